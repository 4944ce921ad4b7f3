"""Our schedules and the configurations of diffusers' schedulers: β by name or as a table, and what a network predicts.

Their timestep k − 1 is our level k of a table, t = k/L, and the label that a network is told there is k − 1 in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vdiff.diffusion.schedules import (
    MAX_LEVELS,
    CosineSchedule,
    DdpmCosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    Schedule,
    TableSchedule,
    grid_times,
)
from vdiff.errors import VdiffError
from vdiff.interop.json_file import JsonFile

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x": "sample"}
SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
]
"""Those that read the same keys about β with the same defaults."""
SPACINGS = ["leading", "trailing", "linspace"]
TOLERANCE = 2e-7
"""How far a β may be off: theirs may be rounded to 24 bits."""


def write_scheduler_config(schedule: Schedule, prediction: str, *, clip: bool) -> dict[str, Any]:
    """The arguments of the `DDIMScheduler` whose steps are ours, wherever their number divides the levels.

    Its last step ends at ᾱ = 1, as ours at φ = 0.

    Args:
        clip: clip x̂ to ±1.

    Raises:
        VdiffError: diffusers has no word for the prediction.
    """
    if prediction not in PREDICTIONS:
        raise VdiffError(
            f"diffusers has no word for a network that predicts {prediction!r}",
            f"only {', '.join(PREDICTIONS)} can be written: distil with another --prediction",
        )
    return {
        "num_train_timesteps": schedule.label_scale,
        "trained_betas": betas_of(schedule),
        "prediction_type": PREDICTIONS[prediction],
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": clip,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }


def betas_of(schedule: Schedule) -> list[float]:
    """β_k = 1 − ᾱ_k/ᾱ_{k−1} for k = 1 … L, with ᾱ_k = cos² φ(k/L) and ᾱ_0 = 1; for a table of L levels its own.

    From angles, 1 − ᾱ_k/ᾱ_{k−1} = sin(φ_k − φ_{k−1}) sin(φ_k + φ_{k−1})/cos² φ_{k−1} loses no digits.
    """
    if isinstance(schedule, TableSchedule) and schedule.num_levels == schedule.label_scale:
        return schedule.betas()
    angles = [0.0, *schedule.angle(grid_times(schedule.label_scale)[1:]).tolist()]
    return [
        min(math.sin(angle - before) * math.sin(angle + before) / math.cos(before) ** 2, 1.0)
        for before, angle in pairwise(angles)
    ]


def read_prediction(file: JsonFile) -> str:
    """What a network predicts, by a scheduler's configuration.

    Raises:
        VdiffError: a scheduler or prediction that we have no word for; the file and key are named.
    """
    file.word("_class_name", "", SCHEDULERS)
    usual = "sample" if file.get("predict_epsilon") is False else "epsilon"  # how files of 2022 said it
    said = file.word("prediction_type", usual, [*PREDICTIONS.values()])
    return next(ours for ours, theirs in PREDICTIONS.items() if theirs == said)


def read_table(file: JsonFile) -> list[float] | None:
    """The table of β, where one is given.

    Raises:
        VdiffError: it is no such table, or is to be changed before it is used; the file and key are named.
    """
    if file.flag("rescale_betas_zero_snr", False):
        raise file.refusal("rescale_betas_zero_snr", "only false can be read")
    size = file.whole("num_train_timesteps", 1000, low=1, high=MAX_LEVELS)
    betas = file.get("trained_betas")
    if betas is None:
        return None
    if not isinstance(betas, list) or len(betas) != size:
        raise file.refusal("trained_betas", f"{size} numbers from 0 to 1 are due")
    if any(type(beta) not in (int, float) or not 0 < beta <= 1 for beta in betas):
        raise file.refusal("trained_betas", f"{size} numbers from 0 to 1 are due")
    return betas


def read_schedule(file: JsonFile) -> Schedule:
    """The schedule that a scheduler's configuration describes, by name or by its table.

    Raises:
        VdiffError: β that we have no word for; the file and key are named.
    """
    if (betas := read_table(file)) is not None:
        known = next((schedule for schedule in _candidates(betas) if agree(schedule, betas)), None)
        if known is None:
            raise file.refusal("trained_betas", "only linear, scaled_linear and cosine ones can be read")
        return known
    size = file.whole("num_train_timesteps", 1000, low=1, high=MAX_LEVELS)
    name = file.word("beta_schedule", "linear", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    if name == "squaredcos_cap_v2":
        return DdpmCosineSchedule(size)
    first = file.number("beta_start", 1e-4, low=0, high=1)
    last = file.number("beta_end", 0.02, low=0, high=1)
    return (LinearSchedule if name == "linear" else ScaledLinearSchedule)(size, first, last)


def remarks(file: JsonFile) -> list[str]:
    """In what a pipeline of theirs with this configuration draws other images than we do, one sentence each.

    Raises:
        VdiffError: a value is none of diffusers'; the file and key are named.
    """
    size = file.whole("num_train_timesteps", 1000, low=1, high=MAX_LEVELS)
    found = []
    if (spacing := file.word("timestep_spacing", "leading", SPACINGS)) != "trailing":
        found.append(f"its timesteps are {spacing}, ours trailing: the same at {size} steps only")
    if not file.flag("set_alpha_to_one", True):
        found.append("its last step stops at its first noise level, ours at the image (set_alpha_to_one)")
    if file.flag("thresholding", False):
        found.append("it clips to a quantile of the pixels (thresholding), ours to ±1 unless told otherwise")
    elif not file.flag("clip_sample", file.get("_class_name") in ("DDPMScheduler", "DDIMScheduler")):
        found.append("it does not clip the image; ours do unless told --no_clip")
    elif (limit := file.number("clip_sample_range", 1.0, low=0, high=1e6)) != 1.0:
        found.append(f"it clips the image to ±{limit}: --clipping_value {limit}")
    return found


def agree(schedule: Schedule, betas: Sequence[float]) -> bool:
    """Whether `betas` are the schedule's."""
    if schedule.label_scale != len(betas):
        return False
    return all(abs(ours - theirs) <= TOLERANCE for ours, theirs in zip(betas_of(schedule), betas, strict=True))


def _candidates(betas: Sequence[float]) -> list[Schedule]:
    """The schedules that have the first and the last β of the table."""
    size, first, last = len(betas), betas[0], betas[-1]
    found: list[Schedule] = [DdpmCosineSchedule(size)]
    if last < 1:
        found += [LinearSchedule(size, first, last), ScaledLinearSchedule(size, first, last)]
    kept = math.fsum(math.log1p(-beta) for beta in betas) if max(betas) < 1 else -math.inf  # log ᾱ_L
    if kept < -1e-3:
        # λ at t = 1 is log ᾱ_L/(1 − ᾱ_L); rounded because their tables have seven digits
        found.append(CosineSchedule(round(math.log1p(-math.exp(kept)) - kept, 3), size))
    return found
