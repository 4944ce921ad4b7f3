"""The configuration of an `ImageV1UNet`, as stored in a checkpoint; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vdiff.models.condition import Signature
from vdiff.models.unet_config import NetworkConfig

GROUP_CHANNELS, HEAD_CHANNELS = 32, 64
MAX_LEVELS, MAX_DEPTH, MAX_WIDTH = 16, 64, 2**16


@dataclass(frozen=True)
class ImageV1Config(NetworkConfig):
    """The sizes of the UNet `image_v1` of k-diffusion, with the names that its configurations give them.

    Attributes:
        input_channels: of the images.
        mapping_out: of the embedded noise level.
        depths, channels: residual blocks and channels of each level.
        self_attn_depths: whether each level has attention.
        patch_size: squares of this side become channels of one pixel before the first level.

    Raises:
        ValueError, TypeError: values of no network.
    """

    network: ClassVar[str] = "ImageV1UNet"
    input_channels: int
    mapping_out: int
    depths: tuple[int, ...]
    channels: tuple[int, ...]
    self_attn_depths: tuple[bool, ...]
    patch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("depths", "channels", "self_attn_depths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        count = len(self.channels)
        if not 1 <= count <= MAX_LEVELS or {len(self.depths), len(self.self_attn_depths)} != {count}:
            raise ValueError(f"depths, channels and self_attn_depths must be of one length up to {MAX_LEVELS}")
        sizes = (self.input_channels, self.mapping_out, self.patch_size, *self.channels)
        if any(type(size) is not int or not 1 <= size <= MAX_WIDTH for size in sizes) or self.mapping_out % 2:
            raise ValueError(f"all sizes must be whole numbers from 1 to {MAX_WIDTH}, and mapping_out even")
        if any(type(depth) is not int or not 1 <= depth <= MAX_DEPTH for depth in self.depths):
            raise ValueError(f"depths must be whole numbers from 1 to {MAX_DEPTH}, got {list(self.depths)}")
        for level, width in enumerate(self.channels):
            into = width if level == count - 1 else 2 * width  # a decoder level begins with the features of two
            for each in (into, width, *([self.channels[level - 1]] if level else [])):
                if each % self.groups(each) or (self.self_attn_depths[level] and each % self.heads(each)):
                    raise ValueError(f"{each} channels do not split into groups of {GROUP_CHANNELS} and heads")

    @staticmethod
    def groups(width: int) -> int:
        """Groups of a normalisation."""
        return max(1, width // GROUP_CHANNELS)

    @staticmethod
    def heads(width: int) -> int:
        """Heads of attention."""
        return max(1, width // HEAD_CHANNELS)

    @property
    def signature(self) -> Signature:
        """The network's inputs and outputs."""
        multiple = self.patch_size * 2 ** (len(self.channels) - 1)
        return Signature(self.input_channels, self.input_channels, size_multiple=multiple)
