"""The networks DDPM++ and NCSN++ of Song et al. 2021, in the form and with the names of weights of EDM.

They differ from vdiff's UNet: sums are divided by √2, images change their size by a filter, the class is embedded
together with the time, and NCSN++ adds the image to each level of the encoder.
Source: Song et al. 2021, *Score-Based Generative Modeling through SDEs*, appendix H; Karras et al. 2022, appendix F.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.models.backbone import Backbone, without_autocast
from vdiff.models.song_config import EdmConfig, SongConfig
from vdiff.models.unet import on_features, timestep_embedding, zero_init

EPS = 1e-6
HALF = math.sqrt(0.5)
"""The sum of two features of variance 1, times this, has variance 1."""


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=EPS)


class FirFilter(nn.Module):
    """Halves or doubles the size of features, each channel by itself, with a filter against aliasing."""

    kernel: Tensor

    def __init__(self, taps: tuple[float, ...]) -> None:
        super().__init__()
        values = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("kernel", torch.outer(values, values)[None, None] / values.sum() ** 2, persistent=False)
        self.padding = (len(taps) - 1) // 2

    def forward(self, h: Tensor, direction: Literal["down", "up"], *, is_padded: bool = False) -> Tensor:
        """The features of half or twice the size.

        Args:
            is_padded: h is larger by `padding` on each side.
        """
        c, p = h.shape[1], self.padding
        kernel = self.kernel.to(h.dtype).expand(c, -1, -1, -1)
        if direction == "up":
            return F.conv_transpose2d(h, 4 * kernel, stride=2, padding=3 * p if is_padded else p, groups=c)
        return F.conv2d(h, kernel, stride=2, padding=0 if is_padded else p, groups=c)


class SongBlock(nn.Module):
    """A residual block, and attention of one head; both sums are divided by √2."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: SongConfig,
        *,
        attend: bool = False,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.filter = FirFilter(config.resample_filter) if resample else None
        self.norm0 = _norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(config.model_channels * config.channel_mult_emb, out_channels)
        self.norm1 = _norm(out_channels)
        self.conv1 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        has_skip = in_channels != out_channels or resample is not None
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if has_skip else nn.Identity()
        self.attends = attend
        if attend:
            self.norm2 = _norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = zero_init(nn.Conv2d(out_channels, out_channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm0(x))
        if self.filter is not None and self.resample is not None:
            h, x = self.filter(h, self.resample), self.filter(x, self.resample)
        h = self.conv0(h) + self.affine(embedding)[:, :, None, None]
        h = (self.skip(x) + self.conv1(F.silu(self.norm1(h)))) * HALF
        if self.attends:
            tokens = self.qkv(self.norm2(h)).unflatten(1, (-1, 3)).flatten(3).permute(2, 0, 3, 1)  # (3, B, H·W, C)
            q, k, v = tokens[:, :, None]
            found = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(h.shape)
            h = (h + self.proj(found)) * HALF
        return h


class EdmUNet(Backbone):
    """What EDM's and EDM2's networks share.

    Attributes:
        enc, dec: blocks of encoder and decoder, named by their resolution.
    """

    config: EdmConfig
    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def class_rows(self, embedded: Tensor, classes: Tensor | None) -> Tensor:
        """√K · one-hot(classes), (B, K), of K classes; rows of zeros without a class.

        Args:
            embedded: (B, …), the embedded time, whose type and device the rows have.
        """
        count = self.signature.num_classes
        rows = embedded.new_zeros(len(embedded), count)
        if classes is not None:
            rows = F.one_hot(classes, count + 1)[:, :count].to(embedded.dtype)
        return rows * math.sqrt(count)

    def describe(self) -> dict[str, Any]:
        """The configuration's `to_dict`."""
        return self.config.to_dict()

    def blocks(self) -> list[nn.Module]:
        """The members of encoder and decoder."""
        return [*self.enc.values(), *self.dec.values()]


class SongUNet(EdmUNet):
    """z (B, C, H, W), timestep (B,) [, classes (B,) int64] → (B, C, H, W).

    Without `classes`, and for class number `label_dim`, the embedding of the class is that of no class.
    """

    config: SongConfig
    kind = "song"
    attention_layers = ("qkv", "proj")

    def __init__(self, config: SongConfig) -> None:
        super().__init__()
        self.config, self.signature = config, config.signature
        channels, noise = config.model_channels, config.model_channels * config.channel_mult_noise
        emb = channels * config.channel_mult_emb
        self.map_noise = nn.Module()
        if config.fourier:
            self.map_noise.register_buffer("freqs", 16 * torch.randn(noise // 2))
        self.map_label = nn.Linear(config.label_dim, noise) if config.label_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)

        size, last = config.img_resolution, len(config.channel_mult) - 1
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.filter = FirFilter(config.resample_filter)
        c, skips, from_image = channels, [channels], config.img_channels
        self.enc[f"{size}x{size}_conv"] = nn.Conv2d(config.img_channels, channels, 3, padding=1)
        for level, multiplier in enumerate(config.channel_mult):
            name, width = f"{size >> level}x{size >> level}", channels * multiplier
            if level:
                self.enc[f"{name}_down"] = SongBlock(c, c, config, resample="down")
                skips.append(c)
                if config.residual:
                    padding = 1 + self.filter.padding
                    self.enc[f"{name}_aux_residual"] = nn.Conv2d(from_image, c, 3, padding=padding)
                    from_image = c
            for i in range(config.num_blocks):
                attend = size >> level in config.attn_resolutions
                self.enc[f"{name}_block{i}"] = SongBlock(c, width, config, attend=attend)
                c = width
                skips.append(c)
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            name, width = f"{size >> level}x{size >> level}", channels * multiplier
            if level == last:
                self.dec[f"{name}_in0"] = SongBlock(c, c, config, attend=True)
                self.dec[f"{name}_in1"] = SongBlock(c, c, config)
            else:
                self.dec[f"{name}_up"] = SongBlock(c, c, config, resample="up")
            for i in range(config.num_blocks + 1):
                attend = i == config.num_blocks and size >> level in config.attn_resolutions
                self.dec[f"{name}_block{i}"] = SongBlock(c + skips.pop(), width, config, attend=attend)
                c = width
        self.dec[f"{size}x{size}_aux_norm"] = _norm(c)
        self.dec[f"{size}x{size}_aux_conv"] = zero_init(nn.Conv2d(c, config.img_channels, 3, padding=1))

    def forward(self, z: Tensor, timestep: Tensor, classes: Tensor | None = None) -> Tensor:
        with self.own_precision(z.device):
            return self._forward(z, self._embedding(timestep, classes))

    def _forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        skips, h, from_image = list[Tensor](), z, z
        for name, module in self.enc.items():
            if name.endswith("_aux_residual"):
                from_image = (h + self.filter(module(from_image), "down", is_padded=True)) * HALF
                h = skips[-1] = from_image
            else:
                h = self.run(on_features, module, embedding, h) if isinstance(module, SongBlock) else module(h)
                skips.append(h)
        *blocks, norm, conv = self.dec.items()
        for name, module in blocks:
            h = self.run(on_features, module, embedding, *((h, skips.pop()) if "_block" in name else (h,)))
        output: Tensor = conv[1](F.silu(norm[1](h)))
        return output

    def _embedding(self, timestep: Tensor, classes: Tensor | None) -> Tensor:
        """The embedding of time and class for the residual blocks."""
        config, dtype = self.config, self.map_layer0.weight.dtype
        with without_autocast(timestep.device):
            time = config.time_scale * timestep + config.time_offset
            if config.fourier:
                angles = time[:, None] * (2 * math.pi * self.map_noise.get_buffer("freqs"))
                embedded = torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
            else:
                channels = config.model_channels * config.channel_mult_noise
                cosines, sines = timestep_embedding(time, channels, freq_shift=1).to(dtype).chunk(2, dim=1)
                embedded = torch.cat([sines, cosines], dim=1)
            if self.map_label is not None:
                embedded = embedded + self.map_label(self.class_rows(embedded, classes))
            return F.silu(self.map_layer1(F.silu(self.map_layer0(embedded))))

    @property
    def output_layer(self) -> nn.Module:
        """The last convolution."""
        return list(self.dec.values())[-1]
