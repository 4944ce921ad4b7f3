"""The DDPM UNet (Ho et al. 2020, with the options of Dhariwal & Nichol 2021): network(z, timestep) → output.

It does not depend on a schedule: the denoiser computes `timestep`, a real number, from the time.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.models.backbone import Backbone, without_autocast
from vdiff.models.unet_config import NORM_EPS, UNetConfig

MAX_GROUPS = 32
Convolution = nn.Conv1d | nn.Conv2d
CONVOLUTIONS: dict[int, type[Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d}
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d}
CONVOLVE, TRANSPOSED = {1: F.conv1d, 2: F.conv2d}, {1: F.conv_transpose1d, 2: F.conv_transpose2d}
"""For each number of sides of a sample, without channels: the layer or function."""
GUIDANCE_SCALE = 250.0
"""Guidance weights are multiplied by this before the embedding of times, which resolves 0 to 1000, so that it resolves
0 to 4 as well."""


def group_norm(channels: int, config: UNetConfig | None = None) -> nn.GroupNorm:
    """GroupNorm with `config`'s number of groups; by default the largest divisor of the channels up to 32."""
    num_groups, eps = (config.num_groups, config.norm_eps) if config else (0, NORM_EPS)
    return nn.GroupNorm(num_groups or math.gcd(channels, MAX_GROUPS), channels, eps=eps)


def conv3(in_channels: int, out_channels: int, config: UNetConfig, stride: int = 1) -> Convolution:
    """A convolution with a kernel of 3 on each side, which keeps the size (or divides it by the stride)."""
    return CONVOLUTIONS[config.dims](in_channels, out_channels, 3, stride, padding=1)


def zero_init(module: Convolution | nn.Linear) -> nn.Module:
    """Initialise with zeros, so that the residual branch starts at zero."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def timestep_embedding(timestep: Tensor, channels: int, max_period: float = 10_000.0, freq_shift: int = 0) -> Tensor:
    """(cos ω_i l, sin ω_i l), ω_i = max_period^(−i/(half − freq_shift)), half = channels/2: (B,) → (B, channels).

    Source: Vaswani et al. 2017; order and frequencies as in diffusers' `UNet2DModel`.
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * index / (half - freq_shift))
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, channels % 2))


def upsample_conv(h: Tensor, conv: Convolution) -> Tensor:
    """conv(nearest-neighbour upsampling of h by 2), for a `conv3`, in 16/36 of the multiplications (of sounds 4/6).

    Repeating each pixel is a transposed convolution with a 2×2 kernel of ones. Together with the 3×3 convolution it is
    a single transposed convolution; its 4×4 kernel is the flipped 3×3 kernel convolved with those ones. A convolution
    with a LoRA has further kernels, so it is called.
    """
    if not isinstance(conv, Convolution):
        upsampled: Tensor = conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return upsampled
    sides = list(range(2, h.ndim))  # torch.compile would pass a range as its two ends
    kernel = F.pad(conv.weight.transpose(0, 1).flip(*sides), (1, 1) * len(sides))
    for side in sides:
        kernel = kernel.narrow(side, 1, 4) + kernel.narrow(side, 0, 4)
    return TRANSPOSED[len(sides)](h, kernel, conv.bias, stride=2, padding=1)


class ResBlock(nn.Module):
    """norm, SiLU, (resample), conv; norm modulated by time, SiLU, dropout, conv; plus the (resampled) input."""

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, resample: Literal["down", "up"] | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.time_affine = config.time_affine
        self.norm1 = group_norm(in_channels, config)
        self.conv1 = conv3(in_channels, out_channels, config)
        self.time = nn.Linear(config.embedding_channels, out_channels * (2 if config.time_affine else 1))
        self.norm2 = group_norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero_init(conv3(out_channels, out_channels, config))
        project = CONVOLUTIONS[config.dims]
        self.skip = project(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            average = AVERAGE[x.ndim - 2]
            h, x = self.conv1(average(h, 2)), average(x, 2)
        elif self.resample == "up":
            h, x = upsample_conv(h, self.conv1), F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            h = self.conv1(h)
        time = self.time(embedding)[(...,) + (None,) * (x.ndim - 2)]
        if self.time_affine:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over all pixels, plus the input."""

    def __init__(self, channels: int, num_heads: int, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels, config)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=2))
        h = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:]).reshape(x.shape)


class UNetStage(nn.Module):
    """A residual block and, at levels with attention, an attention block."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, *, attend: bool) -> None:
        super().__init__()
        self.block = ResBlock(in_channels, out_channels, config)
        heads = config.heads(out_channels)
        self.attention = Attention(out_channels, heads, config) if attend else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(h, embedding))


