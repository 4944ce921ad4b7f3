"""The run: a loop of updates, with its folder, log, checkpoints and signals.

The same loop trains base models, students and feature networks; they differ only in their step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vdiff.data.batches import Batch, Batches
from vdiff.distributed import memory_errors_named
from vdiff.errors import Interrupted, VdiffError, shell
from vdiff.models.checkpoint import CONFIG, CheckpointConfig, read_config, save_checkpoint
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import Conditions, classes_in_turn
from vdiff.records import SAMPLES_FOLDER
from vdiff.reporting import Progress, Reporter
from vdiff.signals import stop_requests
from vdiff.training import history
from vdiff.training.config import LoopConfig
from vdiff.training.engine import REMEDIES, Engine
from vdiff.training.meter import Meter, Position
from vdiff.training.posthoc import drop_later_snapshots, is_snapshot_due, save_snapshot
from vdiff.training.run_log import RunLog, preview, preview_size
from vdiff.training.sample_prompts import SamplePrompts
from vdiff.training.state import load_state, remove_state, save_state
from vdiff.training.step import OptimizerStep, Task, TrainStep
from vdiff.training.weights import whole

EARLY_PART, EARLY_SECONDS = 20, 60.0
"""The first grid of samples is drawn after this many seconds, or in a base model's run after this fraction of its
updates, whichever is first."""
LONG_AVERAGE, SHORT_RUN = 0.1, 100
"""In runs of at least this many updates, an average is reported if it weights the first weights by more than this
fraction of the last ones."""


@dataclass(frozen=True, kw_only=True)
class Run(Task):
    """A task with its data and the folder of its checkpoints.

    Attributes:
        description: the checkpoint's description; the loop fills in the progress.
        on_resumed: called by the main process after an earlier state was read; before, nothing in the folder changes.
        prompts: of the samples of a text-to-image model; None: of any other model.
        conditions: of the samples of any other model, see `sample_conditions`.
    """

    batches: Batches
    description: CheckpointConfig
    folder: Path
    on_resumed: Callable[[], None] | None = None
    prompts: SamplePrompts | None = None
    conditions: Conditions = classes_in_turn


def do_updates(step: OptimizerStep, batches: Iterator[Batch], meter: Meter) -> Iterator[int]:
    """Do the remaining updates; yields the number of finished updates after each. `meter` has the metrics."""
    for n in range(meter.position.step, step.config.num_iters):
        began = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - began
        meter.add(step(n, batch), waited)
        yield n + 1


def metrics_in_memory(step: OptimizerStep, batches: Batches) -> Iterator[dict[str, float]]:
    """Do all updates of a step without a folder; yield the metrics every `log_interval` updates and after the last.

    Raises:
        VdiffError: too many updates in a row were bad, or all were, or memory ran out.
    """
    config = step.config
    meter = Meter(Position(), config, step.engine, step.step_bins)
    with memory_errors_named(REMEDIES), closing(batches.start_at(0)) as found:
        for done in do_updates(step, found, meter):
            check_learning(None, step, meter)
            if done % config.log_interval == 0 or done == config.num_iters:
                yield {"update": done, **meter.read()}


def fit(run: Run, engine: Engine, reporter: Reporter) -> Denoiser:
    """Do the remaining updates, and return the denoiser with the averaged weights, as it is saved.

    Raises:
        Interrupted, VdiffError: as in `metrics_of`.
    """
    with memory_errors_named(REMEDIES):
        step = TrainStep(run, engine)
        for _ in metrics_of(run, step, reporter):
            pass
    return step.averages.model.eval()


def metrics_of(run: Run, step: TrainStep, reporter: Reporter) -> Iterator[dict[str, float]]:
    """Do the remaining updates of a run in its folder; yields the metrics whenever they are logged.

    An interrupted and resumed run ends with the same bits as an uninterrupted one. All processes of the engine call
    this and leave together; only the main one logs, draws and saves.

    Raises:
        Interrupted: one of the processes received a signal; the state is saved.
        VdiffError: too many updates in a row were bad, or all were (nothing is overwritten), or the disk refuses.
    """
    config, engine, folder, averages = run.config, step.engine, run.folder, step.averages
    start = load_state(folder, step)
    if step.draws_whole_batch:
        kept = "it continues with that version's random numbers; later stages and runs use the new ones"
        reporter.line(f"{folder} was begun by an earlier version: {kept}")
    if engine.is_main:
        if run.on_resumed:
            run.on_resumed()
        drop_later_snapshots(folder, start.step)
    report_long_average(config, reporter)
    meter = Meter(start, config, engine, run.step_bins, run.description.space.noun)
    saved = start.step

    def save() -> None:
        nonlocal saved
        save_state(folder, meter.position, step, write=engine.is_main)
        keep_checkpoint()
        saved = meter.position.step

    def keep_checkpoint() -> None:
        position = meter.position
        weights = whole(averages.model.state_dict())
        if engine.is_main:
            save_checkpoint(folder, weights, _describe(run, position))
            history.take(folder, position.step, last=config.keep_last, every=config.keep_every)
            history.drop(folder, position.step, last=config.keep_last, every=config.keep_every)
        engine.wait()  # or the first process to leave ends the others before all is written

    def draw_preview(done: int, on_step: Callable[[int], None]) -> None:
        if engine.is_main or config.fsdp:  # sharded weights are gathered by all processes
            title = f"{folder.name} · update {done:,} of {config.num_iters:,}"
            drawn = preview(
                averages.model, run.description, run.prompts, conditions=run.conditions,
                num=num_samples, steps=num_steps, seed=config.seed, title=title, on_step=on_step,
            )  # fmt: skip
            log.picture(drawn, done)

    num_samples, num_steps, is_small = preview_size(config, run.description, run.prompts)
    space = run.description.space
    shows = run.prompts is not None or space.is_sound or space.are_pictures(run.description.shape)
    began, is_first = time.monotonic(), shows and not any((folder / SAMPLES_FOLDER).glob("*.png"))
    early = 0 if run.description.is_distilled else config.num_iters // EARLY_PART
    if start.step:
        keep_checkpoint()  # a kill may have come after the state was written and before the checkpoint was kept
    tracker = config.tracker if engine.is_main else "none"
    with (
        stop_requests(alone=engine.world_size == 1) as stop,
        closing(RunLog(folder, tracker, step=start.step, reporter=reporter)) as log,
    ):
        stop.answer = lambda: reporter.line(_finishing(meter, saved))
        with (
            reporter.progress(folder.name, config.num_iters, "updates", start=start.step) as bar,
            closing(run.batches.start_at(start.step)) as batches,
        ):
            for done in do_updates(step, batches, meter):
                metrics: dict[str, float] = {}
                check_learning(folder, step, meter)
                is_last = done == config.num_iters
                code = engine.agreed(stop.exit_code, done)  # read once: a later signal waits for the next update
                save_due = done % config.ckpt_interval == 0 or is_last or code is not None
                if save_due or done % config.log_interval == 0:
                    metrics = {**meter.read(), "ema_decay": averages.decay_at(done - 1)}
                    log.scalars(metrics, done)
                bar.update(done, meter.note)
                if is_snapshot_due(done, config.num_iters, config.ema_interval):
                    images = done * config.batch_size
                    save_snapshot(folder, averages, step=done, images=images, write=engine.is_main)
                if save_due and not is_last:
                    save()
                is_late = is_first and not config.fsdp and time.monotonic() - began > EARLY_SECONDS
                is_due = is_late or done == early or done % config.sample_interval == 0
                if shows and is_due and not is_last:
                    draw_preview(done, partial(_note_preview, bar, done))  # after saving: a kill here loses nothing
                    bar.update(done, meter.note or "samples drawn")
                    if is_first:
                        report_pictures(run, f", {num_samples} in {num_steps} steps: a short run" * is_small, reporter)
                    is_first = False
                if metrics and not is_last:
                    yield {"update": done, **metrics}
                if code is not None and not is_last:
                    raise Interrupted(f"stopped after update {done} of {config.num_iters}, {folder} is saved", code)
        save()
        if engine.is_main:
            settle(folder, config, config.num_iters)
        stop.answer = lambda: reporter.line(f"{folder} is saved, its last samples are drawn; press again to leave now")
        if shows:
            with reporter.progress(f"samples of {folder.name}", num_steps, "steps") as bar:
                draw_preview(config.num_iters, bar.update)
        if stop.exit_code is not None:
            raise Interrupted(f"stopped; {folder} is finished and saved", stop.exit_code)
    if start.step < config.num_iters:
        yield {"update": config.num_iters, **metrics}


def report_pictures(run: Run, size: str, reporter: Reporter) -> None:
    """Print where the grids of samples are, `size` if it is unusual, and the command that shows the curves."""
    curves = f"; curves: tensorboard {shell('--logdir', run.folder.parent)}"
    curves *= run.config.tracker == "tensorboard"
    reporter.line(f"samples are saved in {run.folder / SAMPLES_FOLDER}{size}{curves}")


def report_long_average(config: LoopConfig, reporter: Reporter) -> None:
    """Warn that the average spans the whole run, and name a decay that does not."""
    updates, decay = config.num_iters, 0 if config.ema_remainder else config.average_decay
    if updates >= SHORT_RUN and decay**updates > LONG_AVERAGE:
        shorter = 1 - float(f"{1 - 1e-3 ** (1 / updates):.1g}")
        reporter.line(f"the average spans all {updates:,} updates, even the first; --ema {shorter:.6g} forgets them")


def _finishing(meter: Meter, saved: int) -> str:
    """The work that continues after a first signal, and what a second one loses."""
    left = meter.seconds_left_of_update()
    about = f" (about {left:.0f} s)" if left >= 1 else ""
    back = f"back to update {saved:,}" if saved else "with nothing saved"
    return f"finishing update {meter.position.step + 1:,}{about}; press again to leave now, {back}"


def _note_preview(bar: Progress, done: int, step: int) -> None:
    """Show the progress of drawing samples after the bar of the updates."""
    bar.update(done, f"samples, step {step}")


def check_learning(folder: Path | None, step: OptimizerStep, meter: Meter) -> None:
    """End a run after too many bad updates in a row, or at its end if all updates were bad.

    Raises:
        VdiffError: says which checkpoint is left.
    """
    if not meter.has_diverged:
        if meter.position.step < step.config.num_iters or step.has_learned:
            return
        meter.catch_up()
    is_kept = folder is not None and (folder / CONFIG).exists()
    kept = f"{folder} holds update {read_config(folder).num_iters}" if folder and is_kept else "nothing is saved"
    raise VdiffError(
        f"no finite gradient in {meter.bad_in_a_row} updates in a row, up to update {meter.position.step}: "
        "the training diverged",
        f"{kept}; {step.remedy}",
    )


def settle(folder: Path, config: LoopConfig, step: int) -> None:
    """The work after the last checkpoint, of update `step`; repeated if a run was killed during it."""
    history.take(folder, step, last=config.keep_last, every=config.keep_every)
    if config.lr_schedule != "constant":
        remove_state(folder)  # the learning rate ended at 0: the run cannot continue


def _describe(run: Run, position: Position) -> CheckpointConfig:
    """The run's current checkpoint."""
    return replace(
        run.description,
        num_iters=position.step,
        num_images=position.step * run.config.batch_size,
        train_seconds=round(position.seconds, 1),
    )
