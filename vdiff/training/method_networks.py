"""Networks of a distillation method that are trained beside the student, such as a critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vdiff.diffusion.distillation import Method, TrainTarget
from vdiff.diffusion.prediction import Prediction
from vdiff.models.denoiser import Denoiser
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine


class MethodNetworks:
    """The networks of a method, their optimiser, and their update.

    Every process holds the whole networks and averages the gradients of all. A gradient that is not finite counts as 0.

    Args:
        networks: the result of `Method.networks`.
    """

    def __init__(self, method: Method, networks: nn.Module, config: LoopConfig, engine: Engine) -> None:
        self.method, self.engine, self.config = method, engine, config
        self.networks = networks.to(engine.device).train()
        self.optimizer = method.build_optimizer(self.networks, config.lr)
        self.base_rates = [group["lr"] / config.lr for group in self.optimizer.param_groups]

    def student_loss(self, target: TrainTarget, prediction: Prediction) -> Tensor | None:
        """The method's term of the student's loss (B,); it does not train the networks themselves."""
        self.networks.requires_grad_(False)
        return self.method.student_loss(self.networks, _for_autograd(target), prediction)

    def accumulate(self, target: TrainTarget, prediction: Prediction, parts: int) -> None:
        """Accumulate the gradient of the networks' loss on one of `parts` parts of a batch."""
        self.networks.requires_grad_(True)
        answer = Prediction(prediction.x.detach(), prediction.eps.detach(), prediction.v.detach())
        (self.method.network_loss(self.networks, _for_autograd(target), answer).mean() / parts).backward()

    def update(self, lr: float) -> None:
        """Update the networks with the accumulated gradient; `lr` is the student's learning rate in this update."""
        for parameter in self.networks.parameters():
            if parameter.grad is not None:
                parameter.grad = (self.engine.sum(parameter.grad) / self.engine.world_size).nan_to_num(0.0, 0.0, 0.0)
        nn.utils.clip_grad_norm_(self.networks.parameters(), self.config.clip_norm)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Name → tensor, of everything that an update changes."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.networks.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in values.items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`.

        Raises:
            KeyError, ValueError, RuntimeError: it belongs to other networks.
        """
        weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
        self.networks.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".", 2)
                moments.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _for_autograd(target: TrainTarget) -> TrainTarget:
    """Copies of tensors that the teacher computed under `inference_mode`, as autograd does not accept those."""
    return replace(target, z=target.z.clone(), x=target.x.clone())


def networks_of(method: Method | None, student: Denoiser, config: LoopConfig, engine: Engine) -> MethodNetworks | None:
    """The networks of a method, with the same weights in every process; None: the method has none."""
    if method is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        networks = method.networks(student)
    return None if networks is None else MethodNetworks(method, networks, config, engine)
