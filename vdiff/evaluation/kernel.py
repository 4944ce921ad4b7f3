"""The kernel distance between two sets of vectors: squared maximum mean discrepancy, free of bias at any n."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.evaluation.intervals import student
from vdiff.evaluation.results import Metric

TILE = 2**20
"""Pairs that are looked at together: 8 MiB."""


def on_device(vectors: NDArray[Any], device: torch.device | str) -> Tensor:
    """(n, d) float64 where pairs are computed: on CUDA if that is the device, else on the CPU."""
    device = torch.device(device)
    return torch.as_tensor(vectors).to(device if device.type == "cuda" else "cpu").double()


def tiles(x: Tensor, others: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of x, so many at a time that with `others` vectors they are `TILE` pairs, and the number of the first."""
    rows = max(1, TILE // max(others, 1))
    for start in range(0, len(x), rows):
        yield start, x[start : start + rows]


class KernelDistance:
    """MMD² = E k(x, x′) + E k(y, y′) − 2 E k(x, y) to the vectors y of a reference, k(x, y) = (xᵀy/d + 1)³.

    The means are over all pairs of different vectors, so the estimate has no bias and may fall below 0. The kernel
    inception distance is the mean of the same over random subsets, which scatters more.
    Source: Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, *Demystifying MMD GANs*.

    Args:
        reference: (m, d), m ≥ 2.
        device: where pairs are computed.
    """

    def __init__(self, reference: NDArray[Any], device: torch.device | str = "cpu") -> None:
        self.y = on_device(reference, device)
        m = len(self.y)
        self.within = float(_sums_without_self(self.y).sum()) / (m * (m - 1))

    def __call__(self, vectors: NDArray[Any]) -> Metric:
        """The distance of (n, d) vectors, n ≥ 3, ± t·s of the jackknife over single vectors; the reference as it is."""
        x = on_device(vectors, self.y.device)
        n, m = len(x), len(self.y)
        own, cross = _sums_without_self(x), _sums(x, self.y)
        own_sum, cross_sum = float(own.sum()), float(cross.sum())
        value = own_sum / (n * (n - 1)) + self.within - 2 * cross_sum / (n * m)
        without = (own_sum - 2 * own) / ((n - 1) * (n - 2)) - 2 * (cross_sum - cross) / ((n - 1) * m)
        half = student(n - 1) * math.sqrt((n - 1) * float(without.var(correction=0)))
        return Metric(value, value - half, value + half)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T) / x.shape[1] + 1) ** 3


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """Σ_j k(x_i, y_j): (n,)."""
    return torch.cat([_kernel(rows, y).sum(1) for _, rows in tiles(x, len(y))])


def _sums_without_self(x: Tensor) -> Tensor:
    """Σ_{j≠i} k(x_i, x_j): (n,)."""
    parts = []
    for start, rows in tiles(x, len(x)):
        kernel = _kernel(rows, x)
        kernel[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 0
        parts.append(kernel.sum(1))
    return torch.cat(parts)
