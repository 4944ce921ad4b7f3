"""The configuration of a UNet, as stored in a checkpoint; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

from vdiff.models.condition import CLASSES, GUIDANCE, IMAGE, SECOND_TIME, Signature

NORM_EPS = 1e-5
LIMITS = {
    "in_channels": 2**12,
    "out_channels": 2**13,
    "channels": 2**16,
    "embedding_channels": 2**18,
    "num_blocks": 64,
    "fold": 2**8,
    "num_classes": 10**7,
}
MAX_LEVELS, MAX_MULTIPLIER = 16, 2**10
"""Far above any existing network: a damaged or hostile configuration is refused before it is used."""


class NetworkConfig:
    """A dataclass that describes a network of one kind.

    Attributes:
        network: its name in messages.
    """

    network: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's configuration: lists for tuples, as JSON has them."""
        values = asdict(self)  # type: ignore[call-overload]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError, TypeError: an unknown or missing key, or a value of no network.
        """
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown {cls.network} option {', '.join(unknown)}; choose from {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The shape of a UNet.

    Attributes:
        in_channels, out_channels: of the images and of the output (twice as many for `both`).
        channels: of the first level; level i has channels · multipliers[i].
        embedding_channels: of the time embedding.
        num_blocks: residual blocks per level.
        attention_strides: the levels with attention, by image pixels per pixel: 4 = at a quarter of the image size.
        num_heads: attention heads; or, if given, `head_channels` channels per head (one head if a level is narrower).
        dropout: rate in the residual blocks.
        resample: "block" changes the size inside a residual block, "conv" by a strided or upsampled convolution.
        time_affine: the time scales and shifts the normalised features; off: it is added to them.
        num_classes: of a class-conditional network; 0: unconditional.
        null_class: an additional class, number `num_classes`, means "no class", for classifier-free guidance.
        guidance_input: the network receives a guidance weight w (Meng et al. 2023).
        second_time: the network receives a second time, embedded like the first.
        image_input: the network receives a condition image, like z, as further channels of its first convolution
            (Saharia et al. 2022, *Palette*).
        fold: squares of fold × fold pixels become channels of one pixel (space to depth) before the first convolution,
            and are unfolded after the last: the levels begin at 1/fold of the image size. Of a sound, `fold` values in
            a row become channels.
        num_groups: of every normalisation; 0: the largest divisor of the channels up to 32.
        norm_eps: ε that the normalisations add to the variance.
        freq_shift: the slowest frequency of the time embedding is max_period^(−(half − 1)/(half − freq_shift)).
        time_scale, time_offset: the network embeds time_scale · timestep + time_offset.
        downsample_pad: zero padding of the strided convolutions of `resample` "conv": on all "sides", or only at the
            "end", below and to the right.
        dims: sides of a sample, apart from its channels: 2 of an image, 1 of a sound (C, L).
    """

    network: ClassVar[str] = "UNet"
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 64
    embedding_channels: int = 256
    multipliers: tuple[int, ...] = (1, 2, 2)
    num_blocks: int = 2
    attention_strides: tuple[int, ...] = (4,)
    num_heads: int = 1
    head_channels: int = 0
    dropout: float = 0.0
    resample: Literal["block", "conv"] = "block"
    time_affine: bool = True
    num_classes: int = 0
    null_class: bool = False
    guidance_input: bool = False
    second_time: bool = False
    fold: int = 1
    num_groups: int = 0
    norm_eps: float = NORM_EPS
    freq_shift: int = 0
    time_scale: float = 1.0
    time_offset: float = 0.0
    downsample_pad: Literal["sides", "end"] = "sides"
    image_input: bool = False
    dims: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention_strides", tuple(self.attention_strides))
        counts = ("in_channels", "out_channels", "channels", "embedding_channels", "num_blocks", "num_heads", "fold")
        rest = ("num_classes", "head_channels", "num_groups", "freq_shift")
        for names, least in ((counts, 1), (rest, 0)):
            for name in names:
                if type(value := getattr(self, name)) is not int:
                    raise ValueError(f"{name} must be a whole number, got {value!r}")
                if value < least:
                    raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, limit in LIMITS.items():
            if getattr(self, name) > limit:
                raise ValueError(f"{name} must be at most {limit}, got {getattr(self, name)}")
        if len(self.multipliers) > MAX_LEVELS or max(self.multipliers, default=1) > MAX_MULTIPLIER:
            raise ValueError(f"multipliers must be at most {MAX_LEVELS} numbers up to {MAX_MULTIPLIER}")
        if self.dims not in (1, 2):
            raise ValueError(f"dims must be 1 or 2, got {self.dims!r}")
        if self.null_class and not self.num_classes:
            raise ValueError("null_class needs classes, but num_classes is 0")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be whole numbers from 1 up, got {self.multipliers}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.resample not in ("block", "conv"):
            raise ValueError(f"resample must be block or conv, got {self.resample!r}")
        if self.downsample_pad not in ("sides", "end"):
            raise ValueError(f"downsample_pad must be sides or end, got {self.downsample_pad!r}")
        for name in ("norm_eps", "time_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not math.isfinite(self.time_offset):
            raise ValueError(f"time_offset must be finite, got {self.time_offset}")
        if self.freq_shift and self.freq_shift >= self.channels // 2:
            raise ValueError(f"freq_shift must be below channels/2 = {self.channels // 2}, got {self.freq_shift}")
        if self.num_groups and self.channels % self.num_groups:
            raise ValueError(f"{self.channels} channels do not split into {self.num_groups} groups")
        allowed = [self.stride(level) for level in range(len(self.multipliers))]
        if set(self.attention_strides) - set(allowed):
            raise ValueError(f"attention_strides must be among {allowed}, got {list(self.attention_strides)}")
        for multiplier in self.multipliers:
            width = self.channels * multiplier
            if width % (min(self.head_channels, width) or self.num_heads):
                heads = f"heads of {self.head_channels} channels" if self.head_channels else f"{self.num_heads} heads"
                raise ValueError(f"{width} channels do not split into {heads}")

    def heads(self, channels: int) -> int:
        """Attention heads at a width of `channels`."""
        return max(channels // self.head_channels, 1) if self.head_channels else self.num_heads

    def stride(self, level: int) -> int:
        """Image pixels per pixel of a level, along each side."""
        return self.fold * 2**level

    @property
    def input_parts(self) -> tuple[int, ...]:
        """The channels of the first convolution: those of z and those of a condition image, folded."""
        return (self.in_channels * self.fold**self.dims,) * (1 + self.image_input)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this."""
        return self.stride(len(self.multipliers) - 1)

    @property
    def signature(self) -> Signature:
        """The network's inputs and outputs."""
        takes = {
            CLASSES: self.num_classes,
            GUIDANCE: self.guidance_input,
            SECOND_TIME: self.second_time,
            IMAGE: self.image_input,
        }
        names = tuple(name for name, value in takes.items() if value)
        null = {CLASSES: self.num_classes} if self.null_class else {}
        return Signature(self.in_channels, self.out_channels, names, null, self.num_classes, self.size_multiple)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's configuration; without `image_input` and `dims`, if they are as usual, as in
        earlier versions."""
        usual = {"image_input": False, "dims": 2}
        return {key: value for key, value in super().to_dict().items() if (key, value) not in usual.items()}
