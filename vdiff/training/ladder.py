"""Distillation stage by stage: each student becomes the teacher of the next one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vdiff
from vdiff.diffusion.distillation import METHODS
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, read_config, weights_fingerprint
from vdiff.reporting import Reporter
from vdiff.training.config import COMMAND_LINE, DistillConfig, resolve
from vdiff.training.dataset import Images, open_images
from vdiff.training.engine import Engine
from vdiff.training.folder import check_resumable, check_same_run, clear, is_run, recorded, start_anew
from vdiff.training.loop import Run, fit
from vdiff.training.objectives import DistillationObjective
from vdiff.training.presets import RUN_FILE, Settings, preset_for, read_preset, read_run, read_settings

DEFAULT_BASE = "checkpoints/original"


@dataclass(frozen=True)
class Stage:
    """One student: the teacher's folder and the steps that it takes, the student's folder and steps."""

    base: Path
    teacher_steps: int
    folder: Path
    num_steps: int


def resolve_distillation(flags: Mapping[str, Any], config_file: Path | None) -> tuple[DistillConfig, CheckpointConfig]:
    """The settings of a ladder, and its first teacher.

    Raises:
        VdiffError: settings or teacher cannot be used.
    """
    settings = read_settings(config_file) if config_file else Settings({}, {})
    chosen = {**settings.distill, **flags}
    base = Path(chosen.get("base") or DEFAULT_BASE)
    teacher = read_config(base)
    preset = str(chosen.get("preset") or _preset_of(base) or preset_for(teacher.image_size))
    layers = {f"preset {preset}": read_preset(preset).distill}
    if config_file:
        layers[str(config_file)] = settings.distill
    config = resolve(DistillConfig, {**layers, COMMAND_LINE: flags})
    if config.to_steps is not None and config.stages is not None:
        raise OptionError("--to_steps and --stages say the same in two ways", "give one of them")
    is_there = "://" in teacher.dataset or Path(teacher.dataset).exists()
    data = config.data or (teacher.dataset if is_there else "")
    return replace(config, base=base.as_posix(), preset=preset, data=data), teacher


def _preset_of(base: Path) -> str:
    """The preset that the teacher was trained with, where that is recorded."""
    if not (base / RUN_FILE).is_file():
        return ""
    settings = read_run(base)
    return str(settings.train.get("preset") or settings.distill.get("preset") or "")


def teachers_images(config: DistillConfig, teacher: CheckpointConfig) -> Images:
    """The dataset of a ladder, which must be of the teacher's kind.

    Raises:
        VdiffError: no dataset, or one of another size, number of channels or classes.
    """
    images = open_images(config.data, teacher.image_size)
    if images.channels != teacher.unet["in_channels"]:
        raise OptionError(
            f"{images.name} has {images.channels} channels, the teacher {teacher.unet['in_channels']}",
            "give --data the dataset that it was trained on",
        )
    if teacher.class_names and images.class_names != teacher.class_names:
        raise OptionError(
            f"{images.name} has other classes than the teacher", "give --data the dataset that it was trained on"
        )
    return images


def plan_stages(config: DistillConfig, teacher: CheckpointConfig, out: Path | None = None) -> list[Stage]:
    """The stages from the teacher's steps down: `base_k` beside the teacher, k counting on from its own name.

    Raises:
        OptionError: the steps cannot be halved so often, the teacher does not take that many, or it predicts ε.
    """
    base = Path(config.base)
    if base.name in ("", ".."):  # students go beside the teacher, so its folder must have a name
        base = base.resolve()
    if teacher.prediction == "eps":
        raise OptionError(
            f"{base} is an eps-prediction: at zero signal, where students start, it says nothing about the image",
            "distil a model trained with --prediction v, x or both",
        )
    first = config.teacher_steps or teacher.num_timesteps
    if teacher.method != "base" and first != teacher.num_timesteps:
        raise OptionError(
            f"--teacher_steps {first}: {base} was distilled for {teacher.num_timesteps} steps", "leave it out"
        )
    try:
        teacher.check_num_steps(first)
    except ValueError as error:
        raise OptionError(f"--teacher_steps {first}: {error}", "give a number that divides") from None
    if first < 2:
        raise OptionError(f"{base} takes 1 step already: there is nothing to halve", "distil another --base")
    steps = _student_steps(config, first)
    if out is not None and len(steps) > 1:
        raise OptionError(f"--out names one student, and this ladder has {len(steps)}", "leave --out out")
    if out is not None and out.resolve() == base.resolve():
        raise OptionError(f"--out {out} is the teacher itself", "choose another --out")
    match = re.fullmatch(r"base_(\d+)", base.name)
    number = int(match.group(1)) + 1 if match else 0
    stages: list[Stage] = []
    for k, num_steps in enumerate(steps):
        folder = out or base.parent / f"base_{number + k}"
        stages.append(Stage(stages[-1].folder if stages else base, 2 * num_steps, folder, num_steps))
    return stages


def _student_steps(config: DistillConfig, first: int) -> list[int]:
    """The students' numbers of steps."""
    if config.to_steps is not None and config.to_steps >= first:
        raise OptionError(f"--to_steps {config.to_steps}: the teacher takes {first} already", f"give less than {first}")
    stages = config.stages or 1
    if config.to_steps is None and first >> stages == 0:
        raise OptionError(f"--stages {stages}: {first} steps cannot be halved so often", "give fewer")
    try:
        return METHODS[config.method].plan(first, config.to_steps or first >> stages)
    except ValueError as error:
        raise OptionError(str(error), "choose another --to_steps, --stages or --teacher_steps") from None


