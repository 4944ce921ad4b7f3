"""Targets of distillation: the end of a student's step, and the prediction that leads there.

Nothing is clipped: clipping belongs to sampling.
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

    This is x* = (z_end − (σ_s/σ_t) z)/(α_s − (σ_s/σ_t) α_t) of Salimans & Ho 2022, eq. 9 (appendix G), in angles. It
    divides only by the sine of the step, so the ends of the grid need no special case. It multiplies rounding
    errors of z and z_end by 1/sin δ; if both come from velocities, use `composed_velocity`.
    """
    delta = angle_t - angle_s
    v = (coefficient(delta.cos(), z) * z - z_end) / coefficient(delta.sin(), z)
    return from_v(z, v, angle_t)


def composed_velocity(
    z: Tensor, first: Tensor, second: Tensor, angle_t: Tensor, angle_m: Tensor, angle_s: Tensor
) -> Tensor:
    """The velocity of the DDIM step φ_t → φ_s that ends where the two steps φ_t → φ_m → φ_s end.

    v* = (sin δ₁ cos δ₂ v₁ + sin δ₂ v₂ − sin δ₁ sin δ₂ z)/sin(δ₁ + δ₂), δ₁ = φ_t − φ_m, δ₂ = φ_m − φ_s.

    Equals (cos(δ₁ + δ₂) z − z_s)/sin(δ₁ + δ₂), but avoids the difference of two nearly equal images: the division
    multiplies its rounding error by 1/(δ₁ + δ₂).

    Args:
        z: the image at φ_t, (B, C, H, W).
        first, second: v₁ at z, and v₂ at the image at φ_m.
    """
    before, after, whole = angle_t - angle_m, angle_m - angle_s, (angle_t - angle_s).sin()
    of_first = coefficient(before.sin() * after.cos() / whole, z)
    of_second = coefficient(after.sin() / whole, z)
    return of_first * first + of_second * second - coefficient(before.sin() * after.sin() / whole, z) * z


def progressive_target(
    teacher: Denoise, schedule: Schedule, *, z: Tensor, t: Tensor, num_steps: int, ratio: int = 2
) -> Prediction:
    """k DDIM steps of the teacher, t → t − 1/kN → … → t − 1/N, as one step of the student; k = 2 is the paper's target.

    Args:
        teacher: the frozen teacher, a sampler of kN steps.
        z: noisy images (B, C, H, W) at t (B,), where t is on the student's grid of N = `num_steps`.
        ratio: k.

    Source: Salimans & Ho 2022, algorithm 2.
    """
    fine = ratio * num_steps
    times = [t - j / fine for j in range(ratio + 1)]
    times[-1] = times[-1] * (times[-1] > 0.25 / fine)  # 0 exactly at the end, despite the rounding of i/N − 1/N
    angles = [grid_angles(schedule, time) for time in times]
    state, v = z, teacher(z, t).v
    whole = v
    for j in range(1, ratio):
        state = ddim_step(state, v, angles[j - 1], angles[j])
        v = teacher(state, times[j]).v
        whole = composed_velocity(z, whole, v, angles[0], angles[j], angles[j + 1])
    return from_v(z, whole, angles[0])


def segment_target(
    first: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    jump: Denoise,
    schedule: Schedule,
    *,
    z: Tensor,
    t: Tensor,
    middle: Tensor,
    end: Tensor,
) -> Prediction:
    """One step that equals a short step t → m and then a jump of the student to the end e of its segment.

    If m = e, the target is the first step's alone.

    Args:
        first: (z, t, φ_t, φ_m) → v, the velocity of the short step.
        jump: the student's prediction at m.
        t, middle, end: (B,), t > m ≥ e.
    """
    angle_t, angle_m, angle_s = (grid_angles(schedule, time) for time in (t, middle, end))
    v = first(z, t, angle_t, angle_m)
    z_middle = ddim_step(z, v, angle_t, angle_m)
    jumps = middle > end  # networks do not accept t = 0; predictions without a jump get weight 0
    then = jump(z_middle, middle.where(jumps, t)).v
    return from_v(z, composed_velocity(z, v, then, angle_t, angle_m, angle_s), angle_t)


