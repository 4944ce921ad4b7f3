"""One optimiser update: a batch in, losses and metrics out. Folders, signals and logs belong to `loop`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from vdiff.data.batches import Batch
from vdiff.diffusion.distillation import Method, TrainTarget
from vdiff.diffusion.prediction import PREDICTION_TYPES, Prediction
from vdiff.diffusion.schedules import coefficient
from vdiff.diffusion.weighting import LOSSES, weighting_of
from vdiff.errors import VdiffError
from vdiff.models.condition import Condition
from vdiff.models.denoiser import Denoiser
from vdiff.training.averages import Averages, Exponential, profiles_of
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine
from vdiff.training.importance import ImportanceSampling, num_bins
from vdiff.training.inputs import Inputs
from vdiff.training.meter import StepResult
from vdiff.training.method_networks import networks_of
from vdiff.training.objectives import Objective, StudentState, TrainBatch, in_strata, weighted_losses
from vdiff.training.optimisation import build_optimizer, learning_rate
from vdiff.training.random_numbers import (
    DROPPED,
    GUIDANCE,
    OFFSET,
    PERTURBATION,
    TIMES,
    UpdateRandom,
    WholeBatchRandom,
)
from vdiff.training.weights import frozen, shard, trainable

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """A denoiser to train, its objective, and the settings of the training.

    Attributes:
        class_dropout: the fraction of the images whose class is replaced by "no class", if the network has one.
        guidance_range: the weights of guidance that a network with `guidance_input` learns.
        self_ema: decay of the average that the network learns from; None: it learns from none.
        step_bins: the steps of a model of few steps, each of which gets its own loss in the log; None: none does.
        time_bins: the number of times that targets can have, all equally likely; None: any time in (0, 1].
        inputs: turns batches of the dataset into inputs of the network.
        encodes_first: the condition is encoded once in an update, not in each evaluation of a network; for networks
            whose text encoders do not learn.
        offset_noise: standard deviation of the noise that is the same in all pixels of a channel.
        input_perturbation: standard deviation of the noise that the network sees and the loss does not.
        method: of distillation; it may have networks of its own.
    """

    denoiser: Denoiser
    objective: Objective
    config: LoopConfig
    class_dropout: float = 0.0
    guidance_range: Sequence[float] = ()
    self_ema: float | None = None
    step_bins: int | None = None
    time_bins: int | None = None
    method: Method | None = None
    inputs: Inputs = field(default_factory=Inputs)
    encodes_first: bool = False
    offset_noise: float = 0.0
    input_perturbation: float = 0.0


class OptimizerStep(ABC):
    """(n, batch) → `StepResult`: update n by an optimiser. One whose gradient is not finite changes nothing.

    Attributes:
        step_bins: the steps of a model of few steps, each of which gets its own loss in the log; None: none does.
        remedy: what to do if the training diverges.
    """

    step_bins: int | None = None
    remedy = "train again with a lower --lr or a longer --warmup_iters"

    def __init__(self, config: LoopConfig, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        self.config, self.engine, self.optimizer = config, engine, optimizer
        groups = optimizer.param_groups
        self._rates = [group["lr"] / groups[0]["lr"] for group in groups]
        # Accelerate's wrapper is needed to scale a loss; it looks for packages in each update
        scales = engine.accelerator.scaler is not None
        self._prepared = engine.accelerator.prepare(optimizer) if scales else optimizer

    @abstractmethod
    def __call__(self, step: int, batch: Batch) -> StepResult:
        """Update `step` (from 0) with this process's share of its batch; nothing here waits for the device."""

    @property
    def has_learned(self) -> bool:
        """Whether any update changed the weights, also before the run was resumed."""
        return any(float(state.get("step", 1)) > 0 for state in self.optimizer.state.values())

    def descend(self, step: int, is_bad: torch.Tensor) -> None:
        """Change the weights by their gradients, at the learning rate of update `step`."""
        for group, rate in zip(self._prepared.param_groups, self._rates, strict=True):
            group["lr"] = rate * learning_rate(self.config, step)
        if self.engine.accelerator.scaler is None:  # which skips bad updates itself
            if self.optimizer.param_groups[0].get("fused"):
                self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
            elif bool(is_bad):  # the other optimisers take no flag, so the host waits for the device
                self._prepared.zero_grad(set_to_none=True)
                return
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)


