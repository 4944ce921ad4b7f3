"""The UNet of lucidrains' denoising-diffusion-pytorch (versions with RMSNorm), with its names of weights.

Each level has linear attention (Shen et al. 2021, *Efficient Attention*) or the usual one, both with four learned keys
and values besides those of the image.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.models.backbone import Backbone, without_autocast
from vdiff.models.lucid_config import LucidConfig
from vdiff.models.unet import timestep_embedding

MEMORY = 4
"""Learned keys and values."""


class ChannelNorm(nn.Module):
    """x/‖x‖ · √channels · g, over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * math.sqrt(x.shape[1])


class LucidBlock(nn.Module):
    """A convolution, the norm, scale and shift of the time if given, and SiLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = ChannelNorm(out_channels)

    def forward(self, x: Tensor, embedded: Tensor | None = None) -> Tensor:
        h: Tensor = self.norm(self.proj(x))
        if embedded is not None:
            scale, shift = embedded[:, :, None, None].chunk(2, dim=1)
            h = h * (scale + 1) + shift
        return F.silu(h)


class LucidResidual(nn.Module):
    """Two blocks, the first of which receives the time, plus their input."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        self.block1, self.block2 = LucidBlock(in_channels, out_channels), LucidBlock(out_channels, out_channels)
        same = in_channels == out_channels
        self.res_conv = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor = self.block2(self.block1(x, self.mlp(embedding)))
        return h + self.res_conv(x)


class LucidAttention(nn.Module):
    """Attention, usual or linear: (softmax over channels of q) · (softmax over pixels of k) · v."""

    def __init__(self, channels: int, heads: int, width: int, *, is_full: bool) -> None:
        super().__init__()
        self.heads, self.is_full, inner = heads, is_full, heads * width
        self.norm = ChannelNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, *((MEMORY, width) if is_full else (width, MEMORY))))
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        last = nn.Conv2d(inner, channels, 1)
        self.to_out = last if is_full else nn.Sequential(last, ChannelNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (part.unflatten(1, (self.heads, -1)).flatten(3) for part in parts)  # (B, heads, width, H·W)
        memory = self.mem_kv.transpose(2, 3) if self.is_full else self.mem_kv
        more_k, more_v = (each.to(k.dtype).expand(x.shape[0], -1, -1, -1) for each in memory)
        k, v = torch.cat([more_k, k], dim=3), torch.cat([more_v, v], dim=3)
        if self.is_full:
            q, k, v = (each.transpose(2, 3) for each in (q, k, v))
            found = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        else:
            context = k.softmax(dim=3) @ v.transpose(2, 3)  # (B, heads, width of k, width of v)
            found = context.transpose(2, 3) @ (q.softmax(dim=2) / math.sqrt(q.shape[2]))
        result: Tensor = self.to_out(found.flatten(1, 2).unflatten(2, tuple(x.shape[2:])))
        return result


class LucidUNet(Backbone):
    """z (B, C, H, W), timestep (B,) → (B, C, H, W)."""

    kind = "lucidrains"
    attention_layers = ("to_qkv", "to_out", "to_out.0")

    def __init__(self, config: LucidConfig) -> None:
        super().__init__()
        self.config, self.signature = config, config.signature
        widths, emb = [config.init_dim, *config.widths], 4 * config.dim
        self.init_conv = nn.Conv2d(config.channels, config.init_dim, 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Identity(), nn.Linear(config.dim, emb), nn.GELU(), nn.Linear(emb, emb))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()

        def attention(channels: int, level: int, *, is_full: bool) -> LucidAttention:
            return LucidAttention(channels, config.heads[level], config.head_channels[level], is_full=is_full)

        last = len(config.widths) - 1
        for level, (here, below) in enumerate(pairwise(widths)):
            smaller = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * here, below, 1))
            self.downs.append(
                nn.ModuleList([
                    LucidResidual(here, here, emb), LucidResidual(here, here, emb),
                    attention(here, level, is_full=config.full_attention[level]),
                    nn.Conv2d(here, below, 3, padding=1) if level == last else smaller,
                ])
            )  # fmt: skip
        middle = widths[-1]
        self.mid_block1 = LucidResidual(middle, middle, emb)
        self.mid_attn = attention(middle, last, is_full=True)
        self.mid_block2 = LucidResidual(middle, middle, emb)
        for level in reversed(range(last + 1)):
            above, here = widths[level], widths[level + 1]
            larger = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(here, above, 3, padding=1))
            self.ups.append(
                nn.ModuleList([
                    LucidResidual(here + above, here, emb), LucidResidual(here + above, here, emb),
                    attention(here, level, is_full=config.full_attention[level]),
                    larger if level else nn.Conv2d(here, above, 3, padding=1),
                ])
            )  # fmt: skip
        self.final_res_block = LucidResidual(2 * config.init_dim, config.init_dim, emb)
        self.final_conv = nn.Conv2d(config.init_dim, config.channels, 1)

    def forward(self, z: Tensor, timestep: Tensor) -> Tensor:
        with self.own_precision(z.device):
            embedding, first = self._embedding(timestep), self.init_conv(z)
            h, skips = first, list[Tensor]()
            for level in self.downs:
                one, two, attention, resample = _parts(level)
                h = self.run(one, h, embedding)
                skips.append(h)
                h = self.run(two, h, embedding)
                h = self.run(attention, h) + h
                skips.append(h)
                h = resample(h)
            h = self.run(self.mid_block1, h, embedding)
            h = self.run(self.mid_attn, h) + h
            h = self.run(self.mid_block2, h, embedding)
            for level in self.ups:
                one, two, attention, resample = _parts(level)
                h = self.run(one, torch.cat([h, skips.pop()], dim=1), embedding)
                h = self.run(two, torch.cat([h, skips.pop()], dim=1), embedding)
                h = resample(self.run(attention, h) + h)
            output: Tensor = self.final_conv(self.final_res_block(torch.cat([h, first], dim=1), embedding))
            return output

    def _embedding(self, timestep: Tensor) -> Tensor:
        with without_autocast(timestep.device):
            cosines, sines = timestep_embedding(timestep, self.config.dim, freq_shift=1).chunk(2, dim=1)
            waves = torch.cat([sines, cosines], dim=1).to(self.final_conv.weight.dtype)
            embedding: Tensor = self.time_mlp(waves)
            return embedding

    def describe(self) -> dict[str, Any]:
        """`LucidConfig.to_dict`."""
        return self.config.to_dict()

    def blocks(self) -> list[nn.Module]:
        """The parts of all levels, and those of the middle."""
        levels = [part for level in (*self.downs, *self.ups) for part in level.children()]
        return [*levels, self.mid_block1, self.mid_attn, self.mid_block2, self.final_res_block]

    @property
    def output_layer(self) -> nn.Module:
        """The last convolution."""
        return self.final_conv


def _parts(level: nn.Module) -> list[nn.Module]:
    """Two residual blocks, attention and the change of size."""
    return list(level.children())
