"""Settings in TOML: the presets of the package, configuration files, and the record of each run.

A file holds the settings of `train.py` as keys, the network in `[unet]`, the settings of `distill.py` in `[distill]`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
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

PRESETS = ("toy", "digits", "cifar10", "imagenet64", "lsun128", "celebahq256")
CHECKSUM_MARK = f"# {CHECKSUM} "
LARGEST_SIZE = {16: "digits", 32: "cifar10", 64: "imagenet64", 128: "lsun128"}


@dataclass(frozen=True)
class Settings:
    """One file's settings of `train.py` and of `distill.py`, and the images a preset is made for."""

    train: Mapping[str, Any]
    distill: Mapping[str, Any]
    assumed: Mapping[str, int] = field(default_factory=dict)


def read_preset(name: str) -> Settings:
    """A preset of the package.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in PRESETS:
        raise OptionError(f"unknown preset {name!r}", suggestion(name, PRESETS))
    return _settings(resources.files("vdiff").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8"), name)


def preset_for(image_size: int) -> str:
    """The preset for images of this size: `LARGEST_SIZE`, and celebahq256 for larger ones."""
    return next((name for size, name in LARGEST_SIZE.items() if image_size <= size), "celebahq256")


def read_settings(path: Path) -> Settings:
    """A configuration file.

    Raises:
        OptionError: it cannot be read, is no TOML, or has an unknown key or a value that cannot be used.
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
        raise OptionError(f"{origin} is no TOML: {error}", "mend the file") from None
    distill, assumed = table.pop("distill", {}), table.pop("assumed", {})
    return Settings(train=table, distill=distill, assumed=assumed)


def write_run(folder: Path, config: TrainConfig | DistillConfig) -> None:
    """Record the resolved settings in `folder`."""
    write_text(folder / RUN_FILE, run_text(config))


def run_text(config: TrainConfig | DistillConfig) -> str:
    """The resolved settings, as `run.toml` holds them: `--config folder/run.toml` runs them again."""
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
        raise VdiffError(f"{folder} holds a student, not a base model", "the distill.py command that began it goes on")
    if kind is DistillConfig and not settings.distill:
        raise VdiffError(f"{folder} was begun by train.py", "give --overwrite to replace it, or another --out")
    return {str(folder / RUN_FILE): settings.train if kind is TrainConfig else settings.distill}
