"""The UNet `image_v1` of k-diffusion, with its names of weights.

It differs from EDM's networks: the noise level scales and shifts all normalised features, also those before attention;
features change their size by the filter (1, 3, 3, 1) with mirrored borders; and the lowest level of the decoder gets
the output of the encoder alone.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.models.backbone import Backbone, without_autocast
from vdiff.models.image_v1_config import ImageV1Config
from vdiff.models.song_unet import FirFilter
from vdiff.models.unet import zero_init

TAPS = (1.0, 3.0, 3.0, 1.0)


class AdaptiveNorm(nn.Module):
    """Group normalisation, then scale + 1 and shift by the embedding."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.groups = ImageV1Config.groups(channels)
        self.mapper = zero_init(nn.Linear(embedding, 2 * channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.mapper(embedding)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, self.groups) * (scale + 1) + shift


class ImageV1Block(nn.Module):
    """Two convolutions with normalisation and GELU before them, and their input."""

    def __init__(self, in_channels: int, middle: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.main = nn.ModuleDict({
            "0": AdaptiveNorm(in_channels, embedding), "2": nn.Conv2d(in_channels, middle, 3, padding=1),
            "4": AdaptiveNorm(middle, embedding), "6": zero_init(nn.Conv2d(middle, out_channels, 3, padding=1)),
        })  # fmt: skip
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.main["2"](F.gelu(self.main["0"](x, embedding)))
        h = self.main["6"](F.gelu(self.main["4"](h, embedding)))
        found: Tensor = h + self.skip(x)
        return found


class ImageV1Attention(nn.Module):
    """Attention, and its input."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.heads = ImageV1Config.heads(channels)
        self.norm_in = AdaptiveNorm(channels, embedding)
        self.qkv_proj = nn.Conv2d(channels, 3 * channels, 1)
        self.out_proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        tokens = self.qkv_proj(self.norm_in(x, embedding)).unflatten(1, (3, self.heads, -1)).flatten(4)
        q, k, v = tokens.transpose(3, 4).unbind(1)  # each (B, heads, H·W, width)
        found: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape))
        return x + found


class ImageV1UNet(Backbone):
    """z (B, C, H, W), timestep (B,) → (B, C, H, W)."""

    kind = "image_v1"
    attention_layers = ("qkv_proj", "out_proj")

    def __init__(self, config: ImageV1Config) -> None:
        super().__init__()
        self.config, self.signature = config, config.signature
        emb, widths = config.mapping_out, config.channels
        self.timestep_embed = nn.Module()
        self.timestep_embed.register_buffer("weight", torch.randn(emb // 2, 1))
        self.mapping = nn.Sequential(nn.Linear(emb, emb), nn.GELU(), nn.Linear(emb, emb), nn.GELU())
        pixels = config.input_channels * config.patch_size**2
        self.proj_in = nn.Conv2d(pixels, widths[0], 1)
        self.proj_out = zero_init(nn.Conv2d(widths[0], pixels, 1))

        def level(number: int, first: int, last: int) -> list[nn.Module]:
            """The residual blocks of a level from `first` to `last` channels, each with its attention."""
            depth, width, parts = config.depths[number], widths[number], list[nn.Module]()
            for i in range(depth):
                out = last if i == depth - 1 else width
                parts.append(ImageV1Block(width if i else first, width, out, emb))
                if config.self_attn_depths[number]:
                    parts.append(ImageV1Attention(out, emb))
            return parts

        down, up = nn.ModuleList(), nn.ModuleList()
        for number, width in enumerate(widths):
            before, is_last = widths[max(0, number - 1)], number == len(widths) - 1
            down.append(nn.ModuleList([_resampling(number), *level(number, before, width)]))
            parts = level(number, width if is_last else 2 * width, before)
            up.insert(0, nn.ModuleList([*parts, _resampling(number)]))
        self.u_net = nn.ModuleDict({"d_blocks": down, "u_blocks": up})

    def forward(self, z: Tensor, timestep: Tensor) -> Tensor:
        with self.own_precision(z.device):
            embedding, skips = self._embedding(timestep), list[Tensor]()
            h = self.proj_in(F.pixel_unshuffle(z, self.config.patch_size))
            for parts in self._levels("d_blocks"):
                h = self._evaluated(parts, h, embedding, "down")
                skips.append(h)
            skips.pop()
            for i, parts in enumerate(self._levels("u_blocks")):
                h = self._evaluated(parts, torch.cat([h, skips.pop()], dim=1) if i else h, embedding, "up")
            return F.pixel_shuffle(self.proj_out(h), self.config.patch_size)

    def _evaluated(self, parts: list[nn.Module], h: Tensor, embedding: Tensor, way: Literal["down", "up"]) -> Tensor:
        """The features behind the parts of a level."""
        for part in parts:
            if isinstance(part, FirFilter):
                h = part(F.pad(h, [part.padding] * 4, mode="reflect"), way, is_padded=True)
            elif not isinstance(part, nn.Identity):
                h = self.run(part, h, embedding)
        return h

    def _embedding(self, timestep: Tensor) -> Tensor:
        with without_autocast(timestep.device):
            angles = timestep[:, None] * (2 * math.pi * self.timestep_embed.get_buffer("weight")[:, 0])
            waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.proj_in.weight.dtype)
            embedding: Tensor = self.mapping(waves)
            return embedding

    def _levels(self, part: str) -> list[list[nn.Module]]:
        return [list(level.children()) for level in self.u_net[part].children()]

    def describe(self) -> dict[str, Any]:
        """`ImageV1Config.to_dict`."""
        return self.config.to_dict()

    def blocks(self) -> list[nn.Module]:
        """The parts of all levels."""
        return [part for name in ("d_blocks", "u_blocks") for level in self._levels(name) for part in level]

    @property
    def output_layer(self) -> nn.Module:
        """The last convolution."""
        return self.proj_out


def _resampling(level: int) -> nn.Module:
    """The filter between a level and the one above; the first level has none."""
    return FirFilter(TAPS) if level else nn.Identity()
