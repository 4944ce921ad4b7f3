"""The one loop: it trains base models and students alike, and knows neither; the objective makes the difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vdiff.data.batches import Batch
from vdiff.data.datasets import Batches
from vdiff.data.images import from_uint8
from vdiff.diffusion.weighting import WEIGHTINGS
from vdiff.distributed import memory_errors_named
from vdiff.errors import Interrupted, VdiffError
from vdiff.models.checkpoint import CONFIG, CheckpointConfig, read_config, save_checkpoint
from vdiff.models.denoiser import Denoiser, drop_classes
from vdiff.reporting import Progress, Reporter
from vdiff.training import history
from vdiff.training.averages import Averages, Exponential, profiles_of
from vdiff.training.config import LoopConfig
from vdiff.training.engine import REMEDIES, Engine
from vdiff.training.importance import ImportanceSampling, num_bins
from vdiff.training.meter import Meter, Outcome
from vdiff.training.objectives import LOSSES, Objective, StudentState, TrainBatch, stratified, weighted_losses
from vdiff.training.optimisation import build_optimizer, learning_rate
from vdiff.training.posthoc import drop_later_snapshots, is_snapshot_due, save_snapshot
from vdiff.training.records import open_records, preview, preview_steps
from vdiff.training.sharding import whole
from vdiff.training.signals import stop_requests
from vdiff.training.state import Position, load_state, remove_state, save_state

LONG_AVERAGE, SHORT_RUN = 0.1, 100
"""In runs of at least so many updates, an average in which the first weights count more than this part of the last ones
is reported."""


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and where it is kept.

    Attributes:
        description: what the checkpoint says of itself; the loop fills in how far it is.
        class_dropout: the part of the images whose class the network is not told, where it knows "no class".
        self_ema: decay of the average that the network learns from; None: it learns from none.
        step_bins: where the model has few steps, how many: the loss is told for each.
        time_bins: of how many equally likely times examples are; None: of any.
    """

    denoiser: Denoiser
    objective: Objective
    batches: Batches
    config: LoopConfig
    description: CheckpointConfig
    folder: Path
    class_dropout: float = 0.0
    self_ema: float | None = None
    step_bins: int | None = None
    time_bins: int | None = None


def fit(run: Run, engine: Engine, reporter: Reporter) -> Denoiser:
    """Do the updates that are left, and return the denoiser with the averaged weights, which are the ones saved.

    Update n takes its learning rate, images, noise and dropout from (seed, n) alone, so a run that is cut and resumed
    ends with the same bits as one that was not. All processes of the engine call this; the main one logs, given and
    saves, and all leave together.

    Raises:
        Interrupted: a signal came to one of the processes; the state is saved.
        VdiffError: too many updates in a row were bad (and nothing was overwritten), memory ran out, or the disk
            refuses.
    """
    with memory_errors_named(REMEDIES):
        return _fit(run, engine, reporter)


