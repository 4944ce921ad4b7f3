"""The Fréchet distance between two sets of vectors, each taken for a Gaussian."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def frechet_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½): (n, d) and (m, d) vectors, float64 inside.

    The symmetric form of the root needs eigenvalues of symmetric matrices only, so singular covariances (pixels that
    are always black) are no special case. The estimate is biased upwards for small n: compare sets of the same size.
    Source: Dowson & Landau 1982; Heusel et al. 2017.

    Raises:
        ValueError: fewer than two vectors, or unlike dimensions.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:] or a.ndim != 2:
        raise ValueError(f"sets of shape {a.shape} and {b.shape}; need (n, d) and (m, d) with n, m >= 2")
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = (np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
