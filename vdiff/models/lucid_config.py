"""The configuration of a `LucidUNet`, as stored in a checkpoint; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vdiff.models.condition import Signature
from vdiff.models.unet_config import NetworkConfig

MAX_LEVELS, MAX_WIDTH = 16, 2**16


@dataclass(frozen=True)
class LucidConfig(NetworkConfig):
    """The sizes of the UNet of lucidrains' denoising-diffusion-pytorch.

    Attributes:
        channels: of the images.
        dim: of the embedded time; the vector for the blocks has 4 · dim.
        init_dim: channels of the first level.
        widths: channels behind each level.
        full_attention: for each level, whether its attention is the usual one; otherwise it is linear.
        heads, head_channels: of the attention of each level.

    Raises:
        ValueError, TypeError: values of no network.
    """

    network: ClassVar[str] = "LucidUNet"
    channels: int
    dim: int
    init_dim: int
    widths: tuple[int, ...]
    full_attention: tuple[bool, ...]
    heads: tuple[int, ...]
    head_channels: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("widths", "full_attention", "heads", "head_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 1 <= len(self.widths) <= MAX_LEVELS:
            raise ValueError(f"widths must be 1 to {MAX_LEVELS} numbers, got {list(self.widths)}")
        for name in ("full_attention", "heads", "head_channels"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name} must have a value for each of {len(self.widths)} levels")
        sizes = (self.channels, self.dim, self.init_dim, *self.widths, *self.heads, *self.head_channels)
        if any(type(size) is not int or not 1 <= size <= MAX_WIDTH for size in sizes):
            raise ValueError(f"all sizes must be whole numbers from 1 to {MAX_WIDTH}")
        if self.dim < 4 or self.dim % 2:
            raise ValueError(f"dim must be an even number from 4, got {self.dim}")

    @property
    def signature(self) -> Signature:
        """The network's inputs and outputs."""
        return Signature(self.channels, self.channels, size_multiple=2 ** (len(self.widths) - 1))
