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


def products(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x yᵀ, so many rows at a time that they are `TILE` pairs, and which rows they are.

    All are written to the same memory, and may be changed there: the C library finds no use for a piece that is given
    back when the next of the same size is asked for, so tiles of their own would in the end take as much as all pairs.
    """
    rows = max(1, min(len(x), TILE // max(len(y), 1)))
    memory = torch.empty((rows, len(y)), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        yield part, torch.mm(x[part], y.T, out=memory[: part.stop - start])


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


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """Σ_j k(x_i, y_j): (n,)."""
    sums = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for part, product in products(x, y):
        torch.sum(product.div_(x.shape[1]).add_(1).pow_(3), 1, out=sums[part])
    return sums


def _sums_without_self(x: Tensor) -> Tensor:
    """Σ_{j≠i} k(x_i, x_j): (n,)."""
    return _sums(x, x) - (x.square().sum(1) / x.shape[1] + 1) ** 3
