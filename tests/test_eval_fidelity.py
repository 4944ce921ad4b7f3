"""The figures against torch-fidelity's on the same vectors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from vdiff.evaluation.metrics import (
    ClassStats,
    KernelDistance,
    Manifold,
    frechet_distance,
    inception_score,
    precision_recall,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed: pip install 'vdiff[fidelity]'")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((12, 12)) / 3
    x, y = rng.standard_normal((230, 12)) @ mix + 0.2, rng.standard_normal((200, 12)) @ mix
    return x, y, torch.from_numpy(x), torch.from_numpy(y)


def test_frechet_distance(sets):
    x, y, x_tensor, y_tensor = sets
    statistics = [fid_features_to_statistics(each) for each in (x_tensor, y_tensor)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-7)


def test_kernel_distance_with_one_subset_of_all(sets):
    x, y, x_tensor, y_tensor = sets
    settings = {"kid_subsets": 1, "kid_subset_size": 200, "rng_seed": 0, "verbose": False}
    theirs = kid_features_to_metric(x_tensor[:200], y_tensor, **settings)["kernel_inception_distance_mean"]
    assert KernelDistance(y)(x[:200]).value == pytest.approx(theirs, rel=1e-9)


def test_kernel_distance_is_what_random_subsets_scatter_around(sets):
    x, y, x_tensor, y_tensor = sets
    settings = {"kid_subsets": 200, "kid_subset_size": 50, "rng_seed": 0, "verbose": False}
    theirs = kid_features_to_metric(x_tensor, y_tensor, **settings)
    error = theirs["kernel_inception_distance_std"] / 200**0.5
    assert abs(KernelDistance(y)(x).value - theirs["kernel_inception_distance_mean"]) < 4 * error


def test_precision_and_recall(sets):
    x, y, x_tensor, y_tensor = sets
    theirs = prc_features_to_metric(x_tensor, y_tensor, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    precision, recall = precision_recall(x, Manifold(y))
    assert (precision.value, recall.value) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < precision.value < 1


def test_inception_score():
    logits = np.random.default_rng(1).standard_normal((200, 30)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    found = inception_score([ClassStats.of(part) for part in np.split(logits, 20)])
    assert found.value == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
