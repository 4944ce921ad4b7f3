"""The Fréchet distance between two sets of vectors, each taken for a Gaussian."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vdiff.evaluation.intervals import jackknife
from vdiff.evaluation.moments import Moments, total
from vdiff.evaluation.results import Metric


def frechet_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The `FrechetDistance` between (n, d) and (m, d) vectors.

    Raises:
        ValueError: fewer than two vectors, or unlike dimensions.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:] or a.ndim != 2:
        raise ValueError(f"sets of shape {a.shape} and {b.shape}; need (n, d) and (m, d) with n, m >= 2")
    return FrechetDistance(Moments.of(a))(Moments.of(b))


class FrechetDistance:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½) from the moments a of a reference, float64.

    The symmetric form of the root needs eigenvalues of symmetric matrices only, so singular covariances (pixels that
    are always black) are no special case. The estimate is biased upwards for small n: compare sets of the same size.
    Source: Dowson & Landau 1982; Heusel et al. 2017.

    Args:
        reference: of at least two vectors.
    """

    def __init__(self, reference: Moments) -> None:
        self.mean, covariance = reference.mean, reference.covariance
        self.trace = float(np.trace(covariance))
        values, vectors = np.linalg.eigh(covariance)
        self.root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    def __call__(self, moments: Moments) -> float:
        """How far vectors with these moments are."""
        covariance = moments.covariance
        cross = np.sqrt(np.linalg.eigvalsh(self.root @ covariance @ self.root).clip(min=0)).sum()
        shift = ((self.mean - moments.mean) ** 2).sum()
        return float(shift + self.trace + np.trace(covariance) - 2 * cross)

    def measure(self, blocks: Sequence[Moments]) -> tuple[Metric, Metric]:
        """The distance of all blocks together, and what it would be at infinitely many samples (`jackknife`).

        Both with 95 % intervals for other samples of the same model; the reference is taken as it is.
        """
        whole = total(blocks)
        return jackknife(self(whole), [self(whole - block) for block in blocks])
