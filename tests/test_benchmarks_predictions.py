"""The benchmark of predictions and weightings: its best denoiser against Tweedie's formula, and its table."""

from __future__ import annotations

import math

import torch

from benchmarks import plane
from benchmarks.predictions import UNSTABLE, Figures, posterior_mean, rows_of
from tests.oracles import randn


def test_the_best_denoiser_follows_from_the_density_of_noisy_points():
    """E[x | z] = (z + σ² ∇ log p(z)) / α, with the gradient by automatic differentiation."""
    angle = torch.linspace(0.05, 1.5, 40, dtype=torch.float64)
    alpha, sigma = angle.cos()[:, None], angle.sin()[:, None]
    z = randn(40, 2, seed=1).requires_grad_()
    turns = [2 * math.pi * k / plane.MODES for k in range(plane.MODES)]
    means = torch.tensor([[plane.RADIUS * math.cos(turn), plane.RADIUS * math.sin(turn)] for turn in turns])
    deviation = (alpha**2 * plane.SPREAD**2 + sigma**2).sqrt()
    gaussians = torch.distributions.Normal(alpha[:, None] * means.double(), deviation[:, None])
    density = gaussians.log_prob(z[:, None]).sum(-1).logsumexp(1)
    (slope,) = torch.autograd.grad(density.sum(), z)
    torch.testing.assert_close(posterior_mean(z.detach(), angle), ((z + sigma**2 * slope) / alpha).detach())


def test_the_table_has_mean_and_deviation_and_names_the_pair_that_is_refused():
    rows = rows_of(Figures({("v", "snr"): {1: [0.1, 0.3], 8: [0.25]}}), (1, 8))
    assert rows[0] == ["v", "snr", "0.2 ± 0.1", "0.25"]
    assert [*UNSTABLE, "refused", "refused"] in rows
    assert len(rows) == 12
