"""The network of EDM2, whose layers preserve the magnitude of features, with EDM2's names of weights.

Each row of a weight has norm 1 when it is used, sums and concatenations keep the variance, and there are neither biases
nor group normalisations. EDM2's training also sets the stored weights to norm 1 after each update. Here they may grow,
as in any weight normalisation: the function of the network is the same.
Source: Karras et al. 2024, *Analyzing and Improving the Training Dynamics of Diffusion Models*, appendix B.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.models.backbone import without_autocast
from vdiff.models.edm2_config import Edm2Config
from vdiff.models.song_unet import EdmUNet, FirFilter

SILU_SCALE = 1 / 0.596
"""1/√E[silu(x)²] of x ~ N(0, 1), eq. 81."""


def unit_norm(x: Tensor, dims: tuple[int, ...], eps: float = 1e-4) -> Tensor:
    """x divided by its root mean square over `dims`, eq. 56: its norm becomes √(numbers in `dims`)."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (eps + norm / math.sqrt(math.prod(x.shape[d] for d in dims))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x)/0.596, eq. 81."""
    return F.silu(x) * SILU_SCALE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 − t) a + t b)/√((1 − t)² + t²), eq. 88."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a and b concatenated over channels, each with the share t of the variance that its weight gives it, eq. 103."""
    scale = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))], dim=1)


class MpFourier(nn.Module):
    """√2 cos(f y + p) of y (B,): (B, channels) in float32, eq. 75."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, y: Tensor) -> Tensor:
        return (y.float()[:, None] * self.freqs + self.phases).cos() * math.sqrt(2)


class MpConv(nn.Module):
    """A convolution or a linear layer without bias; rows of its weight count with norm 1, times `gain`, eq. 47."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[size] * (2 * bool(size))))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        dims = tuple(range(1, self.weight.ndim))
        w = unit_norm(self.weight.float(), dims)
        w = (w * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Edm2Block(nn.Module):
    """A residual block of encoder or decoder, and attention with q and k of norm 1, figure 21."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        config: Edm2Config,
        *,
        is_encoder: bool,
        attend: bool = False,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.is_encoder, self.resample = config, is_encoder, resample
        self.filter = FirFilter((1, 1)) if resample else None
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MpConv(out_channels if is_encoder else in_channels, out_channels, 3)
        self.emb_linear = MpConv(embedding, out_channels)
        self.conv_res1 = MpConv(out_channels, out_channels, 3)
        self.conv_skip = MpConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.heads = out_channels // config.channels_per_head if attend else 0
        if attend:
            self.attn_qkv = MpConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MpConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        config = self.config
        if self.filter is not None and self.resample is not None:
            x = self.filter(x, self.resample)
        if self.is_encoder:
            x = unit_norm(x if self.conv_skip is None else self.conv_skip(x), (1,))
        scale = self.emb_linear(embedding, gain=self.emb_gain) + 1
        y = mp_silu(self.conv_res0(mp_silu(x)) * scale[:, :, None, None])
        y = self.conv_res1(y)
        if not self.is_encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, config.res_balance)
        if self.heads:
            tokens = self.attn_qkv(x).unflatten(1, (self.heads, -1, 3)).flatten(4)  # (B, heads, C, 3, H·W)
            q, k, v = unit_norm(tokens, (2,)).permute(3, 0, 1, 4, 2)  # each (B, heads, H·W, C)
            found = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
            x = mp_sum(x, self.attn_proj(found), config.attn_balance)
        return x.clip(-config.clip_act, config.clip_act) if config.clip_act else x


class Edm2UNet(EdmUNet):
    """z (B, C, H, W), timestep (B,) [, classes (B,) int64] → (B, C, H, W).

    Class number `label_dim` is no class, as for a `SongUNet`.
    """

    config: Edm2Config
    kind = "edm2"

    def __init__(self, config: Edm2Config) -> None:
        super().__init__()
        self.config, self.signature = config, config.signature
        widths = [config.model_channels * m for m in config.channel_mult]
        noise = config.model_channels * config.channel_mult_noise or widths[0]
        emb = config.model_channels * config.channel_mult_emb or max(widths)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier, self.emb_noise = MpFourier(noise), MpConv(noise, emb)
        self.emb_label = MpConv(config.label_dim, emb) if config.label_dim else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()

        def attends(size: int) -> bool:
            return size in config.attn_resolutions

        c, skips = config.img_channels + 1, list[int]()
        for level, width in enumerate(widths):
            size = config.img_resolution >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = MpConv(c, width, 3)
                c = width
            else:
                self.enc[f"{size}x{size}_down"] = Edm2Block(c, c, emb, config, is_encoder=True, resample="down")
            skips.append(c)
            for i in range(config.num_blocks):
                block = Edm2Block(c, width, emb, config, is_encoder=True, attend=attends(size))
                self.enc[f"{size}x{size}_block{i}"] = block
                c = width
                skips.append(c)
        for level, width in reversed(list(enumerate(widths))):
            size = config.img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = Edm2Block(c, c, emb, config, is_encoder=False, attend=True)
                self.dec[f"{size}x{size}_in1"] = Edm2Block(c, c, emb, config, is_encoder=False)
            else:
                self.dec[f"{size}x{size}_up"] = Edm2Block(c, c, emb, config, is_encoder=False, resample="up")
            for i in range(config.num_blocks + 1):
                into = c + skips.pop()
                block = Edm2Block(into, width, emb, config, is_encoder=False, attend=attends(size))
                self.dec[f"{size}x{size}_block{i}"] = block
                c = width
        self.out_conv = MpConv(c, config.img_channels, 3)

    def forward(self, z: Tensor, timestep: Tensor, classes: Tensor | None = None) -> Tensor:
        with self.own_precision(z.device):
            embedding = self._embedding(timestep, classes)
            h, skips = torch.cat([z, torch.ones_like(z[:, :1])], dim=1), list[Tensor]()
            for module in self.enc.values():
                h = self.run(module, h, embedding) if isinstance(module, Edm2Block) else module(h)
                skips.append(h)
            for name, module in self.dec.items():
                if "_block" in name:
                    h = mp_cat(h, skips.pop(), self.config.concat_balance)
                h = self.run(module, h, embedding)
            output: Tensor = self.out_conv(h, gain=self.out_gain)
            return output

    def _embedding(self, timestep: Tensor, classes: Tensor | None) -> Tensor:
        """The embedding of time and class for the blocks."""
        config, dtype = self.config, self.emb_noise.weight.dtype
        with without_autocast(timestep.device):
            embedding = self.emb_noise(self.emb_fourier(timestep).to(dtype))
            if self.emb_label is not None:
                given = self.emb_label(self.class_rows(embedding, classes))
                embedding = mp_sum(embedding, given, config.label_balance)
            return mp_silu(embedding)

    @property
    def output_layer(self) -> nn.Module:
        """The last convolution."""
        return self.out_conv
