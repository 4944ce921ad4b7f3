"""A pipeline folder of diffusers, or a model of the hub, as a checkpoint.

model_index.json                            the pipeline's class and parts
unet/config.json                            `UNet2DModel`; in old folders these two are beside model_index.json
unet/diffusion_pytorch_model.safetensors   or with a variant (….fp16.safetensors), or in parts with an index
scheduler/scheduler_config.json             in old folders beside model_index.json
vdiff/config.json                           the checkpoint's description by vdiff, which diffusers ignores
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdiff.diffusion.parameterisation import Parameterisation
from vdiff.diffusion.schedules import Schedule, build_schedule
from vdiff.errors import OptionError, VdiffError
from vdiff.interop.diffusers.flow import is_flow, read_family, read_flow
from vdiff.interop.diffusers.folders import (
    CONFIG,
    DAMAGED,
    INDEX,
    NOT_THEIRS,
    NOTE,
    SCHEDULER,
    find,
    read_weights,
    weights_files,
)
from vdiff.interop.diffusers.latent_pipelines import (
    PIPELINES,
    TRANSFORMERS,
    WeightsNote,
    converted,
    import_folder,
    scheduler_of,
)
from vdiff.interop.diffusers.scheduler import agree, read_prediction, read_table, remarks
from vdiff.interop.diffusers.unet import (
    ONLY,
    READ,
    read_unet_config,
    read_unet_weights,
    unet_shapes,
    write_unet_config,
)
from vdiff.interop.foreign import IMPORTED_MODEL, JsonFile, imported_fields, write_model
from vdiff.models.checkpoint import IMPORTED, CheckpointConfig, read_config
from vdiff.models.unet_config import UNetConfig
from vdiff.models.wrapped import CLASSES_OF_DIFFUSERS
from vdiff.replacing import check_free

WRAPPED_ONLY = set(CLASSES_OF_DIFFUSERS) - {"UNet2DModel"}
PIXEL_PIPELINES = ["DDIMPipeline", "DDPMPipeline", "PNDMPipeline"]


@dataclass(frozen=True)
class Imported:
    """The checkpoint's description, and a sentence for each reason why the pipeline draws other images than vdiff.

    Attributes:
        preflight: what a latent model is, in one line; empty for others.
    """

    config: CheckpointConfig
    remarks: list[str]
    preflight: str = ""


def import_pipeline(
    source: str,
    folder: Path,
    *,
    num_timesteps: int | None = None,
    prediction: str | None = None,
    zero_snr: bool = False,
    pipeline: str | None = None,
    image_size: int | None = None,
    copy: bool = False,
    overwrite: bool = False,
) -> Imported:
    """Write a pipeline as a checkpoint, whole or not at all: one of latents, or a `UNet2DModel` and a scheduler.

    A folder that vdiff exported keeps its description (steps, classes, lineage); others become a base model.

    Args:
        source: a folder, OWNER/NAME of the hub, or a safetensors file with all parts of Stable Diffusion.
        num_timesteps: default number of sampling steps; None: as many as in training, for latents those of diffusers.
        prediction, zero_snr: what the model is known to predict ("v", "eps", "x"), and that its betas were rescaled.
        pipeline: for a file, a folder or a name of the hub whose configurations and tokenizers are its own.
        image_size: pixels per side of pictures that a model of latents draws; None: as in training.
        copy: copy text encoders, tokenizers and autoencoder of Stable Diffusion; otherwise the checkpoint names their
            folder. Those of a file are always copied.

    Raises:
        VdiffError: `source` is not such a pipeline, or vdiff does not support it; sources contradict each other; the
            folder exists or cannot be written.
        OptionError: the model has too few levels for this number of steps, or an option has no meaning here.
    """
    check_free(folder, IMPORTED_MODEL, overwrite=overwrite)
    root, name = find(source)
    if root.is_file():
        note = WeightsNote.read(root)
        with converted(root, folder, pipeline) as parts:
            scheduler = scheduler_of(_scheduler(parts), note, is_own=False, prediction=prediction, zero_snr=zero_snr)
            options: Any = {"copy": True, "overwrite": overwrite, "student": note.student}
            return _latent_model(parts, name, folder, scheduler, num_timesteps, image_size, **options)
    if pipeline is not None:
        raise OptionError("--pipeline is for a single file of weights", "leave it out: a folder has its own parts")
    index = _index(root)
    part = "transformer" if index.values["_class_name"] in TRANSFORMERS else "unet"
    unet_folder = root / part if (root / part).is_dir() else root
    files = weights_files(unet_folder)
    scheduler = _scheduler(root)
    note = WeightsNote.read(files[0])
    if not is_flow(scheduler):
        scheduler = scheduler_of(scheduler, note, prediction=prediction, zero_snr=zero_snr)
    elif prediction or zero_snr:
        raise OptionError(f"{scheduler.where} is a rectified flow, with one prediction", "leave the option out")
    if index.values["_class_name"] in PIPELINES:
        options = {"copy": copy, "overwrite": overwrite, "student": note.student}
        return _latent_model(root, name, folder, scheduler, num_timesteps, image_size, **options)
    if copy:
        raise OptionError("--copy: this pipeline has no parts but its network", "leave it out")
    if image_size:
        raise OptionError(f"--image_size {image_size}: a UNet2DModel has its own size", "leave it out")
    unet = JsonFile.read(unet_folder / CONFIG, DAMAGED)
    notes = read_flow(scheduler)[2] if is_flow(scheduler) else remarks(scheduler)
    notes, config = notes + unet.unknown(ONLY.keys() | READ), None
    if (root / NOTE).exists():
        try:
            config = _own_description(root, scheduler, unet, name)
        except (VdiffError, ValueError) as error:
            notes.append(f"{root / NOTE} is ignored: {error}")
    config = _with_steps(config or _base_model(*read_family(scheduler)[:2], unet, name), num_timesteps)
    config = replace(config, approximated=list(notes))
    shape = UNetConfig.from_dict(config.unet)
    if "." in files[0].name.removesuffix(".safetensors"):
        notes.append(f"its weights are the variant {files[0].name}, which may be rounded")
    tensors = read_weights(files, unet_shapes(shape))
    weights = read_unet_weights(shape, tensors, sines_first=not unet.flag("flip_sin_to_cos", True))
    write_model(folder, weights, config, overwrite=overwrite)
    return Imported(config, notes)


def _index(root: Path) -> JsonFile:
    """The description of a pipeline of a kind that can be read."""
    if not (root / INDEX).exists():
        raise VdiffError(f"{root} holds no {INDEX}", NOT_THEIRS)
    index = JsonFile.read(root / INDEX, DAMAGED)
    known = [*PIXEL_PIPELINES, *PIPELINES]
    part = next((key for key in ("transformer", "unet") if index.get(key)), "")
    kind = index.values.get(part)
    if index.get("_class_name") not in known and isinstance(kind, list) and kind[-1] in WRAPPED_ONLY:
        raise index.refusal(
            "_class_name", f"in Python, vdiff.wrap(pipeline.{part}, shape) makes a teacher of it: docs/teachers.md"
        )
    if index.word("_class_name", "", known) not in PIPELINES and index.get("unet") != ["diffusers", "UNet2DModel"]:
        raise index.refusal("unet", "only UNet2DModel of diffusers can be read")
    return index


def _scheduler(root: Path) -> JsonFile:
    """The configuration of a pipeline's scheduler."""
    place = root / "scheduler" if (root / "scheduler").is_dir() else root
    return JsonFile.read(place / SCHEDULER, DAMAGED)


