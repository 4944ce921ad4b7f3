"""Settings in TOML: the presets of the package, configuration files, and the record of each run.

A file holds the settings of `train.py` as keys, the network in `[unet]`, the settings of `distill.py` in `[distill]`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.files import CHECKSUM, checksum, parse, read_text, write_text
from vdiff.records import RUN_FILE
from vdiff.settings import check_values
from vdiff.text import cause_of
from vdiff.training.config import DistillConfig, LoopConfig, TrainConfig, settings_of, values_of

OF_SOUNDS = ("audio_tiny", "audio_16k")
WRITTEN = ("toy", "digits", "cifar10", "imagenet64", "lsun128", "celebahq256", *OF_SOUNDS)
"""Presets in files of the package: for trials, for the quickstart, of the papers, and for sounds."""
CHANNELS = {"small": (32, 5e-4), "base": (64, 3e-4), "large": (128, 2e-4)}
"""Networks for ordinary machines, of about 2, 9 and 35 million parameters: channels, and the learning rate."""
IMAGE_SIZES = (32, 64, 128, 256)
FITTED = {f"{network}{size}": (network, size) for network in CHANNELS for size in IMAGE_SIZES}
FINE_TUNING = ("finetune", "lora", "sd15_lora_v", "sd21_v_full", "sdxl_lora_v", "tiny_text")
"""Presets of fine-tuning: all weights, or a LoRA."""
DISTILLING = ("text", "text_lora", "lcm_lora")
"""Presets of distill.py alone, for text-to-image models."""
PRESETS = (*WRITTEN, *FITTED)
LARGEST_OF_DIGITS = 16
DEVICE_LIMITS = {"cpu": "small", "mps": "base", "cuda": "large"}
"""The largest network that vdiff chooses by itself on a device."""
CHECKSUM_MARK = f"# {CHECKSUM} "


@dataclass(frozen=True)
class Amount:
    """The training and the network that suit a number of images.

    With fewer images each is seen more often; a smaller network and dropout delay memorisation. The average forgets all
    but the last part of the run: `ema`^`num_iters` < 1e-3.
    """

    network: str
    batch_size: int
    num_iters: int
    dropout: float
    ema: float


AMOUNTS = {
    1_000: Amount("small", batch_size=16, num_iters=10_000, dropout=0.2, ema=0.999),
    100_000: Amount("base", batch_size=32, num_iters=30_000, dropout=0.1, ema=0.9997),
}
"""Number of images → the training for fewer images than this."""
SOME_THOUSANDS = 5_000
MANY = {
    "small": Amount("large", batch_size=32, num_iters=30_000, dropout=0.0, ema=0.9997),
    "base": Amount("large", batch_size=64, num_iters=100_000, dropout=0.0, ema=0.9999),
    "large": Amount("large", batch_size=128, num_iters=300_000, dropout=0.0, ema=0.9999),
}
"""Network → its training for more images: a small network has learned what it can after fewer updates."""


@dataclass(frozen=True)
class Settings:
    """One file's settings of `train.py` and of `distill.py`, and the images a preset is made for."""

    train: Mapping[str, Any]
    distill: Mapping[str, Any]
    assumed: Mapping[str, int] = field(default_factory=dict)


def read_preset(name: str, num_images: int = 0) -> Settings:
    """A preset of the package.

    Args:
        num_images: of the dataset; batch, updates and dropout of a fitted preset depend on it; 0: some thousands.

    Raises:
        OptionError: the name is unknown.
    """
    if name not in (known := (*PRESETS, *FINE_TUNING, *DISTILLING)):
        raise OptionError(f"unknown preset {name!r}", suggestion(name, known))
    if name in FITTED:
        network, image_size = FITTED[name]
        return fitted(network, image_size, amount_of(num_images, network))
    text = resources.files("vdiff").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")
    settings = _settings(text, name)
    if (epochs := settings.assumed.get("epochs")) is None:
        return settings
    updates = math.ceil(epochs * (num_images or settings.assumed["num_images"]) / settings.train["batch_size"])
    return replace(settings, train={**settings.train, "num_iters": updates})


def amount_of(num_images: int, network: str = "large") -> Amount:
    """The training of a network for a number of images; 0: unknown, some thousands."""
    fitting = (amount for limit, amount in AMOUNTS.items() if (num_images or SOME_THOUSANDS) < limit)
    return next(fitting, MANY[network])