def climb(
    stages: list[Stage], config: DistillConfig, images: Images, engine: Engine, *, overwrite: bool, reporter: Reporter
) -> bool:
    """Do every stage that is not done, one that was cut from where it was; answer whether there was one.

    Raises:
        Interrupted: a signal came; the same command goes on.
        VdiffError: a student's folder holds something else, or the training fails.
    """
    if overwrite:
        load_checkpoint(stages[0].base)  # before anything is removed: it may be damaged
        engine.wait()
        for stage in stages if engine.is_main else ():
            clear(stage.folder, overwrite=True)
        engine.wait()
    else:
        check_room(stages)
    trained = False
    how = "the same command without --overwrite goes on" if overwrite else "the same command goes on"
    for stage in stages:
        mine = replace(
            config,
            base=stage.base.as_posix(),
            teacher_steps=stage.teacher_steps,
            to_steps=stage.num_steps,
            stages=None,
            num_iters=config.updates(stage.num_steps),
            last_factor=1.0,
        )
        lineage = {"path": stage.base.as_posix(), "fingerprint": weights_fingerprint(stage.base)}
        if is_run(stage.folder):
            found = recorded(stage.folder)
            check_same_teacher(stage, found, lineage)
            if found and found.is_finished:
                reporter.line(f"{stage.folder} is finished already: {steps_text(found.num_timesteps)}")
                continue
            check_same_run(stage.folder, mine, _settings_of(stage.folder))
            check_resumable(stage.folder, images)
            run = _stage_run(stage, mine, images, engine, lineage)
        else:
            run = _stage_run(stage, mine, images, engine, lineage)  # first of all: the teacher may be damaged
            engine.wait()  # until every process has seen that there is nothing yet
            if engine.is_main:
                start_anew(stage.folder, mine, overwrite=False)
            engine.wait()
        try:
            fit(run, engine, reporter)
        except Interrupted as stop:
            raise Interrupted(f"{stop}; {how}", stop.exit_code) from None
        trained = True
    return trained


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


def _stage_run(stage: Stage, config: DistillConfig, images: Images, engine: Engine, lineage: Mapping[str, str]) -> Run:
    """The run of one stage: the student starts as a copy of its teacher, which takes its dropout off."""
    teacher, before = load_checkpoint(stage.base)
    description = replace(
        before,
        unet={**before.unet, "dropout": config.dropout},
        num_timesteps=stage.num_steps,
        method=config.method,
        weights=config.weights,
        num_iters=0,
        target_iters=config.num_iters,
        num_images=0,
        train_seconds=0.0,
        dataset=images.name,
        dataset_fingerprint=images.fingerprint,
        teacher={**asdict(before), **lineage},
        vdiff_version=vdiff.__version__,
    )
    torch.manual_seed(config.seed)
    student = description.build()
    student.load_state_dict(teacher.state_dict())
    teacher = engine.compiled(engine.place(teacher)).requires_grad_(False)
    return Run(
        denoiser=student,
        objective=DistillationObjective(teacher, METHODS[config.method], stage.num_steps),
        batches=images.batches(config, engine),
        config=config,
        description=description,
        folder=stage.folder,
        class_dropout=config.class_dropout,
    )
