"""Weights of the x-error against the errors of ε and v that they stand for."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import ALL_SCHEDULES, Z_SHAPE, randn
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.diffusion.schedules import ScaledLinearSchedule
from vdiff.diffusion.weighting import WEIGHTINGS, ZERO_SNR_FLOOR, weighting_of

T = (0.1, 0.5, 0.9)
every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)


def errors(schedule, t) -> dict[str, torch.Tensor]:
    """Mean squared errors of two answers for the same z, in the three currencies."""
    angle = schedule.angle(torch.tensor(t, dtype=torch.float64))
    z = randn(*Z_SHAPE)
    a, b = (PREDICTION_TYPES["v"].read(z, randn(*Z_SHAPE, seed=seed), angle) for seed in (1, 2))
    return {name: (getattr(a, name) - getattr(b, name)).square().mean((1, 2, 3)) for name in ("x", "eps", "v")}


EXPECTED = {
    "constant": lambda e: e["x"],
    "snr": lambda e: e["eps"],
    "truncated_snr": lambda e: torch.maximum(e["x"], e["eps"]),
    "snr_plus_one": lambda e: e["v"],
    "min_snr": lambda e: torch.minimum(e["eps"], 5 * e["x"]),
}


@every_schedule
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weighted_x_error_is_the_error_it_stands_for(schedule, name):
    error = errors(schedule, T)
    weight = WEIGHTINGS[name](schedule.logsnr(torch.tensor(T, dtype=torch.float64)))
    assert weight.shape == (3,)
    torch.testing.assert_close(weight * error["x"], EXPECTED[name](error), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "at_low", "at_even", "at_high"),
    [
        ("constant", 1, 1, 1),
        ("snr", 0.25, 1, 8),
        ("truncated_snr", 1, 1, 8),
        ("snr_plus_one", 1.25, 2, 9),
        ("min_snr", 0.25, 1, 5),
    ],
)
def test_weights_at_snr_a_quarter_one_and_eight(name, at_low, at_even, at_high):
    logsnr = torch.tensor([0.25, 1, 8], dtype=torch.float64).log()
    torch.testing.assert_close(WEIGHTINGS[name](logsnr), torch.tensor([at_low, at_even, at_high]).double())


def test_the_constant_is_one_also_where_the_snr_has_no_end():
    logsnr = torch.tensor([-torch.inf, 0, torch.inf], dtype=torch.float64)
    assert torch.equal(WEIGHTINGS["constant"](logsnr), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_no_weight_vanishes_at_zero_snr(name):
    """The terminal level of a rescaled schedule has a loss in v, and levels of enough signal keep their weights."""
    schedule = ScaledLinearSchedule(zero_snr=True)
    logsnr = schedule.logsnr(torch.tensor([0.5, 1], dtype=torch.float64))
    weight = weighting_of(name, WEIGHTINGS["snr"], zero_snr=True)(logsnr)
    in_v = weight / (logsnr.exp() + 1)
    assert in_v[1] >= ZERO_SNR_FLOOR
    assert weight[0] == WEIGHTINGS[name](logsnr)[0]
    plain = weighting_of(name, WEIGHTINGS["snr"], zero_snr=False)(logsnr)
    assert torch.equal(plain, WEIGHTINGS[name](logsnr))
    if name == "snr_plus_one":
        torch.testing.assert_close(in_v, torch.ones(2, dtype=torch.float64))


def test_every_weighting_is_held_to_an_error():
    assert set(EXPECTED) == set(WEIGHTINGS)
