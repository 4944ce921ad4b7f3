"""Samplers, each with a `step` from angle φ_t down to φ_s, and the loop that drives them.

A step receives the network's `Prediction`. On a grid's last step φ_s = 0, and every sampler's formula gives x̂ (iPNDM:
x̂ modified by its sum of ε̂). One-step rules are here, those of higher order in `multistep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from vdiff.diffusion.grids import check_times
from vdiff.diffusion.multistep import Dpmpp2m, Dpmpp3m, Heun, Ipndm, UniPc
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import Schedule, alpha_sigma, coefficient, grid_angles, grid_times
from vdiff.diffusion.stepping import (
    Denoise,
    Limits,
    Sampler,
    SolverState,
    StatefulSampler,
    check_clipping_value,
    ddim_step,
)
from vdiff.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SAMPLERS",
    "Clipped",
    "Ddim",
    "Ddpm",
    "Denoise",
    "Dpmpp2m",
    "Dpmpp3m",
    "Heun",
    "Ipndm",
    "NonFiniteSampleError",
    "Renoising",
    "Sampler",
    "UniPc",
    "ddim_step",
    "sample",
    "stochastic_ddim_step",
]


ETA = "Noise that ddim and clipped add at each step: 0 = none, 1 = as much as ddpm."


class NonFiniteSampleError(ValueError):
    """Sampling produced an infinite value or NaN."""


def stochastic_ddim_step(
    *, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    """z_s = α_s x̂ + √(σ_s² − τ²) ε̂ + τ n, τ = η (σ_s/σ_t) √(1 − α_t²/α_s²).

    Source: Song et al. 2021, *Denoising Diffusion Implicit Models*, eqs. 12 and 16; η = 1 is the ancestral sampler.
    In angles 1 − α_t²/α_s² = sin(φ_t − φ_s) sin(φ_t + φ_s)/cos² φ_s, without cancellation for small steps.
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
class Ddim(Limits, Sampler):
    """DDIM; deterministic for `eta` = 0."""

    eta: float = setting(ETA, default=0.0, low=0, high=1)

    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """`ddim_step`, or `stochastic_ddim_step` if η > 0."""
        prediction = self.limited(prediction, z, angle_t)
        if self.eta == 0:
            return ddim_step(z, prediction.v, angle_t, angle_s)
        return stochastic_ddim_step(prediction=prediction, angle_t=angle_t, angle_s=angle_s, eta=self.eta, noise=noise)


@dataclass(frozen=True)
class Ddpm(Limits, Sampler):
    """Ancestral sampling from the posterior q(z_s | z_t, x̂) of Ho et al. 2020, eqs. 6 and 7.

    z_s = (α_t/α_s)(σ_s²/σ_t²) z_t + α_s (σ²_{t|s}/σ_t²) x̂ + σ_{t|s} (σ_s/σ_t)^{1−γ} n,
    σ²_{t|s} = σ_t² − (α_t/α_s)² σ_s².

    Args:
        large_variance: γ. 0 is their β̃, correct for data of one image, 1 their β, correct for Gaussian data (section
            3.2); in between, logarithms are interpolated (Salimans & Ho 2022, appendix). The last step adds no noise.
    """

    large_variance: float = setting(
        "Variance of ddpm: 0 = of the posterior (fixed_small), 1 = of the forward step (fixed_large).",
        default=0.0, low=0, high=1,
    )  # fmt: skip
    solves_ode: ClassVar[bool] = False

    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """One draw from the posterior."""
        x = self.limit(prediction.x)
        ratio = (angle_s.sin() / angle_t.sin()) ** 2
        added = _added_variance(angle_t, angle_s)
        of_z = coefficient(angle_t.cos() / angle_s.cos() * ratio, z)
        of_x = coefficient(angle_s.cos() * added / angle_t.sin() ** 2, z)
        variance = added * ratio ** (1 - self.large_variance) * (angle_s > 0)
        return of_z * z + of_x * x + coefficient(variance.sqrt(), z) * noise()


