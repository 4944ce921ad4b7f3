"""Rectified flows of diffusers: a `FlowMatchEulerDiscreteScheduler` in both directions.

Its network receives T τ, T = `num_train_timesteps`: `Flow` with `time_scale` T. Its Euler step is our DDIM step.
"""

from __future__ import annotations

from typing import Any

from vdiff.diffusion.parameterisation import Flow
from vdiff.diffusion.schedules import MAX_LEVELS, FlowSchedule
from vdiff.errors import VdiffError
from vdiff.interop.foreign import JsonFile
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
WITHOUT_EFFECT = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}
"""Fields of the dynamic shift."""


def is_flow(scheduler: JsonFile) -> bool:
    """Whether a scheduler's configuration is that of a flow."""
    return scheduler.get("_class_name") == FLOW_SCHEDULER


def read_flow(file: JsonFile) -> tuple[FlowSchedule, Flow, list[str]]:
    """The schedule, the parameterisation, and a sentence for each reason why the pipeline gives other images.

    Raises:
        VdiffError: a value that vdiff does not support; the file and key are named.
    """
    size = file.whole("num_train_timesteps", 1000, low=2, high=MAX_LEVELS)
    shift = file.number("shift", 1.0, low=0, high=1e6)
    for key in ("invert_sigmas", "stochastic_sampling"):
        if file.flag(key, False):
            raise file.refusal(key, "only false can be read")
    found = ["its noise levels end at its least noise; ours are spaced evenly, shift applied: --grid cannot copy them"]
    if file.get("shift_terminal") is not None and shift == 1:
        found = []  # as `write_flow` writes it: evenly spaced at one number of steps
    if file.flag("use_dynamic_shifting", False):
        shift = 1.0
        found.append("its shift depends on the size of the images (use_dynamic_shifting); ours is 1")
    found += [f"its noise levels are spaced by {key}; ours are not" for key in SPACINGS if file.flag(key, False)]
    known = {"num_train_timesteps", "shift", "shift_terminal", "use_dynamic_shifting", "invert_sigmas"}
    found += file.unknown({*known, "stochastic_sampling", *SPACINGS, *WITHOUT_EFFECT})
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
