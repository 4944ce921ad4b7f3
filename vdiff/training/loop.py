"""The one loop: it trains base models and students alike, and knows neither; the objective makes the difference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdiff.data.batches import Batch
from vdiff.data.datasets import Batches
from vdiff.data.images import from_uint8
from vdiff.diffusion.weighting import WEIGHTINGS
from vdiff.errors import Interrupted, VdiffError
from vdiff.models.checkpoint import CheckpointConfig, save_checkpoint
from vdiff.models.denoiser import Denoiser
from vdiff.reporting import Reporter
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine
from vdiff.training.objectives import Objective, stratified, weighted_loss
from vdiff.training.optimisation import WeightAverage, build_optimizer, learning_rate
from vdiff.training.records import Records, preview
from vdiff.training.signals import stop_requests
from vdiff.training.state import Position, load_state, remove_state, save_state


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and where it is kept.

    Attributes:
        description: what the checkpoint says of itself; the loop fills in how far it is.
    """

    denoiser: Denoiser
    objective: Objective
    batches: Batches
    config: LoopConfig
    description: CheckpointConfig
    folder: Path


def fit(run: Run, engine: Engine, reporter: Reporter) -> Denoiser:
    """Do the updates that are left, and return the denoiser with the averaged weights, which are the ones saved.

    Update n takes its learning rate, images, noise and dropout from (seed, n) alone, so a run that is cut and resumed
    ends with the same bits as one that was not.

    Raises:
        Interrupted: a signal came; the state is saved.
        VdiffError: the loss is not finite (and nothing was overwritten), or the disk refuses.
    """
    config = run.config
    denoiser = engine.place(run.denoiser).train()
    average = WeightAverage(denoiser, config.ema)
    optimizer = build_optimizer(denoiser, config)
    start = load_state(run.folder, denoiser, average, optimizer)
    update = build_update(run, engine, denoiser, average, optimizer)
    meter = _Meter(start, config)

    def save() -> None:
        save_state(run.folder, meter.position, denoiser, average, optimizer)
        save_checkpoint(run.folder, average.model.state_dict(), _describe(run, meter.position))

    with (
        stop_requests() as stop,
        closing(Records(run.folder, step=start.step)) as records,
    ):
        with (
            reporter.progress(run.folder.name, config.num_iters, "updates", start=start.step) as bar,
            closing(run.batches.start_at(start.step)) as batches,
        ):
            for step in range(start.step, config.num_iters):
                meter.add(*update(step, next(batches)))
                done, is_last = step + 1, step + 1 == config.num_iters
                code = stop.exit_code  # read once: a signal that comes later waits for the next update
                save_due = done % config.ckpt_interval == 0 or is_last or code is not None
                if save_due or done % config.log_interval == 0:
                    records.scalars(meter.read(), done)
                bar.update(done, meter.note)
                if done % config.sample_interval == 0 or is_last:
                    records.pictures(preview(average.model, run.description, seed=config.seed), done)
                if save_due and not is_last:
                    save()
                if code is not None and not is_last:
                    raise Interrupted(f"stopped after update {done} of {config.num_iters}, {run.folder} is saved", code)
        save()
        if config.lr_schedule != "constant":
            remove_state(run.folder)  # the learning rate ended at 0: there is no going on from here
        if stop.exit_code is not None:
            raise Interrupted(f"stopped; {run.folder} is finished and saved", stop.exit_code)
    return average.model.eval()


def build_update(
    run: Run, engine: Engine, denoiser: Denoiser, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> Callable[[int, Batch], tuple[Tensor, Tensor]]:
    """One optimiser update as a function of its number and its batch; it answers loss and gradient norm."""
    config, accelerator = run.config, engine.accelerator
    weighting = WEIGHTINGS[config.weighting]
    conditional = denoiser.network.config.num_classes > 0
    model, prepared = accelerator.prepare(engine.compiled(denoiser), optimizer)

    def update(step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        seed_update(config.seed, step)
        images = from_uint8(batch.images.to(engine.device, non_blocking=True))
        classes = batch.classes if conditional else None
        classes = classes if classes is None else classes.to(engine.device, non_blocking=True)
        example = run.objective(images, classes, torch.randn_like(images), stratified(len(images)))
        loss = weighted_loss(model(example.z, example.t, classes), example, denoiser.schedule, weighting)
        for group in prepared.param_groups:
            group["lr"] = learning_rate(config, step)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        average.update(step)
        return loss.detach(), norm

    return update


def seed_update(seed: int, step: int) -> None:
    """Make everything that update `step` draws (noise, times, dropout) a function of (seed, step)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


class _Meter:
    """Where a run is, and the means of what its updates answered since they were last read.

    Reading is the only moment that waits for the device.
    """

    def __init__(self, start: Position, config: LoopConfig) -> None:
        self.start, self.position, self.config = start, start, config
        self.began = self.read_at = time.monotonic()
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.note = ""

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Take in one update."""
        self.losses.append(loss)
        self.norms.append(norm)
        seconds = self.start.seconds + time.monotonic() - self.began
        self.position = Position(self.position.step + 1, seconds)

    def read(self) -> dict[str, float]:
        """The scalars of the updates since the last reading.

        Raises:
            VdiffError: the loss is infinite or not a number.
        """
        loss, norm = float(torch.stack(self.losses).mean()), float(torch.stack(self.norms).mean())
        if not math.isfinite(loss + norm):
            raise VdiffError(
                f"loss {loss}, gradient norm {norm} at update {self.position.step}: the training diverged",
                "the last checkpoint is whole; train again with a lower --lr or a longer --warmup_iters",
            )
        now = time.monotonic()
        rate = len(self.losses) * self.config.batch_size / max(now - self.read_at, 1e-9)
        lr = learning_rate(self.config, self.position.step - 1)
        self.losses, self.norms, self.read_at = [], [], now
        self.note = f"loss {loss:.4g}, {rate:.3g} images/s"
        return {"loss": loss, "grad_norm": norm, "lr": lr, "images_per_second": rate}


def _describe(run: Run, position: Position) -> CheckpointConfig:
    """The run's checkpoint as it is now."""
    return replace(
        run.description,
        num_iters=position.step,
        num_images=position.step * run.config.batch_size,
        train_seconds=round(position.seconds, 1),
    )
