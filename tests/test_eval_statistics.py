"""The figures of an evaluation against closed forms on Gaussians, and their intervals against many repetitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from vdiff.evaluation import metrics
from vdiff.evaluation.metrics import (
    ClassStats,
    FrechetDistance,
    KernelDistance,
    Manifold,
    Moments,
    frechet_distance,
    inception_score,
    jackknife,
    mean_metric,
    median_metric,
    precision_recall,
    share_metric,
    student,
    total,
)
from vdiff.evaluation.results import Metric


def covers(metric: Metric, truth: float) -> bool:
    assert metric.low is not None
    assert metric.high is not None
    assert metric.low <= metric.value <= metric.high
    return metric.low <= truth <= metric.high


def blocks_of(x, count):
    edges = [len(x) * k // count for k in range(count + 1)]
    return [x[edges[k] : edges[k + 1]] for k in range(count)]


def population(mean, covariance):
    """The moments of a Gaussian itself."""
    count = 10**9
    return Moments(count, np.asarray(mean, float), np.asarray(covariance) * (count - 1.0))


# moments


def test_merged_moments_are_those_of_all_vectors_also_far_from_zero():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((501, 5)) @ rng.standard_normal((5, 5)) + 1e6
    merged = total(Moments.of(part) for part in blocks_of(x, 7))
    assert merged.count == 501
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-8)
    # sums of x xᵀ have lost what the scatter keeps
    naive = (x.T @ x - len(x) * np.outer(x.mean(0), x.mean(0))) / (len(x) - 1)
    assert np.abs(naive - np.cov(x, rowvar=False)).max() > 1e-5


def test_a_part_taken_away_leaves_the_others():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((90, 4)) + 3
    rest = Moments.of(x) - Moments.of(x[20:50])
    others = Moments.of(np.concatenate([x[:20], x[50:]]))
    assert rest.count == others.count
    np.testing.assert_allclose(rest.mean, others.mean, rtol=1e-13)
    np.testing.assert_allclose(rest.scatter, others.scatter, rtol=1e-11)


def test_nothing_added_changes_nothing():
    some = Moments.of(np.random.default_rng(2).standard_normal((5, 3)))
    assert (Moments.none(3) + some) is some
    assert (some + Moments.none(3)) is some


# intervals


def test_the_jackknife_of_a_mean_is_the_textbook_interval_and_frees_a_variance_of_its_bias():
    x = np.random.default_rng(3).standard_normal(30)
    mean, corrected = jackknife(x.mean(), [np.delete(x, k).mean() for k in range(30)])
    textbook = mean_metric(x)
    assert (mean.low, mean.high) == pytest.approx((textbook.low, textbook.high))
    assert corrected.value == pytest.approx(x.mean())
    _, unbiased = jackknife(x.var(), [np.delete(x, k).var() for k in range(30)])
    assert unbiased.value == pytest.approx(x.var(ddof=1))
    assert student(4) == pytest.approx(2.776, abs=1e-3)
    assert student(10**6) == pytest.approx(1.96, abs=1e-3)


def test_shares_have_wilsons_interval():
    share = share_metric(8, 10)
    assert (share.low, share.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998
    assert share_metric(0, 20).low == 0
    assert share_metric(0, 20).high == pytest.approx(0.1611, abs=1e-4)
    assert (share_metric(20, 20).value, share_metric(20, 20).high) == (1, 1)


def test_the_interval_of_a_median_covers_whatever_the_distribution_is():
    rng = np.random.default_rng(4)
    truth = math.log(2)
    covered = sum(covers(median_metric(rng.exponential(size=40)), truth) for _ in range(1000)) / 1000
    assert 0.93 < covered < 0.985
    assert median_metric(np.arange(5.0)) == Metric(2.0)


# Fréchet distance


def test_the_frechet_distance_of_a_gaussian_from_its_moments_is_the_closed_form():
    mean_a, mean_b, std_a, std_b = [0.0, 1.0], [2.0, 1.5], np.array([1.0, 2.0]), np.array([3.0, 0.5])
    found = FrechetDistance(population(mean_a, np.diag(std_a**2)))(population(mean_b, np.diag(std_b**2)))
    assert found == pytest.approx(4.25 + 4 + 2.25, rel=1e-9)


@pytest.mark.parametrize(("shift", "scale", "n"), [(0.5, 1.3, 100), (0.5, 1.3, 300), (0.0, 1.0, 300)])
def test_the_intervals_of_the_frechet_distance_cover_at_their_rate(shift, scale, n):
    """Other samples of the same number, and what infinitely many would give; 300 repetitions, 3 dimensions."""
    rng, repetitions, dim = np.random.default_rng(5), 300, 3
    a = rng.standard_normal((dim, dim)) / 2 + np.eye(dim)
    covariance = a @ a.T
    distance = FrechetDistance(population(np.zeros(dim), covariance))
    truth = distance(population(np.full(dim, shift), scale**2 * covariance))
    root = scale * np.linalg.cholesky(covariance)
    found = []
    for _ in range(repetitions):
        x = rng.standard_normal((n, dim)) @ root.T + shift
        found.append(distance.measure([Moments.of(part) for part in blocks_of(x, 20)]))
    values, corrected = (np.array([pair[k].value for pair in found]) for k in (0, 1))
    error = values.std() / math.sqrt(repetitions)
    assert values.mean() > truth + 3 * error  # the bias that is known of it
    assert abs(corrected.mean() - truth) < max(4 * error, 0.12 * (values.mean() - truth))
    at_n = sum(covers(pair[0], values.mean()) for pair in found) / repetitions
    at_infinity = sum(covers(pair[1], truth) for pair in found) / repetitions
    assert 0.91 < at_n < 0.99
    assert 0.91 < at_infinity < 0.99


def test_blocks_in_order_give_the_distance_of_all_vectors():
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((60, 3)), rng.standard_normal((80, 3)) + 1
    measured, _ = FrechetDistance(Moments.of(y)).measure([Moments.of(part) for part in blocks_of(x, 10)])
    assert measured.value == pytest.approx(frechet_distance(x, y), rel=1e-12)


# kernel distance


def gaussian_tensors(mean, covariance):
    """E x⊗…⊗x of order 0 to 3."""
    m, s = np.asarray(mean, float), np.asarray(covariance, float)
    pair, triple = np.einsum("i,jk->ijk", m, s), np.einsum("i,j,k->ijk", m, m, m)
    third = triple + pair + pair.transpose(1, 0, 2) + pair.transpose(1, 2, 0)
    return [np.ones(()), m, s + np.outer(m, m), third]


def sample_tensors(x):
    return [
        np.ones(()),
        x.mean(0),
        np.einsum("ni,nj->ij", x, x) / len(x),
        np.einsum("ni,nj,nk->ijk", x, x, x) / len(x),
    ]


def mean_kernel(p, q):
    """E (xᵀy/d + 1)³ = Σ_k binomial(3, k) ⟨E x^k, E y^k⟩ / d^k."""
    dim = len(p[1])
    return sum(math.comb(3, k) * float((a * b).sum()) / dim**k for k, (a, b) in enumerate(zip(p, q, strict=True)))


def by_hand(x, y):
    """The unbiased estimate, pair by pair."""
    dim = x.shape[1]

    def k(a, b):
        return (float(a @ b) / dim + 1) ** 3

    own = [k(x[i], x[j]) for i, j in product(range(len(x)), repeat=2) if i != j]
    theirs = [k(y[i], y[j]) for i, j in product(range(len(y)), repeat=2) if i != j]
    cross = [k(a, b) for a, b in product(x, y)]
    return np.mean(own) + np.mean(theirs) - 2 * np.mean(cross)


def test_the_kernel_distance_is_the_mean_over_pairs_in_any_tiles(monkeypatch):
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((9, 3)), rng.standard_normal((7, 3)) + 0.5
    due = by_hand(x, y)
    assert KernelDistance(y)(x).value == pytest.approx(due, rel=1e-12)
    monkeypatch.setattr(metrics, "TILE", 16)
    found = KernelDistance(y)(x)
    assert found.value == pytest.approx(due, rel=1e-12)
    without = [by_hand(np.delete(x, k, 0), y) for k in range(len(x))]
    expected, _ = jackknife(due, without)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_the_kernel_distance_of_gaussians_is_unbiased_and_its_interval_covers():
    rng, dim, n, m, repetitions = np.random.default_rng(8), 8, 100, 80, 300
    mean, std = np.linspace(-0.5, 0.6, dim), np.linspace(0.7, 1.4, dim)
    p, q = gaussian_tensors(mean, np.diag(std**2)), gaussian_tensors(np.zeros(dim), np.eye(dim))
    truth = mean_kernel(p, p) + mean_kernel(q, q) - 2 * mean_kernel(p, q)
    values, covered = [], 0
    for _ in range(repetitions):
        x, y = rng.standard_normal((n, dim)) * std + mean, rng.standard_normal((m, dim))
        distance = KernelDistance(y)
        found = distance(x)
        values.append(found.value)
        # the reference is taken as it is
        given = mean_kernel(p, p) + distance.within - 2 * mean_kernel(p, sample_tensors(y))
        covered += covers(found, given)
    error = np.std(values) / math.sqrt(repetitions)
    assert abs(np.mean(values) - truth) < 4 * error
    assert error < 0.2 * truth
    assert 0.91 < covered / repetitions < 0.985


# precision and recall


def test_samples_of_one_of_two_clusters_are_precise_and_recall_half():
    rng = np.random.default_rng(9)
    data = np.concatenate([rng.uniform(0, 1, (100, 2)), rng.uniform(10, 11, (100, 2))])
    samples = rng.uniform(0.1, 0.9, (200, 2))
    precision, recall = precision_recall(samples, Manifold(data))
    assert precision.value > 0.97
    assert recall.value == pytest.approx(0.5, abs=0.17)  # the rim of the cluster is not reached
    precision, recall = precision_recall(data, Manifold(rng.uniform(0.1, 0.9, (200, 2))))
    assert recall.value > 0.97
    assert precision.value == pytest.approx(0.5, abs=0.17)


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.6, 2.0])
def test_intervals_that_overlap_by_a_known_part(shift):
    """On a line, evenly spread: the manifolds are intervals, three spacings longer at most."""
    data = np.linspace(0, 1, 401)[:, None]
    precision, recall = precision_recall(data + shift + 1e-4, Manifold(data))
    assert precision.value == pytest.approx(max(0, 1 - shift), abs=0.012)
    assert recall.value == pytest.approx(max(0, 1 - shift), abs=0.012)
    assert covers(precision, precision.value)


def test_balls_reach_to_the_third_nearest_other_vector_and_equal_vectors_lie_in_theirs():
    manifold = Manifold(np.array([[0.0], [1.0], [3.0], [7.0], [20.0]]))
    assert manifold.radii.sqrt().tolist() == pytest.approx([7, 6, 4, 7, 19])
    white = np.ones((6, 4))
    precision, recall = precision_recall(white, Manifold(white))  # balls of radius 0
    assert (precision.value, recall.value) == (1, 1)
    assert precision_recall(white + 1e-3, Manifold(white))[0].value == 0
    with pytest.raises(ValueError, match="3 vectors; need more than 3"):
        Manifold(np.zeros((3, 2)))


# Inception score


def test_the_inception_score_of_certain_and_of_ignorant_answers():
    certain = 100 * np.eye(4)[np.arange(40) % 4]
    assert inception_score([ClassStats.of(certain)]).value == pytest.approx(4)
    assert inception_score([ClassStats.of(np.zeros((40, 4)))]).value == pytest.approx(1)
    halves = [ClassStats.of(certain[:20]), ClassStats.of(certain[20:])]
    assert (halves[0] + halves[1]).score == pytest.approx(4)
    found = inception_score([ClassStats.of(100 * np.eye(4)[[k % 4, (k + 1) % 4]]) for k in range(20)])
    assert found.value == pytest.approx(np.mean([2 * math.sqrt(2)] * 10), rel=1e-9)
