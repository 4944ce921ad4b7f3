"""Rectified flows of diffusers: a `FlowMatchEulerDiscreteScheduler` in both directions.

Its network receives T τ, T = `num_train_timesteps`: `Flow` with `time_scale` T. Its Euler step is our DDIM step.
"""

from __future__ import annotations

import math
from typing import Any

from vdiff.diffusion.parameterisation import Flow, Parameterisation, Vp
from vdiff.diffusion.schedules import MAX_LEVELS, FlowSchedule, Schedule
from vdiff.errors import VdiffError
from vdiff.interop.diffusers.scheduler import read_prediction, read_schedule, remarks
from vdiff.interop.foreign import JsonFile
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
OF_SIZE = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
"""Numbers of the dynamic shift, and their defaults."""


def is_flow(scheduler: JsonFile) -> bool:
    """Whether a scheduler's configuration is that of a flow."""
    return scheduler.get("_class_name") == FLOW_SCHEDULER


def read_family(
    file: JsonFile, *, latents: bool = False, tokens: int = 0, is_even: bool = False
) -> tuple[Schedule, Parameterisation, list[str]]:
    """The schedule, the parameterisation, and a sentence for each reason why the pipeline gives other images.

    Args:
        latents: it draws latents, which vdiff never clips.
        tokens, is_even: of `read_flow`.

    Raises:
        VdiffError: a value that vdiff does not support; the file and key are named.
    """
    if is_flow(file):
        return read_flow(file, tokens, is_even=is_even)
    return read_schedule(file), Vp(read_prediction(file)), remarks(file, latents=latents)


def read_flow(file: JsonFile, tokens: int = 0, *, is_even: bool = False) -> tuple[FlowSchedule, Flow, list[str]]:
    """The schedule, the parameterisation, and a sentence for each reason why the pipeline gives other images.

    A dynamic shift is exp(μ), or μ if `time_shift_type` is "linear", where μ is a linear function of the number of
    tokens: `base_shift` at `base_image_seq_len`, `max_shift` at `max_image_seq_len`.

    Args:
        tokens: of an image, if the network is a transformer.
        is_even: the pipeline spaces the levels evenly before the shift, whatever the scheduler does.

    Raises:
        VdiffError: a value that vdiff does not support; the file and key are named.
    """
    size = file.whole("num_train_timesteps", 1000, low=2, high=MAX_LEVELS)
    shift = file.number("shift", 1.0, low=0, high=1e6)
    for key in ("invert_sigmas", "stochastic_sampling"):
        if file.flag(key, False):
            raise file.refusal(key, "only false can be read")
    found = [
        "its noise levels end at its least noise, ours are spaced evenly before the shift: for the same images from N "
        "steps, call the pipeline with sigmas=numpy.linspace(1, 1 / N, N)"
        if tokens
        else "its noise levels end at its least noise; ours are spaced evenly, shift applied: --grid cannot copy them"
    ]
    if is_even or (file.get("shift_terminal") is not None and shift == 1):
        found = []  # the second is `write_flow`'s: evenly spaced at one number of steps
    kind = file.word("time_shift_type", "exponential", ["exponential", "linear"])
    if file.flag("use_dynamic_shifting", False) and tokens:
        low, high, few, many = (file.number(key, usual, low=0, high=1e6) for key, usual in OF_SIZE.items())
        mu = low + (high - low) * (tokens - few) / max(many - few, 1)
        shift = math.exp(mu) if kind == "exponential" else mu
    elif file.flag("use_dynamic_shifting", False):
        shift = 1.0
        found.append("its shift depends on the size of the images (use_dynamic_shifting); ours is 1")
    found += [f"its noise levels are spaced by {key}; ours are not" for key in SPACINGS if file.flag(key, False)]
    known = {"num_train_timesteps", "shift", "shift_terminal", "use_dynamic_shifting", "invert_sigmas"}
    found += file.unknown({*known, "stochastic_sampling", "time_shift_type", *SPACINGS, *OF_SIZE})
    return FlowSchedule(shift, size), Flow(float(size)), found


def write_flow(denoiser: Denoiser, config: CheckpointConfig, *, clip: bool) -> dict[str, Any]:
    """The arguments of the scheduler whose steps are ours at the model's own number of steps N.

    Its levels fall evenly from 1 to `shift_terminal` = 1/N, then to 0; with N = 1 there is only the level 1.

    Raises:
        VdiffError: diffusers cannot take these steps.
    """
    used, schedule, steps = denoiser.parameterisation, denoiser.schedule, config.num_timesteps
    if clip:
        raise VdiffError(f"diffusers' {FLOW_SCHEDULER} does not clip images", "give --clip False")
    if not isinstance(used, Flow) or not used.time_scale.is_integer() or not isinstance(schedule, FlowSchedule):
        raise VdiffError(
            f"diffusers' {FLOW_SCHEDULER} has no {schedule.name} schedule with {used.summary()}",
            "export to ONNX or torch.export",
        )
    if schedule.shift != 1 and steps > 1:
        raise VdiffError(
            f"diffusers cannot take {steps} steps with the time shift {schedule.shift:g} at the same noise levels",
            "export to ONNX or torch.export, or distil to one step",
        )
    ends = {"shift_terminal": 1 / steps} if steps > 1 else {}
    return {"num_train_timesteps": int(used.time_scale), "shift": 1.0, **ends}
