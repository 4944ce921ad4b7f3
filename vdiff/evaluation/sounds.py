"""Measures of sounds: their mel spectrograms, vectors of these for Fréchet distances, and the log-spectral distance."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.models.codec import WAVEFORM

WINDOW_SECONDS, BANDS, PARTS = 0.032, 20, 4
FLOOR_DB = -80.0
"""Lower levels are raised to this one; a sine of amplitude 1 has 0 dB."""
BELOW_LOUDNESS, UNKNOWN_FLOOR = 20.0, -60.0


def power_spectra(sounds: Tensor, rate: int) -> Tensor:
    """The power (n, frequencies, times) of sounds (n, C, L) in [−1, 1], the mean of their channels.

    The Hann window has the power of two of samples nearest to 32 ms, and moves by a quarter of it.
    """
    size = 2 ** round(math.log2(max(WINDOW_SECONDS * rate, 4)))
    window = torch.hann_window(size, dtype=torch.float64, device=sounds.device)
    x = WAVEFORM.clip(WAVEFORM.encode(sounds).double()).mean(1)
    spectrum = torch.stft(x, size, size // 4, window=window, pad_mode="constant", return_complex=True)
    return (spectrum.abs() / (window.sum() / 2)).square()


def decibels(power: Tensor) -> Tensor:
    """10 log₁₀ of a power, at least `FLOOR_DB`."""
    return 10 * power.clamp(min=10 ** (FLOOR_DB / 10)).log10()


def mel_filters(num_frequencies: int, rate: int) -> Tensor:
    """Triangular filters (BANDS, frequencies), equally wide in mel = 2595 log₁₀(1 + f/700), from 0 to rate/2 (HTK)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, num_frequencies, dtype=torch.float64)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)).clamp(min=0)


def log_mel(sounds: Tensor, rate: int) -> Tensor:
    """The mel spectrogram (n, BANDS, times) of sounds (n, C, L), in dB."""
    power = power_spectra(sounds, rate)
    return decibels(mel_filters(power.shape[1], rate).to(power) @ power)


def log_mel_vectors(sounds: Tensor, rate: int, floor: float = FLOOR_DB) -> NDArray[np.float64]:
    """The mean of `log_mel`, in units of 20 dB, over each of 4 equal parts of the time: (n, C, L) → (n, 80).

    Args:
        floor: lower levels are raised to this one, in dB.
    """
    parts = torch.nn.functional.adaptive_avg_pool1d(log_mel(sounds, rate).clamp(min=floor), PARTS) / 20
    vectors: NDArray[np.float64] = parts.flatten(1).cpu().numpy()
    return vectors


def floor_of(loudness: str) -> float:
    """The `floor` for sounds of a `DatasetMeta.loudness`: 20 dB below it, −60 dB if it is unknown.

    Without it, distances measure the noise in pauses, which is hardly heard, more than the sounds.
    """
    return max(float(loudness) - BELOW_LOUDNESS, FLOOR_DB) if loudness not in ("", "none") else UNKNOWN_FLOOR


def log_spectral_distance(sounds: Tensor, theirs: Tensor, rate: int) -> Tensor:
    """The log-spectral distance of each pair of sounds (n, C, L), in dB (Gray & Markel 1976): (n,).

    The mean over the time of √(mean over the frequencies of (10 log₁₀ P/P′)²), powers raised to `FLOOR_DB`.
    """
    difference = decibels(power_spectra(sounds, rate)) - decibels(power_spectra(theirs, rate))
    return difference.square().mean(1).sqrt().mean(1)
