"""The student of one stage: its description, its weights from the teacher, and the run that trains it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import vdiff
from vdiff.diffusion.distillation import Guided
from vdiff.errors import OptionError, VdiffError
from vdiff.models.adapters import add_adapter, copy_adapter
from vdiff.models.checkpoint import (
    ADAPTER,
    CheckpointConfig,
    load_base,
    load_checkpoint,
    load_stored,
    read_config,
    read_tensors,
    save_checkpoint,
)
from vdiff.models.codec import LATENTS
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.models.inheriting import inherit
from vdiff.models.kinds import PYTHON, TEXT, UNET
from vdiff.models.text import TextBackbone
from vdiff.records import RUN_FILE
from vdiff.reporting import Reporter, Silent
from vdiff.text import cause_of
from vdiff.training.config import DistillConfig
from vdiff.training.dataset import TrainingData
from vdiff.training.engine import Engine
from vdiff.training.estimate import Memory, allocate, memory_of, update_times
from vdiff.training.finetuning import adapter_of, sample_shape_of, with_fingerprint
from vdiff.training.folder import is_run
from vdiff.training.inputs import encoded_of, inputs_of, vae_of
from vdiff.training.loop import Run
from vdiff.training.objectives import DistillationObjective
from vdiff.training.presets import read_run
from vdiff.training.sample_conditions import sample_conditions
from vdiff.training.sample_prompts import prompts_of_run
from vdiff.training.stages import Stage, student_network, with_unet
from vdiff.training.step import Task
from vdiff.training.weights import copy_sharing

GUIDANCE_CHANNELS = 256
"""Of the embedding of the weight of guidance, as in the UNets of Latent Consistency Models (Luo et al. 2023).

diffusers' UNets add a linear projection of it to the embedding of the time.
"""


def describe_student(stage: Stage, config: DistillConfig, teacher: CheckpointConfig) -> CheckpointConfig:
    """The description of a stage's student before its training, without data and lineage, which the run adds.

    It keeps its teacher's parameterisation, but predicts v if its teacher predicts ε and it is no LoRA. A LoRA is one
    of the teacher's base, or of the teacher itself if that is no LoRA.

    Raises:
        OptionError: `student_config` does not describe a valid network, the teacher's images do not fit it, or a LoRA
            cannot be such a student.
    """
    method, taught = config.build_method(stage.method), list(teacher.guidance_range)
    network, adapter = dict(student_network(config, teacher)), adapter_of(config)
    base = teacher.base if teacher.adapter else {"path": stage.base.absolute().as_posix(), "fingerprint": ""}
    if teacher.kind == UNET:
        network |= {**method.network_options, "dropout": config.dropout}
    elif "guidance_input" in method.network_options and teacher.kind == TEXT:
        network = with_unet(network, time_cond_proj_dim=GUIDANCE_CHANNELS)
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
        backbone=None if teacher.kind == UNET else {"kind": teacher.kind, "config": network},
        **(teacher.family if adapter else teacher.family.student()).config_fields(),
        num_timesteps=stage.num_steps,
        adapter=adapter,
        base=base if adapter else None,
        method=stage.method,
        guidance_range=taught,
        guidance_scale=config.guidance_scale or teacher.guidance_scale,
        weights=config.weights,
        num_iters=0,
        target_iters=stage.updates(config),
        num_images=0,
        train_seconds=0.0,
        kept_start=False,
        vdiff_version=vdiff.__version__,
    )
    if adapter and description.network_id() != teacher.network_id():
        raise OptionError(
            f"--lora_rank {config.lora_rank}: this student has another network than its teacher",
            "leave --lora_rank out: the student is then a whole model",
        )
    if config.student_config or teacher.kind == UNET:
        try:
            with torch.device("meta"):
                description.build()
            description.signature.check_shape(teacher.shape)
        except VdiffError:
            raise
        except Exception as error:  # diffusers raises many kinds
            raise OptionError(
                f"--student_config {config.student_config}: {cause_of(error)}", "correct the file"
            ) from None
    return description


def begin_student(stage: Stage, config: DistillConfig, description: CheckpointConfig) -> tuple[Denoiser, str]:
    """The student of a stage before its training, and what it inherited, see `begin_stage`."""
    return begin_stage(stage, config, description)[1:]


def begin_stage(stage: Stage, config: DistillConfig, description: CheckpointConfig) -> tuple[Denoiser, Denoiser, str]:
    """The teacher of a stage, frozen, its student before the training, and what a student of another shape inherited.

    The student is a copy of its teacher, or gets those of its weights that fit. Of a LoRA, both have the same tensors
    for the weights of the base, and the student's LoRA begins as that of its teacher.

    Raises:
        VdiffError: the teacher or its base cannot be used.
        OptionError: the LoRA of the teacher does not fit in that of the student.
    """
    before = read_config(stage.base)
    if description.adapter is None:
        teacher, _ = load_checkpoint(stage.base)
        return teacher.requires_grad_(False), *student_of(teacher, before, config, description)
    teacher = load_base(with_fingerprint(description) if before.adapter is None else description)
    teacher.requires_grad_(False).eval()
    student = copy_sharing(teacher, teacher.parameters())
    torch.manual_seed(config.seed)
    add_adapter(student.network, description.adapter)
    if before.adapter is not None:
        add_adapter(teacher.network, before.adapter)
        load_stored(teacher, before, read_tensors(stage.base / ADAPTER))
        copy_adapter(student.network, description.adapter, teacher.network, before.adapter)
    return teacher.requires_grad_(False), student, ""


def student_of(
    teacher: Denoiser, before: CheckpointConfig, config: DistillConfig, description: CheckpointConfig
) -> tuple[Denoiser, str]:
    """A student with all weights, before its training, from a teacher in memory; and what it inherited."""
    torch.manual_seed(config.seed)
    module = copy.deepcopy(teacher.network) if before.kind == PYTHON else None
    student = description.build(module).requires_grad_(True)
    inherited, output = "", student.network.output_layer
    if description.network_id() == before.network_id():
        student.load_state_dict(teacher.state_dict())
    else:
        inherited = str(inherit(student.network, teacher.network))
    if description.family != before.family and output is not None:
        for parameter in output.parameters():  # it predicts something else from now on
            torch.nn.init.zeros_(parameter)
    share_text_encoders(student, teacher)
    return student, inherited


def share_text_encoders(student: Denoiser, teacher: Denoiser) -> None:
    """Let the student use the text encoders of its teacher, which do not learn."""
    if isinstance(student.network, TextBackbone) and isinstance(teacher.network, TextBackbone):
        student.network.text_encoders = teacher.network.text_encoders.requires_grad_(False)


def stage_run(
    stage: Stage,
    config: DistillConfig,
    images: TrainingData,
    engine: Engine,
    lineage: Mapping[str, str],
    reporter: Reporter | None = None,
) -> Run:
    """The run of one stage: the student starts from its teacher's weights, without dropout."""
    before = read_config(stage.base)
    description = replace(
        shaped(describe_student(stage, config, before), images),
        dataset=images.name,
        dataset_fingerprint=images.fingerprint,
        teacher={**before.to_dict(), **lineage},
    )
    if description.adapter and before.adapter is None:
        description = with_fingerprint(description)
    encoded = encoded_of(images, description, reporter or Silent())
    teacher, student, inherited = begin_stage(stage, config, description)
    if config.student_config and reporter and not is_run(stage.folder):
        reporter.line(f"{stage.folder} begins with {inherited or 'all weights of its teacher'}")
    task = stage_task(stage, config, engine, teacher, before, student, description)
    inputs = inputs_of(description, engine.device, encoded)
    return Run(
        **vars(replace(task, inputs=inputs)),
        batches=replace(images, encoded=encoded).batches(config, engine, reporter),
        description=description,
        folder=stage.folder,
        prompts=prompts_of_run(config, images, inputs, Silent()),  # the ladder has reported what is wrong with them
        conditions=sample_conditions(description, images),
    )


