"""Distillation: what a student should answer so that one of its steps lands where its teacher's steps land."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vdiff.diffusion.prediction import Prediction, from_v
from vdiff.diffusion.samplers import Denoise, ddim_step
from vdiff.diffusion.schedules import Schedule, coefficient, grid_angles

if TYPE_CHECKING:
    from torch import Tensor


def invert_ddim(z: Tensor, z_end: Tensor, angle_t: Tensor, angle_s: Tensor) -> Prediction:
    """The prediction whose DDIM step leads from z at φ_t to `z_end` at φ_s.

    v* = (cos δ · z − z_end)/sin δ, δ = φ_t − φ_s.

    The same as x* = (z_end − (σ_s/σ_t) z)/(α_s − (σ_s/σ_t) α_t) of Salimans & Ho 2022, eq. 9 (appendix G), in angles:
    it divides by the sine of the step only, so that both ends of the grid need no special case.
    """
    delta = angle_t - angle_s
    v = (coefficient(delta.cos(), z) * z - z_end) / coefficient(delta.sin(), z)
    return from_v(z, v, angle_t)


def progressive_target(teacher: Denoise, schedule: Schedule, *, z: Tensor, t: Tensor, num_steps: int) -> Prediction:
    """The paper's target: two DDIM half steps of the teacher, t → t − 1/2N → t − 1/N, as one step of the student.

    Nothing is clipped: clipping belongs to sampling.

    Args:
        teacher: the frozen teacher, a sampler of 2N steps.
        z: noisy images (B, C, H, W) at t (B,), where t is on the student's grid of N = `num_steps`.

    Source: Salimans & Ho 2022, algorithm 2.
    """
    middle, end = t - 0.5 / num_steps, t - 1 / num_steps
    end = end * (end > 0.25 / num_steps)  # the last step ends at 0 exactly, whatever i/N − 1/N rounds to
    angle_t, angle_m, angle_s = (grid_angles(schedule, time) for time in (t, middle, end))
    z_middle = ddim_step(z, teacher(z, t).v, angle_t, angle_m)
    z_end = ddim_step(z_middle, teacher(z_middle, middle).v, angle_m, angle_s)
    return invert_ddim(z, z_end, angle_t, angle_s)


def halving_plan(num_steps: int, to_steps: int) -> list[int]:
    """The students' numbers of steps, from `num_steps` down to `to_steps`: 64, 8 → [32, 16, 8].

    Raises:
        ValueError: halving never leads from one to the other.
    """
    plan = []
    steps = num_steps
    while steps > to_steps:
        if steps % 2:
            raise ValueError(f"{steps} steps cannot be halved on the way from {num_steps} to {to_steps}")
        steps //= 2
        plan.append(steps)
    if steps != to_steps or to_steps < 1:
        raise ValueError(f"halving {num_steps} steps never gives {to_steps}")
    return plan


@dataclass(frozen=True)
class Method:
    """A way to distil: the student's target at (z, t), and the numbers of steps that its stages go through."""

    target: Callable[..., Prediction]
    plan: Callable[[int, int], list[int]]


METHODS: dict[str, Method] = {"progressive": Method(progressive_target, halving_plan)}
