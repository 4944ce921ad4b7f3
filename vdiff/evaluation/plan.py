"""What is asked of an evaluation, held against what the checkpoints, the data and the features can answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.evaluation.features import INCEPTION, Classifier, Features
from vdiff.models.checkpoint import CheckpointConfig, read_config

METRICS = ("fd", "kd", "precision", "recall", "isc", "rmse", "psnr", "nearest")
OF_INCEPTION = {"fid": "fd", "kid": "kd"}
MIN_IMAGES = 10
UNBIASED_FROM = 10_000
EXTRAPOLATED_FROM = 5
"""Samples for each dimension from which `fd_inf` is told: with 1.5 it is negative more often than not."""


@dataclass(frozen=True)
class Request:
    """One row: a checkpoint, drawn with a sampler in a number of steps on a grid; `raw`: not with its average."""

    checkpoint: Path
    sampler: str = "ddim"
    num_steps: int = 1
    grid: str = "uniform"
    raw: bool = False


def requests_for(
    checkpoints: Sequence[Path],
    *,
    num_timesteps: Sequence[int] = (),
    samplers: Sequence[str] = ("ddim",),
    grid: str = "uniform",
    raw: bool = False,
) -> tuple[list[Request], list[str]]:
    """A request for each checkpoint, number of steps (none given: its own) and sampler; and those left out, in words.

    What is left out is a number of steps that a distilled model was not made for, where it can take another one.

    Raises:
        VdiffError: a checkpoint that cannot be read, or can take none of what is asked.
        OptionError: no such sampler.
    """
    for name in samplers:
        if name not in SAMPLERS:
            raise OptionError(f"--samplers {name}: no such sampler", suggestion(name, SAMPLERS))
    requests: list[Request] = []
    left_out: list[str] = []
    for folder in checkpoints:
        config = read_config(folder)
        reasons = {steps: why_not(config, grid, steps) for steps in num_timesteps or [config.num_timesteps]}
        if all(reasons.values()):
            steps, reason = next(iter(reasons.items()))
            raise VdiffError(f"{folder} cannot be drawn in {steps} steps: {reason}", "give other --num_timesteps")
        left_out += [f"{folder} in {steps} steps is left out: {reason}" for steps, reason in reasons.items() if reason]
        known = [steps for steps, reason in reasons.items() if not reason]
        requests += [Request(folder, name, steps, grid, raw) for name in samplers for steps in known]
    return requests, left_out


def why_not(config: CheckpointConfig, grid: str, num_steps: int) -> str:
    """Why a model cannot be drawn in a number of steps on a grid; empty where it can."""
    try:
        config.check_grid(grid, num_steps)
    except ValueError as error:
        return str(error)
    return ""


def check_guidance(folder: Path, config: CheckpointConfig, weight: float) -> None:
    """Refuse a weight w of guidance that a model cannot be drawn with.

    Raises:
        OptionError: as said.
    """
    if not math.isfinite(weight):
        raise OptionError(f"--guidance {weight}: no weight", "give a number such as 1.5")
    if config.unet.get("guidance_input"):
        low, high = config.guidance_range or (0.0, 0.0)
        if not low <= weight <= high:
            raise OptionError(
                f"--guidance {weight:g}: {folder} knows weights from {low:g} to {high:g}", "give one of those"
            )
    elif weight and not config.unet.get("null_class"):
        raise OptionError(f"--guidance {weight:g}: {folder} has no answer without a class", "leave it out")


def shared_kind(configs: dict[Path, CheckpointConfig]) -> tuple[int, int]:
    """Image size and channels, which all models share.

    Raises:
        VdiffError: they do not.
    """
    kinds = {folder: (config.image_size, int(config.unet["in_channels"])) for folder, config in configs.items()}
    first, kind = next(iter(kinds.items()))
    for folder, other in kinds.items():
        if other != kind:
            raise VdiffError(
                f"{first} draws images of {_shown(kind)}, {folder} of {_shown(other)}",
                "evaluate them one by one",
            )
    return kind


def check_kind(models: tuple[int, int], data: tuple[int, int], path: Path | str) -> None:
    """Refuse data of another size or with other channels than what the models draw, each told as (size, channels).

    Raises:
        VdiffError: as said.
    """
    if models != data:
        raise VdiffError(
            f"the checkpoints draw images of {_shown(models)}, {path} holds {_shown(data)}",
            "give --data with such images as the model was trained on",
        )


def _shown(kind: tuple[int, int]) -> str:
    size, channels = kind
    return f"{size}×{size} with {channels} channel{'s' if channels > 1 else ''}"


def chosen_metrics(wanted: Sequence[str], features: Features, has_teacher: bool) -> tuple[str, ...]:
    """The metrics that are asked for, in the order of `METRICS`; without a wish, all that there can be.

    Raises:
        OptionError: an unknown one, or one that these features or the lack of a teacher cannot give.
    """
    is_inception = features.name == INCEPTION
    possible = [
        name
        for name in METRICS
        if (name != "isc" or isinstance(features, Classifier)) and (name not in ("rmse", "psnr") or has_teacher)
    ]
    if not wanted:
        return tuple(possible)
    found = set()
    for word in wanted:
        name = OF_INCEPTION.get(word, word)
        if name not in METRICS:
            raise OptionError(f"--metrics {word}: no such metric", suggestion(word, [*METRICS, *OF_INCEPTION]))
        if (word in OF_INCEPTION and not is_inception) or (name == "isc" and name not in possible):
            instead = f", or ask for {name}" if word in OF_INCEPTION else ""
            raise OptionError(f"--metrics {word} needs Inception's features", f"give --features inception{instead}")
        if name not in possible:
            raise OptionError(f"--metrics {word} compares with a teacher", "give --teacher CHECKPOINT")
        found.add(name)
    return tuple(name for name in METRICS if name in found)


def check_numbers(n: int, num_images: int, features: Features, metrics: Sequence[str], data: Path | str) -> None:
    """Refuse fewer images than figures can rest on.

    Raises:
        VdiffError: fewer than `MIN_IMAGES`, or for a Fréchet distance than the features have dimensions.
    """
    least = max(MIN_IMAGES, features.dim if "fd" in metrics else 0)
    why = f"the {features.dim} dimensions of the features {features.name}" if least > MIN_IMAGES else f"{MIN_IMAGES}"
    others = ",".join(name for name in metrics if name not in ("fd", "isc")) or "kd"
    without = f", or vdiff evaluate --metrics {others}" if least > MIN_IMAGES else ""
    if n < least:
        raise OptionError(f"--num {n} is fewer than {why}", f"give --num {least} or more{without}")
    if num_images < least:
        raise VdiffError(f"{data} holds {num_images} images, fewer than {why}", f"give more data{without}")
