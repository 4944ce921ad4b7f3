"""Between samples as people keep them and x, which a model learns: uint8 and pictures ⇄ [−1, 1].

Imports torch when tensors are at hand, so that a checkpoint is described without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """How samples become x, and x samples.

    Attributes:
        limit: |x| ≤ limit, so that what a sampler draws may be clipped to it; None: x has no bounds.
    """

    name: str
    limit: int | None

    def encode(self, samples: Tensor) -> Tensor:
        """x from uint8, or from numbers that are x already."""
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
"""What x is: pixels, numbers without bounds, or the latents of the autoencoder among the model's components."""
