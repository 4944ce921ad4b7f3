"""The configuration of an `Edm2UNet`, as stored in a checkpoint; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vdiff.models.condition import CLASSES, Signature
from vdiff.models.song_config import LIMITS, EdmConfig

BALANCES = ("label_balance", "concat_balance", "res_balance", "attn_balance")


@dataclass(frozen=True)
class Edm2Config(EdmConfig):
    """The arguments of EDM2's network, with the names that EDM2 gives them.

    Attributes:
        img_resolution, img_channels: width, height and channels of the samples.
        label_dim: number of classes; 0: unconditional. A row of zeros means "no class".
        model_channels, channel_mult: level i has model_channels · channel_mult[i] channels.
        channel_mult_noise, channel_mult_emb: channels of the Fourier features and of the embedding, divided by
            model_channels; 0: those of the first level, and of the widest one.
        num_blocks: residual blocks per level.
        attn_resolutions: the sizes of levels with attention.
        channels_per_head: of attention.
        label_balance, concat_balance, res_balance, attn_balance: the weight t of the second part in a sum or
            concatenation that preserves the magnitude.
        clip_act: bound of the features after each block; 0: none.

    Raises:
        ValueError, TypeError: values of no network.
    """

    network: ClassVar[str] = "Edm2UNet"
    img_resolution: int
    img_channels: int
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_noise: int = 0
    channel_mult_emb: int = 0
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float = 256

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, limit in {**LIMITS, "channels_per_head": 2**14, "label_dim": 10**7}.items():
            least = 0 if name in ("label_dim", "channel_mult_emb", "channel_mult_noise") else 1
            if type(value := getattr(self, name)) is not int or not least <= value <= limit:
                raise ValueError(f"{name} must be a whole number from {least} to {limit}, got {value!r}")
        self.check_levels()
        if any(self.model_channels * m < self.channels_per_head for m in self.attending):
            raise ValueError(f"attention needs at least {self.channels_per_head} channels, as channels_per_head says")
        if any(self.model_channels * m % self.channels_per_head for m in self.attending):
            raise ValueError(f"channels with attention must be a multiple of {self.channels_per_head}")
        for name in BALANCES:
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
        if type(self.clip_act) not in (int, float) or not 0 <= self.clip_act < 1e9:
            raise ValueError(f"clip_act must be a number from 0, got {self.clip_act!r}")

    @property
    def attending(self) -> list[int]:
        """The multipliers of the levels with attention, which the middle always has."""
        sizes = [self.img_resolution >> level for level in range(len(self.channel_mult))]
        pairs = zip(sizes, self.channel_mult, strict=True)
        return [self.channel_mult[-1], *(m for size, m in pairs if size in self.attn_resolutions)]

    @property
    def signature(self) -> Signature:
        """The network's inputs and outputs. It has no null class: EDM2 trains a separate network without classes."""
        names = (CLASSES,) if self.label_dim else ()
        return Signature(self.img_channels, self.img_channels, names, {}, self.label_dim, self.size_multiple)
