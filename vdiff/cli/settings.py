"""Flags made from the fields of a configuration, so that a setting is written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from vdiff.cli.options import Number, OneOf, option, switch
from vdiff.diffusion.distillation import METHODS
from vdiff.training.config import DATA, MACHINE, MODEL, OPTIMISATION, RECORDS, DistillConfig, LoopConfig, value_type
from vdiff.training.presets import PRESETS

config_option = option(
    "--config",
    "config_file",
    group="Run",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Settings by their names: those of train.py first, its network in [unet], those of distill.py in [distill].",
)


def settings(kind: type[LoopConfig]) -> Callable[[Any], Any]:
    """A flag for every setting of `kind`; what is not given stays None, and is left to preset and defaults."""
    order = (DATA, MODEL, OPTIMISATION, RECORDS, MACHINE)
    known = [item for item in fields(kind) if "group" in item.metadata]
    by_method = {name for method in METHODS.values() for name in method.settings({"lr": 1.0, "num_iters": 1})}
    told = by_method if kind is DistillConfig else set()
    flags = [
        flag(item, by_method=item.name in told)
        for item in sorted(known, key=lambda item: order.index(item.metadata["group"]))
    ]

    def decorate(function: Any) -> Any:
        for add in reversed(flags):
            function = add(function)
        return function

    return decorate


def flag(item: Field[Any], *, by_method: bool = False) -> Callable[[Any], Any]:
    """The flag of one setting; `by_method`: methods of distillation say otherwise than its default."""
    rules: Mapping[str, Any] = item.metadata
    kind = value_type(item)
    shown = rules["shown"] or ("by preset" if item.default is MISSING else str(item.default))
    if by_method:
        shown += ", or by method"
    attributes: dict[str, Any] = {
        "group": rules["group"],
        "default": None,
        "help": rules["help"],
        "show_default": shown,
    }
    name = f"--{item.name}"
    if kind is bool:
        return switch(name, **attributes)
    choices = rules["choices"] or (PRESETS if item.name == "preset" else ())
    if choices:
        return option(name, type=OneOf(choices), **attributes)
    attributes["metavar"] = rules["unit"] or {int: "INTEGER", float: "NUMBER", str: "TEXT"}[kind]
    types = {
        int: click.IntRange(rules["low"], rules["high"]),
        float: Number(rules["low"], rules["high"], min_open=rules["open_low"]),
        str: click.STRING,
    }
    return option(name, type=types[kind], **attributes)


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the command line or the environment gave."""
    return {key: value for key, value in flags.items() if value is not None}
