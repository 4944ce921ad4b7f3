"""The Fréchet distance against closed forms and against scipy's matrix root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from vdiff.evaluation.metrics import frechet_distance


def exact(rng, mean, covariance, n=200):
    """n vectors whose sample mean and sample covariance are exactly the given ones."""
    x = rng.standard_normal((n, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_diagonal_gaussians_have_a_closed_form():
    rng = np.random.default_rng(0)
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 1.0])
    std_a, std_b = np.array([1.0, 2.0, 0.1]), np.array([3.0, 2.0, 0.5])
    a, b = exact(rng, mean_a, np.diag(std_a**2)), exact(rng, mean_b, np.diag(std_b**2))
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


def test_full_covariances_agree_with_the_matrix_root_of_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((300, 6)) + 0.3
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(cov_a @ cov_b))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_it_is_zero_for_the_same_set_and_symmetric_also_with_constant_dimensions():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((50, 4)), 2 * rng.standard_normal((60, 4))
    a[:, 1] = b[:, 1] = -1.0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-6)


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5,))])
def test_sets_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="need"):
        frechet_distance(*(np.zeros(shape) for shape in shapes))
