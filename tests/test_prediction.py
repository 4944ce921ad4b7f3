"""x ⇄ ε ⇄ v: every way to read a network's output against the image and the noise that made z."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import ALL_SCHEDULES, Z_SHAPE, column, gaussian, mixture, randn
from vdiff.diffusion.prediction import PREDICTION_TYPES, Prediction
from vdiff.diffusion.schedules import grid_angles

every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
FIELDS = ("x", "eps", "v")


def outputs(x: torch.Tensor, eps: torch.Tensor, angle: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a network that knew x and ε would say, for each prediction type."""
    v = column(angle.cos(), x) * eps - column(angle.sin(), x) * x
    return {"x": x, "eps": eps, "v": v, "both": torch.cat([x, eps], dim=1)}


def assert_same(found: Prediction, expected: Prediction, **tolerance: float) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance)


@every_schedule
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_type_recovers_the_truth_at_both_ends_and_between(schedule, kind):
    """Ends included: t = 1 (α down to 4.5e-5 or 0) and t → 0. Only x and ε lose digits where they divide by σ and α."""
    x, eps = randn(5, 2, 3, 5), randn(5, 2, 3, 5, seed=1)
    ends = [0, 1e-3, 0.3, 0.99, 1] if kind != "eps" else [0, 1e-3, 0.3, 0.9, 0.99]
    if kind in ("x", "both"):  # a clean image has no noise to derive
        ends[0] = 1e-4
    angle = schedule.angle(torch.tensor(ends, dtype=torch.float64))
    z = column(angle.cos(), x) * x + column(angle.sin(), x) * eps
    truth = outputs(x, eps, angle)
    found = PREDICTION_TYPES[kind].read(z, truth[kind], angle)
    assert_same(found, Prediction(x, eps, truth["v"]), rtol=1e-9, atol=1e-11)


@every_schedule
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("second", PREDICTION_TYPES)
def test_reading_again_as_another_type_changes_nothing(schedule, kind, second):
    """A wrong answer makes a consistent triple too: z = α x̂ + σ ε̂ and v̂ = α ε̂ − σ x̂ hold, whatever is read."""
    angle = schedule.angle(torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64))
    z = randn(*Z_SHAPE)
    output = randn(3, 2 * PREDICTION_TYPES[kind].channel_factor, 3, 5, seed=2)
    first = PREDICTION_TYPES[kind].read(z, output, angle)
    alpha, sigma = column(angle.cos(), z), column(angle.sin(), z)
    torch.testing.assert_close(alpha * first.x + sigma * first.eps, z)
    torch.testing.assert_close(alpha * first.eps - sigma * first.x, first.v)
    said = {"x": first.x, "eps": first.eps, "v": first.v, "both": torch.cat([first.x, first.eps], dim=1)}
    assert_same(PREDICTION_TYPES[second].read(z, said[second], angle), first, rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("oracle", [gaussian, mixture], ids=["gaussian", "mixture"])
def test_closed_forms_are_read_back(schedule, oracle):
    """The oracles' x̂ and ε̂ are posterior means of their own; every type derives one from the other."""
    t = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    z = randn(*Z_SHAPE, seed=3)
    expected = oracle(schedule, c=0.4)(z, t)
    said = {"x": expected.x, "eps": expected.eps, "v": expected.v, "both": torch.cat([expected.x, expected.eps], 1)}
    for kind, prediction_type in PREDICTION_TYPES.items():
        assert_same(prediction_type.read(z, said[kind], schedule.angle(t)), expected, rtol=1e-9, atol=1e-9)


@given(angle=st.floats(1e-3, math.pi / 2 - 1e-3), seed=st.integers(0, 1000))
def test_both_is_the_released_code_s_formula(angle, seed):
    """x̂ = σ² x̃ + (1 − σ²)(z − σ ε̃)/α with all the divisions of the released code."""
    angles = torch.full((2,), angle, dtype=torch.float64)
    z, output = randn(2, 3, 2, 2, seed=seed), randn(2, 6, 2, 2, seed=seed + 1)
    alpha, sigma = math.cos(angle), math.sin(angle)
    x_from_eps = (z - sigma * output[:, 3:]) / alpha
    expected = sigma**2 * output[:, :3] + (1 - sigma**2) * x_from_eps
    found = PREDICTION_TYPES["both"].read(z, output, angles)
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.eps, (z - alpha * expected) / sigma, rtol=1e-9, atol=1e-9)


def test_both_at_zero_signal_is_its_x_part():
    angle = torch.full((3,), math.pi / 2, dtype=torch.float64)
    z, output = randn(*Z_SHAPE), randn(3, 4, 3, 5, seed=1)
    found = PREDICTION_TYPES["both"].read(z, output, angle)
    assert_same(found, Prediction(output[:, :2], z, -output[:, :2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["v", "x"])
def test_zero_signal_needs_no_division_by_alpha(kind):
    angle = torch.full((3,), math.pi / 2, dtype=torch.float64)
    z, x = randn(*Z_SHAPE), randn(*Z_SHAPE, seed=1)
    found = PREDICTION_TYPES[kind].read(z, x if kind == "x" else -x, angle)
    assert_same(found, Prediction(x, z, -x), rtol=0, atol=1e-12)


def test_eps_at_zero_signal_is_refused_and_at_the_cosine_end_is_not():
    z = randn(*Z_SHAPE)
    angle = torch.tensor([0.1, 0.2, math.pi / 2], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"zero signal.*predict v, x or both"):
        PREDICTION_TYPES["eps"].read(z, z, angle)
    end = ALL_SCHEDULES["cosine"].angle(torch.ones(3, dtype=torch.float64))
    assert PREDICTION_TYPES["eps"].read(z, z, end).x.isfinite().all()


def test_v_on_a_clean_image_is_the_noise():
    z, v = randn(*Z_SHAPE), randn(*Z_SHAPE, seed=1)
    found = PREDICTION_TYPES["v"].read(z, v, torch.zeros(3, dtype=torch.float64))
    assert_same(found, Prediction(z, v, v), rtol=0, atol=0)


@every_schedule
@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_clip_keeps_the_triple_consistent(schedule, limit):
    angle = grid_angles(schedule, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    z = randn(*Z_SHAPE)
    wild = PREDICTION_TYPES["x"].read(z, 2 * randn(*Z_SHAPE, seed=1), angle)
    clipped = wild.clip(z, angle, limit)
    alpha, sigma = column(angle.cos(), z), column(angle.sin(), z)
    x = wild.x.clip(-limit, limit)
    assert not torch.equal(x, wild.x)
    eps = (z - alpha * x) / sigma
    assert_same(clipped, Prediction(x, eps, alpha * eps - sigma * x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_precision_of_the_images_is_kept(kind):
    angle = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    output = randn(3, 2 * PREDICTION_TYPES[kind].channel_factor, 3, 5, dtype=torch.float32)
    found = PREDICTION_TYPES[kind].read(randn(*Z_SHAPE, dtype=torch.float32), output, angle)
    assert {getattr(found, name).dtype for name in FIELDS} == {torch.float32}
