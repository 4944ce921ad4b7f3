"""Predictions of a network for a noisy image, in the common form of all other code: x, ε and v together.

With z = α x + σ ε and α² + σ² = 1 (Salimans & Ho 2022, section 4 and appendix D):

    v = α ε − σ x,    x̂ = α z − σ v̂,    ε̂ = σ z + α v̂.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vdiff.diffusion.schedules import alpha_sigma

if TYPE_CHECKING:
    from torch import Tensor

MIN_SIGNAL = 1e-6
"""Below this α an ε-prediction carries no information about x."""


@dataclass(frozen=True)
class Prediction:
    """Image x̂, noise ε̂ and velocity v̂ of one noisy batch; all (B, C, H, W) and consistent with its z."""

    x: Tensor
    eps: Tensor
    v: Tensor

    def clip(self, z: Tensor, angle: Tensor, limit: float) -> Prediction:
        """Clip x̂ to ±`limit` and derive ε̂ and v̂ from it, so that the three stay consistent with z.

        `angle` must be positive: ε̂ is undefined for a clean image.
        """
        return from_x(z, self.x.clamp(-limit, limit), angle)


def from_x(z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
    """x̂ is the output; ε̂ = (z − α x̂)/σ; v̂ = α ε̂ − σ x̂."""
    alpha, sigma = alpha_sigma(angle, z)
    eps = (z - alpha * output) / sigma
    return Prediction(output, eps, alpha * eps - sigma * output)


def from_eps(z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
    """ε̂ is the output; x̂ = (z − σ ε̂)/α; v̂ = α ε̂ − σ x̂.

    Raises:
        ValueError: α is zero, so the noise carries no information about the image. Angles on a GPU are not read, as
            that would sync, nor those of a subclass of tensors, which may lack values; x̂ is then not finite.
    """
    import torch

    if type(angle) is torch.Tensor and angle.device.type == "cpu" and float(angle.cos().min()) < MIN_SIGNAL:
        raise ValueError(
            f"eps-prediction at zero signal: α = {float(angle.cos().min()):.1g} leaves x̂ = (z − σ ε̂)/α undefined; "
            "predict v, x or both instead"
        )
    alpha, sigma = alpha_sigma(angle, z)
    x = (z - sigma * output) / alpha
    return Prediction(x, output, alpha * output - sigma * x)


def from_v(z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
    """v̂ is the output; x̂ = α z − σ v̂; ε̂ = σ z + α v̂."""
    alpha, sigma = alpha_sigma(angle, z)
    return Prediction(alpha * z - sigma * output, sigma * z + alpha * output, output)


def from_both(z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
    """The output is x̃ and ε̃ along the channels: x̂ = σ² x̃ + (1 − σ²)(z − σ ε̃)/α = σ² x̃ + α (z − σ ε̃).

    As α² = 1 − σ², nothing is divided, and x̂ = x̃ at zero signal. Source: Salimans & Ho 2022, section 4, and the
    released code.
    """
    alpha, sigma = alpha_sigma(angle, z)
    x_part, eps_part = output.chunk(2, dim=1)
    return from_x(z, sigma**2 * x_part + alpha * (z - sigma * eps_part), angle)


@dataclass(frozen=True)
class PredictionType:
    """How to read a network's output, and its channels as a multiple of the image's."""

    read: Callable[[Tensor, Tensor, Tensor], Prediction]
    channel_factor: int = 1


PREDICTION_TYPES: dict[str, PredictionType] = {
    "v": PredictionType(from_v),
    "x": PredictionType(from_x),
    "eps": PredictionType(from_eps),
    "both": PredictionType(from_both, channel_factor=2),
}