class TrainStep(OptimizerStep):
    """(n, batch) → `StepResult`: update n of a task, and everything that an update changes.

    Learning rate, noise, times and dropout of update n depend only on (seed, n), so that a resumed run is
    bit-identical. Noise, time, dropped condition and guidance of a sample are functions of (seed, n, its row in the
    batch), and a process draws those of its share: the batch is the same however many processes and parts compute it.
    An update whose gradient is not finite changes nothing; the optimiser gets this as a flag on the device, so that the
    host does not wait.

    Attributes:
        denoiser: in training mode on the engine's device, its weights sharded over processes with FSDP.
        averages, optimizer: of its weights.
        importance: which times are drawn; None: all are equally likely.
        draws_whole_batch: whether random numbers are those of earlier versions, for a run that one of them began.
        networks: those of the method; None: it has none.

    Args:
        build: makes the optimiser of a network.

    Raises:
        VdiffError: none of the weights learns.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        build: Callable[[Denoiser, LoopConfig], torch.optim.Optimizer] = build_optimizer,
    ) -> None:
        config = task.config
        if not trainable(task.denoiser):
            raise VdiffError("no weight of the network learns", "set requires_grad of some of its parameters")
        self.task, self.step_bins = task, task.step_bins
        self.denoiser = engine.place(task.denoiser).train()
        self.denoiser.network.checkpointing = config.checkpointing
        self.averages = averages_of(config, self.denoiser, engine, task.self_ema)
        is_uniform = config.times == "uniform"
        self.importance = None if is_uniform else ImportanceSampling(num_bins(task.time_bins), engine.device)
        self.draws_whole_batch = False
        super().__init__(config, engine, build(self.denoiser, config))
        self.networks = networks_of(task.method, self.denoiser, config, engine)
        self._model = engine.wrapped(engine.compiled(self.denoiser))
        self._learns = list(trainable(self._model).values())  # listed once: a large network has thousands of modules
        self._share = engine.part(config.batch_size)
        count = self._share.stop - self._share.start
        size = count // config.grad_accum
        self._parts = [slice(start, start + size) for start in range(0, count, size)]

    def __call__(self, step: int, batch: Batch) -> StepResult:
        config, engine, schedule = self.config, self.engine, self.denoiser.schedule
        accelerator = engine.accelerator
        given = self.draw(step, batch)
        counts = None
        if self.importance is not None:
            u, counts = self.importance.draw(given.u)
            given = replace(given, u=u)
        networks = None if self.networks is None else self.networks.networks
        student = StudentState(self.denoiser, self.averages.teacher, step / config.num_iters, networks)
        losses, times = [], []
        for part in self._parts:
            mine = given[part]
            with engine.synchronised(self._model, part is self._parts[-1]):
                each, target, prediction = part_losses(self.task, self._model, mine, student, engine)
                counted = each if counts is None else each * counts[part].to(each)
                if self.networks is not None:
                    with accelerator.autocast():
                        added = self.networks.student_loss(target, prediction)
                    counted = counted if added is None else counted + added
                accelerator.backward(counted.mean() / len(self._parts))
            if self.networks is not None:
                # a method's own loss is not scaled: with fp16 it is computed in fp32
                with accelerator.autocast() if accelerator.scaler is None else nullcontext():
                    self.networks.accumulate(target, prediction, len(self._parts))
            losses.append(each.detach())
            times.append(target.t)
        if self.importance is not None:
            self.importance.learn(given.u, torch.cat(losses), engine)
        norm = engine.clip(self._learns, config.clip_norm)
        is_bad = ~torch.isfinite(norm)
        self.descend(step, is_bad)
        if self.networks is not None:
            self.networks.update(learning_rate(config, step))
        self.averages.update(step)
        t = torch.cat(times).to(engine.device)
        return StepResult(torch.cat(losses), t, schedule.logsnr(t), norm, is_bad, counts)

    def draw(self, step: int, batch: Batch) -> TrainBatch:
        """This process's images, noise, u and condition of update `step`."""
        seed, size, device = self.config.seed, self.config.batch_size, self.engine.device
        takes, rows = self.denoiser.network.signature, range(self._share.start, self._share.stop)
        own = UpdateRandom(seed, step, rows, device)
        random: UpdateRandom | WholeBatchRandom = own
        if self.draws_whole_batch:
            seed_update(seed, step, device=device)
            random = WholeBatchRandom(rows, size, device)
        images = self.task.inputs.x(batch, device, own)
        condition = self.task.inputs.condition(batch, takes).to(device)
        noise = random.normal(images.shape[1:])
        if self.task.offset_noise:
            flat = (noise.shape[1], *[1] * (noise.ndim - 2))
            noise = noise + self.task.offset_noise * own.normal(flat, OFFSET)
        amount, perturbation = self.task.input_perturbation, None
        if amount:
            perturbation = amount * own.normal(noise.shape[1:], PERTURBATION)
        u = in_strata(random.uniform(TIMES), rows, size)
        if condition.can_drop:
            condition = condition.drop(random.uniform(DROPPED) < self.task.class_dropout)
        if self.task.encodes_first:
            with torch.no_grad(), self.engine.accelerator.autocast():
                condition = self.denoiser.network.encode(condition)
        if takes.takes_guidance:
            low, high = self.task.guidance_range or (0.0, 0.0)
            condition = condition.with_tensors(guidance=(low + (high - low) * random.uniform(GUIDANCE)).float())
        if self.engine.rank or not self.draws_whole_batch:
            seed_update(seed, step, self.engine.rank, device=device)  # dropout, which differs from process to process
        return TrainBatch(images, noise, u, condition, perturbation)


