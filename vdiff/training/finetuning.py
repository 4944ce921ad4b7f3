"""Fine-tuning: a run that begins with the weights of a checkpoint, and trains all of them or a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import vdiff
from vdiff.diffusion.parameterisation import Edm, Vp
from vdiff.diffusion.schedules import FlowSchedule, TableSchedule, build_schedule
from vdiff.errors import OptionError
from vdiff.models.adapters import AdapterSettings
from vdiff.models.checkpoint import CheckpointConfig, read_config, weights_fingerprint
from vdiff.models.codec import LATENTS
from vdiff.models.condition import CLASSES, TOKENS
from vdiff.models.kinds import UNET
from vdiff.training.config import LoopConfig, TrainConfig
from vdiff.training.dataset import TrainingData, check_conditions
from vdiff.training.presets import DISTILLING, FINE_TUNING

OF_NETWORK = ("unet", "class_conditional")
"""Settings of a new network. A fine-tuned network takes them from its base."""


def settings_of_base(found: CheckpointConfig) -> dict[str, Any]:
    """The settings that a fine-tuning takes from its base, unless a preset, a file or a flag sets them."""
    schedule, family = build_schedule(found.schedule), found.family
    values: dict[str, Any] = {
        "parameterisation": family.name,
        "schedule": schedule.name,
        "num_timesteps": found.num_timesteps,
    }
    if isinstance(schedule, TableSchedule):
        values["zero_snr"] = schedule.zero_snr
    if isinstance(schedule, FlowSchedule):
        values["flow_shift"] = schedule.shift
    if isinstance(family, Edm):
        values["sigma_data"] = family.sigma_data
    return values | ({"prediction": found.prediction} if isinstance(family, Vp) else {})


def check_preset(preset: str, base: str) -> None:
    """Refuse a preset of new networks for a base, and one of fine-tuning without a base.

    Raises:
        OptionError: it says which presets there are.
    """
    if preset in DISTILLING:
        raise OptionError(f"--preset {preset} is for distill.py", "give another, or leave it out")
    if base and preset not in FINE_TUNING:
        raise OptionError(
            f"--preset {preset} describes a new network, and --base names one", f"give {' or '.join(FINE_TUNING)}"
        )
    if not base and preset in FINE_TUNING:
        raise OptionError(f"--preset {preset} fine-tunes a model", "give it with --base CHECKPOINT")


def check_base(config: TrainConfig, images: TrainingData, found: CheckpointConfig, chosen: Mapping[str, Any]) -> None:
    """Refuse a base that cannot be fine-tuned by these settings on these images.

    Args:
        chosen: the settings that a file or a flag gave.

    Raises:
        OptionError: it names the setting.
    """
    base, takes = config.base, found.signature
    if found.method != "base":
        raise OptionError(
            f"--base {base} is a student of {found.num_timesteps} steps, which knows no other times",
            "fine-tune the model that it was distilled from, and distil that",
        )
    if found.kind == "python":
        raise OptionError(
            f"--base {base} is a network in Python: its code is not in the folder", "train it with vdiff.train"
        )
    for name in OF_NETWORK:
        if chosen.get(name) not in (None, {}, CLASSES in takes.names if name == "class_conditional" else None):
            raise OptionError(f"{name} follows from --base {base}", "leave it out")
    if "dropout" in chosen and config.dropout and found.kind != UNET:
        raise OptionError(f"--dropout {config.dropout}: the network of {base} has its own", "leave it out")
    if config.class_dropout and CLASSES not in takes.null:
        raise OptionError(f"--class_dropout {config.class_dropout}: the base cannot drop classes", "leave it out")
    was = settings_of_base(found)
    for name in was.keys() - {"prediction", "zero_snr"}:
        is_free = name == "num_timesteps" and not build_schedule(found.schedule).num_levels
        if getattr(config, name) != was[name] and not is_free:
            raise OptionError(f"--{name} {getattr(config, name)}: {base} has {was[name]}", "leave it out")
    predicted = was.get("prediction", config.prediction)
    if config.prediction != predicted and "both" in (config.prediction, predicted):
        raise OptionError(
            f"--prediction {config.prediction}: {base} predicts {predicted}, with other channels", "leave it out"
        )
    if config.zero_snr and not isinstance(build_schedule(found.schedule), TableSchedule):
        raise OptionError(f"--zero_snr: the {was['schedule']} schedule of {base} has no betas", "leave it out")
    if config.train_text_encoder and TOKENS not in takes.names:
        raise OptionError(f"--train_text_encoder: {base} has no text encoder", "leave it out")
    if config.train_text_encoder and found.network_config.get("t5_length"):
        raise OptionError(f"--train_text_encoder: {base} takes prompts by T5, which is not trained", "leave it out")
    sample_shape_of(found, images, config.vae)
    if TOKENS in takes.names:
        check_captioned(images, base)
    check_conditions(images, takes)
    if takes.num_classes and len(images.class_names) != takes.num_classes:
        raise OptionError(
            f"{images.name} has {len(images.class_names)} classes, the base {takes.num_classes}", "give another --data"
        )


def check_captioned(images: TrainingData, base: str) -> None:
    """Refuse images without captions for a text-to-image model.

    Raises:
        OptionError: says how to prepare them.
    """
    if images.store is not None and not images.store.meta.num_captions:
        raise OptionError(
            f"{images.name} has no captions, and {base} is a text-to-image model",
            "prepare images with captions: .txt files beside them, metadata.jsonl, or --captions FILE",
        )


def cropped(config: TrainConfig, images: TrainingData, chosen: Mapping[str, Any]) -> TrainingData:
    """The images of a run with its random crops; images that are too small for the crops of a preset stay whole.

    Args:
        chosen: the settings that a file or a flag gave.

    Raises:
        OptionError: images are too small for the crops that were asked for.
    """
    side = config.random_crop
    if side <= images.smallest_side:
        return replace(images, crop=side, shape=(images.channels, side, side)) if side else images
    if chosen.get("random_crop"):
        raise OptionError(
            f"--random_crop {side}: {images.name} has images of {images.smallest_side} pixels",
            f"give at most {images.smallest_side}, or prepare larger images",
        )
    return images


def size_of(found: CheckpointConfig) -> int | None:
    """The size of the samples of a base: pixels of a side, or the length of a sound.

    None: images that are not square, or latents of text, which have any size.

    Raises:
        VdiffError: the autoencoder of the base cannot be read.
    """
    if found.space.is_sound:
        return found.shape[-1]
    if found.codec != LATENTS.name or not found.image_size:
        return found.image_size or None
    if TOKENS in found.signature.names:
        return None
    from vdiff.models.prompting import drawn_shape

    return drawn_shape(found, Path(str((found.components or {}).get("path"))))[-1]


def sample_shape_of(found: CheckpointConfig, images: TrainingData, vae: str = "") -> tuple[int, ...]:
    """(C, H, W) of x: that of the images, or of their latents.

    Args:
        vae: the folder of another autoencoder than that of the base.

    Raises:
        OptionError: the network of the base does not take such samples.
        VdiffError: the autoencoder of the base cannot be read.
    """
    shape = tuple(images.shape)
    if found.codec == LATENTS.name:
        from vdiff.models.autoencoder import picture_shape

        folder = Path(vae or str((found.components or {}).get("path")))
        channels, height, _ = picture_shape((found.shape[0], 1, 1), folder)
        pixels = height * found.signature.size_multiple
        step = images.store.meta.buckets[:1] if images.store and not images.crop else ()  # of all buckets' sides
        if shape[0] == channels and not any(size % pixels for size in (*shape[1:], *step)):
            return (found.shape[0], *(size // height for size in shape[1:]))
        raise OptionError(
            f"{images.name} has images of {' × '.join(map(str, shape))}, and the base takes {channels} channels and "
            f"sides that are multiples of {pixels}",
            "prepare another --size, and buckets with a --bucket_step of such multiples",
        )
    if shape != found.shape:
        sizes = " × ".join(map(str, shape)), " × ".join(map(str, found.shape))
        raise OptionError(f"{images.name} has samples of {sizes[0]}, the base of {sizes[1]}", "give another --data")
    return shape


def describe_finetuned(config: TrainConfig, images: TrainingData) -> CheckpointConfig:
    """The checkpoint that a fine-tuning will write; the fingerprint of its base is not taken yet.

    Raises:
        VdiffError: the base cannot be read.
    """
    found = read_config(Path(config.base))
    if found.has_own_text_encoders or (config.train_text_encoder and not config.lora_rank):
        found = found.with_own_text_encoders()
    unet = {**found.unet, "dropout": config.dropout} if found.kind == UNET else found.unet
    rescaled = {"zero_snr": True} if config.zero_snr else {}
    return replace(
        found,
        unet=unet,
        sample_shape=list(sample_shape_of(found, images, config.vae))
        if found.codec == LATENTS.name
        else found.sample_shape,
        schedule=build_schedule({**found.schedule, **rescaled}).to_dict(),
        prediction=found.prediction if found.parameterisation else config.prediction,
        num_timesteps=config.num_timesteps,
        weights=config.weights,
        num_iters=0,
        target_iters=config.num_iters,
        num_images=0,
        train_seconds=0.0,
        dataset=images.name,
        dataset_fingerprint=images.fingerprint,
        class_names=images.class_names if CLASSES in found.signature.names else [],
        adapter=adapter_of(config),
        base={"path": Path(config.base).absolute().as_posix(), "fingerprint": ""},
        vdiff_version=vdiff.__version__,
    )


def with_fingerprint(description: CheckpointConfig) -> CheckpointConfig:
    """The description with the fingerprint of its base, which is read for it."""
    path = (description.base or {})["path"]
    return replace(description, base={"path": path, "fingerprint": weights_fingerprint(Path(path))})


def with_lora(config: TrainConfig, found: CheckpointConfig, chosen: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run that starts from a LoRA, which has its own rank, alpha and layers.

    Args:
        found: the description of the base.
        chosen: the settings that a file or a flag gave.

    Raises:
        OptionError: one of those is another one.
        VdiffError: the LoRA cannot be read, or is one of another base.
    """
    from vdiff.models.lora_files import read_lora

    if not Path(config.lora).exists():
        raise OptionError(f"--lora {config.lora}: no such file or folder", "give a LoRA, or a checkpoint of one")
    settings, _ = read_lora(Path(config.lora), found)
    given: dict[str, Any] = {
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_targets": ",".join(settings.targets),
    }
    for name, value in given.items():
        if chosen.get(name) not in (None, value):
            raise OptionError(f"--{name} {chosen[name]}: {config.lora} has {value}", "leave it out")
    if config.train_text_encoder and not settings.changes_text_encoders:
        raise OptionError(f"--train_text_encoder: {config.lora} has no LoRA of text encoders", "leave it out")
    return replace(config, **given, train_text_encoder=settings.text_encoder)


def adapter_of(config: LoopConfig) -> AdapterSettings | None:
    """The LoRA that the settings ask for; None: all weights learn."""
    if not config.lora_rank:
        return None
    return AdapterSettings(
        config.lora_rank,
        config.lora_alpha or float(config.lora_rank),
        config.lora_dropout,
        tuple(word.strip() for word in config.lora_targets.split(",")),
        isinstance(config, TrainConfig) and config.train_text_encoder,
    )