def _fit(run: Run, engine: Engine, reporter: Reporter) -> Denoiser:
    config = run.config
    denoiser = engine.place(run.denoiser).train()
    denoiser.network.checkpointing = config.checkpointing
    averages = averages_of(config, denoiser, engine, run.self_ema)
    importance = ImportanceSampling(num_bins(run.time_bins), engine.device) if config.times == "importance" else None
    statistics = {"moments": importance.moments} if importance else {}
    optimizer = build_optimizer(denoiser, config)
    scaler = engine.accelerator.scaler
    start = load_state(run.folder, denoiser, averages, optimizer, scaler, statistics=statistics)
    if engine.is_main:
        drop_later_snapshots(run.folder, start.step)
    updates, decay = config.num_iters, 0 if config.ema_remainder else config.average_decay
    if updates >= SHORT_RUN and decay**updates > LONG_AVERAGE:
        shorter = 1 - float(f"{1 - 1e-3 ** (1 / updates):.1g}")
        reporter.line(f"the average spans all {updates:,} updates, the first too: --ema {shorter:.6g} forgets them")
    update = build_update(run, engine, denoiser, averages, optimizer, importance)
    meter = Meter(start, config, engine, run.step_bins)

    def save() -> None:
        position, write = meter.position, engine.is_main
        save_state(run.folder, position, denoiser, averages, optimizer, scaler, statistics=statistics, write=write)
        keep_checkpoint()

    def keep_checkpoint() -> None:
        position = meter.position
        weights = {name: whole(tensor) for name, tensor in averages.model.state_dict().items()}
        if engine.is_main:
            save_checkpoint(run.folder, weights, _describe(run, position))
            history.take(run.folder, position.step, last=config.keep_last, every=config.keep_every)
            history.drop(run.folder, position.step, last=config.keep_last, every=config.keep_every)
        engine.wait()  # or a process that leaves first takes the others with it, before all is written

    def draw_preview(done: int, on_step: Callable[[int], None]) -> None:
        if engine.is_main or config.fsdp:  # weights that are shared out must be put together by all
            records.pictures(preview(averages.model, run.description, seed=config.seed, on_step=on_step), done)

    if start.step:
        keep_checkpoint()  # a kill may have come after the state was written, and before the checkpoint was kept
    tracker = config.tracker if engine.is_main else "none"
    with (
        stop_requests(alone=engine.world_size == 1) as stop,
        closing(open_records(tracker, run.folder, step=start.step, reporter=reporter)) as records,
    ):
        with (
            reporter.progress(run.folder.name, config.num_iters, "updates", start=start.step) as bar,
            closing(run.batches.start_at(start.step)) as batches,
        ):
            for step in range(start.step, config.num_iters):
                began = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - began
                meter.add(update(step, batch), waited)
                if meter.bad_in_a_row >= max(config.max_bad_steps, 1):
                    raise diverged(run.folder, meter)
                done, is_last = step + 1, step + 1 == config.num_iters
                code = engine.agreed(stop.exit_code, step)  # asked once: what comes later waits for the next update
                save_due = done % config.ckpt_interval == 0 or is_last or code is not None
                if save_due or done % config.log_interval == 0:
                    records.scalars({**meter.read(), "ema_decay": averages.decay_at(step)}, done)
                bar.update(done, meter.note)
                if is_snapshot_due(done, config.num_iters, config.ema_interval):
                    images = done * config.batch_size
                    save_snapshot(run.folder, averages, step=done, images=images, write=engine.is_main)
                if save_due and not is_last:
                    save()
                if done % config.sample_interval == 0 and not is_last:  # after saving: a kill here loses nothing
                    draw_preview(done, partial(_note_preview, bar, done))
                if code is not None and not is_last:
                    raise Interrupted(f"stopped after update {done} of {config.num_iters}, {run.folder} is saved", code)
        save()
        if engine.is_main:
            settle(run.folder, config, config.num_iters)
        with reporter.progress(f"samples of {run.folder.name}", preview_steps(run.description), "steps") as bar:
            draw_preview(config.num_iters, bar.update)
        if stop.exit_code is not None:
            raise Interrupted(f"stopped; {run.folder} is finished and saved", stop.exit_code)
    return averages.model.eval()


def _note_preview(bar: Progress, done: int, step: int) -> None:
    """Say behind the bar of the updates how far the drawing of samples is."""
    bar.update(done, f"samples, step {step}")


def diverged(folder: Path, meter: Meter) -> VdiffError:
    """Too many bad updates in a row, and what there is to go on with."""
    kept = (
        f"{folder} holds update {read_config(folder).num_iters}" if (folder / CONFIG).exists() else "nothing is saved"
    )
    return VdiffError(
        f"no finite gradient in {meter.bad_in_a_row} updates in a row, up to update {meter.position.step}: "
        "the training diverged",
        f"{kept}; train again with a lower --lr or a longer --warmup_iters",
    )


def settle(folder: Path, config: LoopConfig, step: int) -> None:
    """What follows the last checkpoint, of update `step`; again where a run was killed in between."""
    history.take(folder, step, last=config.keep_last, every=config.keep_every)
    if config.lr_schedule != "constant":
        remove_state(folder)  # the learning rate ended at 0: there is no going on from here


