"""Loss weights w(λ) for the squared error of x̂, loss = E w(λ_t) ‖x − x̂‖², and other functions of the error.

Since x − x̂ = −σ(v − v̂) = −(σ/α)(ε − ε̂), SNR × x-error = ε-error and (SNR + 1) × x-error = v-error.
Source: Salimans & Ho 2022, section 4; Hang et al. 2023 for min-SNR.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MIN_SNR_GAMMA = 5.0
"""γ of min-SNR in its paper."""


def constant(logsnr: Tensor) -> Tensor:
    """w = 1: the plain x-error."""
    return logsnr.new_ones(logsnr.shape)


def snr(logsnr: Tensor) -> Tensor:
    """w = SNR = e^λ: the ε-error, the loss of Ho et al. 2020."""
    return logsnr.exp()


def truncated_snr(logsnr: Tensor) -> Tensor:
    """w = max(SNR, 1): the larger of the x-error and the ε-error."""
    return logsnr.exp().clamp(min=1)


def snr_plus_one(logsnr: Tensor) -> Tensor:
    """w = SNR + 1: the v-error."""
    return logsnr.exp() + 1


def min_snr(logsnr: Tensor, gamma: float = MIN_SNR_GAMMA) -> Tensor:
    """w = min(SNR, γ) (Hang et al. 2023, *Efficient Diffusion Training via Min-SNR Weighting Strategy*)."""
    return logsnr.exp().clamp(max=gamma)


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": constant,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "snr_plus_one": snr_plus_one,
    "min_snr": min_snr,
}

ZERO_SNR_FLOOR = 0.1
"""The least weight w for schedules that end at zero SNR. SNR and min(SNR, γ) would be 0 there, and the network would
learn nothing at the last level, where sampling starts."""


OUTPUT = "output"
"""The weighting that makes the loss the squared error of the network's output, in its own units."""


def weighting_of(
    name: str, output: Callable[[Tensor], Tensor], *, zero_snr: bool, snr_gamma: float = MIN_SNR_GAMMA
) -> Callable[[Tensor], Tensor]:
    """The weighting `name`; with `zero_snr` it is at least `ZERO_SNR_FLOOR`, which in v is the weight at SNR = 0.

    Args:
        output: the weighting `OUTPUT`, which depends on the parameterisation.
        snr_gamma: γ of the weighting `min_snr`.
    """
    weighting = output if name == OUTPUT else WEIGHTINGS[name]
    if weighting is min_snr:
        weighting = partial(min_snr, gamma=snr_gamma)
    return (lambda logsnr: weighting(logsnr).clamp(min=ZERO_SNR_FLOOR)) if zero_snr else weighting


HUBER = 0.00054
"""The errors of pixels below which the pseudo-Huber loss is quadratic (Song & Dhariwal 2023)."""

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda error: error.square().flatten(1).mean(1),
    "l1": lambda error: error.abs().flatten(1).mean(1),
    "huber": lambda error: (error.square().flatten(1).mean(1) + HUBER**2).sqrt() - HUBER,
}
"""The loss of an image from the weighted errors of its pixels, (B, …) → (B,): e², |e|, or √(e² + c²) − c of the root
mean square."""
