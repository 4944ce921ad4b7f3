"""Which noise levels an update looks at: all alike, or those more often where losses are large."""

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
    """Draws u ∈ [0, 1), from which an objective makes a time, with a density f that is large where losses are.

    [0, 1) is cut into K bins; f = (1 − 0.1)·√m_k/mean(√m) + 0.1 in bin k, m_k a moving average of the squared losses
    there. A loss drawn so counts 1/f times: the expected loss and gradient are those of uniform u, with less variance.
    Until every bin was seen f = 1. The statistics stay on the device, and are those of all processes together.
    Source: Nichol & Dhariwal 2021, *Improved Denoising Diffusion Probabilistic Models*, section 3.3.

    Attributes:
        moments: m (K,), −1 where a bin was never seen.
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
        """(u', 1/f(u')) from uniform u (B,): u' = F⁻¹(u), F the integral of f, linear in each bin."""
        density = self.density().to(u.dtype)
        ends = density.cumsum(0) / density.sum()
        bins = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)
        start = torch.where(bins > 0, ends[bins - 1], 0)
        within = (u - start) / (ends[bins] - start)
        # rounding, here or when u'·K is taken, must not carry a number into another bin, whose weight is another
        return (bins + within.clamp(EDGE, 1 - EDGE)) / len(ends), 1 / density[bins]

    def learn(self, u: Tensor, losses: Tensor, engine: Engine) -> None:
        """Take in the losses (b,), without their weights 1/f, at u (b,) of this process; one that is no number counts
        nothing."""
        bins = (u * len(self.moments)).long()
        finite = losses.isfinite()
        squares = losses.square().clamp(max=LARGEST)  # an infinite one would never be forgotten
        sums = self.moments.new_zeros(2, len(self.moments))
        sums[0].index_add_(0, bins, torch.where(finite, squares, 0).to(sums))
        sums[1].index_add_(0, bins, finite.to(sums))
        total, counts = engine.sum(sums)
        seen, mean = counts > 0, total / counts.clamp(min=1)
        kept = torch.where(self.moments < 0, mean, MEMORY * self.moments + (1 - MEMORY) * mean)
        self.moments.copy_(torch.where(seen, kept, self.moments))


def num_bins(num_times: int | None) -> int:
    """A bin for each time of the examples, as long as they are few, else 64; None: any time is possible."""
    return num_times if num_times is not None and num_times <= MAX_BINS else MAX_BINS
