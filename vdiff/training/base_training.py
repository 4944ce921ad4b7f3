"""The training of a base model, or the fine-tuning of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from vdiff.diffusion.prediction import PREDICTION_TYPES, from_x
from vdiff.diffusion.schedules import FlowSchedule
from vdiff.distributed import memory_errors_named
from vdiff.errors import Interrupted, VdiffError, explained
from vdiff.models.adapters import add_adapter
from vdiff.models.checkpoint import CheckpointConfig, load_base, load_stored, read_config
from vdiff.models.denoiser import Denoiser
from vdiff.models.lora_files import read_lora
from vdiff.models.text import TextBackbone
from vdiff.records import STATE
from vdiff.replacing import locked
from vdiff.reporting import Reporter
from vdiff.training.base import describe
from vdiff.training.config import TrainConfig, resolve
from vdiff.training.dataset import TrainingData
from vdiff.training.engine import REMEDIES, Engine, build_engine, effective_batch
from vdiff.training.estimate import Memory, allocate, memory_of
from vdiff.training.finetuning import with_fingerprint
from vdiff.training.folder import RUN, check_resumable, check_same_model, check_same_run, recorded, start_anew
from vdiff.training.inputs import Inputs, encoded_of, inputs_of, vae_of
from vdiff.training.loop import Run, metrics_of, settle
from vdiff.training.objectives import DenoisingObjective, StudentState
from vdiff.training.presets import recorded_layer, write_run
from vdiff.training.sample_conditions import sample_conditions
from vdiff.training.sample_prompts import prompts_of_run
from vdiff.training.step import Task, TrainStep

CLEAR_SIGNAL = 0.1


def train(
    config: TrainConfig, images: TrainingData, *, folder: Path, resume: bool, overwrite: bool, reporter: Reporter
) -> CheckpointConfig:
    """Train a base model into `folder`: `training`, whose metrics are left to the log.

    Raises:
        Interrupted, VdiffError: as in `training`.
    """
    try:
        for _ in training(config, images, folder=folder, resume=resume, overwrite=overwrite, reporter=reporter):
            pass
    except Interrupted as stop:
        raise Interrupted(f"{stop}; continue with --resume", stop.exit_code) from None
    return read_config(folder)


def training(
    config: TrainConfig,
    images: TrainingData,
    *,
    folder: Path,
    resume: bool,
    overwrite: bool,
    reporter: Reporter,
    model: tuple[Denoiser, CheckpointConfig] | None = None,
    on_start: Callable[[TrainStep], object] = id,
) -> Iterator[dict[str, float]]:
    """Train a base model into `folder`, and yield the metrics whenever they are logged.

    Args:
        model: the denoiser to train and its description; None: the one that the settings describe.
        on_start: called with what does the updates, before the first one.

    Raises:
        Interrupted: a signal came; the run is saved and can be resumed.
        VdiffError: the folder, the device or the training does not allow it.
    """
    description = describe(config, images) if model is None else model[1]
    if config.base:
        description = with_fingerprint(description)
    engine = build_engine(config)
    with locked(folder, kind=RUN, mine=engine.is_main), memory_errors_named(REMEDIES):
        if resume:
            check_same_run(folder, config, resolve(TrainConfig, recorded_layer(TrainConfig, folder)))
            found = recorded(folder)
            if found and found.is_finished and found.num_iters >= config.num_iters:
                longer = "; --resume with more --num_iters trains it longer" * (folder / STATE).is_file()
                reporter.line(f"{folder} is finished already: {found.num_iters} updates{longer}")
                if engine.is_main:
                    settle(folder, config, found.num_iters)
                return
            check_resumable(folder, images)
            if found and (model or config.base):
                check_same_model(folder, found, description)
            if found and (found.base or {}).get("fingerprint") != (description.base or {}).get("fingerprint"):
                raise VdiffError(f"{folder} was begun from other weights than {config.base} has now", "restore them")
        engine.wait()  # until every process has seen the folder as it was
        if engine.is_main and not resume:
            start_anew(folder, config, overwrite=overwrite)
        engine.wait()
        torch.manual_seed(config.seed)
        encoded = encoded_of(images, description, reporter)
        if encoded is not None and config.vae:
            raise VdiffError(f"{encoded.folder} has latents of the base's autoencoder", "remove it, or leave --vae out")
        inputs = inputs_of(description, engine.device, encoded, config.vae)
        lora = "" if resume else config.lora  # a resumed run has its state
        learns = config.train_text_encoder
        started = begin(description, train_text_encoder=learns, lora=lora) if model is None else model[0]
        run = Run(
            **vars(base_task(config, started, inputs)),
            batches=replace(images, encoded=encoded).batches(config, engine, reporter),
            description=description,
            folder=folder,
            on_resumed=partial(write_run, folder, config) if resume else None,
            prompts=prompts_of_run(config, images, inputs, reporter),
            conditions=sample_conditions(description, images),
        )
        reporter.line(f"training {folder} on {images.name}, {engine.description}, {effective_batch(config, engine)}")
        on_start(step := TrainStep(run, engine))
        if not resume and config.base and (before := read_config(Path(config.base)).prediction) != config.prediction:
            reporter.line(f"{before} → {config.prediction}: {start_of_conversion(run, step, before)}")
        yield from metrics_of(run, step, reporter)


def begin(description: CheckpointConfig, *, train_text_encoder: bool = False, lora: str = "") -> Denoiser:
    """The denoiser before its training, with random weights or those of its base; trained weights require a gradient.

    Args:
        train_text_encoder: whether all weights of text encoders learn, too, if all weights learn.
        lora: a LoRA to begin with.

    Raises:
        VdiffError: the base cannot be used.
    """
    if description.base is None:
        return description.build()
    denoiser = load_base(description)
    if description.adapter is None:
        denoiser.requires_grad_(True)
        if isinstance(denoiser.network, TextBackbone):
            denoiser.network.train_text_encoders(train_text_encoder)
    else:
        add_adapter(denoiser.network, description.adapter)
    if lora:
        _, tensors = read_lora(Path(lora), read_config(Path(str(description.base["path"]))))
        with explained(f"{lora} is another LoRA than this run's", "give the one that it began with", ValueError):
            load_stored(denoiser, description, tensors)
    return denoiser


@torch.no_grad()
def start_of_conversion(run: Run, step: TrainStep, before: str) -> str:
    """The first error of a network whose output is read as another prediction from now on.

    Errors of v on the first batch, at times where α ≥ `CLEAR_SIGNAL`, as an ε-prediction says nothing about x below.

    Args:
        before: what the output was until now.
    """
    with closing(run.batches.start_at(0)) as batches:
        given = step.draw(0, next(batches))
    denoiser = step.denoiser
    target = run.objective(given, StudentState(denoiser, denoiser, 0.0))
    angle = denoiser.schedule.angle(target.t)
    rows = angle.cos() >= CLEAR_SIGNAL
    angle, z, x = angle[rows], target.z[rows], target.x[rows]
    if not len(z):
        return "the output is read anew from the first update on"
    with step.engine.accelerator.autocast():
        found = denoiser(z, target.t[rows], given.condition[rows])
    v = from_x(z, x, angle).v
    output = getattr(found, denoiser.parameterisation.prediction)
    errors = [
        float((v - other).square().mean()) for other in (found.v, PREDICTION_TYPES[before].read(z, output, angle).v)
    ]
    return (
        f"the network's output is read anew from the first update on; the error of v is {errors[0]:.3g} at first, "
        f"{errors[1]:.3g} read as before, {float(v.square().mean()):.3g} of an output of zeros"
    )


def memory_of_base(config: TrainConfig, images: TrainingData, description: CheckpointConfig, engine: Engine) -> Memory:
    """The memory of a base model's training; see `memory_of`."""
    more = images.num_images, engine, vae_of(description, config.vae)
    if description.adapter is None:
        return memory_of(lambda _: base_task(config, description.build()), description.shape, *more)
    with torch.device("meta"):  # peft cannot make a LoRA among tensors without values
        made = description.build()

    def build(_: Engine) -> Task:
        allocate(made)
        return base_task(config, made)

    return memory_of(build, description.shape, *more)


def base_task(config: TrainConfig, denoiser: Denoiser, inputs: Inputs | None = None) -> Task:
    """The task of a base model: predict images from their noisy copies.

    Args:
        inputs: turns batches into inputs of the network; None: pixels and classes.
    """
    levels = None
    if config.noise_mean is not None and config.noise_std is not None:
        shift = denoiser.schedule.shift if isinstance(denoiser.schedule, FlowSchedule) else 1.0
        levels = (config.noise_mean + math.log(shift), config.noise_std)
    objective = DenoisingObjective(denoiser.schedule, levels)
    return Task(
        denoiser, objective, config, class_dropout=config.class_dropout, inputs=inputs or Inputs(),
        offset_noise=config.offset_noise, input_perturbation=config.input_perturbation,
    )  # fmt: skip
