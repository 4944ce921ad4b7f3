"""The v-diffusion repositories' network and sampler, written anew from their definition as functions of a dictionary.

They share nothing with `vdiff`: attention is sums over explicit pixels, upsampling repeats rows, the schedule is a
table in Python floats. Weights are random; names and shapes are those of `checkpoint.pt`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """The arguments of their network; `attn_strides` count from the folded image."""

    channel: int = 8
    multipliers: tuple[int, ...] = (1, 2)
    n_res_blocks: int = 1
    attn_strides: tuple[int, ...] = (2,)
    attn_heads: int = 1
    affine: bool = False
    fold: int = 1
    image_channels: int = 3

    def blocks(self, part: str) -> list[tuple[str, int, int, bool]]:
        """(kind, channels in, channels out, attends) of each entry of `down`, `mid` or `up`."""
        widths = [self.channel * m for m in self.multipliers]
        attends = [2**i in self.attn_strides for i in range(len(widths))]
        kept, now, last = [self.channel], self.channel, len(widths) - 1
        down: list[tuple[str, int, int, bool]] = []
        for i, width in enumerate(widths):
            for _ in range(self.n_res_blocks):
                down.append(("block", now, width, attends[i]))
                kept.append(now := width)
            if i < last:
                down.append(("down", now, now, False))
                kept.append(now)
        middle = [("block", now, now, True), ("block", now, now, False)]
        up: list[tuple[str, int, int, bool]] = []
        for i in range(last, -1, -1):
            for _ in range(self.n_res_blocks + 1):
                up.append(("block", now + kept.pop(), widths[i], attends[i]))
                now = widths[i]
            if i:
                up.append(("up", now, now, False))
        assert not kept
        return {"down": down, "mid": middle, "up": up}[part]

    def random_weights(self, seed: int = 0) -> dict[str, Tensor]:
        """Every tensor of `G`, of a size that keeps features near 1."""
        generator = torch.Generator().manual_seed(seed)
        c, outputs = self.channel, self.image_channels * self.fold**2
        found: dict[str, Tensor] = {}

        def layer(name: str, *size: int) -> None:
            fan_in = math.prod(size[1:])
            found[f"{name}.weight"] = torch.randn(size, generator=generator) / fan_in**0.5
            found[f"{name}.bias"] = 0.1 * torch.randn(size[0], generator=generator)

        def norm(name: str, size: int) -> None:
            found[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)
            found[f"{name}.bias"] = 0.2 * torch.randn(size, generator=generator)

        found["time.0.inv_freq"] = torch.tensor([10_000 ** (-2 * i / c) for i in range(c // 2)])
        layer("time.1", 4 * c, c)
        layer("time.3", 4 * c, 4 * c)
        layer("down.0", c, outputs, 3, 3)
        for part, offset in (("down", 1), ("mid", 0), ("up", 0)):
            for i, (kind, before, width, attends) in enumerate(self.blocks(part)):
                at = f"{part}.{i + offset}"
                if kind != "block":
                    layer(f"{at}.{'0' if kind == 'down' else '1'}", width, width, 3, 3)
                    continue
                norm(f"{at}.resblocks.norm1", before)
                layer(f"{at}.resblocks.conv1", width, before, 3, 3)
                layer(f"{at}.resblocks.time.1", width * (2 if self.affine else 1), 4 * c)
                if not self.affine:
                    norm(f"{at}.resblocks.norm2", width)
                layer(f"{at}.resblocks.conv2", width, width, 3, 3)
                if before != width:
                    layer(f"{at}.resblocks.skip", width, before, 1, 1)
                if attends:
                    norm(f"{at}.attention.norm", width)
                    layer(f"{at}.attention.qkv", 3 * width, width, 1, 1)
                    layer(f"{at}.attention.out", width, width, 1, 1)
        norm("out.0", c * self.multipliers[0])
        layer("out.2", outputs, c * self.multipliers[0], 3, 3)
        return found

    def forward(self, weights: Mapping[str, Tensor], z: Tensor, timestep: Tensor) -> Tensor:
        """v̂ of z (B, C, H, W), told `timestep` (B,)."""

        def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
            kernel = weights[f"{name}.weight"]
            return F.conv2d(h, kernel, weights[f"{name}.bias"], stride=stride, padding=kernel.shape[-1] // 2)

        def norm(name: str, h: Tensor) -> Tensor:
            groups = h.unflatten(1, (self.channel // 4, -1))
            axes = (2, 3, 4)
            mean, variance = groups.mean(axes, keepdim=True), groups.var(axes, keepdim=True, unbiased=False)
            h = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
            if f"{name}.weight" not in weights:
                return h
            return h * weights[f"{name}.weight"].view(-1, 1, 1) + weights[f"{name}.bias"].view(-1, 1, 1)

        def block(at: str, h: Tensor) -> Tensor:
            told = F.linear(swish(time), weights[f"{at}.time.1.weight"], weights[f"{at}.time.1.bias"])[:, :, None, None]
            inner = conv(f"{at}.conv1", swish(norm(f"{at}.norm1", h)))
            if self.affine:
                gamma, beta = told[:, : inner.shape[1]], told[:, inner.shape[1] :]
                inner = (1 + gamma) * norm(f"{at}.norm2", inner) + beta
            else:
                inner = norm(f"{at}.norm2", inner + told)
            skip = conv(f"{at}.skip", h) if f"{at}.skip.weight" in weights else h
            return conv(f"{at}.conv2", swish(inner)) + skip

        def attend(at: str, h: Tensor) -> Tensor:
            width = h.shape[1] // self.attn_heads
            qkv = conv(f"{at}.qkv", norm(f"{at}.norm", h)).flatten(2)
            heads = []
            for k in range(self.attn_heads):
                query, key, value = qkv[:, 3 * width * k : 3 * width * (k + 1)].split(width, dim=1)
                scores = torch.einsum("bcp,bcr->bpr", query, key) / h.shape[1] ** 0.5
                heads.append(torch.einsum("bpr,bcr->bcp", scores.exp() / scores.exp().sum(2, keepdim=True), value))
            return h + conv(f"{at}.out", torch.cat(heads, 1).view_as(h))

        def run(at: str, kind: str, attends: bool, h: Tensor) -> Tensor:
            if kind == "down":
                return conv(f"{at}.0", h, stride=2)
            if kind == "up":
                return conv(f"{at}.1", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            h = block(f"{at}.resblocks", h)
            return attend(f"{at}.attention", h) if attends else h

        angles = timestep.float()[:, None] * weights["time.0.inv_freq"]
        time = F.linear(torch.cat([angles.sin(), angles.cos()], 1), weights["time.1.weight"], weights["time.1.bias"])
        time = F.linear(swish(time), weights["time.3.weight"], weights["time.3.bias"])
        f = self.fold
        h = torch.stack([z[:, :, y::f, x::f] for y in range(f) for x in range(f)], 2).flatten(1, 2)
        kept = [h := conv("down.0", h)]
        for i, (kind, _, _, attends) in enumerate(self.blocks("down")):
            kept.append(h := run(f"down.{i + 1}", kind, attends, h))
        for i, (kind, _, _, attends) in enumerate(self.blocks("mid")):
            h = run(f"mid.{i}", kind, attends, h)
        for i, (kind, _, _, attends) in enumerate(self.blocks("up")):
            h = run(f"up.{i}", kind, attends, torch.cat([h, kept.pop()], 1) if kind == "block" else h)
        h = conv("out.2", swish(norm("out.0", h))).unflatten(1, (-1, f * f))
        v = torch.empty_like(z)
        for k in range(f * f):
            v[:, :, k // f :: f, k % f :: f] = h[:, :, k]
        return v


def swish(h: Tensor) -> Tensor:
    """h · logistic(h)."""
    return h / (1 + (-h).exp())


def alpha_bars(num_levels: int) -> list[float]:
    """ᾱ of the levels 1 … N of a ddpm_cosine table, β ≤ 0.999."""

    def curve(k: int) -> float:
        return math.cos((k / num_levels + 0.008) / 1.008 * math.pi / 2) ** 2

    kept, found = 1.0, []
    for k in range(num_levels):
        kept *= 1 - min(1 - curve(k + 1) / curve(k), 0.999)
        found.append(kept)
    return found


@torch.no_grad()
def clipped_sampling(
    shape: Shape, weights: Mapping[str, Tensor], noise: Tensor, n_timesteps: int, time_scale: int, clip: float = 1.2
) -> Tensor:
    """Their sampling with clipping, η = 0: indices N − 1 … 0, each told index × time_scale; images in float64."""
    bars = alpha_bars(n_timesteps)
    x = noise.double()
    for index in reversed(range(n_timesteps)):
        timestep = torch.full((len(x),), index * time_scale)
        v = shape.forward(weights, x.float(), timestep).double()
        alpha, sigma = bars[index] ** 0.5, (1 - bars[index]) ** 0.5
        image = (alpha * x - sigma * v).clamp(-clip, clip)
        eps = ((x - alpha * image) / sigma).clamp(-clip, clip)
        x = image if index == 0 else bars[index - 1] ** 0.5 * image + (1 - bars[index - 1]) ** 0.5 * eps
    return x


def save(path: Path, shape: Shape, *, n_timesteps: int = 8, time_scale: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Write a `checkpoint.pt` as they do, with random weights; returns these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = shape.random_weights(seed)
    torch.save({"G": weights, "n_timesteps": n_timesteps, "time_scale": time_scale}, path)
    return weights
