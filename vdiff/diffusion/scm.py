"""Continuous-time consistency distillation, sCM, with its adaptive weight of noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vdiff.diffusion.continuous import TangentMethod, angle_rate
from vdiff.diffusion.method import DistillContext, TrainTarget
from vdiff.diffusion.prediction import Prediction, from_v
from vdiff.diffusion.schedules import coefficient, diffuse, grid_angles
from vdiff.diffusion.targets import flow_map_tangent, segment_end
from vdiff.settings import setting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vdiff.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Scm(TangentMethod):
    """All points of a path jump to the same end: v* = v̂ + g/(‖g‖ + c), g by `flow_map_tangent`, v̂ without gradient.

    This is `tract` and `consistency` in the limit of infinitely short steps of the teacher, so there is no error of
    discretisation. The student is differentiated along the flow by forward differentiation. A student of N steps jumps
    to the ends of N segments. A student of one step can be sampled in any number of steps.

    ‖g‖ is the root mean square, so that c means the same for every size of image; in the paper it is the norm. With
    `flow` "data" the method is consistency training, sCT. Source: Lu & Song 2024, *Simplifying, Stabilizing and Scaling
    Continuous-time Consistency Models*, eqs. 5, 6 and 8, algorithm 1, with their adaptive weight e^{w(t)} of the loss
    e^{w} ‖v* − v̂‖² − w.

    Args:
        tangent_norm: c; 0: g is not normalised.
        adaptive_weight: a small network learns w(t).
    """

    tangent_norm: float = setting(
        "Constant of the tangent's normalisation in scm; 0 = no normalisation.", default=0.1, low=0, high=100
    )
    adaptive_weight: bool = setting("Learn the weights of noise levels in scm.", default=False)

    @classmethod
    def paper_settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """The settings for CIFAR-10, appendix G.2: P_mean −1.0, P_std 1.4, c = 0.1, a constant learning rate.

        The warm-up has 10,000 updates there. Its share is that of 400,000 updates, their number for ImageNet 64×64.
        """
        own = {"proposal": "-1.0,1.4", "tangent_norm": 0.1, "tangent_warmup": 0.025, "adaptive_weight": True}
        return {**cls.settings(preset), "lr": preset["lr"], "lr_schedule": "constant", **own}

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """Noisy images at any time."""
        assert context.derivative is not None
        schedule, t = context.schedule, self.times(context.schedule, u)
        angle = schedule.angle(t)
        delta = angle - grid_angles(schedule, segment_end(t, context.num_steps))
        z = diffuse(x, noise, angle)
        velocity = self.velocity(context, x, noise, z, t)
        v, v_along = context.derivative(z, t, velocity, 1 / angle_rate(schedule, t))
        g = flow_map_tangent(z, velocity, v, v_along, delta, self.warmup(context))
        if self.tangent_norm:
            size = g.square().flatten(1).mean(1).sqrt()
            g = g / coefficient(size + self.tangent_norm, g)
        weight = None if context.networks is None else context.networks(t).exp()
        return TrainTarget(z, t, from_v(z, v + g, angle).x, weight=weight)

    def networks(self, student: nn.Module) -> nn.Module | None:
        """The network of w(t) if it is learned."""
        return log_weight(cast("Schedule", student.schedule)) if self.adaptive_weight else None

    def network_loss(self, networks: nn.Module, target: TrainTarget, prediction: Prediction) -> Tensor:
        """e^{w(t)} ‖v* − v̂‖² − w(t); its minimum is at e^{w(t)} = 1/(mean error at t)."""
        sigma = cast("Schedule", networks.schedule).angle(target.t).sin()
        error = (target.x - prediction.x).square().flatten(1).mean(1)
        w: Tensor = networks(target.t)
        return w.exp() * error / sigma.to(error).square() - w


def log_weight(schedule: Schedule) -> nn.Module:
    """w(t) = b + Σ_k (a_k cos kφ + b_k sin kφ), k = 1 … 8, initially 0: (B,) for t (B,)."""
    import torch

    class LogWeight(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule
            self.series = torch.nn.Linear(16, 1)
            for parameter in self.series.parameters():
                torch.nn.init.zeros_(parameter)

        def forward(self, t: Tensor) -> Tensor:
            phases = self.schedule.angle(t)[:, None] * torch.arange(1, 9, device=t.device)
            waves = torch.cat([phases.cos(), phases.sin()], dim=1)
            w: Tensor = self.series(waves.to(self.series.weight))[:, 0]
            return w

    return LogWeight()
