"""The figures of one row, from what its pieces kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from vdiff.evaluation.drawn import answers_in
from vdiff.evaluation.features import INCEPTION, PIXELS, Features
from vdiff.evaluation.frechet import FrechetDistance
from vdiff.evaluation.intervals import of_mean, of_median
from vdiff.evaluation.kernel import KernelDistance
from vdiff.evaluation.manifolds import Manifold, precision_recall
from vdiff.evaluation.nearest import MAX_QUERIES, Search
from vdiff.evaluation.pieces import Arrays
from vdiff.evaluation.plan import EXTRAPOLATED_FROM
from vdiff.evaluation.reference import MAX_KEPT, Statistics, chosen, moments_in
from vdiff.evaluation.results import Metric
from vdiff.evaluation.score import inception_score

RANGE = 2.0
"""From black to white."""


class Figures:
    """Answers the metrics of a row; what is the same for all rows is computed once.

    Args:
        n: samples of a row.
        metrics: names from `plan.METRICS`.
    """

    def __init__(
        self, known: Statistics, features: Features, n: int, metrics: Sequence[str], device: torch.device
    ) -> None:
        self.known, self.features, self.metrics, self.device = known, features, metrics, device
        self.n, self.num_pairs = n, min(n, MAX_KEPT, len(known.kept))

    @cached_property
    def _frechet(self) -> FrechetDistance:
        return FrechetDistance(self.known.moments)

    @cached_property
    def _kernel(self) -> KernelDistance:
        return KernelDistance(self.known.kept, self.device)

    @cached_property
    def _manifold(self) -> Manifold:
        return Manifold(self.known.kept[chosen(len(self.known.kept), self.num_pairs)], self.device)

    @cached_property
    def _of_data(self) -> Metric:
        places = chosen(len(self.known.kept), MAX_QUERIES)
        return of_median(self._far_in_features(self.known.kept[places], places))

    def __call__(self, pieces: Sequence[Arrays]) -> dict[str, Metric]:
        """The metrics of the samples in some pieces, but for the distances to the nearest images in pixels."""
        kept = np.concatenate([piece["kept"] for piece in pieces])
        fd, kd = ("fid", "kid") if self.features.name == INCEPTION else ("fd", "kd")
        found: dict[str, Metric] = {}
        if "fd" in self.metrics:
            blocks = [block for piece in pieces for block in moments_in(piece)]
            found[fd], at_infinity = self._frechet.measure(blocks)
            if self.n >= EXTRAPOLATED_FROM * self.features.dim:
                found[f"{fd}_inf"] = at_infinity
        if "kd" in self.metrics:
            found[kd] = self._kernel(kept)
        if "precision" in self.metrics or "recall" in self.metrics:
            both = zip(("precision", "recall"), precision_recall(kept[: self.num_pairs], self._manifold), strict=True)
            found |= {name: metric for name, metric in both if name in self.metrics}
        if "isc" in self.metrics:
            found["isc"] = inception_score([answers for piece in pieces for answers in answers_in(piece)])
        errors = np.concatenate([piece["errors"] for piece in pieces])
        if len(errors):
            squared = of_mean(errors)
            found |= {name: f(squared) for name, f in (("rmse", rmse), ("psnr", psnr)) if name in self.metrics}
        if "nearest" in self.metrics and self.features.name != PIXELS:
            found["nearest_features"] = of_median(self._far_in_features(kept[:MAX_QUERIES]))
            found["nearest_data_features"] = self._of_data
        return found

    def _far_in_features(
        self, vectors: NDArray[np.float32], places: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        search = Search(vectors, places, self.device)
        search.look(0, self.known.kept)
        return search.distances


def rmse(squared: Metric) -> Metric:
    """√ of the mean of `vdiff.models.drawing.squared_errors` and of its bounds."""
    low, high = (None if bound is None else math.sqrt(max(bound, 0.0)) for bound in (squared.low, squared.high))
    return Metric(math.sqrt(squared.value), low, high)


def psnr(squared: Metric) -> Metric:
    """10 log₁₀ (2² / e) of a mean squared error e, in dB; the bounds change places."""
    low, high = (None if bound is None else _decibels(bound) for bound in (squared.high, squared.low))
    return Metric(_decibels(squared.value), low, high)


def _decibels(squared: float) -> float:
    return 10 * math.log10(RANGE**2 / squared) if squared > 0 else math.inf