def averages_of(config: LoopConfig, denoiser: Denoiser, engine: Engine, self_ema: float | None = None) -> Averages:
    """The averages that a run keeps; the weights are shared out first, where that is asked for."""
    profile, further = profiles_of(
        ema=config.average_decay, ema_more=config.further_decays(), ema_profiles=config.ema_profiles
    )
    of_teacher = None if self_ema is None else Exponential(self_ema)
    return Averages(denoiser, profile, further, prepare=engine.shared_out(config), of_teacher=of_teacher)


def build_update(
    run: Run,
    engine: Engine,
    denoiser: Denoiser,
    averages: Averages,
    optimizer: torch.optim.Optimizer,
    importance: ImportanceSampling | None = None,
) -> Callable[[int, Batch], Outcome]:
    """One optimiser update as a function of its number and its batch, which is this process's share.

    Noise and times are drawn for the whole batch in every process, which takes its share of them: so the batch is the
    same however many processes and parts it is computed in. An update whose gradient is infinite or no number changes
    nothing: the optimiser is told so on the device, and nobody waits for it.
    """
    config, accelerator = run.config, engine.accelerator
    weighting, loss = WEIGHTINGS[config.weighting], LOSSES[config.loss]
    known = denoiser.network.config
    low, high = run.description.guidance_range or (0.0, 0.0)
    model = engine.wrapped(engine.compiled(denoiser))
    prepared = accelerator.prepare(optimizer)
    share = engine.part(config.batch_size)
    size = (share.stop - share.start) // config.grad_accum
    parts = [slice(start, start + size) for start in range(0, share.stop - share.start, size)]

    def update(step: int, batch: Batch) -> Outcome:
        seed_update(config.seed, step)
        images = from_uint8(batch.images.to(engine.device, non_blocking=True))
        classes = batch.classes if known.num_classes else None
        classes = classes if classes is None else classes.to(engine.device, non_blocking=True)
        noise = torch.randn((config.batch_size, *images.shape[1:]), device=engine.device)[share]
        u = stratified(config.batch_size, engine.device)[share]
        guidance = None
        if classes is not None and known.null_class:
            left_out = torch.rand(config.batch_size, device=engine.device)[share]
            classes = drop_classes(classes, left_out, run.class_dropout, known.num_classes)
        if known.guidance_input:
            guidance = low + (high - low) * torch.rand(config.batch_size, device=engine.device)[share]
        if engine.rank:
            seed_update(config.seed, step, engine.rank)  # dropout differs from process to process
        u, counts = (u, None) if importance is None else importance.draw(u)
        given = TrainBatch(images, noise, u, classes, guidance)
        student = StudentState(denoiser, averages.teacher, step / config.num_iters)
        losses, times = [], []
        for part in parts:
            mine = given[part]
            with accelerator.autocast():
                example = run.objective(mine, student)
            told = mine if example.rows is None else mine[example.rows]
            with engine.synchronised(model, part is parts[-1]):
                with accelerator.autocast():
                    prediction = model(example.z, example.t, told.classes, told.guidance)
                each = weighted_losses(prediction, example, denoiser.schedule.logsnr(example.t), weighting, loss)
                meant = each if counts is None else each * counts[part].to(each)
                accelerator.backward(meant.mean() / len(parts))
            losses.append(each.detach())
            times.append(example.t)
        if importance is not None:
            importance.learn(u, torch.cat(losses), engine)
        for group in prepared.param_groups:
            group["lr"] = learning_rate(config, step)
        norm = engine.clip(model, config.clip_norm)
        is_bad = ~torch.isfinite(norm)
        if accelerator.scaler is None:  # which looks after this itself
            optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        averages.update(step)
        t = torch.cat(times).to(engine.device)
        return Outcome(torch.cat(losses), t, denoiser.schedule.logsnr(t), norm, is_bad, counts)

    return update


def seed_update(seed: int, step: int, rank: int = 0) -> None:
    """Make everything that update `step` given (noise, times, dropout) a function of (seed, step[, rank])."""
    words = [seed, step, rank] if rank else [seed, step]
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def _describe(run: Run, position: Position) -> CheckpointConfig:
    """The run's checkpoint as it is now."""
    return replace(
        run.description,
        num_iters=position.step,
        num_images=position.step * run.config.batch_size,
        train_seconds=round(position.seconds, 1),
    )