def fine_step(u: Tensor, num_steps: int, fine_steps: int) -> dict[str, Tensor]:
    """t = k/n, m = (k − 1)/n and the end e of the segment that contains t, k uniform in 1 … n.

    [0, 1] is cut into N = `num_steps` segments, the student's steps, and each into n/N fine ones.
    """
    level, part = (u * fine_steps).floor() + 1, fine_steps // num_steps
    end = (level - 1).div(part, rounding_mode="floor") * part
    return {"t": level / fine_steps, "middle": (level - 1) / fine_steps, "end": end / fine_steps}


def segment_end(t: Tensor, num_steps: int) -> Tensor:
    """(⌈t·N⌉ − 1)/N: where the step of N that begins at t or above it ends."""
    return ((t * num_steps - 1e-9).ceil() - 1).clamp(min=0) / num_steps


def flow_map_tangent(
    z: Tensor, velocity: Tensor, v: Tensor, v_along: Tensor, delta: Tensor, warmup: float = 1.0
) -> Tensor:
    """How a student's jump changes where it begins further along the flow: 0 where the student is consistent.

    g = −cos² δ (v̂ − ż) − r cos δ sin δ (z + dv̂/dφ) = cos δ · df/dφ at r = 1, of the jump
    f(z, φ) = cos δ z − sin δ v̂(z, φ) to the segment's end, δ = φ − φ_s. At δ = 0 what is left is flow matching.

    Args:
        velocity: ż = dz/dφ, the flow's.
        v, v_along: the student's v̂, and its derivative dv̂/dφ along the flow.
        warmup: r.

    Source: Lu & Song 2024, *Simplifying, Stabilizing and Scaling Continuous-time Consistency Models*, eq. 6 and
    algorithm 1, with σ_d = 1 and their t for δ: their segment ends at the image.
    """
    cosine, sine = coefficient(delta.cos(), z), coefficient(delta.sin(), z)
    return -(cosine**2) * (v - velocity) - warmup * cosine * sine * (z + v_along)


def addim_velocity(
    z: Tensor, prediction: Prediction, x: Tensor, angle_t: Tensor, angle_s: Tensor, eta: float
) -> Tensor:
    """The velocity of the adjusted DDIM step z_s = α_s x̂ + √(σ_s² + a² sin² δ) ε̂, a² = η‖x − x̂‖²/(σ_t² ‖ε̂‖²).

    v = v̂ − a² sin δ/(√(σ_s² + a² sin² δ) + σ_s) ε̂, δ = φ_t − φ_s.

    A DDIM step uses x̂, the mean of the possible x, instead of x itself, so its z_s has too little variance. Scaling up
    ε̂ restores the variance, and the step stays deterministic. η = 0 is DDIM.
    Source: Heek et al. 2024, *Multistep Consistency Models*, section 3.2: its V = (α_s − α_t σ_s/σ_t)² · η‖x − x̂‖²/d
    with α_s − α_t σ_s/σ_t = sin δ/σ_t.
    """
    pixels = tuple(range(1, z.ndim))
    missing = eta * (x - prediction.x).square().mean(pixels, keepdim=True)
    _, sigma_t = alpha_sigma(angle_t, z)
    _, sigma_s = alpha_sigma(angle_s, z)
    sine = coefficient((angle_t - angle_s).sin(), z)
    square = missing / (sigma_t**2 * prediction.eps.square().mean(pixels, keepdim=True))
    root = (sigma_s**2 + square * sine**2).sqrt() + sigma_s
    return prediction.v - square * sine / root.clamp(min=1e-30) * prediction.eps  # 0/0 where x̂ = x and σ_s = 0


def grid_times_of(u: Tensor, num_steps: int) -> Tensor:
    """t = (⌊u·N⌋ + 1)/N: a level of a grid of N steps, uniformly."""
    return ((u * num_steps).floor() + 1) / num_steps
