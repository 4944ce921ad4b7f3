"""Metrics with 95 % intervals: Fréchet and kernel distance, precision, recall, Inception score.

Mergeable statistics (`Moments`, `ClassStats`) replace the vectors, which need not be in memory all at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, stdtrit
from torch import Tensor

from vdiff.evaluation.results import Metric

LEVEL = 0.95
NORMAL = 1.959963984540054
TILE = 2**20
"""Pairs of vectors in memory at once: 8 MiB."""
NEIGHBOURS = 3
EQUAL = 1e-12
"""Squared distances below this fraction of the vectors' squared lengths are rounding errors: the vectors are equal."""
SPLITS = 10
Arrays = Mapping[str, NDArray[Any]]
T = TypeVar("T")


# Intervals


def student(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def mean_metric(values: NDArray[Any]) -> Metric:
    """The mean of independent values, mean ± t·s/√n; no bounds for one value."""
    mean = float(values.mean())
    if len(values) < 2:
        return Metric(mean)
    return Metric.around(mean, student(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values)))


def share_metric(successes: int, trials: int) -> Metric:
    """The fraction of successes in independent trials, with its score interval. Source: Wilson 1927."""
    share, z2 = successes / trials, NORMAL**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Metric(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def median_metric(values: NDArray[Any]) -> Metric:
    """The median of independent values, between the two order statistics that contain it with probability 95 %.

    The number of values below the median is binomial (n, ½), whatever the distribution. No bounds for n < 6.
    """
    ordered, n = np.sort(values), len(values)
    median = float(np.median(ordered))
    rank = math.floor((n - NORMAL * math.sqrt(n)) / 2)
    return Metric(median, float(ordered[rank]), float(ordered[n - 1 - rank])) if n >= 6 else Metric(median)


def jackknife(value: float, without: Sequence[float]) -> tuple[Metric, Metric]:
    """A statistic θ of K blocks of equal size, and θ without its bias, from the leave-one-out values θ₋ₖ.

    The first is θ ± t·s with s² = (K − 1)/K · Σ (θ₋ₖ − θ̄₋)²: the interval for other samples, equally many. The second
    is K θ − (K − 1) θ̄₋ ± t·s, without the bias of order 1/n: the value for infinitely many samples.
    Source: Quenouille 1956; Tukey 1958; Efron & Tibshirani 1993, ch. 11.
    """
    left, count = np.asarray(without, np.float64), len(without)
    half = student(count - 1) * math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    return Metric.around(value, half), Metric.around(count * value - (count - 1) * float(left.mean()), half)


# Fréchet distance


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and scatter Σ (x − μ)(x − μ)ᵀ (d, d) of n vectors, in float64.

    Scatters about the mean of each part lose no precision to a large common mean, unlike sums of x xᵀ.
    Source: Chan, Golub & LeVeque 1979 (merging).
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: NDArray[Any]) -> Moments:
        """The moments of (n, d) vectors, n ≥ 1."""
        x = np.asarray(vectors, np.float64)
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    @classmethod
    def none(cls, dim: int) -> Moments:
        """The moments of no vectors."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    def __sub__(self, part: Moments) -> Moments:
        """The moments of the vectors without `part`, a subset of them."""
        count = self.count - part.count
        mean = (self.count * self.mean - part.count * part.mean) / count
        delta = part.mean - mean
        scatter = self.scatter - part.scatter - np.outer(delta, delta) * (count * part.count / self.count)
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(d, d), by n − 1."""
        return self.scatter / (self.count - 1)


