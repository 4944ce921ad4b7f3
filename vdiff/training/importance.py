"""The sampling of noise levels: uniform, or more often where losses are large."""

from __future__ import annotations

import torch
from torch import Tensor

from vdiff.training.engine import Engine

MAX_BINS = 64
MEMORY = 0.95
UNIFORM_PART = 0.1
LARGEST = 1e30
EDGE = 1e-5


class ImportanceSampling:
    """Draws u ∈ [0, 1), which an objective turns into a time, with a density f that is large where losses are large.

    [0, 1) is divided into K bins. In bin k, f = (1 − 0.1)·√m_k/mean(√m) + 0.1, where m_k is a moving average of the
    squared losses in the bin. Each loss is weighted by 1/f: the expected loss and gradient are those of uniform u, with
    less variance. f = 1 until every bin has been drawn. The statistics are on the device, shared by all processes.
    Source: Nichol & Dhariwal 2021, *Improved Denoising Diffusion Probabilistic Models*, section 3.3.

    Attributes:
        moments: m (K,), −1 for bins that were never drawn.
    """

    def __init__(self, num_bins: int, device: torch.device) -> None:
        self.moments = torch.full((num_bins,), -1.0, device=device)

    def density(self) -> Tensor:
        """f of each bin, with mean 1: (K,)."""
        roots = self.moments.clamp(min=0).sqrt()
        adapted = (1 - UNIFORM_PART) * roots / roots.mean().clamp(min=1e-30) + UNIFORM_PART
        is_ready = (self.moments >= 0).all() & (roots.mean() > 0)
        return torch.where(is_ready, adapted, torch.ones_like(adapted))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(u', 1/f(u')) from uniform u (B,): u' = F⁻¹(u), where F is the integral of f, linear in each bin."""
        density = self.density().to(u.dtype)
        ends = density.cumsum(0) / density.sum()
        bins = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)
        start = torch.where(bins > 0, ends[bins - 1], 0)
        within = (u - start) / (ends[bins] - start)
        # rounding, here or in u'·K, must not move a number into another bin, which has another weight
        return (bins + within.clamp(EDGE, 1 - EDGE)) / len(ends), 1 / density[bins]

    def learn(self, u: Tensor, losses: Tensor, engine: Engine) -> None:
        """Learn from this process's losses (b,) at u (b,), without the weights 1/f; skips non-finite values."""
        bins = (u * len(self.moments)).long()
        finite = losses.isfinite()
        squares = losses.square().clamp(max=LARGEST)  # an infinite moment would never decay
        sums = self.moments.new_zeros(2, len(self.moments))
        sums[0].index_add_(0, bins, torch.where(finite, squares, 0).to(sums))
        sums[1].index_add_(0, bins, finite.to(sums))
        total, counts = engine.sum(sums)
        seen, mean = counts > 0, total / counts.clamp(min=1)
        kept = torch.where(self.moments < 0, mean, MEMORY * self.moments + (1 - MEMORY) * mean)
        self.moments.copy_(torch.where(seen, kept, self.moments))


def num_bins(num_times: int | None) -> int:
    """A bin for each possible time if they are few, else 64; None: any time is possible."""
    return num_times if num_times is not None and num_times <= MAX_BINS else MAX_BINS
