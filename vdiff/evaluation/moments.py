"""Mean and covariance of vectors that come in batches: what a Gaussian needs to be told, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter Σ (x − μ)(x − μ)ᵀ of (n, d) vectors, in float64.

    Scatters about the mean of their own part lose no digits to a large common mean, as sums of x xᵀ would.
    Source: Chan, Golub & LeVeque 1979 (merging).
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, vectors: NDArray[Any]) -> Moments:
        """Those of (n, d) vectors, n ≥ 1."""
        x = np.asarray(vectors, np.float64)
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    @classmethod
    def none(cls, dim: int) -> Moments:
        """Those of no vectors."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def __add__(self, other: Moments) -> Moments:
        """Those of both sets together."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    def __sub__(self, part: Moments) -> Moments:
        """Those of the vectors that are not in `part`, which is a part of these."""
        count = self.count - part.count
        mean = (self.count * self.mean - part.count * part.mean) / count
        delta = part.mean - mean
        scatter = self.scatter - part.scatter - np.outer(delta, delta) * (count * part.count / self.count)
        return Moments(count, mean, scatter)

    @property
    def dim(self) -> int:
        """d."""
        return len(self.mean)

    @property
    def covariance(self) -> Array:
        """(d, d), by n − 1."""
        return self.scatter / (self.count - 1)


def total(parts: Iterable[Moments]) -> Moments:
    """Those of all parts, merged from the first to the last: equal parts in equal order give equal bits."""
    return reduce(Moments.__add__, parts)
