"""Distillation stage by stage: each student is examined, and becomes the teacher of the next one."""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

import vdiff
from vdiff.data.batches import Batch
from vdiff.diffusion.distillation import METHODS, build_method
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.files import remove
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, weights_fingerprint
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.models.inheriting import inherit
from vdiff.reporting import Reporter
from vdiff.training.config import DistillConfig, resolve
from vdiff.training.dataset import Images
from vdiff.training.engine import Engine
from vdiff.training.folder import check_resumable, check_same_run, clear, is_run, recorded, start_anew
from vdiff.training.loop import Run, averages_of, build_update, fit
from vdiff.training.objectives import DistillationObjective
from vdiff.training.optimisation import build_optimizer
from vdiff.training.presets import RUN_FILE, read_run
from vdiff.training.stages import Stage, student_network
from vdiff.training.verdict import Distance, Examiner, Verdict, read_verdict, why_failed, write_verdict

TIMED_UPDATES = 3


def climb(
    stages: list[Stage],
    config: DistillConfig,
    images: Images,
    engine: Engine,
    *,
    overwrite: bool,
    reporter: Reporter,
    distance: Distance | None = None,
) -> bool:
    """Do every stage that is not done, one that was cut from where it was; answer whether there was one.

    Args:
        distance: how far a student's images are from the data, for the verdict on it.

    Raises:
        Interrupted: a signal came; the same command goes on.
        VdiffError: a student's folder holds something else, the training fails, or a student is worse than it may be.
    """
    if overwrite:
        load_checkpoint(stages[0].base)  # before anything is removed: it may be damaged
        engine.wait()
        for stage in stages if engine.is_main else ():
            clear(stage.folder, overwrite=True)
            for attempt in failed_attempts(stage.folder):
                remove(attempt)
        engine.wait()
    else:
        for stage in stages if engine.is_main else ():
            _finish_keeping(stage.folder, config.retries)
        engine.wait()
        check_room(stages)
    trained = False
    how = "the same command without --overwrite goes on" if overwrite else "the same command goes on"
    examiner = Examiner(
        seed=config.seed,
        num_images=config.check_images,
        num_distance_images=config.distance_images,
        distance=distance,
        device=engine.device,
        reporter=reporter,
    )
    for k, stage in enumerate(stages):
        mine = stage.settings(config if k == 0 else replace(config, student_config=""))
        measured = config.distance_every > 0 and (len(stages) - 1 - k) % config.distance_every == 0
        while True:
            try:
                trained |= _do(stage, mine, images, engine, reporter)
                is_good = not config.check_images or _judge(
                    stage, mine, engine, examiner, reporter, measure_distance=measured
                )
            except Interrupted as stop:
                raise Interrupted(f"{stop}; {how}", stop.exit_code) from None
            if is_good:
                break
    return trained


def _do(stage: Stage, config: DistillConfig, images: Images, engine: Engine, reporter: Reporter) -> bool:
    """Do what is left of a stage; answer whether there was anything."""
    config = replace(config, lr=config.lr / 2 ** times_failed(stage.folder))
    lineage = {"path": stage.base.as_posix(), "fingerprint": weights_fingerprint(stage.base)}
    if is_run(stage.folder):
        found = recorded(stage.folder)
        check_same_teacher(stage, found, lineage)
        if found and found.is_finished:
            reporter.line(f"{stage.folder} is finished already: {steps_text(found.num_timesteps)}")
            return False
        check_same_run(stage.folder, config, _settings_of(stage.folder))
        check_resumable(stage.folder, images)
        run = stage_run(stage, config, images, engine, lineage)
    else:
        run = stage_run(stage, config, images, engine, lineage)  # first of all: the teacher may be damaged
        engine.wait()  # until every process has seen that there is nothing yet
        if engine.is_main:
            start_anew(stage.folder, config, overwrite=False)
        engine.wait()
    fit(run, engine, reporter)
    return True


def _judge(
    stage: Stage,
    config: DistillConfig,
    engine: Engine,
    examiner: Examiner,
    reporter: Reporter,
    *,
    measure_distance: bool,
) -> bool:
    """Whether the student is good; a failed one is set aside, so that the stage can be done again.

    Raises:
        VdiffError: it failed, and so did every attempt before; the best of them is kept.
    """
    code = 0
    if engine.is_main:
        verdict = read_verdict(stage.folder)
        if verdict is None:
            verdict = _examined(stage, config, examiner, measure_distance=measure_distance)
            write_verdict(stage.folder, verdict)
            reporter.line(f"{stage.folder}: {verdict_text(verdict)}")
        if verdict.reason and not why_failed(verdict, config.max_regression):  # a larger one may be given afterwards
            verdict = replace(verdict, reason="")
            write_verdict(stage.folder, verdict)
        if verdict.reason and verdict.attempts <= config.retries:
            _set_aside(stage.folder)
            reporter.line(f"{stage.folder} failed: {verdict.reason}; once more with half the learning rate")
            code = 1
        elif verdict.reason:
            _keep_best(stage.folder, verdict)
            code = 2
    code = int(engine.sum(torch.tensor([code], device=engine.device)))
    if code == 2:
        found = read_verdict(stage.folder)
        reason = f": {found.reason}" if found else ""
        raise VdiffError(
            f"{stage.folder} is no better for its training{reason}; the best attempt is kept there",
            "give --overwrite with a lower --lr or more --num_iters",
        )
    return code == 0