@dataclass(frozen=True)
class Renoising(Limits, Sampler):
    """Multistep sampling of students that jump from any time to the image: z_s = α_s x̂ + σ_s (√(1 − γ²) ε̂ + γ n).

    γ = 1 is algorithm 1 of Song et al. 2023, *Consistency Models*: each step jumps to the image and adds new noise.
    γ = 0 keeps the predicted noise, as `Ddim` does, and draws none.

    Args:
        renoise: γ.
    """

    renoise: float = setting(
        "New noise that consistency adds at each step: 1 = all of it, 0 = none.", default=1.0, low=0, high=1
    )
    solves_ode: ClassVar[bool] = False
    jumps_to_image: ClassVar[bool] = True

    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """A jump to the image, and back to φ_s."""
        prediction = self.limited(prediction, z, angle_t)
        eps = (1 - self.renoise**2) ** 0.5 * prediction.eps
        if self.renoise:
            eps = eps + self.renoise * noise()
        alpha, sigma = alpha_sigma(angle_s, z)
        return alpha * prediction.x + sigma * eps


@dataclass(frozen=True)
class Clipped(Sampler):
    """The clipped sampler of the v-diffusion repositories: it clamps x̂, and ε̂ derived from it, to ±c.

    x̂ ← clamp(x̂, ±c); ε̂ ← clamp((z − α x̂)/σ, ±c); then DDIM with η. c = `clipping_value`.
    """

    clipping_value: float = setting(
        "Clip predicted images to ±LIMIT; clipped clips the predicted noise too.",
        default=1.2, low=0, open_low=True, unit="LIMIT",
    )  # fmt: skip
    eta: float = setting(ETA, default=0.0, low=0, high=1)
    solves_ode: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_clipping_value(self.clipping_value)

    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """`stochastic_ddim_step` on the clamped prediction."""
        alpha, sigma = alpha_sigma(angle_t, z)
        x = prediction.x.clamp(-self.clipping_value, self.clipping_value)
        eps = ((z - alpha * x) / sigma).clamp(-self.clipping_value, self.clipping_value)
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
    on_step: Callable[[int], object] | None = None,
    times: Tensor | None = None,
    on_state: Callable[[int, Tensor, Prediction], None] | None = None,
    check: bool = True,
) -> Tensor:
    """Sample images: step along the grid t = 1, (N−1)/N, …, 0 from the noise `z` (B, C, H, W).

    This takes `sampler.evaluations(num_steps)` network evaluations per image; a solver's state exists for one call.

    Args:
        denoise: the network's prediction at (z, t).
        noise: draws the noise that a stochastic sampler adds; a deterministic one never calls it.
        on_step: called after each step with the number of finished steps.
        times: another increasing grid, (N + 1,) float64, see `grids`. `z` has the noise level t_N, and the result t_0.
        on_state: called before each step with the number of finished steps, z, and the network's prediction there,
            without the sampler's limits.
        check: wait for the device at the end, and check that all values are finite.

    Raises:
        NonFiniteSampleError: a step produced an infinite value or NaN, and `check` is on.
        ValueError: the schedule has no such grid, or `times` is not a grid of `num_steps` steps.
    """
    import torch

    if times is None:
        schedule.check_num_steps(num_steps)
        times = grid_times(num_steps)
    else:
        check_times(times, num_steps)
    angles = grid_angles(schedule, times)
    ends_clean = not times[0] > 0
    state = SolverState(num_steps=num_steps, denoise=denoise)
    step = partial(sampler.step, state=state) if isinstance(sampler, StatefulSampler) else sampler.step
    finite = []
    for i in range(num_steps, 0, -1):
        t, s, angle_t, angle_s = (
            values.expand(len(z)) for values in (times[i], times[i - 1], angles[i], angles[i - 1])
        )
        prediction = denoise(z, t)
        if on_state is not None:
            on_state(num_steps - i, z, prediction)
        state.t_s, state.steps_left = s, i if ends_clean else math.inf
        z = step(z=z, prediction=prediction, angle_t=angle_t, angle_s=angle_s, noise=noise)
        finite.append(z.isfinite().all())  # checked after the loop: a check here would sync at each step
        if on_step is not None:
            on_step(num_steps + 1 - i)
    is_finite = torch.stack(finite).tolist() if check else []
    if not all(is_finite):
        broken = is_finite.index(False) + 1
        raise NonFiniteSampleError(f"step {broken} of {num_steps} produced non-finite values in {z.dtype}")
    return z


SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": Ddim,
    "ddpm": Ddpm,
    "consistency": Renoising,
    "clipped": Clipped,
    "dpmpp_2m": Dpmpp2m,
    "dpmpp_3m": Dpmpp3m,
    "unipc": UniPc,
    "ipndm": Ipndm,
    "heun": Heun,
}