def _latent_model(
    root: Path,
    name: str,
    folder: Path,
    scheduler: JsonFile,
    num_timesteps: int | None,
    image_size: int | None,
    *,
    copy: bool,
    overwrite: bool,
    student: Mapping[str, Any],
) -> Imported:
    """A pipeline of latents.

    Args:
        student: what the metadata of a student that vdiff exported say, see `WeightsNote`.
    """
    own = read_config((root / NOTE).parent) if (root / NOTE).exists() else None
    description = import_folder(root, name, _index(root), scheduler, own, image_size)
    config, notes = description.config, description.notes
    if student and student["num_timesteps"] < build_schedule(config.schedule).label_scale:
        config = replace(config, **student)
    if own is not None:
        if (own.family, own.schedule, own.shape) == (config.family, config.schedule, config.shape):
            dataset = own.dataset if own.is_imported else _trained_by_vdiff(own, name)
            config = replace(own, backbone=config.backbone, dataset=dataset)
        elif own.guidance_range:
            raise VdiffError(f"{root / NOTE} describes another schedule or prediction", "export the folder again")
        else:
            notes.append(f"{root / NOTE} is ignored: it describes another schedule or prediction")
    config = replace(_with_steps(config, num_timesteps), approximated=list(notes))
    description.write(folder, config, copy=copy, overwrite=overwrite)
    return Imported(config, notes, description.preflight)


def _with_steps(config: CheckpointConfig, num_timesteps: int | None) -> CheckpointConfig:
    """The description with another number of sampling steps; None: with its own."""
    if num_timesteps is None:
        return config
    try:
        config.check_num_steps(num_timesteps)
    except ValueError as error:
        raise OptionError(f"--num_timesteps {num_timesteps}: {error}", "give fewer") from None
    return replace(config, num_timesteps=num_timesteps)


def _base_model(schedule: Schedule, family: Parameterisation, unet: JsonFile, name: str) -> CheckpointConfig:
    """The description of a model that another program trained."""
    shape, image_size = read_unet_config(unet)
    return CheckpointConfig(
        unet=shape.to_dict(),
        schedule=schedule.to_dict(),
        **family.config_fields(),
        num_timesteps=schedule.label_scale,
        image_size=image_size,
        **imported_fields(f"diffusers/{name}"),
        class_names=[str(k) for k in range(shape.num_classes)],
    )


def _own_description(root: Path, scheduler: JsonFile, unet: JsonFile, name: str) -> CheckpointConfig:
    """The original description of a checkpoint that vdiff exported."""
    own = read_config((root / NOTE).parent)
    shape = UNetConfig.from_dict(own.unet)
    said = write_unet_config(shape, own.image_size)
    if any(unet.values.get(key) != value for key, value in said.items()):
        raise ValueError(f"it describes another network than {unet.where}")
    read_unet_config(unet)
    if is_flow(scheduler):
        schedule, family, _ = read_flow(scheduler)
        is_same = own.family == family and (own.num_timesteps == 1 or own.schedule.get("shift") == schedule.shift)
    else:
        is_same = own.prediction == read_prediction(scheduler)
        is_same = is_same and agree(build_schedule(own.schedule), read_table(scheduler) or [])
    if not is_same:
        raise ValueError(f"it describes another schedule or prediction than {scheduler.where}")
    own.check_num_steps(own.num_timesteps)
    if len(own.class_names) != shape.num_classes:
        raise ValueError(f"it names only {len(own.class_names)} of {shape.num_classes} classes")
    return replace(own, dataset=own.dataset if own.is_imported else _trained_by_vdiff(own, name))


def _trained_by_vdiff(own: CheckpointConfig, name: str) -> str:
    """The dataset of a model that vdiff trained and exported."""
    return f"{IMPORTED}diffusers/{name}, trained by vdiff on {own.dataset}"