def _examined(stage: Stage, config: DistillConfig, examiner: Examiner, *, measure_distance: bool) -> Verdict:
    _, before = load_checkpoint(stage.base)
    description = describe_student(stage, config, before)
    return examiner.examine(
        base=stage.base,
        teacher_steps=stage.teacher_steps,
        start=begin_student(stage, config, description)[0],
        folder=stage.folder,
        num_steps=stage.num_steps,
        guidance=description.guidance_range,
        measure_distance=measure_distance,
        max_regression=config.max_regression,
        attempts=times_failed(stage.folder) + 1,
    )


FAILED = ".failed_"


def failed_attempts(folder: Path) -> list[Path]:
    """The students that were set aside for `folder`, in their order."""
    paths = folder.parent.glob(f"{glob.escape(folder.name)}{FAILED}*")
    numbers = {path: path.name.removeprefix(f"{folder.name}{FAILED}") for path in paths}
    return sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))


def times_failed(folder: Path) -> int:
    """How often the stage of `folder` was done in vain, as the students set aside tell."""
    verdicts = [read_verdict(path) for path in failed_attempts(folder)]
    return max([len(verdicts), *(verdict.attempts for verdict in verdicts if verdict)])


def _set_aside(folder: Path) -> None:
    """Make room for another attempt."""
    last = [int(path.name.removeprefix(f"{folder.name}{FAILED}")) for path in failed_attempts(folder)[-1:]]
    folder.rename(folder.with_name(f"{folder.name}{FAILED}{sum(last) + len(last)}"))


def _keep_best(folder: Path, verdict: Verdict) -> None:
    """Leave in `folder` the attempt that is nearest to the teacher, and no other; it knows how many there were."""
    best = _nearest([*failed_attempts(folder), folder])
    write_verdict(best, replace(read_verdict(best) or verdict, attempts=verdict.attempts))
    if best != folder:
        _set_aside(folder)
        best.rename(folder)
    for path in failed_attempts(folder):
        remove(path)


def _finish_keeping(folder: Path, retries: int) -> None:
    """What a kill between the two renames of `_keep_best` left undone."""
    if not folder.exists() and times_failed(folder) > retries:
        _nearest(failed_attempts(folder)).rename(folder)


def _nearest(attempts: list[Path]) -> Path:
    verdicts = {path: read_verdict(path) for path in attempts}
    return min(attempts, key=lambda path: verdict.rmse if (verdict := verdicts[path]) else math.inf)


def verdict_text(verdict: Verdict) -> str:
    """`RMSE to its teacher 0.031 (before training 0.112), distance to data 0.23 (teacher 0.21)`."""
    text = f"RMSE to its teacher {verdict.rmse:.4f} (before training {verdict.rmse_before:.4f})"
    if verdict.distance is not None:
        text += f", distance to the data {verdict.distance:.3g} (teacher {verdict.teacher_distance:.3g})"
    return text


def steps_text(num_steps: int) -> str:
    """`1 step`, `8 steps`."""
    return f"{num_steps} step{'s' if num_steps > 1 else ''}"


def check_room(stages: list[Stage]) -> None:
    """See before the first update that no student's folder is in the way of a later stage.

    Raises:
        VdiffError: a folder exists whose teacher is still to be trained.
    """
    to_train = ""
    for stage in stages:
        if to_train and stage.folder.is_dir() and any(stage.folder.iterdir()):
            raise VdiffError(
                f"{stage.folder} exists already, but its teacher {to_train} is still to be trained",
                "move it away, or give --overwrite",
            )
        found = recorded(stage.folder)
        if not (found and found.is_finished):
            to_train = stage.folder.as_posix()


def _settings_of(folder: Path) -> DistillConfig:
    """The settings that a stage recorded in `folder`.

    Raises:
        VdiffError: what is there was not begun by distill.py.
    """
    settings = read_run(folder)
    if not settings.distill:
        raise VdiffError(f"{folder} was begun by train.py", "give --overwrite to replace it, or another --out")
    return resolve(DistillConfig, {str(folder / RUN_FILE): settings.distill})


