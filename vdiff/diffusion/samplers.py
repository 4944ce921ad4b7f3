"""Samplers: one `step` each from angle φ_t down to φ_s, and the one loop that drives them all.

A step is given the network's `Prediction` and knows nothing of networks; on a grid's last step φ_s = 0, where every
sampler's formula gives x̂.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import Schedule, alpha_sigma, coefficient, grid_angles, grid_times

if TYPE_CHECKING:
    from torch import Tensor

Denoise = Callable[["Tensor", "Tensor"], Prediction]
"""(z, t) → Prediction: z (B, C, H, W), t (B,) float64."""


class NonFiniteSampleError(ValueError):
    """Sampling produced an infinite value or not a number."""


class Sampler(Protocol):
    """A rule for one step."""

    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """z_s from z_t: z (B, C, H, W); angles (B,) float64; `noise()` draws N(0, I) like z where the rule needs it."""


def ddim_step(z: Tensor, v: Tensor, angle_t: Tensor, angle_s: Tensor) -> Tensor:
    """z_s = cos δ · z_t − sin δ · v̂, δ = φ_t − φ_s.

    The deterministic DDIM step (Song et al. 2021) as a rotation: Salimans & Ho 2022, appendix D. Nothing is divided.
    """
    delta = angle_t - angle_s
    return coefficient(delta.cos(), z) * z - coefficient(delta.sin(), z) * v


def stochastic_ddim_step(
    *, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    """z_s = α_s x̂ + √(σ_s² − τ²) ε̂ + τ n, τ = η (σ_s/σ_t) √(1 − α_t²/α_s²).

    Source: Song et al. 2021, *Denoising Diffusion Implicit Models*, eqs. 12 and 16; η = 1 is the ancestral sampler.
    In angles 1 − α_t²/α_s² = sin(φ_t − φ_s) sin(φ_t + φ_s)/cos² φ_s, which loses no digits for small steps.
    """
    x = prediction.x
    tau = eta * angle_s.sin() / angle_t.sin() * _added_variance(angle_t, angle_s).sqrt()
    kept = (angle_s.sin() ** 2 - tau**2).clamp(min=0).sqrt()
    z = coefficient(angle_s.cos(), x) * x + coefficient(kept, x) * prediction.eps
    return z + coefficient(tau, x) * noise() if eta else z


def _added_variance(angle_t: Tensor, angle_s: Tensor) -> Tensor:
    """1 − α_t²/α_s² = σ_t² − (α_t/α_s)² σ_s²: the variance of q(z_t | z_s)."""
    return (angle_t - angle_s).sin() * (angle_t + angle_s).sin() / angle_s.cos() ** 2


@dataclass(frozen=True)
class Ddim:
    """DDIM; deterministic at `eta` 0.

    x̂ is clipped to ±`clip` and ε̂ derived again, as in the paper's code; None: no clip.
    """

    clip: float | None = 1.0
    eta: float = 0.0

    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """`ddim_step`, or `stochastic_ddim_step` where η > 0."""
        if self.clip is not None:
            prediction = prediction.clip(z, angle_t, self.clip)
        if self.eta == 0:
            return ddim_step(z, prediction.v, angle_t, angle_s)
        return stochastic_ddim_step(prediction=prediction, angle_t=angle_t, angle_s=angle_s, eta=self.eta, noise=noise)


@dataclass(frozen=True)
class Ddpm:
    """Ancestral sampling from the posterior q(z_s | z_t, x̂) of Ho et al. 2020, eqs. 6 and 7, variance β̃.

    z_s = (α_t/α_s)(σ_s²/σ_t²) z_t + α_s (σ²_{t|s}/σ_t²) x̂ + σ_s (σ_{t|s}/σ_t) n, σ²_{t|s} = σ_t² − (α_t/α_s)² σ_s².
    """

    clip: float | None = 1.0

    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """One draw from the posterior."""
        x = prediction.x if self.clip is None else prediction.x.clamp(-self.clip, self.clip)
        ratio = (angle_s.sin() / angle_t.sin()) ** 2
        added = _added_variance(angle_t, angle_s)
        of_z = coefficient(angle_t.cos() / angle_s.cos() * ratio, z)
        of_x = coefficient(angle_s.cos() * added / angle_t.sin() ** 2, z)
        return of_z * z + of_x * x + coefficient((added * ratio).sqrt(), z) * noise()


@dataclass(frozen=True)
class Clipped:
    """The clipped sampler of the v-diffusion repositories: x̂ and the ε̂ derived from it are both clamped to ±c.

    x̂ ← clamp(x̂, ±c); ε̂ ← clamp((z − α x̂)/σ, ±c); then DDIM with η. c = 1.2.
    """

    clip: float = 1.2
    eta: float = 0.0

    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """`stochastic_ddim_step` on the clamped prediction."""
        alpha, sigma = alpha_sigma(angle_t, z)
        x = prediction.x.clamp(-self.clip, self.clip)
        eps = ((z - alpha * x) / sigma).clamp(-self.clip, self.clip)
        clamped = Prediction(x, eps, alpha * eps - sigma * x)
        return stochastic_ddim_step(prediction=clamped, angle_t=angle_t, angle_s=angle_s, eta=self.eta, noise=noise)


def sample(
    denoise: Denoise,
    schedule: Schedule,
    sampler: Sampler,
    *,
    z: Tensor,
    num_steps: int,
    noise: Callable[[], Tensor],
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw images: walk the grid t = 1, (N−1)/N, …, 0 from the noise `z` (B, C, H, W), with N network evaluations.

    Args:
        denoise: the network's prediction at (z, t).
        noise: draws what a stochastic sampler adds; a deterministic one never calls it.
        on_step: told after each step how many are done.

    Raises:
        NonFiniteSampleError: a step produced an infinite value or not a number.
        ValueError: the schedule has no such grid.
    """
    import torch

    schedule.check_num_steps(num_steps)
    times = grid_times(num_steps)
    angles = grid_angles(schedule, times)
    finite = []
    for i in range(num_steps, 0, -1):
        t, angle_t, angle_s = (values.expand(len(z)) for values in (times[i], angles[i], angles[i - 1]))
        z = sampler.step(z=z, prediction=denoise(z, t), angle_t=angle_t, angle_s=angle_s, noise=noise)
        finite.append(
            z.isfinite().all()
        )  # looked at after the loop: looking here would wait for the device at each step
        if on_step is not None:
            on_step(num_steps + 1 - i)
    is_finite = torch.stack(finite).tolist()
    if not all(is_finite):
        step = is_finite.index(False) + 1
        raise NonFiniteSampleError(f"step {step} of {num_steps} produced non-finite values in {z.dtype}")
    return z


SAMPLERS: dict[str, Callable[..., Sampler]] = {"ddim": Ddim, "ddpm": Ddpm, "clipped": Clipped}
