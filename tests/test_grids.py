"""Grids of times: rules, ends, whole levels, and the spacings of diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from tests.foreign import foreign
from tests.oracles import ALL_SCHEDULES, TABLES
from vdiff.diffusion.grids import GRIDS, MOST_NOISE, check_times, grid_of
from vdiff.diffusion.schedules import CosineSchedule, DdpmCosineSchedule, LinearSchedule

every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
every_table = pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES)
every_grid = pytest.mark.parametrize("name", GRIDS)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in their set_timesteps


@every_schedule
@every_grid
def test_a_grid_rises_from_0_to_1_over_levels(schedule, name):
    size = schedule.num_levels
    for num_steps in [n for n in (1, 2, 4, 5, 8, 10, 64, 500, 512, 1000, 1024) if size is None or n <= size]:
        if name == "uniform" and size and size % num_steps:
            continue
        times = grid_of(name, schedule, num_steps)
        assert times.dtype == torch.float64
        check_times(times, num_steps)
        assert (times[0], times[-1]) == (0, 1)
        if size is not None:
            torch.testing.assert_close(times * size, (times * size).round(), rtol=0, atol=1e-9)


@every_table
@every_grid
def test_as_many_steps_as_levels_are_all_of_them(schedule, name):
    size = schedule.num_levels
    assert torch.equal(grid_of(name, schedule, size), torch.arange(size + 1).double() / size)


@every_schedule
def test_trailing_is_uniform_where_the_steps_divide_the_levels(schedule):
    for num_steps in (1, 2, 4, 8, 20, 250, 512):
        if schedule.label_scale % num_steps == 0:
            assert torch.equal(grid_of("trailing", schedule, num_steps), grid_of("uniform", schedule, num_steps))


@every_schedule
def test_trailing_rounds_to_the_nearest_label(schedule):
    size = schedule.label_scale
    for num_steps in range(1, size + 1, 7):
        expected = np.round(np.arange(num_steps + 1) * size / num_steps) / size
        assert grid_of("trailing", schedule, num_steps).tolist() == expected.tolist()


@every_table
@pytest.mark.parametrize("num_steps", [1, 3, 6, 7, 9, 14, 30, 50, 77])
def test_trailing_is_diffusers_trailing(schedule, num_steps):
    theirs = foreign(DPMSolverMultistepScheduler, schedule, num_steps).timesteps + 1
    assert (grid_of("trailing", schedule, num_steps)[1:].flip(0) * schedule.num_levels).tolist() == theirs.tolist()


@pytest.mark.parametrize("option", ["use_lu_lambdas", "use_karras_sigmas"])
@pytest.mark.parametrize("num_steps", [2, 5, 8, 30])
def test_spaced_grids_are_diffusers_on_the_nearest_level(option, num_steps):
    """Where the table ends above the noise that we begin to count at."""
    schedule = LinearSchedule()
    theirs = foreign(DPMSolverMultistepScheduler, schedule, num_steps, final_sigmas_type="zero", **{option: True})
    times = grid_of("logsnr" if option == "use_lu_lambdas" else "karras", schedule, num_steps)
    log_table = schedule.angle(torch.arange(1, 1001) / 1000).tan().log()
    wanted = theirs.sigmas[:-1].double().log().flip(0)
    nearest = (log_table[:, None] - wanted).abs().argmin(0) + 1
    assert ((times[1:] * 1000).round() - nearest).abs().max() <= 1  # nearest in σ^(1/7) is not always nearest in log σ
    if option == "use_lu_lambdas":
        assert (times[1:] * 1000).round().tolist() == nearest.tolist()


@pytest.mark.parametrize("num_steps", [2, 3, 9])
def test_spaced_grids_are_even_on_a_continuous_schedule(num_steps):
    schedule = CosineSchedule()
    for name, scale in (("logsnr", lambda s: s.log()), ("karras", lambda s: s ** (1 / 7))):
        times = grid_of(name, schedule, num_steps)
        values = scale(schedule.angle(times[1:]).tan())
        values[-1] = scale(
            torch.tensor(math.exp(MOST_NOISE), dtype=torch.float64)
        )  # where counting begins; the step itself is t = 1
        steps = values.diff()
        torch.testing.assert_close(steps, steps.mean().expand(num_steps - 1), rtol=1e-9, atol=0)
        assert times[1].item() == pytest.approx(1 / 1024, rel=1e-9)


def test_equal_levels_are_moved_apart():
    """Near t = 1 the log-SNR of this table falls by 7 from one level to the next, where many steps would meet."""
    schedule = DdpmCosineSchedule(num_levels=16)
    levels = (grid_of("logsnr", schedule, 14)[1:] * 16).tolist()
    assert len(set(levels)) == 14
    assert (levels[0], levels[-1]) == (1, 16)


def test_no_such_grid_is_an_error():
    schedule = LinearSchedule()
    with pytest.raises(ValueError, match="unknown grid 'even', choose from uniform, trailing, logsnr, karras"):
        grid_of("even", schedule, 4)
    for name in GRIDS:
        with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
            grid_of(name, schedule, 0)
        with pytest.raises(ValueError, match="1000 levels"):
            grid_of(name, schedule, 1001)
    with pytest.raises(ValueError, match="1024 levels, too few for 1025 steps"):
        grid_of("trailing", CosineSchedule(), 1025)
    assert grid_of("uniform", schedule, 7).tolist() == pytest.approx([k / 7 for k in range(8)])


@pytest.mark.parametrize("times", [[0.0, 0.5, 0.5], [0.0, 0.6, 1.1], [-0.1, 0.5, 1.0], [1.0, 0.5, 0.0]])
def test_times_that_do_not_rise_within_0_and_1_are_refused(times):
    with pytest.raises(ValueError, match=r"increase within \[0, 1\]"):
        check_times(torch.tensor(times, dtype=torch.float64), 2)


def test_times_of_another_number_or_precision_are_refused():
    with pytest.raises(ValueError, match=r"a grid of 3 steps is 4 float64 times, got \(3,\) torch.float64"):
        check_times(torch.tensor([0, 0.5, 1], dtype=torch.float64), 3)
    with pytest.raises(ValueError, match=r"got .* torch\.float32"):
        check_times(torch.tensor([0, 0.5, 1]), 2)
