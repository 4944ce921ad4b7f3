"""Conversions between stored samples (uint8, pictures) and x, which a model learns ([−1, 1]).

Functions import torch, so that a checkpoint is described without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """The conversion between samples and x.

    Attributes:
        limit: the bound of |x|, to which samplers may clip; None: x has no bound.
    """

    name: str
    limit: int | None

    def encode(self, samples: Tensor) -> Tensor:
        """x from uint8; floating-point values are x already."""
        import torch

        return from_uint8(samples) if samples.dtype == torch.uint8 else samples

    def clip(self, x: Tensor) -> Tensor:
        """x within its bounds."""
        return x if self.limit is None else x.clamp(-self.limit, self.limit)

    def are_pictures(self, shape: Sequence[int]) -> bool:
        """Whether samples of this shape (C, …) are pictures: grey or in colour."""
        return self.limit is not None and len(shape) == 3 and shape[0] in (1, 3)


def to_uint8(x: Tensor) -> Tensor:
    """round((x + 1) · 127.5), clamped to 0 … 255; any shape, floating-point in, uint8 out.

    Raises:
        ValueError: NaN or infinity among the values, or an integer tensor.
    """
    import torch

    if not x.is_floating_point():
        raise ValueError(f"images of dtype {x.dtype}; need a floating-point dtype")
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{bad} of {x.numel()} image values are NaN or infinite (dtype {x.dtype})")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(u: Tensor) -> Tensor:
    """u / 127.5 − 1: uint8 0 … 255 to float32 in [−1, 1]; `to_uint8` gives back exactly `u`."""
    import torch

    if u.dtype != torch.uint8:
        raise ValueError(f"images of dtype {u.dtype}; need torch.uint8")
    return u.float().div_(127.5).sub_(1)  # in place: one new tensor, not three


PIXEL_CODEC, UNBOUNDED, LATENTS = Codec("pixels", 1), Codec("unbounded", None), Codec("autoencoder", None)
CODECS = {codec.name: codec for codec in (PIXEL_CODEC, UNBOUNDED, LATENTS)}
"""The codecs: pixels, numbers without bounds, and latents of the autoencoder in the model's components."""
