"""Conversion between vdiff's schedules and configurations of diffusers' schedulers: β and the prediction type.

Timestep k − 1 of diffusers is level k of a table, t = k/L; the network receives the timestep k − 1 in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vdiff.diffusion.schedules import (
    MAX_LEVELS,
    CosineSchedule,
    DdpmCosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    Schedule,
    SigmoidSchedule,
    TableSchedule,
    grid_times,
)
from vdiff.errors import VdiffError
from vdiff.interop.foreign import JsonFile

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x": "sample"}
_OF_BETA = {"beta_start": 1e-4, "beta_end": 0.02}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_SPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SOLVER = {**_OF_BETA, **_SPACED, "thresholding": False, "use_flow_sigmas": False}
_RESCALED = {"rescale_betas_zero_snr": False}
_ENDED = {"final_sigmas_type": "zero"}
_DDPM = {**_OF_BETA, **_LEADING, **_CLIPPED, **_RESCALED, "thresholding": False, "variance_type": "fixed_small"}
_DDIM = {**_OF_BETA, **_LEADING, **_CLIPPED, **_RESCALED, "thresholding": False, "set_alpha_to_one": True}
_DPM = {**_SOLVER, **_ENDED, "lambda_min_clipped": -math.inf, "variance_type": None, "use_dynamic_shifting": False}
_KDPM2 = {**_LINSPACE, **_SPACED, "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "PNDMScheduler": {**_OF_BETA, **_LEADING, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {**_DPM, **_LINSPACE, **_RESCALED, "use_lu_lambdas": False},
    "DPMSolverSinglestepScheduler": _DPM,
    "UniPCMultistepScheduler": {**_SOLVER, **_LINSPACE, **_RESCALED, **_ENDED, "use_dynamic_shifting": False},
    "DEISMultistepScheduler": {**_SOLVER, **_LINSPACE, "use_dynamic_shifting": False},
    "EulerDiscreteScheduler": {
        **_OF_BETA, **_LINSPACE, **_SPACED, **_RESCALED, **_ENDED, "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": {**_OF_BETA, **_LINSPACE, **_RESCALED},
    "HeunDiscreteScheduler": {**_KDPM2, **_CLIPPED, "clip_sample": False},
    "KDPM2DiscreteScheduler": _KDPM2,
    "KDPM2AncestralDiscreteScheduler": _KDPM2,
    "LMSDiscreteScheduler": {**_OF_BETA, **_LINSPACE, **_SPACED},
}  # fmt: skip
"""The supported schedulers: the fields of `BETAS` and `RULES` that each has, with its defaults.

Files may hold additional fields, which their scheduler ignores.
"""
BETAS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
"""Fields of all schedulers that define β."""


@dataclass(frozen=True)
class Rule:
    """The meaning of a field's values for vdiff.

    Attributes:
        same: values with which both samplers do the same.
        remark: the note for other values; empty: other values are refused.
        others: the other values; None: any number from 0, or from the value with the same result.
        where: an earlier field, and its value with which this field has an effect.
    """

    same: tuple[Any, ...]
    remark: str = ""
    others: tuple[Any, ...] | None = ()
    where: tuple[str, Any] | None = None


_SPACING = Rule((False,), "its noise levels are spaced by {key}; vdiff's only with --grid", (True,))
_ONLY_FALSE = Rule((False,))
RULES = {
    "timestep_spacing": Rule(
        ("trailing",),
        "its timesteps are {value}, vdiff's are trailing: they agree only at {size} steps",
        ("leading", "linspace"),
    ),
    "steps_offset": Rule(
        (0,), "its timesteps begin {value} later than vdiff's (steps_offset)", None, ("timestep_spacing", "leading")
    ),
    "set_alpha_to_one": Rule(
        (True,), "its last step ends at its first noise level, not at the image (set_alpha_to_one)", (False,)
    ),
    "final_sigmas_type": Rule(
        ("zero",), "its last step ends at its first noise level, not at the image (final_sigmas_type)", ("sigma_min",)
    ),
    "lambda_min_clipped": Rule((-math.inf,), "it skips its highest noise levels (lambda_min_clipped)", None),
    "variance_type": Rule(
        ("fixed_small", "fixed_small_log", None),
        "its noise has the variance {value} (--sampler ddpm --large_variance 1)",
        ("fixed_large", "fixed_large_log"),
    ),
    "thresholding": Rule(
        (False,), "it clips to a quantile of the pixels (thresholding), vdiff to ±1 by default", (True,)
    ),
    "clip_sample": Rule(
        (True,), "it does not clip the image; vdiff does without --no_clip", (False,), ("thresholding", False)
    ),
    "clip_sample_range": Rule(
        (1.0,), "it clips the image to ±{value}: --clipping_value {value}", None, ("clip_sample", True)
    ),
    "use_karras_sigmas": _SPACING,
    "use_exponential_sigmas": _SPACING,
    "use_beta_sigmas": _SPACING,
    "use_lu_lambdas": _SPACING,
    "use_flow_sigmas": _ONLY_FALSE,
    "use_dynamic_shifting": _ONLY_FALSE,
    "rescale_betas_zero_snr": Rule((False, True)),
    "timestep_type": Rule(("discrete",)),  # continuous: the timestep is log σ/4 and not the index of a level
}
"""Fields that change the images, in the order of the notes."""
CLIPPING = ("thresholding", "clip_sample", "clip_sample_range")
AS_IF: dict[str, Any] = {"timestep_spacing": "linspace", "clip_sample": False}
"""Values for schedulers without such a field; the default is the first of `Rule.same`."""
WITHOUT_EFFECT = {
    *("solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final", "skip_prk_steps"),
    *("predict_x0", "disable_corrector", "solver_p"),  # the rule of a step: sample.py has its own samplers
    *("dynamic_thresholding_ratio", "sample_max_value"),  # no effect without thresholding, which has a note
    *("sigma_min", "sigma_max", "interpolation_type"),  # no effect without other spacings, which have notes
    *("flow_shift", "time_shift_type", "shift_terminal"),  # no effect without use_flow_sigmas, which is refused
    *("predict_epsilon", "tensor_format", "timestep_values"),  # fields of 2022; the first is read as a prediction_type
}
TOLERANCE = 2e-7
"""The tolerance of a β: diffusers' may be rounded to 24 bits."""