def part_losses(
    task: Task, model: nn.Module, batch: TrainBatch, student: StudentState, engine: Engine
) -> tuple[torch.Tensor, TrainTarget, Prediction]:
    """The weighted losses (b,) of a part of a batch, with the target and what `model`, the student, predicts."""
    config = task.config
    with engine.accelerator.autocast():
        target = task.objective(batch, student)
    condition = batch.condition if target.rows is None else batch.condition[target.rows]
    now, inputs = student.now, condition.with_tensors(**target.inputs)
    with engine.accelerator.autocast():
        if batch.perturbation is None:
            prediction = model(target.z, target.t, inputs)
        else:
            prediction = perturbed(model, now, target, batch.perturbation, inputs)
    weighting = weighting_of(
        config.weighting, now.parameterisation.output_weight, zero_snr=now.schedule.zero_snr, snr_gamma=config.snr_gamma
    )
    losses = weighted_losses(prediction, target, now.schedule.logsnr(target.t), weighting, LOSSES[config.loss])
    return losses, target, prediction


def perturbed(
    model: nn.Module, now: Denoiser, target: TrainTarget, perturbation: torch.Tensor, condition: Condition
) -> Prediction:
    """The prediction of a network that sees z + σ ξ, with its output read at z, as the loss compares it there.

    Source: Ning et al. 2023, *Input Perturbation Reduces Exposure Bias in Diffusion Models*, with the target of
    diffusers' `train_text_to_image.py`: noise and velocity are those of z.
    """
    angle = now.schedule.angle(target.t)
    seen = model(target.z + coefficient(angle.sin(), target.z) * perturbation, target.t, condition)
    kind = now.parameterisation.prediction
    return PREDICTION_TYPES[kind].read(target.z, getattr(seen, kind), angle)


def averages_of(config: LoopConfig, denoiser: Denoiser, engine: Engine, self_ema: float | None = None) -> Averages:
    """The averages that a run keeps; with FSDP the weights are sharded first."""
    profile, further = profiles_of(
        ema=config.average_decay, ema_more=config.further_decays(), ema_profiles=config.ema_profiles
    )
    fixed = set(frozen(denoiser).values())
    prepare = partial(shard, device=engine.device, world_size=engine.world_size, whole_ones=fixed)
    of_teacher = None if self_ema is None else Exponential(self_ema)
    return Averages(denoiser, profile, further, prepare=prepare if config.fsdp else None, of_teacher=of_teacher)


def seed_update(seed: int, step: int, rank: int = 0, device: torch.device = CPU) -> None:
    """Make everything that update `step` draws (noise, times, dropout) a function of (seed, step[, rank])."""
    words = [seed, step, rank] if rank else [seed, step]
    # of a GPU that is not used, `torch.manual_seed` stores the call and its stack
    set_seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    set_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
