"""The student of one stage: its description, its weights from the teacher, and the run that trains it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

import vdiff
from vdiff.diffusion.distillation import Guided
from vdiff.errors import OptionError
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, read_config, save_checkpoint
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.models.inheriting import inherit
from vdiff.models.kinds import PYTHON, UNET
from vdiff.models.unet import UNet
from vdiff.records import RUN_FILE
from vdiff.reporting import Reporter
from vdiff.training.config import DistillConfig
from vdiff.training.dataset import TrainingData
from vdiff.training.engine import Engine
from vdiff.training.estimate import Memory, memory_of, update_times
from vdiff.training.loop import Run
from vdiff.training.objectives import DistillationObjective
from vdiff.training.presets import read_run
from vdiff.training.stages import Stage, student_network
from vdiff.training.step import Task


def describe_student(stage: Stage, config: DistillConfig, teacher: CheckpointConfig) -> CheckpointConfig:
    """The description of a stage's student before its training, without data and lineage, which the run adds.

    It keeps its teacher's parameterisation, but predicts v if its teacher predicts ε.

    Raises:
        OptionError: `student_config` does not describe a valid network, or the teacher's images do not fit it.
    """
    method, taught = config.build_method(stage.method), list(teacher.guidance_range)
    network = dict(student_network(config, teacher))
    if teacher.kind == UNET:
        network |= {**method.network_options, "dropout": config.dropout}
    elif missing := {name.removesuffix("_input") for name in method.network_options} - set(teacher.signature.names):
        name = sorted(missing)[0]
        raise OptionError(
            f"--method {stage.method} needs a network that takes {name}", f'see vdiff.wrap(…, takes=["{name}"])'
        )
    if isinstance(method, Guided):
        taught = list(method.weights())
    description = replace(
        teacher,
        unet=network if teacher.kind == UNET else {},
        **teacher.family.student().config_fields(),
        num_timesteps=stage.num_steps,
        adapter=None,  # a student of a LoRA has all weights
        base=None,
        method=stage.method,
        guidance_range=taught,
        weights=config.weights,
        num_iters=0,
        target_iters=stage.updates(config),
        num_images=0,
        train_seconds=0.0,
        kept_start=False,
        vdiff_version=vdiff.__version__,
    )
    try:
        if teacher.kind == UNET:
            with torch.device("meta"):
                description.build()
        description.signature.check_shape(teacher.shape)
    except (ValueError, TypeError) as error:
        raise OptionError(f"--student_config {config.student_config}: {error}", "correct the file") from None
    return description


def begin_student(stage: Stage, config: DistillConfig, description: CheckpointConfig) -> tuple[Denoiser, str]:
    """The student before its training, and what it inherited from its teacher: a copy, or the weights that fit."""
    return student_of(*load_checkpoint(stage.base), config, description)


def student_of(
    teacher: Denoiser, before: CheckpointConfig, config: DistillConfig, description: CheckpointConfig
) -> tuple[Denoiser, str]:
    """`begin_student` for a teacher in memory."""
    torch.manual_seed(config.seed)
    module = copy.deepcopy(teacher.network) if before.kind == PYTHON else None
    student = description.build(module).requires_grad_(True)
    inherited, output = "", student.network.output_layer
    if description.network_id() == before.network_id():
        student.load_state_dict(teacher.state_dict())
    else:
        inherited = str(inherit(cast(UNet, student.network), cast(UNet, teacher.network)))
    if description.family != before.family and output is not None:
        for parameter in output.parameters():  # it predicts something else from now on
            torch.nn.init.zeros_(parameter)
    return student, inherited


def stage_run(
    stage: Stage,
    config: DistillConfig,
    images: TrainingData,
    engine: Engine,
    lineage: Mapping[str, str],
    reporter: Reporter | None = None,
) -> Run:
    """The run of one stage: the student starts from its teacher's weights, without dropout."""
    teacher, before = load_checkpoint(stage.base)
    description = replace(
        describe_student(stage, config, before),
        dataset=images.name,
        dataset_fingerprint=images.fingerprint,
        teacher={**before.to_dict(), **lineage},
    )
    student, _ = begin_student(stage, config, description)
    return Run(
        **vars(stage_task(stage, config, engine, teacher.requires_grad_(False), before, student, description)),
        batches=images.batches(config, engine, reporter),
        description=description,
        folder=stage.folder,
    )


def stage_task(
    stage: Stage,
    config: DistillConfig,
    engine: Engine,
    teacher: Denoiser,
    before: CheckpointConfig,
    student: Denoiser,
    description: CheckpointConfig,
) -> Task:
    """The objective of a student, from a teacher in memory.

    Args:
        before, description: the descriptions of teacher and student.
    """
    for network in (student.network, teacher.network):
        network.full_precision = config.precision == "auto" and stage.is_fine
    teacher = engine.compiled(engine.place(teacher))
    method = config.build_method(stage.method)
    return Task(
        student,
        DistillationObjective(
            GuidedDenoiser(teacher) if isinstance(method, Guided) else teacher,
            method,
            num_steps=stage.num_steps,
            teacher_steps=stage.teacher_steps,
            # steps between the levels of a table are not on the grid: then the teacher is evaluated at any time
            levels=None if before.levels and before.levels % stage.teacher_steps else before.levels,
        ),
        replace(config, num_iters=stage.updates(config)),
        class_dropout=config.class_dropout,
        guidance_range=description.guidance_range,
        self_ema=method.self_ema,
        method=method,
        step_bins=None if method.keeps_steps else stage.num_steps,
        time_bins=None
        if method.keeps_steps or method.has_any_time
        else stage.teacher_steps
        if method.has_fine_times
        else stage.num_steps,
    )


def times_of_stage(stage: Stage, config: DistillConfig, images: TrainingData, engine: Engine) -> tuple[float, float]:
    """The seconds of the first and of a later update of a stage, measured on a few updates.

    The stage's own teacher need not exist yet: it costs as much as the ladder's first teacher, `config.base`, or as a
    model of `student_config`, if an earlier stage produces one.
    """
    there = replace(stage, base=Path(config.base))
    if not config.student_config or stage.base.resolve() == there.base.resolve():
        return update_times(stage_run(there, stage.settings(config), images, engine, {}), images.shape, engine)
    description = describe_student(replace(there, method="match"), config, read_config(there.base))
    with TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), description.build().state_dict(), description)
        alone = replace(config, student_config="")
        run = stage_run(replace(stage, base=Path(folder)), stage.settings(alone), images, engine, {})
        return update_times(run, images.shape, engine)


def memory_of_stage(stage: Stage, config: DistillConfig, images: TrainingData, engine: Engine) -> Memory:
    """The memory of the first stage of a ladder; its teacher must exist. See `memory_of`."""
    config, before = stage.settings(config), read_config(stage.base)
    description = describe_student(stage, config, before)

    def build(local: Engine) -> Task:
        teacher, student = before.build().requires_grad_(False), description.build()
        return stage_task(stage, config, local, teacher, before, student, description)

    return memory_of(build, images.shape, images.num_images, engine)


def recorded_setting(stages: Sequence[Stage], name: str) -> Any:
    """A setting of the ladder's first student; None if it is not recorded or the training has not begun."""
    folder = stages[0].folder
    return read_run(folder).distill.get(name) if (folder / RUN_FILE).is_file() else None
