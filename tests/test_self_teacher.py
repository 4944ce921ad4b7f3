"""The average that a student learns from, and what is told of its losses step by step."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.oracles import randn
from tests.toy import train_config
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.models.denoiser import Denoiser
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training.averages import Averages, Exponential
from vdiff.training.engine import build_engine
from vdiff.training.meter import MAX_STEPS, Meter, Position, StepResult
from vdiff.training.step import averages_of


def network(seed: int = 0) -> Denoiser:
    config = UNetConfig(1, 1, channels=4, embedding_channels=4, multipliers=(1,), num_blocks=1, attention_strides=())
    torch.manual_seed(seed)
    return Denoiser(UNet(config), CosineSchedule(), "v").double()


def trained(denoiser: Denoiser, averages: Averages, updates: int, *, start: int = 0) -> list[list[Tensor]]:
    """The weights after each update, which `averages` took in."""
    path = []
    for step in range(start, start + updates):
        for k, parameter in enumerate(denoiser.parameters()):
            parameter.data.copy_(randn(*parameter.shape, seed=100 * step + k))
        averages.update(step)
        path.append([parameter.detach().clone() for parameter in denoiser.parameters()])
    return path


# The self-teacher


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.0, 0.9999])
def test_the_corrected_average_is_the_weighted_mean_of_all_trained_weights(decay):
    """Σ_k d^(n−k) θ_k / Σ_k d^(n−k): each weighs d times the next, the initial ones nothing."""
    denoiser = network()
    averages = Averages(denoiser, None, of_teacher=Exponential(decay))
    assert averages.teacher is not denoiser
    for parameter, mine in zip(averages.teacher.parameters(), denoiser.parameters(), strict=True):
        assert torch.equal(parameter, mine)  # before the first update it is what the student begins with
    path = trained(denoiser, averages, 6)
    shares = [decay ** (5 - k) for k in range(6)]
    for i, found in enumerate(averages.teacher.parameters()):
        expected = sum(share * weights[i] for share, weights in zip(shares, path, strict=True)) / sum(shares)
        torch.testing.assert_close(found.data, expected, rtol=1e-10, atol=1e-12)


def test_the_correction_wears_off():
    """β is 0 at first, d in the end; it is that of a plain average divided by 1 − dⁿ."""
    profile, plain = Exponential(0.9), 0.0
    corrected = 0.0
    for n in range(400):
        value = math.sin(n)
        plain = 0.9 * plain + 0.1 * value
        beta = profile.decay_at(n)
        corrected = beta * corrected + (1 - beta) * value
        assert corrected == pytest.approx(plain / (1 - 0.9 ** (n + 1)), rel=1e-9)
    assert profile.decay_at(0) == 0
    assert profile.decay_at(10**6) == 0.9
    assert Exponential(0.0).decay_at(5) == 0


def test_the_student_s_average_and_its_model_are_two():
    """Each has its own length; the model's is what is saved, the other what is learned from."""
    denoiser = network()
    averages = Averages(denoiser, Exponential(0.9), [Exponential(0.99)], of_teacher=Exponential(0.5))
    alone = Averages(network(), Exponential(0.9), [Exponential(0.99)])
    only = Averages(network(), None, of_teacher=Exponential(0.5))
    trained(denoiser, averages, 3)
    for other in (alone, only):
        for step in range(3):
            values = [randn(*parameter.shape, seed=100 * step + k) for k, parameter in enumerate(other._raw)]
            for parameter, value in zip(other._raw, values, strict=True):
                parameter.data.copy_(value)
            other.update(step)
    assert list(averages.named()) == ["ema", "self_teacher", "ema_0.99"]
    for name, expected in {**alone.named(), **only.named()}.items():
        for weight, tensor in averages.named()[name].items():
            assert torch.equal(tensor, expected[weight]), name
    assert averages.decay_at(0) == Exponential(0.9).decay_at(0)
    assert not averages.teacher.training
    assert not any(parameter.requires_grad for parameter in averages.teacher.parameters())


def test_without_a_self_teacher_the_student_is_its_own():
    denoiser = network()
    averages = Averages(denoiser, Exponential(0.9))
    assert averages.teacher is denoiser
    assert list(averages.named()) == ["ema"]
    assert Averages(denoiser, None).named() == {}