def check_same_teacher(stage: Stage, found: CheckpointConfig | None, lineage: Mapping[str, str]) -> None:
    """Refuse a student's folder that holds a model of another teacher or for other steps.

    Raises:
        VdiffError: it does.
    """
    if found is None:
        return
    if found.num_timesteps != stage.num_steps:
        raise VdiffError(
            f"{stage.folder} holds a model of {found.num_timesteps} steps, not {stage.num_steps}",
            "give --overwrite to replace it, or another --out",
        )
    if (found.teacher or {}).get("fingerprint") != lineage["fingerprint"]:
        raise VdiffError(
            f"{stage.folder} was distilled from another teacher than {stage.base} is now",
            "give --overwrite to replace it, or another --out",
        )


# One stage


def describe_student(stage: Stage, config: DistillConfig, teacher: CheckpointConfig) -> CheckpointConfig:
    """What a stage's student says of itself before its training: data and lineage are left to the run.

    It predicts v where its teacher predicts ε, and what its teacher predicts otherwise.

    Raises:
        OptionError: `student_config` describes no network, or one that the teacher's images do not fit.
    """
    unet = {**student_network(config, teacher), "dropout": config.dropout}
    taught = list(teacher.guidance_range)
    if stage.method == "guided":
        unet["guidance_input"], taught = True, list(config.guidance_weights())
    description = replace(
        teacher,
        unet=unet,
        prediction="v" if teacher.prediction == "eps" else teacher.prediction,
        num_timesteps=stage.num_steps,
        method=stage.method,
        guidance_range=taught,
        weights=config.weights,
        num_iters=0,
        target_iters=stage.updates(config),
        num_images=0,
        train_seconds=0.0,
        vdiff_version=vdiff.__version__,
    )
    try:
        with torch.device("meta"):
            multiple = description.build().network.config.size_multiple
        if teacher.image_size % multiple:
            raise ValueError(f"images of {teacher.image_size} pixels need a network for multiples of {multiple}")
    except (ValueError, TypeError) as error:
        raise OptionError(f"--student_config {config.student_config}: {error}", "mend the file") from None
    return description


def begin_student(stage: Stage, config: DistillConfig, description: CheckpointConfig) -> tuple[Denoiser, str]:
    """The student before its training, and what it has from its teacher: a copy, or what fits of it."""
    teacher, before = load_checkpoint(stage.base)
    torch.manual_seed(config.seed)
    student = description.build()
    inherited = ""
    if {**description.unet, "dropout": 0} == {**before.unet, "dropout": 0}:
        student.load_state_dict(teacher.state_dict())
    else:
        inherited = str(inherit(student.network, teacher.network))
    if description.prediction != before.prediction:  # the last layer says something else from now on
        for parameter in student.network.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
    return student, inherited


def stage_run(stage: Stage, config: DistillConfig, images: Images, engine: Engine, lineage: Mapping[str, str]) -> Run:
    """The run of one stage: the student starts from its teacher, which takes its dropout off."""
    teacher, before = load_checkpoint(stage.base)
    description = replace(
        describe_student(stage, config, before),
        dataset=images.name,
        dataset_fingerprint=images.fingerprint,
        teacher={**asdict(before), **lineage},
    )
    student, _ = begin_student(stage, config, description)
    teacher = engine.compiled(engine.place(teacher)).requires_grad_(False)
    method = build_method(stage.method, asdict(config))
    return Run(
        denoiser=student,
        objective=DistillationObjective(
            GuidedDenoiser(teacher) if stage.method == "guided" else teacher,
            method,
            num_steps=stage.num_steps,
            teacher_steps=stage.teacher_steps,
            levels=before.levels,
        ),
        batches=images.batches(config, engine),
        config=replace(config, num_iters=stage.updates(config)),
        description=description,
        folder=stage.folder,
        class_dropout=config.class_dropout,
        self_ema=method.self_ema,
        step_bins=None if METHODS[stage.method].keeps_steps else stage.num_steps,
    )


def seconds_per_update(stage: Stage, config: DistillConfig, images: Images, engine: Engine) -> float:
    """How long an update of a stage takes, measured on a few of them from the ladder's first teacher.

    The stage's own teacher need not be there yet: its cost is that of `config.base`.
    """
    there = replace(stage, base=Path(config.base))
    run = stage_run(there, stage.settings(config), images, engine, {})
    denoiser = engine.place(run.denoiser).train()
    averages = averages_of(run.config, denoiser, engine, run.self_ema)
    update = build_update(run, engine, denoiser, averages, build_optimizer(denoiser, run.config))
    share = engine.share(config.batch_size)
    size = (share.stop - share.start, images.channels, images.image_size, images.image_size)
    batch = Batch(torch.zeros(size, dtype=torch.uint8), torch.zeros(size[:1], dtype=torch.int64))
    times = []
    for step in range(TIMED_UPDATES + 1):
        began = time.monotonic()
        float(update(step, batch).norm)  # waits for the device
        times.append(time.monotonic() - began)
    return min(times[1:])