class Resample(nn.Module):
    """The resampling between two levels: a residual block that changes the size, or a convolution."""

    def __init__(self, channels: int, config: UNetConfig, direction: Literal["down", "up"]) -> None:
        super().__init__()
        self.direction = direction
        self.pads_end = direction == "down" and config.downsample_pad == "end"
        self.block = ResBlock(channels, channels, config, direction) if config.resample == "block" else None
        self.conv = conv3(channels, channels, config, 2 if direction == "down" else 1) if self.block is None else None

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        if self.block is not None:
            return self.block(h, embedding)
        assert self.conv is not None
        if self.pads_end:  # one more row and column at the end; the padding before the first is cut off
            dims = h.ndim - 2
            if not isinstance(self.conv, Convolution):  # it has a LoRA
                return self.conv(F.pad(h, (1, 1) * dims))[(slice(None), slice(None), *[slice(1, None)] * dims)]
            return CONVOLVE[dims](F.pad(h, (0, 1) * dims), self.conv.weight, self.conv.bias, stride=2)
        return self.conv(h) if self.direction == "down" else upsample_conv(h, self.conv)


class UNet(Backbone):
    """z (B, in_channels, H, W), timestep (B,) [, classes (B,) int64][, guidance (B,)][, second_time (B,)]
    [, condition_image (B, in_channels, H, W)] → (B, out_channels, H, W). With `config.dims` = 1, L replaces H, W.

    H and W must be multiples of `config.size_multiple`. With `config.null_class`, class number `num_classes` is "no
    class", and the default. With `config.guidance_input`, guidance is w, by default 0; a network that was not trained
    with it ignores it. The same holds for `config.second_time` and the second timestep, by default the first one. With
    `config.image_input`, the channels of the condition image follow those of z.

    With `checkpointing`, only the inputs of each stage are stored for the gradient; the rest is recomputed.
    """

    kind = "unet"
    attention_layers = ("attention.qkv", "attention.out")

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config, self.signature = config, config.signature
        c, emb = config.channels, config.embedding_channels
        self.embed = nn.Sequential(nn.Linear(c, emb), nn.SiLU(), nn.Linear(emb, emb))
        rows = config.num_classes + config.null_class
        self.embed_class = nn.Embedding(rows, emb) if rows else None
        self.embed_guidance, self.embed_second = (
            nn.Sequential(nn.Linear(c, emb), nn.SiLU(), zero_init(nn.Linear(emb, emb))) if is_told else None
            for is_told in (config.guidance_input, config.second_time)
        )

        self.conv_in = conv3(sum(config.input_parts), c, config)
        self.down = nn.ModuleList()
        widths = [c]
        last = len(config.multipliers) - 1
        for level, multiplier in enumerate(config.multipliers):
            width, attend = config.channels * multiplier, config.stride(level) in config.attention_strides
            for _ in range(config.num_blocks):
                self.down.append(UNetStage(c, width, config, attend=attend))
                c = width
                widths.append(c)
            if level < last:
                self.down.append(Resample(c, config, "down"))
                widths.append(c)

        self.middle = nn.ModuleList([UNetStage(c, c, config, attend=True), UNetStage(c, c, config, attend=False)])

        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            width, attend = config.channels * multiplier, config.stride(level) in config.attention_strides
            for _ in range(config.num_blocks + 1):
                self.up.append(UNetStage(c + widths.pop(), width, config, attend=attend))
                c = width
            if level > 0:
                self.up.append(Resample(c, config, "up"))

        self.norm_out = group_norm(c, config)
        self.conv_out = zero_init(conv3(c, config.out_channels * config.fold**config.dims, config))

    def forward(
        self,
        z: Tensor,
        timestep: Tensor,
        classes: Tensor | None = None,
        guidance: Tensor | None = None,
        second_time: Tensor | None = None,
        condition_image: Tensor | None = None,
    ) -> Tensor:
        if self.config.image_input:
            if condition_image is None:
                raise ValueError("the network needs a condition image")
            z = torch.cat([z, condition_image.to(z.dtype)], dim=1)
        with self.own_precision(z.device):
            return self._forward(z, self._embedding(timestep, classes, guidance, second_time))

    def _forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(_folded(z, self.config.fold))
        skips = [h]
        for module in self.down:
            h = self.run(on_features, module, embedding, h)
            skips.append(h)
        for module in self.middle:
            h = self.run(on_features, module, embedding, h)
        for module in self.up:
            joined = (h,) if isinstance(module, Resample) else (h, skips.pop())
            h = self.run(on_features, module, embedding, *joined)
        return _unfolded(self.conv_out(F.silu(self.norm_out(h))), self.config.fold)

    def _embedding(
        self, timestep: Tensor, classes: Tensor | None, guidance: Tensor | None, second_time: Tensor | None
    ) -> Tensor:
        """The embedding of times, class and guidance for the residual blocks: (B, embedding_channels)."""
        config, dtype = self.config, self.conv_in.weight.dtype
        with without_autocast(timestep.device):  # a few multiplications: rounding saves no time
            embedding = self.embed(self._embedded(timestep))
            if self.embed_guidance is not None:
                w = torch.zeros_like(timestep) if guidance is None else guidance
                embedded = timestep_embedding(GUIDANCE_SCALE * w, config.channels).to(dtype)
                embedding = embedding + self.embed_guidance(embedded)
            if self.embed_second is not None:
                second = timestep if second_time is None else second_time
                embedding = embedding + self.embed_second(self._embedded(second))
        if self.embed_class is not None:
            if classes is None:
                if not config.null_class:
                    raise ValueError(f"a class-conditional network needs classes, 0 to {config.num_classes - 1}")
                classes = torch.full_like(timestep, config.num_classes, dtype=torch.int64)
            embedding = embedding + self.embed_class(classes)
        return F.silu(embedding)

    def _embedded(self, timestep: Tensor) -> Tensor:
        """Sines and cosines of a time, (B, channels)."""
        config = self.config
        time = config.time_scale * timestep + config.time_offset
        return timestep_embedding(time, config.channels, freq_shift=config.freq_shift).to(self.conv_in.weight.dtype)

    def describe(self) -> dict[str, Any]:
        """`UNetConfig.to_dict`."""
        return self.config.to_dict()

    def blocks(self) -> list[nn.Module]:
        """The stages."""
        return [*self.down, *self.middle, *self.up]

    @property
    def output_layer(self) -> nn.Module:
        """The last convolution."""
        return self.conv_out


def on_features(module: nn.Module, embedding: Tensor, *features: Tensor) -> Tensor:
    """A stage on its input; on the way up, the input is concatenated with the skip of the same level.

    They are concatenated here, so that checkpointing does not store the result.
    """
    h: Tensor = module(features[0] if len(features) == 1 else torch.cat(features, dim=1), embedding)
    return h


def _folded(z: Tensor, fold: int) -> Tensor:
    """Space to depth: (B, C, H, W) → (B, C·fold², H/fold, W/fold), with the pixels of a square row by row.

    (B, C, L) → (B, C·fold, L/fold).
    """
    if z.ndim == 3:
        return z.unflatten(2, (-1, fold)).transpose(2, 3).flatten(1, 2)
    return F.pixel_unshuffle(z, fold) if fold > 1 else z


def _unfolded(h: Tensor, fold: int) -> Tensor:
    """The inverse of `_folded`."""
    if h.ndim == 3:
        return h.unflatten(1, (-1, fold)).transpose(2, 3).flatten(2)
    return F.pixel_shuffle(h, fold) if fold > 1 else h