def test_a_self_teacher_is_brought_back():
    first, second = network(), network(1)
    pair = [Averages(each, None, of_teacher=Exponential(0.5)) for each in (first, second)]
    trained(first, pair[0], 3)
    kept = {name: {key: value.clone() for key, value in values.items()} for name, values in pair[0].named().items()}
    pair[1].load(kept)
    for averages, denoiser in zip(pair, (first, second), strict=True):
        trained(denoiser, averages, 2, start=3)
    for a, b in zip(pair[0].teacher.parameters(), pair[1].teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(KeyError):
        pair[1].load({"ema": kept["self_teacher"]})


@pytest.mark.parametrize("remainder", [1e-3, 0.5, 0.99])
def test_the_remainder_is_what_the_first_weights_count(tmp_path, remainder):
    """Σₖ r^((N − k)/N) θₖ / Σₖ r^((N − k)/N) over the weights after updates k = 1 … N (TRACT, section 4)."""
    config, student = train_config(tmp_path, ema=0.9, ema_remainder=remainder, num_iters=40), network()
    averages = averages_of(config, student, build_engine(config))
    path = trained(student, averages, 40)
    shares = [remainder ** ((40 - k) / 40) for k in range(1, 41)]
    for i, found in enumerate(averages.model.parameters()):
        expected = sum(share * weights[i] for share, weights in zip(shares, path, strict=True)) / sum(shares)
        torch.testing.assert_close(found.data, expected, rtol=1e-10, atol=1e-12)


def test_settings_become_averages(tmp_path):
    settings = {"ema": 0.9, "ema_remainder": 1e-3, "num_iters": 100}
    config = train_config(tmp_path, **settings)
    averages = averages_of(config, network(), build_engine(config), 0.25)
    assert averages.profile == Exponential(1e-3 ** (1 / 100))
    assert math.isclose(averages.profile.decay**100, 1e-3)
    assert averages.named().keys() == {"ema", "self_teacher"}
    plain = averages_of(dataclasses.replace(config, ema_remainder=0.0), network(), build_engine(config))
    assert plain.profile == Exponential(0.9)
    assert dataclasses.replace(config, ema=0.0).weights == "ema"
    assert dataclasses.replace(config, ema=0.0, ema_remainder=0.0).weights == "raw"


# Losses step by step


def meter(steps: int | None) -> Meter:
    config = train_config(Path())
    return Meter(Position(), config, build_engine(config), steps)


def result_of(
    losses: list[float], t: list[float], *, bad: bool = False, counts: list[float] | None = None
) -> StepResult:
    times = torch.tensor(t, dtype=torch.float64)
    return StepResult(
        torch.tensor(losses),
        times,
        torch.zeros(len(losses)),
        torch.tensor(2.0),
        torch.tensor(bad),
        None if counts is None else torch.tensor(counts),
    )


def by_step(scalars: dict[str, float]) -> dict[str, float]:
    return {name.partition("/")[2]: value for name, value in scalars.items() if name.startswith("loss_by_step/")}


def test_losses_are_told_for_each_step_of_the_student():
    """Step i is (i − 1)/N < t ≤ i/N: the mean over its images since the last reading; steps without images are left
    out."""
    found = meter(4)
    found.add(result_of([1.0, 3.0, 5.0, 7.0], [0.25, 0.5, 0.75, 1.0]), 0.0)
    found.add(result_of([2.0, 4.0, 10.0, 20.0], [0.25 + 1 / 4096, 0.3, 1.0, 0.76]), 0.0)
    found.add(result_of([math.nan, 9.0, 9.0, 9.0], [0.25, 0.5, 0.75, 1.0], bad=True), 0.0)
    scalars = found.read()
    assert by_step(scalars) == pytest.approx({"1": 1, "2": 3, "3": 5, "4": 37 / 3})
    assert scalars["loss"] == pytest.approx(52 / 8)
    found.add(result_of([6.0], [2 / 3]), 0.0)
    assert by_step(found.read()) == {"3": 6}


@pytest.mark.parametrize("steps", [1, 3, 7, 24, 32])
def test_grid_times_belong_to_their_own_step_whatever_they_round_to(steps):
    """Also those of a fine grid just above them, which belong to the next."""
    for k in range(1, steps + 1):
        found = meter(steps)
        found.add(result_of([1.0], [k / steps]), 0.0)
        assert list(by_step(found.read())) == [str(k)]
        if k < steps:
            found.add(result_of([1.0], [k / steps + 1 / (1024 * steps)]), 0.0)
            assert list(by_step(found.read())) == [str(k + 1)]


def test_only_models_of_few_steps_tell_their_steps():
    for steps, told in ((None, False), (MAX_STEPS, True), (MAX_STEPS + 1, False)):
        found = meter(steps)
        found.add(result_of([1.0, 2.0], [0.5, 1.0]), 0.0)
        assert bool(by_step(found.read())) == told
    assert MAX_STEPS == 32


def test_losses_that_count_more_often_do_so_in_the_means():
    """Σ w l / Σ w, over all and in each step and noise level."""
    found = meter(2)
    found.add(result_of([1.0, 5.0, 7.0], [0.5, 0.5, 1.0], counts=[3.0, 0.5, 0.25]), 0.0)
    scalars = found.read()
    assert by_step(scalars) == pytest.approx({"1": (3 + 2.5) / 3.5, "2": 7})
    assert scalars["loss"] == pytest.approx((3 + 2.5 + 1.75) / 3.75)
    assert scalars["loss_by_logsnr/0_5"] == pytest.approx(scalars["loss"])
