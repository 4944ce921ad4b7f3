"""Perfect and random denoisers with closed forms that share no formula with `vdiff.diffusion.prediction`.

All are (z, t) → Prediction. For data x ~ N(μ, c²) and z = α x + σ ε, with d = α²c² + σ²:

    E[x | z] = μ + α c² (z − α μ)/d,    E[ε | z] = σ (z − α μ)/d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import (
    SCHEDULES,
    CosineSchedule,
    DdpmCosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    Schedule,
)
from vdiff.models.condition import Condition

ALL_SCHEDULES: dict[str, Schedule] = {name: schedule() for name, schedule in SCHEDULES.items()} | {
    "cosine_uncut": CosineSchedule(logsnr_max=math.inf)
}
"""Every registered schedule as it comes, and φ = πt/2."""

TABLES: dict[str, Schedule] = {
    "ddpm_cosine": DdpmCosineSchedule(),
    "linear": LinearSchedule(),
    "scaled_linear": ScaledLinearSchedule(),
}

Z_SHAPE = (3, 2, 3, 5)


def column(values: Tensor, like: Tensor) -> Tensor:
    """`values` (B,) in shape and type to multiply `like` (B, …)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded standard normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def condition(classes: Tensor | None = None, guidance: Tensor | None = None) -> Condition:
    """Classes and weights of guidance, where they are given."""
    return Condition().with_tensors(classes=classes, guidance=guidance)


def noise_source(shape: Sequence[int], seed: int) -> Callable[[], Tensor]:
    """A stream of float64 noise that starts anew from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def no_noise() -> Tensor:
    """For samplers that must not ask for any."""
    raise AssertionError("a deterministic sampler drew noise")


def gaussian(schedule: Schedule, c: float) -> Callable[[Tensor, Tensor], Prediction]:
    """The perfect denoiser of data N(0, c²): v̂ = α σ (1 − c²)/d · z, with its own x̂ and ε̂."""

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        angle = schedule.angle(t)
        alpha, sigma = angle.cos(), angle.sin()
        d = alpha**2 * c**2 + sigma**2
        x, eps, v = (column(k / d, z) * z for k in (alpha * c**2, sigma, alpha * sigma * (1 - c**2)))
        return Prediction(x, eps, v)

    return denoise


def mixture(
    schedule: Schedule,
    means: Sequence[float] = (-0.8, 0.1, 0.7),
    c: float = 0.15,
    weights: Sequence[float] = (3, 1, 2),
) -> Callable[[Tensor, Tensor], Prediction]:
    """The perfect denoiser of pixels from Σ_k w_k N(μ_k, c²): posterior means, weighted by the parts' shares."""

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        angle = schedule.angle(t)
        alpha, sigma = column(angle.cos(), z), column(angle.sin(), z)
        d = alpha**2 * c**2 + sigma**2
        distances = torch.stack([z - alpha * mean for mean in means])
        log_share = torch.stack([math.log(w) - e**2 / (2 * d) for w, e in zip(weights, distances, strict=True)])
        share = log_share.softmax(0)
        x = sum(p * (mean + alpha * c**2 * e / d) for p, mean, e in zip(share, means, distances, strict=True))
        eps = (share * sigma * distances / d).sum(0)
        return Prediction(x, eps, alpha * eps - sigma * x)

    return denoise


def random_teacher(schedule: Schedule, seed: int = 0) -> Callable[[Tensor, Tensor], Prediction]:
    """A nonlinear denoiser of no data at all, smooth in z and t, that mixes pixels: v̂ = tanh(W z + b + t)."""

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        pixels = z[0].numel()
        matrix = randn(pixels, pixels, seed=seed) / pixels**0.5
        bias = randn(pixels, seed=seed + 1)
        flat = z.double().flatten(1)
        v = torch.tanh(flat @ matrix.T + bias + t.double()[:, None]).reshape(z.shape).to(z.dtype)
        angle = schedule.angle(t)
        alpha, sigma = column(angle.cos(), z), column(angle.sin(), z)
        return Prediction(alpha * z - sigma * v, sigma * z + alpha * v, v)

    return denoise
