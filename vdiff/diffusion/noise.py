"""Gaussian noise with one stream for each image, so that image k is the same in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, device


class ImageNoise:
    """Each call draws the next N(0, I) from each image's own stream: (B, C, H, W) float32.

    Stream k of seed s is Philox with the key (s, k) (Salmon et al. 2011), the same on every machine and device.

    Args:
        seed: 0 to 2⁶⁴ − 1.
        indices: the B image numbers.
        shape: (C, H, W).
    """

    def __init__(
        self, *, seed: int, indices: Sequence[int], shape: Sequence[int], device: str | device = "cpu"
    ) -> None:
        self.streams = [np.random.Generator(np.random.Philox(key=np.array([seed, k], np.uint64))) for k in indices]
        self.shape = tuple(shape)
        self.device = device

    def __call__(self) -> Tensor:
        import torch

        draws = [stream.standard_normal(self.shape, dtype=np.float32) for stream in self.streams]
        return torch.from_numpy(np.stack(draws)).to(self.device)