def write_scheduler_config(schedule: Schedule, prediction: str, *, clip: bool) -> dict[str, Any]:
    """The arguments of a `DDIMScheduler` with vdiff's steps, for every number of steps that divides the levels.

    Its last step ends at ᾱ = 1, like vdiff's at φ = 0.

    Args:
        clip: clip x̂ to ±1.

    Raises:
        VdiffError: diffusers does not support the prediction.
    """
    if prediction not in PREDICTIONS:
        raise VdiffError(
            f"diffusers has no prediction type {prediction!r}",
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
    """β_k = 1 − ᾱ_k/ᾱ_{k−1} for k = 1 … L, with ᾱ_k = cos² φ(k/L) and ᾱ_0 = 1; for a table of L levels, its own β.

    From angles, 1 − ᾱ_k/ᾱ_{k−1} = sin(φ_k − φ_{k−1}) sin(φ_k + φ_{k−1})/cos² φ_{k−1} is computed without cancellation.
    """
    if isinstance(schedule, TableSchedule) and schedule.num_levels == schedule.label_scale:
        return schedule.betas()
    angles = [0.0, *schedule.angle(grid_times(schedule.label_scale)[1:]).tolist()]
    return [
        min(math.sin(angle - before) * math.sin(angle + before) / math.cos(before) ** 2, 1.0)
        for before, angle in pairwise(angles)
    ]


def read_prediction(file: JsonFile) -> str:
    """The prediction type in a scheduler's configuration.

    Raises:
        VdiffError: vdiff does not support the scheduler or the prediction; names the file and the key.
    """
    _kind(file)
    usual = "sample" if file.get("predict_epsilon") is False else "epsilon"  # the form in files of 2022
    said = file.word("prediction_type", usual, [*PREDICTIONS.values()])
    return next(ours for ours, theirs in PREDICTIONS.items() if theirs == said)


def read_table(file: JsonFile) -> list[float] | None:
    """The table of β, if one is given.

    Raises:
        VdiffError: the table is not valid, or diffusers would change it before use; names the file and the key.
    """
    size = file.whole("num_train_timesteps", 1000, low=1, high=MAX_LEVELS)
    betas = file.get("trained_betas")
    if betas is None:
        return None
    if file.flag("rescale_betas_zero_snr", False):
        raise file.refusal("rescale_betas_zero_snr", "with trained_betas only false can be read")
    if not isinstance(betas, list) or len(betas) != size:
        raise file.refusal("trained_betas", f"need {size} numbers from 0 to 1")
    if any(type(beta) not in (int, float) or not 0 < beta <= 1 for beta in betas):
        raise file.refusal("trained_betas", f"need {size} numbers from 0 to 1")
    return betas


def read_schedule(file: JsonFile) -> Schedule:
    """The schedule that a scheduler's configuration describes, by name or by its table.

    Raises:
        VdiffError: vdiff does not support the β; names the file and the key.
    """
    zero_snr = file.flag("rescale_betas_zero_snr", False)
    if (betas := read_table(file)) is not None:
        known = next((schedule for schedule in _candidates(betas) if agree(schedule, betas)), None)
        if known is None:
            raise file.refusal("trained_betas", "only linear, scaled_linear, cosine and sigmoid ones can be read")
        return known
    size = file.whole("num_train_timesteps", 1000, low=1, high=MAX_LEVELS)
    name = file.word("beta_schedule", "linear", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    if name == "squaredcos_cap_v2":
        return DdpmCosineSchedule(size, zero_snr=zero_snr)
    usual = SCHEDULERS[_kind(file)]
    first = file.number("beta_start", usual["beta_start"], low=0, high=1)
    last = file.number("beta_end", usual["beta_end"], low=0, high=1)
    return (LinearSchedule if name == "linear" else ScaledLinearSchedule)(size, first, last, zero_snr)


def spacing_of(file: JsonFile) -> str:
    """How the scheduler spaces its timesteps: leading, trailing or linspace."""
    return str(_value(file, _kind(file), "timestep_spacing", RULES["timestep_spacing"]))


def remarks(file: JsonFile, *, latents: bool = False) -> list[str]:
    """A sentence for each reason why a pipeline with this configuration draws other images than vdiff.

    Args:
        latents: it generates latents, which vdiff never clips.

    Raises:
        VdiffError: diffusers does not know a value, or vdiff does not support it; names the file and the key.
    """
    size = file.whole("num_train_timesteps", 1000, low=1, high=MAX_LEVELS)
    kind = _kind(file)
    values: dict[str, Any] = {}
    found = []
    for key, rule in RULES.items():
        value = values[key] = _value(file, kind, key, rule)
        if latents and key in CLIPPING:
            continue
        has_effect = rule.where is None or values[rule.where[0]] == rule.where[1]
        if value not in rule.same and has_effect:
            found.append(rule.remark.format(key=key, value=value, size=size))
    return found + file.unknown(BETAS | RULES.keys() | WITHOUT_EFFECT)


def _kind(file: JsonFile) -> str:
    """The scheduler's class."""
    return file.word("_class_name", "", list(SCHEDULERS))


def _value(file: JsonFile, kind: str, key: str, rule: Rule) -> Any:
    """The value of a field for its scheduler, with the scheduler's default."""
    if key not in SCHEDULERS[kind]:
        return AS_IF.get(key, rule.same[0])
    value = file.get(key, SCHEDULERS[kind][key])
    if rule.others is None:
        if type(value) not in (int, float) or not min(rule.same[0], 0) <= value < 1e9:
            raise file.refusal(key, f"need a number from {min(rule.same[0], 0)}")
    elif not any(type(value) is type(known) and value == known for known in (*rule.same, *rule.others)):
        known = [json.dumps(each) for each in (*rule.same, *rule.others) if each is not None]
        raise file.refusal(key, f"only {', '.join(known)} can be read")
    return value


def agree(schedule: Schedule, betas: Sequence[float]) -> bool:
    """Whether `betas` are those of the schedule."""
    if schedule.label_scale != len(betas):
        return False
    return all(abs(ours - theirs) <= TOLERANCE for ours, theirs in zip(betas_of(schedule), betas, strict=True))


def _candidates(betas: Sequence[float]) -> list[Schedule]:
    """The named schedules with the first and the last β of the table."""
    size, first, last = len(betas), betas[0], betas[-1]
    found: list[Schedule] = [DdpmCosineSchedule(size), SigmoidSchedule(size)]
    if max(first, last) < 1:
        found += [LinearSchedule(size, first, last), ScaledLinearSchedule(size, first, last)]
    kept = math.fsum(math.log1p(-beta) for beta in betas) if max(betas) < 1 else -math.inf  # log ᾱ_L
    if kept < -0.7:  # in every cosine schedule ᾱ_L is below ½
        # λ at t = 1 is log ᾱ_L/(1 − ᾱ_L); rounded, as diffusers' tables have seven digits
        found.append(CosineSchedule(round(math.log1p(-math.exp(kept)) - kept, 3), size))
    return found
