"""The Inception score from what a classifier answers, kept as sums so that no answer need be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from vdiff.evaluation.intervals import student
from vdiff.evaluation.results import Metric

SPLITS = 10


@dataclass(frozen=True)
class Answers:
    """Of (n, c) logits: n, Σ p (c,), and Σ Σ p log p."""

    count: int
    sums: NDArray[np.float64]
    negentropy: float

    @classmethod
    def of(cls, logits: NDArray[Any]) -> Answers:
        """Those of (n, c) logits."""
        logs = log_softmax(np.asarray(logits, np.float64), axis=1)
        p = np.exp(logs)
        return cls(len(p), p.sum(0), float((p * logs).sum()))

    def __add__(self, other: Answers) -> Answers:
        """Those of both sets together."""
        return Answers(self.count + other.count, self.sums + other.sums, self.negentropy + other.negentropy)

    @property
    def score(self) -> float:
        """exp E KL(p(y|x) ‖ p(y)), p(y) being the mean of p(y|x). Source: Salimans et al. 2016, §4."""
        mean = self.sums / self.count
        return math.exp(self.negentropy / self.count - float((mean * np.log(mean)).sum()))


def inception_score(blocks: Sequence[Answers]) -> Metric:
    """The mean score of `SPLITS` sets of equal size (of all blocks, where there are fewer), ± t·s/√splits."""
    splits = min(SPLITS, len(blocks))
    edges = [len(blocks) * k // splits for k in range(splits + 1)]
    groups = [blocks[start:stop] for start, stop in pairwise(edges)]
    scores = []
    for first, *others in groups:
        merged = first
        for other in others:
            merged = merged + other
        scores.append(merged.score)
    mean = sum(scores) / splits
    if splits < 2:
        return Metric(mean)
    half = student(splits - 1) * float(np.std(scores, ddof=1)) / math.sqrt(splits)
    return Metric(mean, mean - half, mean + half)
