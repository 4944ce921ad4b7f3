"""Data-free distillation: the student's own path, where its teacher's leads, and which steps a batch holds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.oracles import gaussian, mixture, no_noise, randn, random_teacher
from tests.written_out import (
    EXACT,
    SCHEDULES,
    closed_form,
    ddim,
    every_schedule,
    image_towards,
    images,
    lesson,
    middles,
    nobody,
    perfect,
    still,
    walk,
)
from vdiff.diffusion.distillation import DistillContext, Trajectory, VariableTrajectory
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import SAMPLERS, Ddim, sample
from vdiff.training.objectives import stratified


def path_lesson(schedule, teacher, student, num_steps: int, **more) -> DistillContext:
    return lesson(schedule, teacher, num_steps, 999, student=student, **more)


@every_schedule
@pytest.mark.parametrize(("num_steps", "count"), [(1, 3), (2, 6), (4, 8), (3, 3)])
def test_a_trajectory_s_states_are_the_student_s_and_its_ends_the_teacher_s(schedule, num_steps, count):
    """Walked step by step, from the first rows of the noise; x is not looked at."""
    teacher, student, fine = mixture(schedule), random_teacher(schedule, seed=3), 24 // num_steps * num_steps
    noise, u = randn(count, 2, 3, 2), torch.zeros(count, dtype=torch.float64)
    nothing = torch.full_like(noise, math.nan)
    found = Trajectory(24, "ddim")(path_lesson(schedule, teacher, student, num_steps), nothing, noise, u)
    mine = theirs = noise[: count // num_steps]
    states, targets = [], []
    for i in range(num_steps, 0, -1):
        level, part = torch.full((len(mine),), i, dtype=torch.float64), fine // num_steps
        for k in range(i * part, (i - 1) * part, -1):
            at = torch.full((len(mine),), k, dtype=torch.float64)
            theirs = ddim(teacher, schedule, theirs, at, at - 1, fine)
        states.append(mine)
        targets.append(image_towards(schedule, mine, theirs, level, level - 1, num_steps))
        mine = ddim(student, schedule, mine, level, level - 1, num_steps)
    assert found.rows.tolist() == [k for k in range(count // num_steps) for _ in range(num_steps)]
    assert found.t.tolist() == [i / num_steps for i in range(num_steps, 0, -1)] * (count // num_steps)
    torch.testing.assert_close(found.z, torch.stack(states, 1).flatten(0, 1), **EXACT)
    torch.testing.assert_close(found.x, torch.stack(targets, 1).flatten(0, 1), rtol=1e-8, atol=1e-8)


@every_schedule
def test_a_trajectory_of_gaussians_has_a_closed_form(schedule):
    """States: the student's factors; ends: the teacher's, 8 of them a step of the student's."""
    noise = randn(6, 1, 2, 2)
    given = path_lesson(schedule, gaussian(schedule, 0.4), gaussian(schedule, 0.9), 3)
    found = Trajectory(24, "ddim")(given, noise, noise, torch.zeros(6, dtype=torch.float64))
    for row, i in enumerate((3, 2, 1, 3, 2, 1)):
        mine = walk(schedule, 0.9, 3, 3, i)
        theirs = walk(schedule, 0.4, 24, 24, 8 * (i - 1))
        start = noise[row // 3 : row // 3 + 1]
        torch.testing.assert_close(found.z[row : row + 1], mine * start, **EXACT)
        expected = closed_form(schedule, mine * start, [theirs / mine], [i], [i - 1], 3)
        torch.testing.assert_close(found.x[row : row + 1], expected, **EXACT)


@every_schedule
def test_a_student_that_walks_as_its_teacher_is_taught_to_go_on(schedule):
    teacher = mixture(schedule)
    student, noise = perfect(schedule, teacher, 4, 16), randn(8, 2, 3, 2)
    given = path_lesson(schedule, teacher, student, 4)
    found = Trajectory(path_sampler="ddim")(given, noise, noise, torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(found.x, student(found.z, found.t).x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 9])
@pytest.mark.parametrize("num_steps", [3, 4])
def test_paths_that_the_batch_cuts_short(num_steps, count):
    """Every example is a state of the path of its own row, on its way to that path's end."""
    schedule, noise = SCHEDULES["cosine"], randn(count, 1, 2, 2)
    given = path_lesson(schedule, gaussian(schedule, 0.4), gaussian(schedule, 0.9), num_steps)
    for u in (0.0, 0.3, 0.7 / 2**20, 0.4 / 2**20):
        numbers = torch.full((count,), u, dtype=torch.float64)
        found = Trajectory(12, "ddim")(given, noise, noise, numbers)
        assert len(found.z) == len(found.x) == len(found.t) == len(found.rows) == count
        assert found.rows.tolist() == [k // num_steps for k in range(count)]
        levels = (found.t * num_steps).round().int().tolist()
        first = math.floor((u * 2**20) % 1 * num_steps)
        assert levels == [num_steps - (first + k) % num_steps for k in range(count)]
        for row, i in enumerate(levels):
            start = noise[row // num_steps][None]
            mine = walk(schedule, 0.9, num_steps, num_steps, i)
            theirs = walk(schedule, 0.4, 12, 12, 12 // num_steps * (i - 1))
            torch.testing.assert_close(found.z[row : row + 1], mine * start, **EXACT)
            expected = closed_form(schedule, mine * start, [theirs / mine], [i], [i - 1], num_steps)
            torch.testing.assert_close(found.x[row : row + 1], expected, **EXACT)


@pytest.mark.parametrize(("num_steps", "count"), [(4, 2), (3, 4), (4, 6)])
def test_over_many_updates_every_step_of_a_path_is_learned_as_often(num_steps, count):
    """With the stratified numbers of the loop, whose first is never far from 0."""
    noise = randn(count, 1, 1, 1)
    given = path_lesson(SCHEDULES["cosine"], still, still, num_steps)
    torch.manual_seed(0)
    counts, updates = torch.zeros(num_steps), 150
    for _ in range(updates):
        t = Trajectory(path_steps=2)(given, noise, noise, stratified(count)).t
        counts += torch.bincount((t * num_steps).round().long() - 1, minlength=num_steps)
    share = counts / counts.sum()
    torch.testing.assert_close(share, torch.full_like(share, 1 / num_steps), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("path_steps", "num_steps", "levels", "asked"),
    [(16, 4, None, 16), (16, 16, None, 32), (6, 4, None, 8), (18, 4, None, 16), (16, 1, 1000, 20), (16, 3, 6, 6)],
)
def test_the_teacher_of_a_trajectory_takes_its_steps(path_steps, num_steps, levels, asked):
    """n, or 2N where that is more, as the grids allow; asked about as few images as there are paths."""
    schedule, times, states = SCHEDULES["cosine"], [], []

    def teacher(z: Tensor, t: Tensor) -> Prediction:
        times.append(t[0].item())
        states.append(len(z))
        return gaussian(schedule, 0.4)(z, t)

    noise = randn(num_steps + 1, 1, 1, 1)
    given = path_lesson(schedule, teacher, gaussian(schedule, 0.9), num_steps, levels=levels)
    Trajectory(path_steps=path_steps)(given, noise, noise, noise.flatten())
    assert times == pytest.approx([k / asked for k in range(asked, 0, -1)], abs=1e-12)
    assert set(states) == {2}


@pytest.mark.parametrize("sampler", [name for name, kind in SAMPLERS.items() if kind.solves_ode])
def test_the_teacher_of_a_trajectory_walks_by_any_sampler_without_noise(sampler):
    """Ends are where the sampler itself, unclipped, stands at the student's times."""
    schedule, noise, states = SCHEDULES["cosine"], 2 * randn(4, 2, 3, 2), []
    teacher, student = mixture(schedule), random_teacher(schedule, seed=3)
    end = sample(
        teacher, schedule, SAMPLERS[sampler](clipping_value=None), z=noise[:2], num_steps=8, noise=nobody,
        on_state=lambda done, z, _: states.append(z) if done % 4 == 0 else None,
    )  # fmt: skip
    method, given = Trajectory(8, sampler), path_lesson(schedule, teacher, student, 2)
    found = method(given, noise, noise, torch.zeros(4, dtype=torch.float64))
    for row, (start, level) in enumerate(itertools.product(range(2), (2, 1))):
        z_end = (states[1] if level == 2 else end)[start][None]
        at = torch.tensor([level], dtype=torch.float64)
        expected = image_towards(schedule, found.z[row][None], z_end, at, at - 1, 2)
        torch.testing.assert_close(found.x[row][None], expected, rtol=1e-8, atol=1e-8)


@every_schedule
@pytest.mark.parametrize("levels", [None, "the schedule's", 32])
def test_left_alone_a_student_walks_by_ddim_and_every_other_teacher_by_a_solver(schedule, levels):
    """What a student answers leads to the end of its own step: a solver that takes it for x̂ leads elsewhere."""
    levels = schedule.num_levels if levels == "the schedule's" else levels
    noise, u = randn(4, 2, 3, 2), torch.zeros(4, dtype=torch.float64)
    given = path_lesson(schedule, mixture(schedule), random_teacher(schedule, seed=3), 2, levels=levels)
    own = "ddim" if levels == 32 else "dpmpp_3m"
    other = "dpmpp_3m" if levels == 32 else "ddim"
    found = Trajectory(8)(given, noise, noise, u).x
    assert torch.equal(found, Trajectory(8, own)(given, noise, noise, u).x)
    assert not torch.equal(found, Trajectory(8, other)(given, noise, noise, u).x)


def test_a_sampler_that_draws_noise_is_no_path():
    schedule, noise = SCHEDULES["cosine"], randn(4, 1, 1, 1)
    given = path_lesson(schedule, mixture(schedule), mixture(schedule), 2)
    with pytest.raises(ValueError, match="deterministic"):
        Trajectory(path_sampler="ddpm")(given, noise, noise, noise.flatten())


@pytest.mark.parametrize("num_steps", [1, 4, 6])
def test_a_variable_trajectory_has_paths_of_every_number_of_steps(num_steps):
    """Each part of the batch is a trajectory's, and teacher and student are told where a step ends."""
    schedule, count = SCHEDULES["cosine"], 24
    counts = [n for n in (6, 4, 3, 2, 1) if num_steps % n == 0]
    asked: list[tuple[float, float]] = []

    def teacher(z: Tensor, t: Tensor, second_time: Tensor | None = None) -> Prediction:
        if second_time is not None:
            asked.append((float(t[0]), float(second_time[0])))
        return mixture(schedule)(z, t)

    x, noise, u = *images(count), middles(count)
    given = lesson(schedule, teacher, num_steps, 24, student=teacher)
    found = VariableTrajectory(path_steps=12, path_sampler="ddim")(given, x, noise, u)
    parts = []
    for n, part, some in zip(counts, noise.tensor_split(len(counts)), u.tensor_split(len(counts)), strict=True):
        alone = lesson(schedule, teacher, n, 24, student=teacher)
        parts.append((n, Trajectory(path_steps=12, path_sampler="ddim")(alone, x, part, some)))
    for name in ("z", "t", "x", "rows"):
        assert torch.equal(getattr(found, name), torch.cat([getattr(part, name) for _, part in parts]))
    ends = torch.cat([part.t - 1 / n for n, part in parts])
    torch.testing.assert_close(found.inputs["second_time"], ends.clamp(min=0), **EXACT)
    lengths = {round(1 / (t - s)) for t, s in asked}
    assert lengths == {n for n in counts if n > 1} | {12}


def test_a_path_may_be_thresholded():
    """x̂ of a teacher that leaves [−1, 1] is scaled down at each step, as by `--dynamic_threshold`."""
    schedule = SCHEDULES["cosine"]
    teacher, noise = gaussian(schedule, 3.0), images(4)[1]
    given = lesson(schedule, teacher, 1, 8)
    free, limited = (
        Trajectory(path_steps=8, path_sampler="ddim", path_threshold=p).walk(given, noise) for p in (None, 0.9)
    )
    sampler = Ddim(clipping_value=1.0, threshold=0.9)
    expected = sample(teacher, schedule, sampler, z=noise, num_steps=8, noise=no_noise)
    torch.testing.assert_close(limited[0], expected, **EXACT)
    assert limited[0].abs().max() <= 1 + 1e-9 < free[0].abs().max()
