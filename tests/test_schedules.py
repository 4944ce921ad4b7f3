"""Schedules against their formulas, diffusers' tables, and their own inverses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import ALL_SCHEDULES, TABLES, column, randn
from vdiff.diffusion.schedules import (
    SCHEDULES,
    CosineSchedule,
    DdpmCosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    SigmoidSchedule,
    alpha_sigma,
    build_schedule,
    coefficient,
    diffuse,
    grid_angles,
    grid_times,
)

SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012}
RESCALED = {"zero_snr": ScaledLinearSchedule(1000, 8.5e-4, 0.012, zero_snr=True)}
every_schedule = pytest.mark.parametrize("schedule", [*ALL_SCHEDULES.values(), *RESCALED.values()])
every_table = pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@every_schedule
def test_time_and_angle_are_inverse_at_both_ends_and_between(schedule):
    t = torch.cat([tensor(0, 1, 1e-9, 1 - 1e-9), torch.rand(1000, generator=torch.Generator().manual_seed(0)).double()])
    angle = schedule.angle(t)
    assert angle.dtype == torch.float64
    torch.testing.assert_close(schedule.time(angle), t, rtol=0, atol=1e-11)
    torch.testing.assert_close(schedule.angle(schedule.time(angle)), angle, rtol=0, atol=1e-13)


@every_schedule
def test_angle_rises_within_a_quarter_turn(schedule):
    angle = schedule.angle(grid_times(schedule.num_levels or 4096))
    assert (angle.diff() > 0).all()
    assert angle[0] >= 0
    assert angle[-1] <= math.pi / 2


@every_schedule
def test_ends_are_the_angles_of_the_first_timestep_and_of_the_last(schedule):
    first = 1 / (schedule.num_levels or schedule.label_scale)
    torch.testing.assert_close(tensor(*schedule.ends), schedule.angle(tensor(first, 1)), rtol=1e-12, atol=0)


@every_schedule
@given(t=st.floats(0, 1))
def test_angle_keeps_shape_and_signal_to_noise(schedule, t):
    times = torch.full((2, 3), t, dtype=torch.float64)
    angle = schedule.angle(times)
    assert angle.shape == (2, 3)
    ratio = angle.cos() ** 2 / angle.sin() ** 2
    if 1e-18 < ratio[0, 0] < 1e18:
        torch.testing.assert_close(schedule.logsnr(times).exp(), ratio, rtol=1e-6, atol=0)


def test_logsnr_of_cosine_ends_at_plus_and_minus_20():
    torch.testing.assert_close(CosineSchedule().logsnr(tensor(0, 0.5, 1)), tensor(20, 0, -20), rtol=0, atol=1e-9)
    torch.testing.assert_close(CosineSchedule(logsnr_max=6).logsnr(tensor(0, 1)), tensor(6, -6), rtol=0, atol=1e-9)


def test_cosine_is_the_released_code_s_logsnr_schedule():
    """λ(t) = −2 log tan(a t + b), written with the exponentials of the released code's `logsnr_schedule_cosine`."""
    t = grid_times(64)
    b = math.atan(math.exp(-0.5 * 20.0))
    a = math.atan(math.exp(-0.5 * -20.0)) - b
    torch.testing.assert_close(CosineSchedule().logsnr(t), -2 * torch.log(torch.tan(a * t + b)), rtol=1e-9, atol=1e-9)


