"""`vdiff.prepare`, `vdiff.train` and `vdiff.distill`: the work of the commands, from Python."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from vdiff.api import Model, load_plain
from vdiff.data.audio import AudioConfig
from vdiff.data.conversion import ConversionConfig
from vdiff.data.preparation import prepare as prepare_source
from vdiff.data.source import SourceOptions
from vdiff.data.sources import open_source
from vdiff.diffusion.distillation import METHODS
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.models.checkpoint import CheckpointConfig, read_config, weights_fingerprint
from vdiff.models.denoiser import Denoiser
from vdiff.replacing import locked
from vdiff.reporting import Silent
from vdiff.training.base import describe
from vdiff.training.base_training import base_task, begin, training
from vdiff.training.config import DistillConfig, TrainConfig, resolve
from vdiff.training.dataset import TrainingData, open_images
from vdiff.training.engine import Engine, build_engine
from vdiff.training.finetuning import check_base, check_preset, cropped, settings_of_base, with_fingerprint, with_lora
from vdiff.training.folder import RUN, check_resumable, check_same_run, is_run, recorded, start_anew
from vdiff.training.inputs import inputs_of
from vdiff.training.loop import Run, metrics_in_memory, metrics_of
from vdiff.training.presets import read_preset, recorded_layer
from vdiff.training.sample_conditions import sample_conditions
from vdiff.training.stages import Stage, is_there, plan_stages, recipe_of, teachers_images
from vdiff.training.step import Task, TrainStep
from vdiff.training.student import describe_student, shaped, stage_task, student_of
from vdiff.training.tensors import TensorData
from vdiff.training.weights import frozen, trainable

Metrics = dict[str, float]
Learned = TypeVar("Learned", Model, Denoiser)
USUAL: dict[str, Any] = {"num_iters": 1000, "batch_size": 64, "lr": 1e-3, "ema_remainder": 1e-3, "tracker": "none"}
"""Settings of `train` without a preset, and of `distill`."""
WRAP = "make a model from your network with vdiff.wrap"
_open: WeakSet[Generator[Metrics, None, None]] = WeakSet()


def prepare(
    source: str | Path | None = None,
    *,
    out: str | Path,
    kind: Literal["image", "audio"] = "image",
    size: int | Iterable[int] | None = None,
    condition: str | Path | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    **conversion: Any,
) -> Path:
    """Turn images, or sounds, into a dataset, as `prepare_data.py` does, and return its folder.

    Args:
        source: a folder, an archive, a pattern of tars or the name of a dataset; None: the built-in digits.
        size: side length in pixels, one or several; None: the source's default.
        condition: a folder with a condition image for each image, of the same name apart from the suffix.
        conversion: other fields of `ConversionConfig`: `channels`, `crop`, `image_format`, …; of sounds, fields of
            `AudioConfig`: `rate`, `length`, `channels`, `trim`, `loudness`.

    Raises:
        VdiffError: see `vdiff.data.preparation.prepare`.
        ValueError: the size or another field of the conversion is invalid.
    """
    sounds = AudioConfig(**conversion) if kind == "audio" else None
    options = SourceOptions(condition="" if condition is None else str(condition), kind="audio" if sounds else "")
    opened = open_source(None if source is None else str(source), options)
    if sounds and size is not None:
        raise OptionError(f"size {size} does not apply to sounds", "give length, the samples of a piece")
    if sounds:
        return prepare_source(opened, Path(out), sounds, num_workers=num_workers, overwrite=overwrite).path
    usual = opened.defaults
    size = usual.size if size is None else size
    sizes = (size,) if isinstance(size, int) else tuple(sorted(set(size)))
    values = {"channels": usual.channels, "image_format": usual.image_format, **conversion}
    config = ConversionConfig(sizes=sizes, **values)
    return prepare_source(opened, Path(out), config, num_workers=num_workers, overwrite=overwrite).path


@dataclass
class Learner:
    """The training of the current stage."""

    model: Model


class Training:
    """A training that runs while it is iterated over: each item holds the metrics since the previous one.

    With a folder, the training can be interrupted, and the same call continues it. `close` ends it after a `break`.

    Attributes:
        num_updates: updates of all stages together.
    """

    def __init__(
        self, model: Model, work: Callable[[Learner], Generator[Metrics, None, None]], num_updates: int
    ) -> None:
        self.num_updates = num_updates
        self._learner = Learner(model)
        self._metrics = work(self._learner)  # holds the learner, not this object, so leaving a loop ends it
        _open.add(self._metrics)

    def __iter__(self) -> Iterator[Metrics]:
        return self._metrics

    @property
    def model(self) -> Model:
        """The model as trained so far, with EMA weights."""
        return self._learner.model

    def close(self) -> None:
        """Stop the training, and unlock the folder."""
        self._metrics.close()

    def finish(self) -> Model:
        """Run to the end, and return the model."""
        for _ in self:
            pass
        return self.model


def _close_all() -> None:
    """At exit, close trainings that were left, while the modules that they need are still loaded."""
    for metrics in list(_open):
        with suppress(ValueError):  # it runs in another thread
            metrics.close()


atexit.register(_close_all)


def train(
    model: Model | str, data: str | Path | Iterable[Any], *, out: str | Path | None = None, **settings: Any
) -> Training:
    """Train a base model; the training runs while the result is iterated over.

    Args:
        model: a model from your own network (`vdiff.wrap`), trained in place; or the name of a preset, for a new UNet.
        data: the path of a dataset, or tensors in [−1, 1] or uint8: one tensor of all samples, or an iterable of
        samples or batches, with or without classes: (samples, classes).
        out: a folder for checkpoints, log and samples. The same call continues a run in this folder.
        settings: settings of `train.py`, such as `base` with the preset "lora"; without a preset the defaults are
            `USUAL`.

    Raises:
        VdiffError: settings, data or folder cannot be used.
    """
    if not isinstance(model, str | Model):
        raise OptionError(f"a {type(model).__name__} is neither a model nor a preset's name", WRAP)
    images = _data_of(data, None if isinstance(model, str) else model.shape, settings.get("image_size"))
    if isinstance(model, Model) and images.rate and images.shape != model.shape:
        raise OptionError(f"{images}, the model takes {' × '.join(map(str, model.shape))}", "give another --data")
    layers: dict[str, Mapping[str, Any]] = {"usual settings": USUAL, "vdiff.train": settings}
    base = str(settings.get("base") or "")
    found = read_config(Path(base)) if base else None
    if isinstance(model, Model):
        if base:
            raise OptionError(f"base={base!r}: a model in memory is trained as it is", "give the preset 'lora' instead")
        layers = {"the model": model.config.family.training, **layers}
    else:
        check_preset(model, base)
        preset = read_preset(model, images.num_images).train
        layers = {base: settings_of_base(found)} if found else {}
        layers |= {f"preset {model}": preset, "vdiff.train": {"tracker": "none", **settings}}
    config = resolve(TrainConfig, layers)
    conditional = bool(images.class_names) if config.class_conditional is None else config.class_conditional
    config = replace(
        config, preset=model if isinstance(model, str) else "", data=images.name, class_conditional=conditional
    )
    if isinstance(model, str):
        torch.manual_seed(config.seed)
        if found:
            images = cropped(config, images, settings)
            check_base(config, images, found, settings)
            config = with_lora(config, found, settings) if config.lora else config
        description = describe(replace(config, image_size=images.image_size), images)
        if found:
            description = with_fingerprint(description)
        denoiser = begin(description, train_text_encoder=config.train_text_encoder, lora=config.lora)
    else:
        denoiser = model.plain()
        description = replace(
            model.config, method="base", teacher=None, weights=config.weights, num_iters=0, num_images=0,
            target_iters=config.num_iters, dataset=images.name, dataset_fingerprint=images.fingerprint,
            train_seconds=0.0, kept_start=False,
        )  # fmt: skip

    fixed = set(frozen(denoiser))

    def work(learner: Learner) -> Generator[Metrics, None, None]:
        def start(step: TrainStep) -> None:
            learner.model = Model(step.averages.model, description)

        if out is None:
            engine = build_engine(config)
            step = TrainStep(base_task(config, denoiser, inputs_of(description, engine.device, vae=config.vae)), engine)
            start(step)
            yield from _noted(learner, metrics_in_memory(step, images.batches(config, engine)), config.batch_size)
            learner.model = _finished(learner.model.denoiser, description, config.batch_size, fixed)
            return
        folder = Path(out)
        found = training(
            config, images, folder=folder, resume=is_run(folder), overwrite=False, reporter=Silent(),
            model=(denoiser, description), on_start=start,
        )  # fmt: skip
        yield from _noted(learner, found, config.batch_size)
        learner.model = _with_frozen(load_plain(folder, learner.model), fixed)

    return Training(Model(denoiser, description), work, config.num_iters)


def distill(
    teacher: Model | str | Path,
    *,
    data: str | Path | Iterable[Any] | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> Training:
    """Distil a model stage by stage while the result is iterated over; metrics hold the student's `num_steps`.

    Unlike `distill.py`, this does not compare students with their teachers.

    Args:
        teacher: a model, or the folder of a checkpoint.
        data: as in `train`; None: the teacher's dataset, if the method needs images.
        out: a folder for the students, `base_0`, `base_1`, …. The same call continues a ladder in this folder.
        settings: settings of `distill.py`, such as `to_steps` and `method`; the defaults are `USUAL` and the method's.

    Raises:
        VdiffError: the settings, the data or the folder cannot be used, or `to_steps` cannot be reached.
    """
    if not isinstance(teacher, str | Path | Model):
        raise OptionError(f"a {type(teacher).__name__} is neither a model nor a checkpoint's folder", WRAP)
    model = teacher if isinstance(teacher, Model) else load_plain(Path(teacher))
    method = settings.get("then", "progressive") if settings.get("method") == "guided" else settings.get("method")
    recipe = recipe_of(method, settings.get("recipe", ""), USUAL) if method in METHODS else {}
    usual = {**USUAL, "ema_remainder": 0.0, **recipe}
    given = {"data": str(data)} if isinstance(data, str | Path) else {}
    config = resolve(DistillConfig, {"usual settings": usual, "vdiff.distill": {**given, **settings}})
    if config.lora_rank:
        raise OptionError(f"lora_rank={config.lora_rank}: vdiff.distill makes whole students", "use distill.py")
    root = Path(out) if out is not None else Path()
    config = replace(config, base=(root / "teacher").as_posix())
    stages = plan_stages(config, model.config)
    if data is None or isinstance(data, str | Path):
        own = model.config.dataset if METHODS[config.method].needs_images or is_there(model.config.dataset) else ""
        images = teachers_images(config if data else replace(config, data=own), model.config)
    else:
        images = _data_of(data, model.shape)

    fixed = set(frozen(model.plain())) if trainable(model.plain()) else set()

    def work(learner: Learner) -> Generator[Metrics, None, None]:
        engine = build_engine(config)
        folder = None if isinstance(teacher, Model) else Path(teacher)  # of the current teacher
        for stage in stages:
            own, before, base = stage.settings(config), learner.model.config, learner.model.plain()
            fingerprint = weights_fingerprint(folder) if folder else learner.model.fingerprint()
            lineage = {"path": folder.as_posix() if folder else "", "fingerprint": fingerprint}
            description = replace(
                shaped(describe_student(stage, own, before), images), dataset=images.name,
                dataset_fingerprint=images.fingerprint, teacher={**before.to_dict(), **lineage},
            )  # fmt: skip
            student = _with_frozen(student_of(base, before, own, description)[0], fixed)
            task = stage_task(stage, own, engine, base, before, student, description)
            task = replace(task, inputs=inputs_of(description, engine.device))

            def start(step: TrainStep, description: CheckpointConfig = description) -> None:
                learner.model = Model(step.averages.model, description)

            if out is None:
                step = TrainStep(task, engine)
                start(step)
                found = metrics_in_memory(step, images.batches(task.config, engine))
            else:
                found = _in_folder(task, stage, own, images, engine, description, start)
            for metrics in _noted(learner, found, task.config.batch_size):
                yield {"num_steps": stage.num_steps, **metrics}
            folder = None if out is None else stage.folder
            if folder is None:
                learner.model = _finished(learner.model.denoiser, description, task.config.batch_size, fixed)
            else:
                learner.model = _with_frozen(load_plain(folder, learner.model), fixed)

    return Training(model, work, sum(stage.updates(config) for stage in stages))


def _in_folder(
    task: Task,
    stage: Stage,
    config: DistillConfig,
    images: TrainingData,
    engine: Engine,
    description: CheckpointConfig,
    on_start: Callable[[TrainStep], object],
) -> Iterator[Metrics]:
    """Train what is left of a stage, in its folder."""
    with locked(stage.folder, kind=RUN, mine=engine.is_main):
        if is_run(stage.folder):
            found = recorded(stage.folder)
            check_same_run(stage.folder, config, resolve(DistillConfig, recorded_layer(DistillConfig, stage.folder)))
            if found and (found.teacher or {}).get("fingerprint") != (description.teacher or {}).get("fingerprint"):
                raise VdiffError(f"{stage.folder} was distilled from another teacher", "give another `out`")
            if found and found.is_finished:
                return
            check_resumable(stage.folder, images)
        elif engine.is_main:
            start_anew(stage.folder, config, overwrite=False)
        engine.wait()
        batches = images.batches(task.config, engine)
        conditions = sample_conditions(description, images)
        run = Run(**vars(task), batches=batches, description=description, folder=stage.folder, conditions=conditions)
        on_start(step := TrainStep(run, engine))
        yield from metrics_of(run, step, Silent())


def _data_of(data: Any, shape: tuple[int, ...] | None, image_size: int | None = None) -> TrainingData:
    """The dataset at a path, or tensors of a shape (None: images, shaped as the first one)."""
    if isinstance(data, str | Path):
        return open_images(str(data), image_size)
    if shape is None:
        first = next(iter(data), None)
        if isinstance(data, Iterator) and first is not None:
            data = chain([first], data)
        first = first[0] if isinstance(first, tuple | list) and first else first
        if not isinstance(first, Tensor) or first.ndim not in (3, 4) or first.shape[-1] != first.shape[-2]:
            raise OptionError("a preset needs square images (C, H, W) or (B, C, H, W)", "give a model, see vdiff.wrap")
        shape = tuple(first.shape[-3:])
    return TensorData(shape[-1], shape[0], tensors=data, shape=shape)


def _noted(learner: Learner, found: Iterator[Metrics], batch_size: int) -> Iterator[Metrics]:
    """The metrics; the model records how many updates it has seen.

    Raises:
        Interrupted: by a signal; the run is saved in its folder.
    """
    try:
        for metrics in found:
            done = int(metrics["update"])
            description = replace(learner.model.config, num_iters=done, num_images=done * batch_size)
            learner.model = Model(learner.model.denoiser, description)
            yield metrics
    except Interrupted as stop:
        raise Interrupted(f"{stop}; the same call continues", stop.exit_code) from None


def _finished(denoiser: Denoiser, description: CheckpointConfig, batch_size: int, fixed: Set[str]) -> Model:
    """The model at the end of its training."""
    done = replace(description, num_iters=description.target_iters, num_images=description.target_iters * batch_size)
    return Model(_with_frozen(denoiser.eval(), fixed), done)


def _with_frozen(model: Learned, fixed: Set[str]) -> Learned:
    """The model, with all weights trainable except `fixed`."""
    for name, weight in (model.denoiser if isinstance(model, Model) else model).named_parameters():
        weight.requires_grad_(name not in fixed)
    return model
