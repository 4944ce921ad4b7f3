"""The configuration of a `SongUNet`, as stored in a checkpoint; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vdiff.models.condition import CLASSES, Signature
from vdiff.models.unet_config import NetworkConfig

LIMITS = {"img_resolution": 2**13, "img_channels": 2**12, "model_channels": 2**14, "num_blocks": 64}
LIMITS |= {"channel_mult_emb": 2**6, "channel_mult_noise": 2**6}


class EdmConfig(NetworkConfig):
    """The levels of EDM's and EDM2's networks."""

    img_resolution: int
    channel_mult: tuple[int, ...]

    def check_levels(self) -> None:
        """Check the levels.

        Raises:
            ValueError: multipliers or resolution of no network.
        """
        if not 1 <= len(self.channel_mult) <= 16 or not all(
            type(m) is int and 1 <= m <= 2**10 for m in self.channel_mult
        ):
            raise ValueError(f"channel_mult must be 1 to 16 whole numbers, got {list(self.channel_mult)}")
        if self.img_resolution % self.size_multiple:
            raise ValueError(f"img_resolution must be a multiple of {self.size_multiple}, got {self.img_resolution}")

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True)
class SongConfig(EdmConfig):
    """The arguments of EDM's networks DDPM++ and NCSN++, with the names that EDM gives them.

    Attributes:
        img_resolution, img_channels: width, height and channels of the images.
        label_dim: number of classes; 0: unconditional.
        label_dropout: whether it was also trained without classes.
        model_channels, channel_mult: level i has model_channels · channel_mult[i] channels.
        channel_mult_emb, channel_mult_noise: channels of the embedding and of the embedded time, divided by
            model_channels.
        num_blocks: residual blocks per level.
        attn_resolutions: the sizes of levels with attention.
        fourier: random Fourier features of the time (NCSN++) instead of a geometric sequence of frequencies.
        residual: each level of the encoder also receives the image, by strided convolutions (NCSN++).
        resample_filter: the filter of one axis before the size changes.
        time_scale, time_offset: the network embeds time_scale · timestep + time_offset.

    Raises:
        ValueError, TypeError: values of no network.
    """

    network: ClassVar[str] = "SongUNet"
    img_resolution: int
    img_channels: int
    label_dim: int = 0
    label_dropout: bool = False
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    channel_mult_noise: int = 1
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    fourier: bool = False
    residual: bool = False
    resample_filter: tuple[float, ...] = (1, 1)
    time_scale: float = 1.0
    time_offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions", "resample_filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, limit in LIMITS.items():
            if type(value := getattr(self, name)) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} must be a whole number from 1 to {limit}, got {value!r}")
        if type(self.label_dim) is not int or not 0 <= self.label_dim <= 10**7:
            raise ValueError(f"label_dim must be a whole number up to 10,000,000, got {self.label_dim!r}")
        self.check_levels()
        if self.model_channels % 4:
            raise ValueError(f"model_channels must be a multiple of 4, got {self.model_channels}")
        count = len(self.resample_filter)
        if not 2 <= count <= 16 or count % 2 or not sum(self.resample_filter) > 0:
            raise ValueError(f"resample_filter must be 2 to 16 numbers, evenly many, got {list(self.resample_filter)}")

    @property
    def signature(self) -> Signature:
        """The network's inputs and outputs."""
        names = (CLASSES,) if self.label_dim else ()
        null = {CLASSES: self.label_dim} if self.label_dropout else {}
        return Signature(self.img_channels, self.img_channels, names, null, self.label_dim, self.size_multiple)
