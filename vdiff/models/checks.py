"""Checks of options for sampling from a checkpoint: each returns the options for sampling, or refuses them."""

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
from vdiff.models.codec import LATENTS
from vdiff.models.condition import IMAGE, POOLED, TOKENS
from vdiff.models.diffusers_names import DIT, FLUX, PIXART, SD3, diffusers_class

UNIFORM = "uniform"
GUIDANCE_OF = {DIT: 3.0, PIXART: 3.5, SD3: 6.0, FLUX: 2.5}
"""The weights w of guidance of diffusers' pipelines with these transformers."""
MIN_SIGNAL = 1e-3
"""For a smaller α at t = 1, x̂ = (z − σ ε̂)/α magnifies the network's error too much."""


def class_numbers(config: CheckpointConfig, words: Sequence[str | int] | None) -> list[int]:
    """The numbers of classes, given by name or number; all if none are given; none for an unconditional model.

    Raises:
        VdiffError: a class is unknown, or the model has no classes.
    """
    names = config.class_names
    if words is None:
        return list(range(len(names)))
    if not names:
        raise VdiffError("this model has no classes", "leave it out")
    if not words:
        raise VdiffError("no class is given", suggestion("", names))
    numbers = []
    for word in map(str, words):
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            raise VdiffError(f"unknown class {word!r}", suggestion(word, names))
        numbers.append(names.index(word) if word in names else int(word))
    return numbers


def check_grid(config: CheckpointConfig, grid: str, num_steps: int) -> None:
    """Refuse times that the network was not trained for.

    Raises:
        VdiffError: a distilled model needs its own grid, or the grid cannot have this number of steps.
    """
    try:
        config.check_grid(grid, num_steps)
    except ValueError as error:
        if grid != UNIFORM and config.is_distilled:
            hint = "leave it out, or use the model that it was distilled from"
        else:
            hint = "give a number that does" if "divide" in str(error) else "give another"
        raise VdiffError(str(error), hint) from None


def check_guidance(config: CheckpointConfig, weight: float) -> None:
    """Refuse a guidance weight w that this network does not support.

    Raises:
        VdiffError: the network was not trained without classes, or only for another range of weights.
    """
    if not math.isfinite(weight):
        raise VdiffError(f"{weight} is not a guidance weight", "give a number such as 1.5")
    if config.signature.takes_guidance:
        low, high = config.guidance_range or (0.0, 0.0)
        if not low <= weight <= high:
            raise VdiffError(f"this model supports weights {low:g} to {high:g}, not {weight:g}", "give one of these")
    elif weight and not config.signature.null:
        raise VdiffError(
            "this model cannot predict without a class", "leave it out, or train with --class_dropout 0.1 for guidance"
        )


def check_interval(config: CheckpointConfig, weight: float, interval: Sequence[float] | None) -> None:
    """Refuse an invalid interval (first, last) of times for guidance with weight w; None: all times.

    Raises:
        VdiffError: the interval is not two increasing times, there is no guidance, or the network has it built in.
    """
    if interval is None:
        return
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        shown = ",".join(f"{t:g}" for t in interval)
        raise VdiffError(f"{shown} are not two increasing times between 0 and 1", "give two, such as 0.2,0.8")
    if not weight:
        raise VdiffError("it has no effect without guidance", "give --guidance too")
    if config.signature.takes_guidance:
        raise VdiffError("this model was distilled with guidance at all times", "leave it out")


def check_prompts(config: CheckpointConfig, prompts: Sequence[str], negative_prompt: str = "") -> None:
    """Refuse prompts for a model that takes none, and a text-to-image model without prompts.

    Raises:
        VdiffError: as said.
    """
    takes_text = TOKENS in config.signature.names
    if takes_text and not prompts:
        raise VdiffError("this is a text-to-image model, and no prompt is given", 'give one, such as "a red fox"')
    if not takes_text and (prompts or negative_prompt):
        raise VdiffError("this model takes no prompts", "leave it out, or import a text-to-image model")


def check_negative_prompt(config: CheckpointConfig, negative_prompt: str, weight: float) -> None:
    """Refuse a negative prompt where no guidance would move away from it.

    Raises:
        VdiffError: there is no guidance with weight w, or the network has it built in.
    """
    if not negative_prompt or (weight and not config.signature.takes_guidance):
        return
    if config.guidance_scale or config.signature.takes_guidance:
        kind = "model" if config.method == "base" else "student"
        raise VdiffError(f"it has no effect, as this {kind} has its guidance inside", "leave it out")
    raise VdiffError("it has no effect without guidance", "leave it out, or give --guidance too")


def check_condition(config: CheckpointConfig, *, is_given: bool) -> None:
    """Refuse condition images for a model that takes none, and a model that takes them without any.

    Raises:
        VdiffError: as said.
    """
    takes_image = IMAGE in config.signature.names
    if takes_image and not is_given:
        raise VdiffError("this model needs condition images, and none are given", "give a folder of them")
    if is_given and not takes_image:
        raise VdiffError("this model takes no condition images", "leave it out")


def without_limits(config: CheckpointConfig, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the sampler `name`; x̂ is not clipped if x has no bounds, as latents have none.

    Raises:
        VdiffError: clipping is requested, or the sampler always clips.
    """
    if config.space.limit is not None:
        return dict(options)
    limits = [key for key in ("clipping_value", "threshold") if options.get(key) is not None]
    if config.codec == LATENTS.name and (name == "clipped" or limits):
        what = limits[0] if limits else "the sampler clipped"
        raise VdiffError(
            f"{what} is for pixels, and this model generates latents, which have no bounds", "leave it out"
        )
    return {**({"clipping_value": None} if "clipping_value" in sampler_fields(name) else {}), **options}


def default_guidance(config: CheckpointConfig) -> float:
    """The default weight w: that of diffusers' pipelines for a latent model, else 0.

    Their scale w + 1 is 7.5, for Stable Diffusion XL 5, and for transformers that of `GUIDANCE_OF`. A distilled model
    has learned its guidance; one that takes the weight as an input gets the nearest weight in its range. A FLUX that
    takes none has it inside.
    """
    names, name = config.signature.names, diffusers_class(config.network_config)
    if config.codec != LATENTS.name or config.components is None:
        return 0.0
    is_student = config.method != "base" or name == FLUX
    if (is_student and not config.guidance_range) or not config.signature.null:
        return 0.0
    low, high = config.guidance_range or (-math.inf, math.inf)
    return min(max(low, GUIDANCE_OF.get(name, 4.0 if POOLED in names else 6.5)), high)


def build_sampler(name: str, options: Mapping[str, Any]) -> Sampler:
    """The sampler `name` with these options.

    Raises:
        VdiffError: the sampler is unknown, or an option is unknown or invalid.
    """
    if name not in SAMPLERS:
        raise VdiffError(f"unknown sampler {name!r}", suggestion(name, SAMPLERS))
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
    """Refuse an unclipped x̂ of an ε-prediction on a schedule that ends in pure noise.

    Raises:
        VdiffError: the model and the options are such a case.
    """
    if not config.family.predicts_noise or options.get("clipping_value", 1.0) is not None:
        return
    end = build_schedule(config.schedule).angle(torch.ones(1))
    if float(end.cos()) < MIN_SIGNAL:
        raise VdiffError(
            "an eps-prediction at zero signal carries no information about the image, so x must be clipped", "clip it"
        )