def total(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts, merged in order: the same parts in the same order give the same bits."""
    return reduce(Moments.__add__, parts)


def to_arrays(items: Sequence[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The fields of equal dataclasses, stacked, under `names`."""
    pairs = zip(names, fields(items[0]), strict=True)
    return {name: np.stack([np.asarray(getattr(item, field.name)) for item in items]) for name, field in pairs}


def from_arrays(kind: type[T], arrays: Arrays, names: Sequence[str]) -> list[T]:
    """The inverse of `to_arrays`; empty if the first name is missing."""
    return [kind(*each) for each in zip(*(arrays[n] for n in names), strict=True)] if names[0] in arrays else []


class FrechetDistance:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½) from the moments a of a reference, float64.

    The symmetric form of the root needs only eigenvalues of symmetric matrices, so singular covariances (pixels that
    are always black) need no special case. The estimate is biased upwards for small n: compare sets of the same size.
    Source: Dowson & Landau 1982; Heusel et al. 2017.

    Args:
        reference: the moments of at least two vectors.
    """

    def __init__(self, reference: Moments) -> None:
        self.mean, covariance = reference.mean, reference.covariance
        self.trace = float(np.trace(covariance))
        values, vectors = np.linalg.eigh(covariance)
        self.root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    def __call__(self, moments: Moments) -> float:
        """The distance of vectors with these moments."""
        covariance = moments.covariance
        cross = np.sqrt(np.linalg.eigvalsh(self.root @ covariance @ self.root).clip(min=0)).sum()
        shift = ((self.mean - moments.mean) ** 2).sum()
        return float(shift + self.trace + np.trace(covariance) - 2 * cross)

    def measure(self, blocks: Sequence[Moments]) -> tuple[Metric, Metric]:
        """The distance of all blocks together, and its value for infinitely many samples (`jackknife`).

        Both intervals are for other samples of the same model; the reference counts as exact.
        """
        whole = total(blocks)
        return jackknife(self(whole), [self(whole - block) for block in blocks])


def frechet_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The `FrechetDistance` between (n, d) and (m, d) vectors.

    Raises:
        ValueError: there are fewer than two vectors, or the dimensions differ.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:] or a.ndim != 2:
        raise ValueError(f"sets of shape {a.shape} and {b.shape}; need (n, d) and (m, d) with n, m >= 2")
    return FrechetDistance(Moments.of(a))(Moments.of(b))


# Pairs of vectors: kernel distance, precision and recall


def on_device(vectors: NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """(n, d) float64 where pairs are computed: on CUDA if that is the device, else on the CPU."""
    device = torch.device(device)
    return torch.as_tensor(vectors).to(device if device.type == "cuda" else "cpu").double()


def products(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x yᵀ in blocks of rows (`TILE` pairs), and the rows of each block.

    All blocks share one buffer, which the caller may modify: with separate buffers, glibc would not reuse freed memory,
    which would then grow to that of all pairs.
    """
    rows = max(1, min(len(x), TILE // max(len(y), 1)))
    memory = torch.empty((rows, len(y)), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        yield part, torch.mm(x[part], y.T, out=memory[: part.stop - start])


class KernelDistance:
    """MMD² = E k(x, x′) + E k(y, y′) − 2 E k(x, y) to the vectors y of a reference, k(x, y) = (xᵀy/d + 1)³.

    The means are over all pairs of different vectors, so the estimate is unbiased and may be negative. The kernel
    inception distance is its mean over random subsets, which has a larger variance.
    Source: Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, *Demystifying MMD GANs*.

    Args:
        reference: (m, d), m ≥ 2.
        device: computes the pairs.
    """

    def __init__(self, reference: NDArray[Any], device: torch.device | str = "cpu") -> None:
        self.y = on_device(reference, device)
        m = len(self.y)
        self.within = float(_sums_without_self(self.y).sum()) / (m * (m - 1))

    def __call__(self, vectors: NDArray[Any]) -> Metric:
        """The distance of (n, d) vectors, n ≥ 3, ± t·s of the jackknife over vectors; the reference is exact."""
        x = on_device(vectors, self.y.device)
        n, m = len(x), len(self.y)
        own, cross = _sums_without_self(x), _sums(x, self.y)
        own_sum, cross_sum = float(own.sum()), float(cross.sum())
        value = own_sum / (n * (n - 1)) + self.within - 2 * cross_sum / (n * m)
        without = (own_sum - 2 * own) / ((n - 1) * (n - 2)) - 2 * (cross_sum - cross) / ((n - 1) * m)
        return Metric.around(value, student(n - 1) * math.sqrt((n - 1) * float(without.var(correction=0))))


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """Σ_j k(x_i, y_j): (n,)."""
    sums = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for part, product in products(x, y):
        torch.sum(product.div_(x.shape[1]).add_(1).pow_(3), 1, out=sums[part])
    return sums


def _sums_without_self(x: Tensor) -> Tensor:
    """Σ_{j≠i} k(x_i, x_j): (n,)."""
    return _sums(x, x) - (x.square().sum(1) / x.shape[1] + 1) ** 3


def squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """‖a_i − b_j‖² of (n, d) and (m, d) float64, in blocks of rows; exactly 0 for equal vectors.

    Yields the rows, their distances, and a boolean tensor of the same shape as a buffer for the caller (`products`).
    """
    of_a, of_b = a.square().sum(1), b.square().sum(1)
    lengths, is_less = torch.empty(0), torch.empty(0)
    for part, squares in products(a, b):
        if len(lengths) < len(squares):
            lengths, is_less = torch.empty_like(squares), torch.empty_like(squares, dtype=torch.bool)
        both, answers = lengths[: len(squares)], is_less[: len(squares)]
        torch.add(of_a[part, None], of_b, out=both)
        squares.mul_(-2).add_(both)
        torch.lt(squares, both.mul_(EQUAL), out=answers)
        yield part, squares.masked_fill_(answers, 0.0), answers


class Manifold:
    """The union of balls around vectors; each radius is the distance to the `NEIGHBOURS`-th nearest other vector.

    Args:
        vectors: (n, d), n > `NEIGHBOURS`.
    """

    def __init__(self, vectors: NDArray[Any], device: torch.device | str = "cpu") -> None:
        self.centres = on_device(vectors, device)
        if len(self.centres) <= NEIGHBOURS:
            raise ValueError(f"{len(self.centres)} vectors; need more than {NEIGHBOURS}")
        self.radii = torch.empty(len(self.centres), dtype=torch.float64, device=self.centres.device)
        for part, squares, _ in squared_distances(self.centres, self.centres):
            # the nearest is the vector itself
            self.radii[part] = squares.topk(NEIGHBOURS + 1, largest=False).values[:, -1]

    def count_inside(self, vectors: Tensor) -> int:
        """The number of vectors that are in at least one ball."""
        tiles = squared_distances(vectors, self.centres)
        return sum(int(torch.le(squares, self.radii, out=inside).any(1).sum()) for _, squares, inside in tiles)


def precision_recall(samples: NDArray[Any], reference: Manifold) -> tuple[Metric, Metric]:
    """The fraction of samples in the reference's manifold, and the fraction of the reference in the samples' manifold.

    Radii depend on the number of vectors: use as many samples as the reference has. The interval of precision is for
    other samples, that of recall for other images of the data; the respective other set counts as exact (Wilson).
    Source: Kynkäänniemi et al. 2019, *Improved Precision and Recall Metric*, eq. 1 and 2.

    Args:
        samples: (n, d), n > `NEIGHBOURS`.
    """
    own = Manifold(samples, reference.centres.device)
    inside, reached = reference.count_inside(own.centres), own.count_inside(reference.centres)
    return share_metric(inside, len(own.centres)), share_metric(reached, len(reference.centres))


# Inception score


@dataclass(frozen=True)
class ClassStats:
    """Statistics of (n, c) logits: n, Σ p (c,), and Σ Σ p log p."""

    count: int
    sums: NDArray[np.float64]
    negentropy: float

    @classmethod
    def of(cls, logits: NDArray[Any]) -> ClassStats:
        """The statistics of (n, c) logits."""
        logs = log_softmax(np.asarray(logits, np.float64), axis=1)
        p = np.exp(logs)
        return cls(len(p), p.sum(0), float((p * logs).sum()))

    def __add__(self, other: ClassStats) -> ClassStats:
        """The statistics of both sets together."""
        return ClassStats(self.count + other.count, self.sums + other.sums, self.negentropy + other.negentropy)

    @property
    def score(self) -> float:
        """exp E KL(p(y|x) ‖ p(y)), where p(y) is the mean of p(y|x). Source: Salimans et al. 2016, §4."""
        mean = self.sums / self.count
        return math.exp(self.negentropy / self.count - float((mean * np.log(mean)).sum()))


def inception_score(blocks: Sequence[ClassStats]) -> Metric:
    """The mean score of `SPLITS` sets of equal size (one per block, if there are fewer blocks), ± t·s/√splits."""
    splits = min(SPLITS, len(blocks))
    edges = [len(blocks) * k // splits for k in range(splits + 1)]
    scores = [reduce(ClassStats.__add__, blocks[start:stop]).score for start, stop in pairwise(edges)]
    mean = sum(scores) / splits
    if splits < 2:
        return Metric(mean)
    return Metric.around(mean, student(splits - 1) * float(np.std(scores, ddof=1)) / math.sqrt(splits))
