"""Settings: fields of dataclasses that are also flags, keys of configuration files, help texts and checks.

A training run, a distillation method and a sampler each declare theirs in their own dataclass. Nothing here imports
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any

from vdiff.errors import MAX_WHOLE, OptionError, suggestion

COMMAND_LINE = "the command line"
DATA, MODEL, OPTIMISATION, RECORDS, MACHINE = "Data", "Model", "Optimisation", "Records", "Machine"
WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "a table"}
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "dict[str, Any]": dict}


def setting(
    text: str,
    *,
    group: str = MODEL,
    default: Any = MISSING,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    choices: Collection[str] | Callable[[], Collection[str]] = (),
    unit: str = "",
    shown: str = "",
    free: bool = False,
    flag: str = "",
    hidden: bool = False,
) -> Any:
    """A field that is also a flag and a key of configuration files; without a default, every preset must set it.

    Args:
        text: the help text.
        group: the heading in `--help`.
        low, high: the range, with both ends, unless `open_low`.
        choices: the allowed words, or a function that returns them, as a registry may grow.
        unit: the placeholder after the flag in `--help`.
        shown: the default in `--help`, if the value itself is not informative.
        free: whether a run may be resumed with another value, because its result does not depend on it.
        flag: the flag's name, if it differs from the field's.
        hidden: whether help texts omit the flag, because another one does the same.
    """
    metadata = {
        "help": text, "group": group, "low": low, "high": high, "open_low": open_low, "choices": choices,
        "unit": unit, "shown": shown, "free": free, "flag": flag, "hidden": hidden,
    }  # fmt: skip
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


def parameters(kind: Any) -> dict[str, Field[Any]]:
    """Name → field, for the settings of a dataclass."""
    return {item.name: item for item in fields(kind) if "group" in item.metadata}


def parameters_of_all(registry: Mapping[str, Any], taken: Iterable[str] = ()) -> dict[str, Field[Any]]:
    """Name → field, for the settings of all classes in a registry.

    Raises:
        ValueError: two classes declare a name differently, or a class declares a name in `taken` or without a default.
    """
    found: dict[str, Field[Any]] = {}
    taken = set(taken)
    for name, kind in registry.items():
        for key, item in parameters(kind).items():
            if key in taken or found.setdefault(key, item) is not item:
                raise ValueError(f"{name}: another setting is called {key} already")
            if item.default is MISSING:
                raise ValueError(f"{name}: {key} needs a default")
    return found


def check_values(known: Mapping[str, Field[Any]], values: Any, origin: str) -> dict[str, Any]:
    """Name → value, each as the type of its setting.

    Raises:
        OptionError: not a table, an unknown name, or an invalid value (see `check_value`); it names `origin`.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"{origin}: {values!r} is not a table", "correct the file")
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise OptionError(f"{origin}: unknown setting {key!r}", suggestion(key, known))
        checked[key] = check_value(known[key], value, origin)
    return checked


def check_value(setting: Field[Any], value: Any, origin: str) -> Any:
    """`value` as the setting's type. Raises OptionError: wrong type, out of range, or not one of the choices."""
    rules = setting.metadata
    where = f"{origin}: {setting.name} =" if origin != COMMAND_LINE else f"--{rules.get('flag') or setting.name}"
    kind = value_type(setting)
    low, high = rules.get("low"), rules.get("high")
    if type(value) is int and abs(value) > max(MAX_WHOLE, high or 0):
        raise OptionError(f"{where} {str(value)[:20]} is too large", f"it must be at most {high or MAX_WHOLE}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise OptionError(f"{where} {value!r} is not {WORDS[kind]}", f"give {WORDS[kind]}")
    choices = choices_of(setting)
    if choices and value not in choices:
        raise OptionError(f"{where} {value!r} is unknown", suggestion(str(value), choices))
    if low is not None and (not value >= low or (rules["open_low"] and value == low)):
        raise OptionError(
            f"{where} {value} is too small", f"it must be {'above' if rules['open_low'] else 'at least'} {low}"
        )
    if high is not None and not value <= high:
        raise OptionError(f"{where} {value} is too large", f"it must be at most {high}")
    return value


def value_type(setting: Field[Any]) -> type:
    """`int`, `float`, `str`, `bool` or `dict`: the type of a setting, whether or not it may be None."""
    return TYPES[str(setting.type).removesuffix(" | None")]


def choices_of(setting: Field[Any]) -> list[str]:
    """The allowed words of a setting; empty if it has no choices."""
    choices = setting.metadata.get("choices", ())
    return list(choices() if callable(choices) else choices)
