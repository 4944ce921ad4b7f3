"""Where one step of a student should end, and the prediction that leads there.

Nothing is ever clipped: clipping belongs to sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vdiff.diffusion.prediction import Prediction, from_v
from vdiff.diffusion.samplers import Denoise, ddim_step
from vdiff.diffusion.schedules import Schedule, alpha_sigma, coefficient, grid_angles

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


def segment_target(
    first: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    jump: Denoise,
    schedule: Schedule,
    *,
    z: Tensor,
    level: Tensor,
    num_steps: int,
    fine_steps: int,
) -> Prediction:
    """A fine step of the teacher, then a jump of the student itself to the end of its segment, as one step.

    [0, 1] is cut into N segments, the student's steps, and each into m = n/N fine ones. From level k of the fine grid
    the teacher goes to k − 1, and `jump` from there to the segment's end e = m ⌊(k − 1)/m⌋; where k − 1 = e the target
    is the teacher's alone.

    Args:
        first: (z, t, φ_t, φ_s) → z_s, the teacher's step.
        jump: what the student says at k − 1.
        level: k (B,), whole numbers 1 … n.
        num_steps, fine_steps: N and n.
    """
    part = fine_steps // num_steps
    end = (level - 1).div(part, rounding_mode="floor") * part
    t, middle, s = level / fine_steps, (level - 1) / fine_steps, end / fine_steps
    angle_t, angle_m, angle_s = (grid_angles(schedule, time) for time in (t, middle, s))
    z_middle = first(z, t, angle_t, angle_m)
    jumps = middle > s  # a network is told no t = 0; what it says where there is nothing to jump is a rotation by 0
    asked_at = middle.where(jumps, t)
    z_end = ddim_step(z_middle, jump(z_middle, asked_at).v, angle_m, angle_s)
    return invert_ddim(z, z_end, angle_t, angle_s)


def addim_step(z: Tensor, prediction: Prediction, x: Tensor, angle_t: Tensor, angle_s: Tensor, eta: float) -> Tensor:
    """z_s = α_s x̂ + √(σ_s² + (d/‖ε̂‖²) V) ε̂, V = (α_s − α_t σ_s/σ_t)² · η‖x − x̂‖²/d: adjusted DDIM.

    A DDIM step takes x̂, the mean of what x may be, for x itself, so its z_s varies too little by V (η = 1). The step
    stays deterministic: ε̂ is lengthened instead. α_s − α_t σ_s/σ_t = sin δ/σ_t. η = 0 is DDIM.
    Source: Heek et al. 2024, *Multistep Consistency Models*, section 3.2.
    """
    pixels = tuple(range(1, z.ndim))
    missing = eta * (x - prediction.x).square().mean(pixels, keepdim=True)
    gain = coefficient(((angle_t - angle_s).sin() / angle_t.sin()) ** 2, z)
    length = prediction.eps.square().mean(pixels, keepdim=True)
    alpha, sigma = alpha_sigma(angle_s, z)
    return alpha * prediction.x + (sigma**2 + gain * missing / length).sqrt() * prediction.eps


def grid_times_of(u: Tensor, num_steps: int) -> Tensor:
    """t = (⌊u·N⌋ + 1)/N: a level of a grid of N steps, each as likely."""
    return ((u * num_steps).floor() + 1) / num_steps
