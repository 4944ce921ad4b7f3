"""What can be asked of a checkpoint: each check answers what was asked in the form that drawing takes, or refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from vdiff.diffusion.samplers import SAMPLERS, Sampler
from vdiff.diffusion.schedules import build_schedule
from vdiff.errors import VdiffError, suggestion
from vdiff.models.checkpoint import CheckpointConfig

UNIFORM = "uniform"
MIN_SIGNAL = 1e-3
"""With a smaller α at t = 1, x̂ = (z − σ ε̂)/α is the network's error magnified."""


def class_numbers(config: CheckpointConfig, words: Sequence[str | int] | None) -> list[int]:
    """Classes by name or number; all of them where none is named, none for an unconditional model.

    Raises:
        VdiffError: an unknown class, or a model without classes.
    """
    names = config.class_names
    if words is None:
        return list(range(len(names)))
    if not names:
        raise VdiffError("this model knows no classes", "leave it out")
    if not words:
        raise VdiffError("no class is named", suggestion("", names))
    numbers = []
    for word in map(str, words):
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            raise VdiffError(f"unknown class {word!r}", suggestion(word, names))
        numbers.append(names.index(word) if word in names else int(word))
    return numbers


def check_grid(config: CheckpointConfig, grid: str, num_steps: int) -> None:
    """Refuse times that the network has never seen.

    Raises:
        VdiffError: another grid than its own for a distilled model, or a number of steps that the grid cannot have.
    """
    try:
        config.check_grid(grid, num_steps)
    except ValueError as error:
        if grid != UNIFORM and config.is_distilled:
            hint = "leave it out, or take the model that it was distilled from"
        else:
            hint = "give a number that does" if "divide" in str(error) else "give another"
        raise VdiffError(str(error), hint) from None


def check_guidance(config: CheckpointConfig, weight: float) -> None:
    """Refuse a weight w that this network cannot be guided with.

    Raises:
        VdiffError: a network that learned no answer without a class, or another range of weights.
    """
    if not math.isfinite(weight):
        raise VdiffError(f"{weight} is not a weight", "give a number such as 1.5")
    if config.signature.takes_guidance:
        low, high = config.guidance_range or (0.0, 0.0)
        if not low <= weight <= high:
            raise VdiffError(f"this model knows weights from {low:g} to {high:g}, not {weight:g}", "give one of those")
    elif weight and not config.signature.null:
        raise VdiffError(
            "this model has no answer without a class", "leave it out, or train with --class_dropout 0.1 for guidance"
        )


def check_interval(config: CheckpointConfig, weight: float, interval: Sequence[float] | None) -> None:
    """Refuse an interval (first, last) of times t that are guided with the weight w; None: all times.

    Raises:
        VdiffError: These are not two increasing times, there is no guidance, or the network knows none.
    """
    if interval is None:
        return
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        shown = ",".join(f"{t:g}" for t in interval)
        raise VdiffError(f"{shown} are not two increasing times between 0 and 1", "give two, such as 0.2,0.8")
    if not weight:
        raise VdiffError("it means nothing without guidance", "give --guidance too")
    if config.signature.takes_guidance:
        raise VdiffError("this model was distilled with guidance at all times", "leave it out")


def build_sampler(name: str, options: Mapping[str, Any]) -> Sampler:
    """The sampler `name` with those options.

    Raises:
        VdiffError: no such sampler, or an option that it has no use for or cannot take.
    """
    if name not in SAMPLERS:
        raise VdiffError(f"no sampler {name!r}", suggestion(name, SAMPLERS))
    known = sampler_fields(name)
    for key in options:
        if key not in known:
            raise VdiffError(f"the sampler {name} does not use {key}", f"it takes {', '.join(sorted(known))}")
    try:
        return SAMPLERS[name](**options)
    except ValueError as error:
        raise VdiffError(str(error), "give another value") from None


def sampler_fields(name: str) -> set[str]:
    """The options of the sampler `name`."""
    return {field.name for field in fields(SAMPLERS[name])}  # type: ignore[arg-type]


def check_limits(config: CheckpointConfig, options: Mapping[str, Any]) -> None:
    """Refuse an x̂ without limits from an ε-prediction on a schedule that ends in noise alone.

    Raises:
        VdiffError: as said.
    """
    if not config.family.predicts_noise or options.get("clipping_value", 1.0) is not None:
        return
    end = build_schedule(config.schedule).angle(torch.ones(1))
    if float(end.cos()) < MIN_SIGNAL:
        raise VdiffError(
            "an eps-prediction at zero signal says nothing about the image, so x must be clipped", "clip it"
        )
