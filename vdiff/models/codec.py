"""Conversions between stored samples (pictures, sounds) and x, which a model learns ([−1, 1]), and pictures of x.

Functions import torch, so that a checkpoint is described without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """The conversion between samples and x.

    Attributes:
        limit: the bound of |x|, to which samplers may clip; None: x has no bound.
    """

    name: str
    limit: int | None

    def encode(self, samples: Tensor) -> Tensor:
        """x from uint8 (pictures) or int16 (sounds, x = samples/32768); floating-point values are x already."""
        import torch

        if samples.dtype == torch.int16:
            return samples.float().div_(32768)
        return from_uint8(samples) if samples.dtype == torch.uint8 else samples

    def store(self, x: Tensor) -> Tensor:
        """Samples as they are stored: int16 of sounds, uint8 of pictures."""
        import torch

        return (x * 32768).round().clamp(-32768, 32767).to(torch.int16) if self.is_sound else to_uint8(x)

    def clip(self, x: Tensor) -> Tensor:
        """x within its bounds."""
        return x if self.limit is None else x.clamp(-self.limit, self.limit)

    def are_pictures(self, shape: Sequence[int]) -> bool:
        """Whether samples of this shape (C, …) are pictures: grey or in colour."""
        return not self.is_sound and self.limit is not None and len(shape) == 3 and shape[0] in (1, 3)

    @property
    def is_sound(self) -> bool:
        """Whether samples are sounds."""
        return self.name == WAVEFORM.name

    @property
    def noun(self) -> str:
        """What one sample is called in messages."""
        return "sound" if self.is_sound else "image"

    def pictures(self, x: Tensor) -> Tensor:
        """What is shown of samples: pictures themselves, of sounds their spectrograms; (B, 1 or 3, H, W) in [−1, 1]."""
        return spectrograms(x) if self.is_sound else x


def to_uint8(x: Tensor) -> Tensor:
    """round((x + 1) · 127.5), clamped to 0 … 255; any shape, floating-point in, uint8 out.

    Raises:
        ValueError: NaN or infinity among the values, or an integer tensor.
    """
    import torch

    if not x.is_floating_point():
        raise ValueError(f"images of dtype {x.dtype}; need a floating-point dtype")
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{bad} of {x.numel()} image values are NaN or infinite (dtype {x.dtype})")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(u: Tensor) -> Tensor:
    """u / 127.5 − 1: uint8 0 … 255 to float32 in [−1, 1]; `to_uint8` gives back exactly `u`."""
    import torch

    if u.dtype != torch.uint8:
        raise ValueError(f"images of dtype {u.dtype}; need torch.uint8")
    return u.float().div_(127.5).sub_(1)  # in place: one new tensor, not three


def spectrograms(x: Tensor) -> Tensor:
    """Colour pictures (B, 3, 128, 128) in [−1, 1] of sounds (B, C, L): time to the right, frequency upwards.

    Colours are 10 log₁₀ of the power of a Hann window of up to 256 samples, from −80 to 0 dB, where 0 dB is a sine of
    amplitude 1; channels are averaged.
    """
    import torch
    from matplotlib import colormaps

    if not len(x):  # the Fourier transform refuses it
        return torch.empty(0, 3, SPECTROGRAM_SIDE, SPECTROGRAM_SIDE)
    x = x.detach().float().cpu().nan_to_num().clamp(-1, 1).mean(1)
    size = min(2 * SPECTROGRAM_SIDE, x.shape[-1])
    window = torch.hann_window(size)
    hop = max(1, x.shape[-1] // SPECTROGRAM_SIDE)
    spectrum = torch.stft(x, size, hop, window=window, pad_mode="constant", return_complex=True)
    power = (spectrum.abs() / (window.sum() / 2)).square()[:, 1:].flip(1)
    level = 1 + 10 * power.clamp(min=1e-12).log10() / SPECTROGRAM_DB
    side = (SPECTROGRAM_SIDE, SPECTROGRAM_SIDE)
    level = torch.nn.functional.interpolate(level[:, None], side, mode="nearest")[:, 0].clamp(0, 1)
    table = torch.from_numpy(colormaps["magma"](range(256))[:, :3]).float()
    return 2 * table[(level * (len(table) - 1)).round().long()].movedim(-1, 1) - 1


SPECTROGRAM_SIDE, SPECTROGRAM_DB = 128, 80.0
PIXEL_CODEC, UNBOUNDED, LATENTS = Codec("pixels", 1), Codec("unbounded", None), Codec("autoencoder", None)
WAVEFORM = Codec("waveform", 1)
CODECS = {codec.name: codec for codec in (PIXEL_CODEC, UNBOUNDED, LATENTS, WAVEFORM)}
"""The codecs: pixels, numbers without bounds, latents of the autoencoder in the model's components, and sounds."""