def shaped(description: CheckpointConfig, images: TrainingData) -> CheckpointConfig:
    """The description of a latent model, with samples of the shape of the latents of `images`."""
    if description.codec != LATENTS.name or images.store is None:
        return description
    return replace(description, sample_shape=list(sample_shape_of(description, images)))


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
    if isinstance(method, Guided):
        teacher = GuidedDenoiser(teacher)
    elif config.guidance_scale:
        teacher = GuidedDenoiser(teacher, config.guidance_scale - 1)
    return Task(
        student,
        DistillationObjective(
            teacher,
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
        encodes_first=True,
    )


def times_of_stage(stage: Stage, config: DistillConfig, images: TrainingData, engine: Engine) -> tuple[float, float]:
    """The seconds of the first and of a later update of a stage, measured on a few updates.

    The stage's own teacher need not exist yet: it costs as much as the ladder's first teacher, `config.base`, or as a
    model of `student_config`, if an earlier stage produces one.
    """
    there = replace(stage, base=Path(config.base))
    if not config.student_config or stage.base.resolve() == there.base.resolve():
        run = stage_run(there, stage.settings(config), images, engine, {})
        return update_times(run, run.description.shape, engine)
    description = describe_student(replace(there, method="match"), config, read_config(there.base))
    with TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), description.build().state_dict(), description)
        alone = replace(config, student_config="")
        run = stage_run(replace(stage, base=Path(folder)), stage.settings(alone), images, engine, {})
        return update_times(run, run.description.shape, engine)


def memory_of_stage(stage: Stage, config: DistillConfig, images: TrainingData, engine: Engine) -> Memory:
    """The memory of the first stage of a ladder; its teacher must exist. See `memory_of`."""
    config, before = stage.settings(config), read_config(stage.base)
    description = shaped(describe_student(stage, config, before), images)
    with torch.device("meta"):  # peft cannot make a LoRA among tensors without values
        teacher = replace(before, adapter=None).build().requires_grad_(False)
        student = description.build() if description.adapter is None else copy_sharing(teacher, teacher.parameters())
    share_text_encoders(student, teacher)
    if description.adapter is not None:
        add_adapter(student.network, description.adapter)
    if before.adapter is not None and description.adapter is not None:
        add_adapter(teacher.network, before.adapter)
        teacher.requires_grad_(False)

    def build(local: Engine) -> Task:
        allocate(teacher, student)
        return stage_task(stage, config, local, teacher, before, student, description)

    return memory_of(build, description.shape, images.num_images, engine, vae_of(description))


def recorded_setting(stages: Sequence[Stage], name: str) -> Any:
    """A setting of the ladder's first student; None if it is not recorded or the training has not begun."""
    folder = stages[0].folder
    return read_run(folder).distill.get(name) if (folder / RUN_FILE).is_file() else None