def fitted(network: str, image_size: int, amount: Amount) -> Settings:
    """The settings for images of one of `IMAGE_SIZES`: the network by its name in `CHANNELS`.

    Images above 64 pixels are folded to a grid of 64 × 64, so that a network costs about the same at all sizes.
    """
    channels, lr = CHANNELS[network]
    fold = max(1, image_size // 64)
    shared = {"batch_size": amount.batch_size, "log_interval": 50}
    often, rarely = amount.num_iters // 20, amount.num_iters // 40
    unet = {
        "channels": channels,
        "embedding_channels": 4 * channels,
        "multipliers": [1, 2, 2] if image_size == 32 else [1, 1, 2, 2],
        "num_blocks": 2,
        "attention_strides": [image_size // 16, image_size // 8],
        "head_channels": 32,
        "fold": fold,
    }
    train = {
        **shared, "num_iters": amount.num_iters, "lr": lr, "warmup_iters": 500, "dropout": amount.dropout,
        "ema": amount.ema, "sample_interval": often, "ckpt_interval": often, "unet": unet,
    }  # fmt: skip
    distill = {
        **shared, "num_iters": often, "lr": lr / 3, "warmup_iters": 20, "sample_interval": rarely,
        "ckpt_interval": rarely,
    }  # fmt: skip
    return Settings(train, distill, {"image_size": image_size, "image_channels": 3})


def preset_for(shape: Sequence[int], num_images: int, device: str) -> str:
    """The preset for a number of samples (0: some thousands) of a shape (C, H, W) or (C, L) and a device; never one of
    the papers'."""
    if len(shape) == 2:
        return OF_SOUNDS[device == "cuda" and (num_images or SOME_THOUSANDS) >= min(AMOUNTS)]
    if (image_size := shape[-1]) <= LARGEST_OF_DIGITS:
        return "digits"
    order = list(CHANNELS)
    network = min(amount_of(num_images).network, DEVICE_LIMITS[device], key=order.index)
    return f"{network}{next((size for size in IMAGE_SIZES if image_size <= size), IMAGE_SIZES[-1])}"


def read_settings(path: Path) -> Settings:
    """A configuration file.

    Raises:
        OptionError: it cannot be read, is not TOML, or has an unknown key or an invalid value.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {cause_of(error)}", "give --config a TOML file") from None
    settings_text, mark, said = text.rpartition(CHECKSUM_MARK)
    if path.name == RUN_FILE and mark and said.strip() != checksum(settings_text):  # a copy may be edited as it is
        raise OptionError(f"{path} is damaged, or edited", "restore it, or delete its last line, the checksum")
    settings = _settings(text, str(path))
    # those of the other command too, before any of them is used
    check_values(settings_of(TrainConfig), settings.train, str(path))
    check_values(settings_of(DistillConfig), settings.distill, f"{path} [distill]")
    return settings


def _settings(text: str, origin: str) -> Settings:
    try:
        table = parse(text, tomllib.loads)
    except ValueError as error:
        raise OptionError(f"{origin} is not TOML: {error}", "correct the file") from None
    distill, assumed = table.pop("distill", {}), table.pop("assumed", {})
    return Settings(train=table, distill=distill, assumed=assumed)


def write_run(folder: Path, config: TrainConfig | DistillConfig) -> None:
    """Record the resolved settings in `folder`."""
    write_text(folder / RUN_FILE, run_text(config))


def run_text(config: TrainConfig | DistillConfig) -> str:
    """The text of `run.toml`, all resolved settings: `--config folder/run.toml` repeats the run."""
    values = {key: value for key, value in values_of(config).items() if value is not None}
    text = tomli_w.dumps({"distill": values} if isinstance(config, DistillConfig) else values)
    return f"{text}{CHECKSUM_MARK}{checksum(text)}\n"


def read_run(folder: Path) -> Settings:
    """The settings that `write_run` recorded.

    Raises:
        VdiffError: no run was recorded there.
    """
    if not (folder / RUN_FILE).is_file():
        raise VdiffError(f"{folder} holds no run to resume: it has no {RUN_FILE}", "start it without --resume")
    return read_settings(folder / RUN_FILE)


def recorded_layer(kind: type[LoopConfig], folder: Path) -> dict[str, Mapping[str, Any]]:
    """The settings of a run of this kind that are recorded in `folder`, as a layer of `resolve`.

    Raises:
        VdiffError: there is no run, or it is one of the other command.
    """
    settings = read_run(folder)
    if kind is TrainConfig and not settings.train:
        raise VdiffError(f"{folder} holds a student, not a base model", "give the distill.py command that began it")
    if kind is DistillConfig and not settings.distill:
        raise VdiffError(
            f"{folder} was begun by train.py", "give another --name or --out to keep both, or --overwrite to replace it"
        )
    return {str(folder / RUN_FILE): settings.train if kind is TrainConfig else settings.distill}