def test_cosine_without_a_cut_is_a_quarter_turn():
    t = tensor(0, 0.25, 0.5, 1)
    torch.testing.assert_close(CosineSchedule(logsnr_max=math.inf).angle(t), t * math.pi / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize("cut", [0, -1, math.nan])
def test_cosine_refuses_a_senseless_cut(cut):
    with pytest.raises(ValueError, match=f"positive, got {cut}"):
        CosineSchedule(logsnr_max=cut)


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (LinearSchedule(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (DdpmCosineSchedule(num_levels=1000), {"beta_schedule": "squaredcos_cap_v2"}),
        (ScaledLinearSchedule(1000, 8.5e-4, 0.012), SCALED_LINEAR),
    ],
    ids=["linear", "ddpm_cosine", "scaled_linear"],
)
def test_tables_are_those_of_diffusers(schedule, theirs):
    scheduler = DDPMScheduler(num_train_timesteps=1000, **theirs)
    torch.testing.assert_close(tensor(*schedule.betas()), scheduler.betas.double(), rtol=1e-5, atol=1e-7)
    angle = schedule.angle(grid_times(1000)[1:])
    torch.testing.assert_close(angle.cos() ** 2, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(tensor(*schedule.alphas_cumprod()), angle.cos() ** 2, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("count", [10, 1000])
def test_sigmoid_is_the_curve_of_jabri_2023_until_beta_is_capped(count):
    """By torch's logistic function: ᾱ falls from 1 to 0, and is ½ in the middle by symmetry."""
    schedule = SigmoidSchedule(count)
    t = grid_times(count)[1:-1]
    falling = (torch.sigmoid(tensor(3.0)) - torch.sigmoid(6 * t - 3)) / (2 * torch.sigmoid(tensor(3.0)) - 1)
    torch.testing.assert_close(tensor(*schedule.alphas_cumprod())[:-1], falling, rtol=1e-9, atol=1e-12)
    assert schedule.alphas_cumprod()[count // 2 - 1] == pytest.approx(0.5)
    assert schedule.betas()[-1] == 0.999


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (LinearSchedule(zero_snr=True), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (DdpmCosineSchedule(1000, zero_snr=True), {"beta_schedule": "squaredcos_cap_v2"}),
        (ScaledLinearSchedule(1000, 8.5e-4, 0.012, zero_snr=True), SCALED_LINEAR),
    ],
    ids=["linear", "ddpm_cosine", "scaled_linear"],
)
def test_zero_snr_is_the_rescaling_of_diffusers(schedule, theirs):
    """Their function, given betas in float64, and the table of their scheduler, which computes in float32."""
    plain = tensor(*replace(schedule, zero_snr=False).betas())
    torch.testing.assert_close(tensor(*schedule.betas()), rescale_zero_terminal_snr(plain), rtol=1e-9, atol=1e-12)
    kept = tensor(*schedule.alphas_cumprod())
    assert kept[-1] == 0
    assert schedule.angle(tensor(1)).item() == math.pi / 2
    scheduler = DDPMScheduler(num_train_timesteps=1000, **theirs, rescale_betas_zero_snr=True)
    torch.testing.assert_close(kept, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(kept[0], tensor(*replace(schedule, zero_snr=False).alphas_cumprod())[0])


def test_zero_snr_is_kept_in_the_description_only_where_it_is_set():
    assert LinearSchedule().to_dict().keys() == {"name", "num_levels", "first_beta", "last_beta"}
    for schedule in (LinearSchedule(zero_snr=True), DdpmCosineSchedule(8, zero_snr=True)):
        assert schedule.to_dict()["zero_snr"] is True
        assert build_schedule(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    "values",
    [{"zero_snr": 1}, {"zero_snr": True, "num_levels": 1}, {"zero_snr": True, "first_beta": 0, "last_beta": 0}],
)
def test_zero_snr_of_a_table_that_cannot_be_rescaled_is_refused(values):
    with pytest.raises(ValueError, match="zero_snr"):
        LinearSchedule(**values)


@every_table
def test_levels_of_a_table_obey_its_betas(schedule):
    """α_k² = α_{k−1}² (1 − β_k) at t = k/N, from the clean image at k = 0."""
    kept = schedule.angle(grid_times(schedule.num_levels)).cos() ** 2
    assert kept[0] == 1
    torch.testing.assert_close(kept[1:] / kept[:-1], 1 - tensor(*schedule.betas()), rtol=1e-9, atol=0)


def test_ddpm_cosine_is_nichol_and_dhariwal_s_curve_until_beta_is_capped():
    schedule = DdpmCosineSchedule(num_levels=100)
    f = [math.cos((k / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(101)]
    assert schedule.alphas_cumprod()[:99] == pytest.approx([value / f[0] for value in f[1:100]], rel=1e-9)
    assert schedule.betas()[-1] == 0.999


def test_linear_betas_run_from_end_to_end():
    betas = LinearSchedule(num_levels=5, first_beta=0.1, last_beta=0.5).betas()
    assert betas == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert LinearSchedule(num_levels=1).betas() == [1e-4]


@every_table
def test_angle_of_a_table_is_linear_between_levels(schedule):
    n = schedule.num_levels
    for k in (0, 1, n // 2, n - 1):
        low, middle, high = schedule.angle(tensor(k / n, (k + 0.25) / n, (k + 1) / n)).tolist()
        assert middle == pytest.approx(0.75 * low + 0.25 * high, rel=1e-9)


@every_schedule
def test_label_of_level_k_is_k_minus_1_in_every_stage(schedule):
    size = schedule.label_scale
    assert size == (schedule.num_levels or 1024)
    assert schedule.timestep(grid_times(size)).tolist() == [k - 1 for k in range(size + 1)]
    num_steps = size
    while num_steps % 2 == 0:
        num_steps //= 2
        stride = size // num_steps
        coarse, fine = grid_times(num_steps), grid_times(size)[::stride]
        torch.testing.assert_close(schedule.timestep(coarse), schedule.timestep(fine), rtol=0, atol=0)
        torch.testing.assert_close(schedule.angle(coarse), schedule.angle(fine), rtol=0, atol=0)


def test_label_is_float64_whatever_the_time_is():
    label = CosineSchedule().timestep(torch.tensor([0.5], dtype=torch.float32))
    assert label.dtype == torch.float64
    assert label.item() == 511


@every_schedule
def test_grid_ends_at_the_image_itself(schedule):
    times = grid_times(8)
    assert times.tolist() == [i / 8 for i in range(9)]
    angles = grid_angles(schedule, times)
    assert angles[0] == 0
    assert torch.equal(angles[1:], schedule.angle(times[1:]))


@every_table
@pytest.mark.parametrize("num_steps", [0, -1, 1025, 1024 * 1000])
def test_a_table_refuses_more_steps_than_it_has_levels(schedule, num_steps):
    with pytest.raises(ValueError, match=str(num_steps)):
        schedule.check_num_steps(num_steps)


@every_schedule
def test_fitting_numbers_of_steps_pass(schedule):
    for num_steps in (1, 2, 3, 7, schedule.num_levels or 5000):
        schedule.check_num_steps(num_steps)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        schedule.check_num_steps(0)


@every_schedule
def test_configuration_round_trip(schedule):
    assert build_schedule(schedule.to_dict()) == schedule


def test_registry_names_are_the_schedules_own():
    assert {name: schedule().name for name, schedule in SCHEDULES.items()} == {name: name for name in SCHEDULES}


def test_changed_parameters_survive_the_round_trip():
    schedule = DdpmCosineSchedule(num_levels=64, offset=0.1)
    built = build_schedule(schedule.to_dict())
    assert built == schedule
    assert built.label_scale == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "sine"}, "unknown schedule 'sine', choose from cosine"),
        ({}, "unknown schedule None"),
        ({"name": "linear", "num_level": 3}, "linear has no parameter num_level, only"),
    ],
)
def test_unknown_schedules_and_parameters_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(config)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diffuse_is_alpha_x_plus_sigma_eps(schedule, dtype):
    x, eps = randn(4, 2, 3, 5, dtype=dtype), randn(4, 2, 3, 5, seed=1, dtype=dtype)
    angle = schedule.angle(tensor(0, 0.2, 0.7, 1))
    expected = torch.stack([math.cos(a) * x[i] + math.sin(a) * eps[i] for i, a in enumerate(angle.tolist())])
    z = diffuse(x, eps, angle)
    assert z.dtype == dtype
    torch.testing.assert_close(z, expected)


def test_coefficients_are_taken_in_float64_and_shaped_like_the_images():
    """cos(π/2 − 1e-9) is 1e-9; in float32 the angle itself would already be off by 4e-8."""
    like = torch.zeros(2, 3, 4, 4)
    alpha, sigma = alpha_sigma(tensor(math.pi / 2 - 1e-9, 1e-9), like)
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha.dtype == torch.float32
    assert alpha[0].item() == pytest.approx(1e-9, rel=1e-6)
    assert sigma[1].item() == pytest.approx(1e-9, rel=1e-6)
    assert torch.equal(coefficient(tensor(3, 4), torch.zeros(2, 5)), torch.tensor([[3.0], [4.0]]))
    assert torch.equal(column(tensor(3, 4), like), coefficient(tensor(3, 4), like))
