"""Flags made from the fields of dataclasses, so that each setting is declared once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

import click

from vdiff.cli.options import Checkpoint, Number, OneOf, option, switch
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import OptionError
from vdiff.settings import COMMAND_LINE, DATA, MACHINE, MODEL, OPTIMISATION, RECORDS, choices_of, parameters, value_type
from vdiff.training.config import Config, DistillConfig, LoopConfig, check_packages, resolve, settings_of
from vdiff.training.presets import DISTILLING, FINE_TUNING, PRESETS, Settings, read_preset, read_settings

config_option = option(
    "--config",
    "config_file",
    group="Run",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="TOML file with settings: of train.py at the top level, of its network in [unet], of distill.py in [distill].",
)


def sampler_settings(function: Any) -> Any:
    """A flag for every setting of a sampler; flags that are not given stay None, and the sampler's default applies."""
    found: dict[str, dict[str, Field[Any]]] = {}
    for sampler, kind in SAMPLERS.items():
        for name, item in parameters(kind).items():
            found.setdefault(name, {})[sampler] = item
    for items in reversed(found.values()):
        usual = Counter(item.default for item in items.values()).most_common(1)[0][0]
        others = [f"{item.default} for {sampler}" for sampler, item in items.items() if item.default != usual]
        shown = "" if usual is None else ", ".join([*others, f"else {usual}" if others else str(usual)])
        widest = max(items.values(), key=lambda item: item.metadata["high"] or math.inf)
        function = flag(widest, group="Sampler", shown=shown)(function)
    return function


def settings(kind: type[LoopConfig]) -> Callable[[Any], Any]:
    """A flag for every setting of `kind`; flags that are not given stay None: the preset or the default applies."""
    order = (DATA, MODEL, OPTIMISATION, RECORDS, MACHINE)
    known = [item for item in settings_of(kind).values() if "group" in item.metadata]
    by_method = {name for method in METHODS.values() for name in method.settings({"lr": 1.0, "num_iters": 1})}

    own_presets = DISTILLING if kind is DistillConfig else FINE_TUNING
    ordered = sorted(known, key=lambda item: order.index(item.metadata["group"]))

    def decorate(function: Any) -> Any:
        for item in reversed(ordered):
            shown = item.metadata["shown"] or ("by preset" if item.default is MISSING else str(item.default))
            said = ", or by method" if kind is DistillConfig and item.name in by_method else ""
            presets = (*PRESETS, *own_presets) if item.name == "preset" else ()
            function = flag(item, group=item.metadata["group"], shown=shown + said, choices=presets)(function)
        return function

    return decorate


def flag(item: Field[Any], *, group: str, shown: str, choices: Sequence[str] = ()) -> Callable[[Any], Any]:
    """The flag of one setting, under a heading; `shown` is its default in the help.

    Args:
        choices: all values, if the setting itself does not list them.
    """
    rules, kind, name = item.metadata, value_type(item), item.name
    names = [f"--{rules['flag'] or name}", name]
    attributes: dict[str, Any] = {
        "group": group,
        "default": None,
        "help": rules["help"],
        "show_default": shown or False,
        "hidden": rules["hidden"],
    }
    if name in AVERAGES:
        return option(*names, type=AVERAGES[name], **attributes)
    if kind is bool:
        return switch(*names, **attributes)
    if choices := choices_of(item) or choices:
        return option(*names, type=OneOf(choices), **attributes)
    attributes["metavar"] = rules["unit"] or {int: "INTEGER", float: "NUMBER", str: "TEXT"}[kind]
    types: dict[type, click.ParamType] = {
        int: click.IntRange(rules["low"], rules["high"]),
        float: Number(rules["low"], rules["high"], min_open=rules["open_low"]),
        str: Checkpoint(str, imports=False) if name == "base" else click.STRING,
    }
    return option(*names, type=types[kind], **attributes)


FEWEST = 100


class Average(click.ParamType):
    """The average that is saved, in one of three units; each unit is a separate setting."""

    name = "DECAY|IMAGES|PERCENT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        """`0.999` → `ema`, `500000` → `ema_images`, `0.1%` → `ema_remainder`."""
        text = str(value)
        if text.endswith("%"):
            return {"ema_remainder": Number(0, 99).convert(text[:-1], param, ctx) / 100}
        number = Number(0).convert(text, param, ctx)
        if 1 < number < FEWEST:
            self.fail(f"{text} is neither a decay up to 1 nor a half-life of at least {FEWEST} images", param, ctx)
        return {"ema": number} if number <= 1 else {"ema_images": number}


class MoreAverages(click.ParamType):
    """More averages: decays and the word `profiles`."""

    name = "DECAY,…|profiles"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """`0.99,profiles` → `ema_more` and `ema_profiles`."""
        del param, ctx
        words = [word.strip() for word in str(value).split(",")]
        if "profiles" not in words:
            return {"ema_more": value}
        decays = ",".join(word for word in words if word != "profiles")
        return {"ema_more": decays, "ema_profiles": True} if decays else {"ema_profiles": True}


AVERAGES: dict[str, click.ParamType] = {"ema": Average(), "ema_more": MoreAverages()}


def check_early(kind: type[Config], flags: Mapping[str, Any], file: Path | None) -> None:
    """Find mistakes in settings before torch is imported, which takes seconds.

    Raises:
        OptionError: a preset, a file, a value or a package cannot be used, or settings contradict each other.
    """
    own, name = (
        read_settings(file) if file else Settings({}, {}),
        "distill" if issubclass(kind, DistillConfig) else "train",
    )
    settings = getattr(own, name)
    preset = read_preset(str(flags.get("preset") or settings.get("preset") or "toy"))  # toy, until a preset is chosen
    check_packages(resolve(kind, {"preset": getattr(preset, name), str(file): settings, COMMAND_LINE: flags}))


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings from the command line and the environment.

    Raises:
        OptionError: two flags set the same thing.
    """
    found: dict[str, Any] = {}
    for key, value in flags.items():
        for name, part in (value if key in AVERAGES and value is not None else {key: value}).items():
            if part is None:
                continue
            if found.setdefault(name, part) != part:
                raise OptionError(f"--{key} and --{name} set the same thing", f"give only --{key}")
    return found
