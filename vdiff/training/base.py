"""Before the training of a base model: the settings of the run, its images, and the description of its checkpoint.

This module does not load torch, so mistakes are found at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vdiff.data.captions import read_prompts
from vdiff.diffusion.schedules import FlowSchedule, Schedule, build_schedule
from vdiff.diffusion.weighting import ZERO_SNR_FLOOR
from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.models.checkpoint import CheckpointConfig, read_config
from vdiff.models.condition import CLASSES, IMAGE, TOKENS
from vdiff.models.unet_config import UNetConfig
from vdiff.projects import Project
from vdiff.reporting import Reporter
from vdiff.settings import COMMAND_LINE
from vdiff.training.config import LoopConfig, TrainConfig, resolve
from vdiff.training.dataset import TENSORS, TrainingData, open_images
from vdiff.training.finetuning import (
    check_base,
    check_preset,
    cropped,
    describe_finetuned,
    settings_of_base,
    size_of,
    with_lora,
)
from vdiff.training.presets import Settings, preset_for, read_preset, read_settings, recorded_layer

DERIVED = ("in_channels", "out_channels", "num_classes", "null_class", "image_input", "dropout", "dims")


def resolve_training(
    flags: Mapping[str, Any],
    config_file: Path | None,
    *,
    folder: Path,
    resume: bool,
    assume: bool = False,
    reporter: Reporter | None = None,
    project: Project | None = None,
) -> tuple[TrainConfig, TrainingData]:
    """The settings of a base run, and its images.

    Args:
        flags: what the command line and the environment said.
        resume: begin from the settings recorded in `folder` instead of a preset.
        assume: if there is a preset and no dataset, take the images that the preset is made for.
        project: its dataset is taken if none is named.
        reporter: gets the preset and the reason for it, and a line if the preset ignores the classes of the data.

    Raises:
        VdiffError: settings or dataset cannot be used.
    """
    layers = recorded_layer(TrainConfig, folder) if resume else {}
    settings = read_settings(config_file) if config_file else Settings({}, {})
    chosen = {key: value for layer in [*layers.values(), settings.train, flags] for key, value in layer.items()}
    preset = str(chosen.get("preset") or "")
    data, size = str(chosen.get("data") or ""), chosen.get("image_size")
    if resume and data == TENSORS:
        raise VdiffError(f"{folder} was trained on tensors in Python", "the same call of vdiff.train continues")
    base = str(chosen.get("base") or "")
    found = read_config(Path(base)) if base else None
    is_assumed = assume and preset and not data and not base
    size = size or (size_of(found) if found else None)
    takes_text = found is not None and TOKENS in found.signature.names
    images = _assumed(preset, size) if is_assumed else open_images(data, size, project, buckets=takes_text)
    reason = ""
    if not resume:
        if found:
            layers[base] = settings_of_base(found)
            preset, reason = (
                preset or ("lora" if chosen.get("lora_rank") or chosen.get("lora") else "finetune"),
                f", fine-tuning {base}",
            )
        elif not preset:
            from vdiff.distributed import pick_device

            device = pick_device(str(chosen.get("device") or "auto")).type
            preset = preset_for(images.shape, images.num_images, device)
            reason = f", chosen for {images.num_images:,} {images.codec.noun}s of this size on {device}"
        check_preset(preset, base)
        layers[f"preset {preset}"] = read_preset(preset, images.num_images).train
    if config_file:
        layers[str(config_file)] = settings.train
    config = resolve(TrainConfig, {**layers, COMMAND_LINE: flags})
    if found:
        images = cropped(config, images, chosen)
        if config.random_crop and not images.crop:
            if reporter:
                reporter.line(
                    f"images of {images.smallest_side} pixels stay whole, as crops of {config.random_crop} do not fit"
                )
            config = replace(config, random_crop=0)
        check_base(config, images, found, {**settings.train, **flags})
        if config.lora and not resume:
            config = with_lora(config, found, {**settings.train, **flags})
            if reporter:
                alpha = config.lora_alpha or 0
                reporter.line(f"{config.lora}: LoRA of rank {config.lora_rank}, alpha {alpha:g}, {config.lora_targets}")
        config = replace(config, class_conditional=CLASSES in found.signature.names)
    elif config.class_conditional and not images.class_names:
        raise OptionError(f"--class_conditional: {images.name} has no classes", "give --class_conditional False")
    if reporter:
        reporter.line(f"preset {preset or config.preset}, {images}{reason}")
    if reporter and images.has_conditions and (found is None or IMAGE in found.signature.names):
        reporter.line("the dataset has condition images: the network gets them as further input channels")
    if reporter and config.zero_snr:
        is_constant = config.weighting == "snr_plus_one"
        weight = "constant in v" if is_constant else f"at least {ZERO_SNR_FLOOR} at the last level"
        reporter.line(f"zero terminal SNR; the weight {config.weighting} is {weight}")
    if reporter and config.optimizer == "prodigy":
        reporter.line(f"prodigy finds its step itself; the factor --lr is {config.lr:g}")
    if reporter and images.class_names and config.class_conditional is False and "class_conditional" not in chosen:
        unused = f"preset {preset} ignores the {len(images.class_names)} classes"
        reporter.line(f"{unused}; --class_conditional True uses them")
    conditional = bool(images.class_names) if config.class_conditional is None else config.class_conditional
    check_dropped(config, takes_text=takes_text, takes_classes=conditional)
    for name in ("random_crop", "vae"):
        if not takes_text and (value := getattr(config, name)):
            raise OptionError(f"--{name} {value}: the network does not use captions", "leave it out")
    return replace(
        config,
        preset=preset,
        data=images.name,
        image_size=images.image_size,
        class_conditional=conditional,
    ), images


def check_dropped(config: LoopConfig, *, takes_text: bool, takes_classes: bool) -> None:
    """Refuse settings of captions or classes that the network does not take, and a file of prompts without any.

    Raises:
        OptionError: names the setting.
    """
    of_captions = ("caption_dropout", "caption_shuffle", "caption_keep_tokens", "caption_prefix", "sample_prompts")
    names = [] if takes_classes else [("class_dropout", "classes")]
    for name, what in [*names, *([] if takes_text else [(name, "captions") for name in of_captions])]:
        if value := getattr(config, name):
            raise OptionError(f"--{name} {value}: the network does not use {what}", "leave it out")
    if config.sample_prompts:
        read_prompts(Path(config.sample_prompts), "--sample_prompts")


def _assumed(preset: str, image_size: int | None) -> TrainingData:
    """The images that a preset is made for, or others of its kind."""
    assumed = read_preset(preset).assumed
    names = [str(k) for k in range(assumed.get("num_classes", 0))]
    size = image_size or assumed["image_size"]
    return TrainingData(size, assumed["image_channels"], names, rate=assumed.get("rate", 0))


def describe(config: TrainConfig, images: TrainingData) -> CheckpointConfig:
    """The checkpoint that a run will write.

    Raises:
        OptionError: the network's settings do not fit together, or not the images.
        VdiffError: a base that cannot be read.
    """
    if config.base:
        return describe_finetuned(config, images)
    check_unet(config.unet)
    try:
        unet = UNetConfig.from_dict(
            {
                **config.unet,
                "in_channels": images.channels,
                "out_channels": images.channels * config.family.channel_factor,
                "num_classes": len(images.class_names) if config.class_conditional else 0,
                "null_class": config.class_dropout > 0,
                "image_input": images.has_conditions,
                "dropout": config.dropout,
                "dims": len(images.shape) - 1,
            }
        )
    except (ValueError, TypeError) as error:
        raise OptionError(f"[unet] {error}", "fix the configuration") from None
    if images.image_size % unet.size_multiple:
        what = f"sounds of {images.image_size} samples" if images.rate else f"images of {images.image_size} pixels"
        raise OptionError(
            f"{what} do not fit a network of {len(unet.multipliers)} levels: "
            f"it needs a multiple of {unet.size_multiple}",
            f"prepare another --{'length' if images.rate else 'size'}, or choose another --preset",
        )
    return CheckpointConfig(
        unet=unet.to_dict(),
        schedule=schedule_of(config).to_dict(),
        **config.family.config_fields(),
        num_timesteps=config.num_timesteps,
        sample_shape=list(images.shape),
        codec=images.codec.name,
        sample_rate=images.rate,
        method="base",
        weights=config.weights,
        num_iters=0,
        target_iters=config.num_iters,
        num_images=0,
        dataset=images.name,
        dataset_fingerprint=images.fingerprint,
        class_names=images.class_names if config.class_conditional else [],
        condition_images=condition_images_of(images),
    )


def condition_images_of(images: TrainingData) -> dict[str, str] | None:
    """How the condition images of a dataset were made; None: it has none."""
    if images.store is None or not images.has_conditions:
        return None
    meta = images.store.meta
    return {"crop": meta.crop, "resample": meta.resample, "background": meta.background}


def check_unet(values: Mapping[str, Any], origin: str = "") -> None:
    """Refuse keys of [unet] that are unknown or follow from other settings, and values of another type.

    Args:
        origin: what an error begins with.

    Raises:
        OptionError: it names the key.
    """
    usual = UNetConfig().to_dict()
    for key, value in values.items():
        if key in DERIVED:
            raise OptionError(f"{origin}[unet] {key} follows from data and other settings", "take it out of the file")
        if key not in usual:
            raise OptionError(f"{origin}[unet] unknown UNet option {key}", suggestion(key, usual))
        items = value if isinstance(value, list) else []
        if type(value) is not type(usual[key]) or any(type(item) is not int for item in items):
            raise OptionError(
                f"{origin}[unet] {key} = {value!r} is of another type", f"give something like {usual[key]!r}"
            )


def schedule_of(config: TrainConfig) -> Schedule:
    """The noise schedule; a table gets `num_timesteps` levels."""
    if config.schedule == FlowSchedule.name:
        return FlowSchedule(config.flow_shift)
    schedule = build_schedule({"name": config.schedule})
    if schedule.num_levels is None:
        return schedule
    table = {"num_levels": config.num_timesteps, "zero_snr": config.zero_snr}
    return build_schedule({"name": config.schedule, **table})
