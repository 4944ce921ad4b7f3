"""95 % intervals: of means, shares, medians, and of anything that can be computed with a block left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from vdiff.evaluation.results import Metric

LEVEL = 0.95
NORMAL = 1.959963984540054


def student(degrees: int) -> float:
    """The quantile of Student's t that 95 % of its absolute values are below."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def of_mean(values: NDArray[Any]) -> Metric:
    """The mean of independent values, mean ± t·s/√n; no bounds for one value."""
    mean = float(values.mean())
    if len(values) < 2:
        return Metric(mean)
    half = student(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Metric(mean, mean - half, mean + half)


def of_share(successes: int, trials: int) -> Metric:
    """The share of successes in independent trials. Source: Wilson 1927."""
    share, z2 = successes / trials, NORMAL**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Metric(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def of_median(values: NDArray[Any]) -> Metric:
    """The median of independent values, between the two values whose ranks bound it with a chance of 95 %.

    The number of values below the median is binomial (n, ½): no distribution is assumed. Fewer than 6 have no bounds.
    """
    ordered, n = np.sort(values), len(values)
    median = float(np.median(ordered))
    rank = math.floor((n - NORMAL * math.sqrt(n)) / 2)
    return Metric(median, float(ordered[rank]), float(ordered[n - 1 - rank])) if n >= 6 else Metric(median)


def jackknife(value: float, without: Sequence[float]) -> tuple[Metric, Metric]:
    """A statistic θ of K blocks of equal size and θ₋ₖ, the same without block k: θ, and θ freed of its bias.

    The first is θ ± t·s with s² = (K − 1)/K · Σ (θ₋ₖ − θ̄₋)², which is where other samples of the same number would
    put it. The second is K θ − (K − 1) θ̄₋, which has no part left that falls as 1/n, with the same s: where infinitely
    many would put it. Source: Quenouille 1956; Tukey 1958; Efron & Tibshirani 1993, ch. 11.
    """
    left, count = np.asarray(without, np.float64), len(without)
    half = student(count - 1) * math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    corrected = count * value - (count - 1) * float(left.mean())
    return Metric(value, value - half, value + half), Metric(corrected, corrected - half, corrected + half)
