"""The target's defining property: one step of the student lands where two steps of the teacher land."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracles import ALL_SCHEDULES, Z_SHAPE, column, gaussian, mixture, no_noise, randn, random_teacher
from vdiff.diffusion.distillation import METHODS, DistillContext
from vdiff.diffusion.phases import fitting_phases, halving_plan, halving_start
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.diffusion.samplers import Ddim, ddim_step, sample
from vdiff.diffusion.schedules import CosineSchedule, grid_angles, grid_times
from vdiff.diffusion.targets import invert_ddim, progressive_target

TEACHERS = {"random": random_teacher, "mixture": mixture}
STUDENT_STEPS = [
    (name, num_steps)
    for name, schedule in ALL_SCHEDULES.items()
    for num_steps in (1, 2, 3, 4, 8, 500, 512)
    if schedule.num_levels is None or schedule.num_levels % (2 * num_steps) == 0
]
every_student = pytest.mark.parametrize(("name", "num_steps"), STUDENT_STEPS)
every_teacher = pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS)


def teacher_walk(teacher, schedule, z, num_steps):
    """Every t of the student's grid at once: (t, middle, s), the teacher's middle state and its z″ in α and σ."""
    i = torch.arange(num_steps, dtype=torch.float64)
    t, middle, s = (2 * i + 2) / (2 * num_steps), (2 * i + 1) / (2 * num_steps), 2 * i / (2 * num_steps)
    state = z
    for start, end in ((t, middle), (middle, s)):
        said = teacher(state, start)
        angle = schedule.angle(end)
        alpha = torch.where(end > 0, angle.cos(), 1.0)
        sigma = torch.where(end > 0, angle.sin(), 0.0)
        before, state = state, column(alpha, z) * said.x + column(sigma, z) * said.eps
    return t, middle, s, before, state


@every_student
@every_teacher
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_student_step_lands_where_the_teacher_lands(name, num_steps, teacher, dtype, tolerance):
    schedule = ALL_SCHEDULES[name]
    z = randn(num_steps, 2, 3, 2, dtype=dtype)
    answer = teacher(schedule)
    t, _, s, _, z_end = teacher_walk(answer, schedule, z.double(), num_steps)
    target = progressive_target(answer, schedule, z=z, t=t, num_steps=num_steps)
    angle_t, angle_s = grid_angles(schedule, t), grid_angles(schedule, s)
    step = Ddim(clipping_value=None).step(z=z, prediction=target, angle_t=angle_t, angle_s=angle_s, noise=no_noise)
    error = (step.double() - z_end).flatten(1).norm(dim=1) / z_end.flatten(1).norm(dim=1)
    assert step.dtype == dtype
    assert error.max() < tolerance


@every_student
@every_teacher
def test_target_is_the_paper_s_quotient(name, num_steps, teacher):
    """x̃ = (z″ − (σ_s/σ_t) z)/(α_s − (σ_s/σ_t) α_t), with ε and v that belong to it."""
    schedule = ALL_SCHEDULES[name]
    z = randn(num_steps, 2, 3, 2)
    t, _, s, _, z_end = teacher_walk(teacher(schedule), schedule, z, num_steps)
    angle_t, angle_s = schedule.angle(t), schedule.angle(s) * (s > 0)
    alpha_t, sigma_t, alpha_s, sigma_s = (
        column(values, z) for values in (angle_t.cos(), angle_t.sin(), angle_s.cos(), angle_s.sin())
    )
    x = (z_end - (sigma_s / sigma_t) * z) / (alpha_s - (sigma_s / sigma_t) * alpha_t)
    target = progressive_target(teacher(schedule), schedule, z=z, t=t, num_steps=num_steps)
    scale = max(x.abs().max().item(), 1)
    torch.testing.assert_close(target.x, x, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(alpha_t * target.x + sigma_t * target.eps, z, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(alpha_t * target.eps - sigma_t * target.x, target.v, rtol=0, atol=1e-9 * scale)


@every_student
@every_teacher
def test_the_last_step_s_target_is_the_teacher_s_middle_image(name, num_steps, teacher):
    """At i = 0 (s = 0) the released code returns the teacher's second x-prediction; the formula gives it unasked."""
    schedule = ALL_SCHEDULES[name]
    z = randn(num_steps, 2, 3, 2)
    t, middle, _, z_middle, _ = teacher_walk(teacher(schedule), schedule, z, num_steps)
    target = progressive_target(teacher(schedule), schedule, z=z[:1], t=t[:1], num_steps=num_steps)
    torch.testing.assert_close(target.x, teacher(schedule)(z_middle[:1], middle[:1]).x, rtol=0, atol=1e-9)


def test_the_papers_number_and_not_the_second_x_prediction():
    """Unit Gaussian, 8-step teacher, φ = π/4: x* = cos φ (1 + ½ tan(π/16)) z = 0.7774 z, never 0.8155 z."""
    schedule = CosineSchedule(logsnr_max=math.inf)
    z = randn(1, 3, 4, 4)
    t = torch.tensor([0.5], dtype=torch.float64)
    target = progressive_target(gaussian(schedule, 1.0), schedule, z=z, t=t, num_steps=4)
    exact = (1 + math.tan(math.pi / 16) / 2) / math.sqrt(2)
    assert exact == pytest.approx(0.7774, abs=5e-5)
    torch.testing.assert_close(target.x, exact * z, rtol=1e-12, atol=1e-12)
    second_x = math.cos(3 * math.pi / 16) * math.cos(math.pi / 16)
    assert second_x == pytest.approx(0.8155, abs=5e-5)
    assert not torch.allclose(target.x, second_x * z, rtol=1e-2)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_targets_are_never_clipped(schedule):
    t = torch.tensor([0.5], dtype=torch.float64)
    target = progressive_target(gaussian(schedule, 4.0), schedule, z=3 * randn(1, 3, 4, 4), t=t, num_steps=2)
    assert target.x.abs().max() > 1.5


@every_student
def test_a_perfect_student_s_samples_are_its_teacher_s(name, num_steps):
    """A student that answers the target at every step draws, in N steps, what the teacher draws in 2N."""
    schedule, z = ALL_SCHEDULES[name], randn(*Z_SHAPE)
    teacher = random_teacher(schedule)

    def student(z, t):
        return progressive_target(teacher, schedule, z=z, t=t, num_steps=num_steps)

    ends = [
        sample(denoise, schedule, Ddim(clipping_value=None), z=z, num_steps=steps, noise=no_noise)
        for denoise, steps in ((student, num_steps), (teacher, 2 * num_steps))
    ]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_the_target_asks_the_teacher_only_on_its_own_grid():
    """At t and t − 1/2N, also where i/N − 1/N is not 0 in floating point (N = 3, 49, …)."""
    schedule = ALL_SCHEDULES["cosine"]
    for num_steps in (3, 7, 49, 512):
        asked = []

        def teacher(z, t, asked=asked):
            asked.append(t)
            return gaussian(schedule, 0.5)(z, t)

        t = grid_times(num_steps)[1:]
        progressive_target(teacher, schedule, z=randn(num_steps, 1, 1, 1), t=t, num_steps=num_steps)
        fine = grid_times(2 * num_steps)
        torch.testing.assert_close(asked[0], fine[2::2], rtol=0, atol=1e-15)
        torch.testing.assert_close(asked[1], fine[1::2], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_a_last_step_off_by_one_rounding_still_ends_at_the_image(name):
    """One ulp above 1/8, t − 1/8 is 1e-17 instead of 0, where the cosine schedule would keep σ = 4.5e-5."""
    schedule, z = ALL_SCHEDULES[name], randn(1, 2, 3, 2)
    t = torch.tensor([1 / 8], dtype=torch.float64)
    above = t.nextafter(torch.ones_like(t))
    assert above - 1 / 8 > 0
    at, near = (progressive_target(random_teacher(schedule), schedule, z=z, t=time, num_steps=8) for time in (t, above))
    torch.testing.assert_close(near.x, at.x, rtol=1e-12, atol=1e-12)


# k steps


@every_teacher
@pytest.mark.parametrize("name", ALL_SCHEDULES)
@pytest.mark.parametrize(("num_steps", "ratio"), [(1, 4), (8, 4), (4, 5), (1, 125), (30, 3), (100, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_student_step_lands_where_k_steps_of_the_teacher_land(name, teacher, num_steps, ratio, dtype, tolerance):
    """Also between the levels of a table; the teacher's chain is in float64, from x̂ and ε̂."""
    schedule, fine = ALL_SCHEDULES[name], ratio * num_steps
    answer = teacher(schedule)
    i = torch.arange(1, num_steps + 1, dtype=torch.float64)
    z, t = randn(num_steps, 2, 3, 2, dtype=dtype), i / num_steps
    end = z.double()
    for j in range(ratio):
        said = answer(end, t - j / fine)
        level = ratio * i - j - 1
        angle = torch.where(level > 0, schedule.angle(level / fine), 0)
        end = column(angle.cos(), z.double()) * said.x + column(angle.sin(), z.double()) * said.eps
    target = progressive_target(answer, schedule, z=z, t=t, num_steps=num_steps, ratio=ratio)
    step = ddim_step(z, target.v, grid_angles(schedule, t), grid_angles(schedule, (i - 1) / num_steps))
    error = (step.double() - end).flatten(1).norm(dim=1) / end.flatten(1).norm(dim=1)
    assert step.dtype == dtype
    assert error.max() < tolerance


def as_network_of(kind, denoise, schedule):
    """The denoiser as a network of this prediction type says it, in the precision of z."""

    def teacher(z, t):
        said = denoise(z.double(), t)
        output = torch.cat([said.x, said.eps], dim=1) if kind == "both" else getattr(said, kind)
        return PREDICTION_TYPES[kind].read(z, output.to(z), grid_angles(schedule, t))

    return teacher


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_one_student_step_lands_there_whatever_the_teacher_predicts(name, kind):
    """At zero signal, where ε says nothing about the image, an ε-teacher is not asked."""
    schedule, num_steps, ratio = ALL_SCHEDULES[name], 6, 4
    teacher = as_network_of(kind, mixture(schedule), schedule)
    z, times = randn(num_steps, 2, 3, 2), grid_times(num_steps)
    z, t, s = (z[:-1], times[1:-1], times[:-2]) if kind == "eps" else (z, times[1:], times[:-1])
    fine = Ddim(clipping_value=None)
    ends = [
        sample(teacher, schedule, fine, z=z[k : k + 1], num_steps=ratio, noise=no_noise,
               times=torch.linspace(s[k], t[k], ratio + 1, dtype=torch.float64))
        for k in range(len(z))
    ]  # fmt: skip
    target = progressive_target(teacher, schedule, z=z, t=t, num_steps=num_steps, ratio=ratio)
    found = ddim_step(z, target.v, grid_angles(schedule, t), grid_angles(schedule, s))
    torch.testing.assert_close(found, torch.cat(ends), rtol=1e-8, atol=1e-8)


def test_two_steps_of_the_formula_are_the_paper_s():
    """k = 2 in the plain quotient of the paper, at every t of the grid, and by the method itself."""
    schedule, z, t = ALL_SCHEDULES["linear"], randn(4, 2, 3, 2), grid_times(4)[1:]
    teacher = random_teacher(schedule)
    _, _, s, _, z_end = teacher_walk(teacher, schedule, z, 4)
    angle_t, angle_s = grid_angles(schedule, t), grid_angles(schedule, s)
    exact = invert_ddim(z, z_end, angle_t, angle_s)
    found = progressive_target(teacher, schedule, z=z, t=t, num_steps=4)
    torch.testing.assert_close(found.v, exact.v, rtol=1e-10, atol=1e-10)
    lesson = DistillContext(teacher, schedule, 4, 32)
    example = METHODS["progressive"]()(
        lesson, 0 * z, z / column(angle_t.sin(), z), (torch.arange(4) + 0.5).double() / 4
    )
    eight = progressive_target(teacher, schedule, z=z, t=t, num_steps=4, ratio=8)
    torch.testing.assert_close(example.x, eight.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("name", "ratio"), [("cosine", 2), ("cosine", 4), ("ddpm_cosine", 2), ("linear", 2)])
def test_float32_does_not_drown_the_target_of_a_short_step(kind, name, ratio):
    """What 8192 steps and 4096 (of a table: all its levels) differ in is told to a hundredth, at both ends of the grid.

    With (cos δ z − z_end)/sin δ the rounding is as large as the difference.
    """
    schedule = ALL_SCHEDULES[name]
    fine = 8192 if schedule.num_levels is None else schedule.num_levels
    num_steps = fine // ratio
    teacher = as_network_of(kind, mixture(schedule), schedule)
    level = torch.tensor([1, 2, num_steps // 4, num_steps // 2, num_steps // 2 + 1, num_steps * 3 // 4, num_steps])
    level = level[:-1] if kind == "eps" else level  # at zero signal ε says nothing about the image
    t = level.double() / num_steps
    means = torch.tensor([-0.8, 0.1, 0.7], dtype=torch.float64)[torch.arange(len(t) * 48) % 3].reshape(len(t), 3, 4, 4)
    angle = schedule.angle(t)
    z = (column(angle.cos(), means) * means + column(angle.sin(), means) * randn(*means.shape)).float()
    exact = progressive_target(teacher, schedule, z=z.double(), t=t, num_steps=num_steps, ratio=ratio)
    found = progressive_target(teacher, schedule, z=z, t=t, num_steps=num_steps, ratio=ratio)

    def size(values):
        return values.double().flatten(1).norm(dim=1) / 48**0.5

    signal = angle.sin() * size(exact.v - teacher(z.double(), t).v)
    of_float32 = 2e-7 / angle.cos() if kind == "eps" else 2e-7
    assert (size(found.x.double() - exact.x) < 0.01 * signal + of_float32).all()


@pytest.mark.parametrize(("name", "settings"), [("tract", {}), ("consistency", {}), ("consistency", {"addim": 0.75})])
@pytest.mark.parametrize("num_steps", [1, 1024])
def test_float32_does_not_drown_the_targets_of_segments(name, settings, num_steps):
    """A fine step of 4096 and a jump: the jump is long for one step, and as short as 3/4096 for 1024."""
    schedule, fine = ALL_SCHEDULES["cosine"], 4096
    teacher = as_network_of("v", mixture(schedule), schedule)
    student = as_network_of("v", mixture(schedule, c=0.2), schedule)
    lesson = DistillContext(teacher, schedule, num_steps, fine, student=student, average=student, progress=1.0)
    x, noise = randn(8, 2, 3, 2).tanh(), randn(8, 2, 3, 2, seed=1)
    u = torch.tensor([0, 1, 3, 900, 2047, 2050, 3000, 4095], dtype=torch.float64).add(0.5) / fine
    method = METHODS[name](**settings)
    exact = method(lesson, x.float().double(), noise.float().double(), u)
    found = method(lesson, x.float(), noise.float(), u)
    torch.testing.assert_close(found.t, exact.t, rtol=0, atol=0)
    torch.testing.assert_close(found.x.double(), exact.x, rtol=0, atol=3e-6)  # 1e-4 by the quotient


@pytest.mark.parametrize("path_sampler", ["ddim", "dpmpp_3m"])
def test_float32_does_not_drown_the_targets_of_a_long_path(path_sampler):
    """A trajectory of 256 short steps in float32 and in float64."""
    schedule, steps = ALL_SCHEDULES["cosine"], 256
    teacher, student = random_teacher(schedule), random_teacher(schedule, seed=5)
    noise, u = randn(steps, 2, 3, 2), torch.zeros(steps, dtype=torch.float64)
    lesson = DistillContext(teacher, schedule, steps, steps, student=student)
    method = METHODS["trajectory"](path_sampler=path_sampler)
    exact = method(lesson, noise, noise, u)
    found = method(lesson, noise.float(), noise.float(), u)
    assert (found.z.dtype, found.x.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(found.x.double(), exact.x, rtol=0, atol=5e-5)  # 1e-3 with states in float32


def test_inverting_a_step_recovers_the_velocity():
    angle_t = torch.tensor([0.3, 0.9, math.pi / 2], dtype=torch.float64)
    angle_s = torch.tensor([0.0, 0.2, 1.5], dtype=torch.float64)
    z, v = randn(*Z_SHAPE), randn(*Z_SHAPE, seed=1)
    found = invert_ddim(z, ddim_step(z, v, angle_t, angle_s), angle_t, angle_s)
    torch.testing.assert_close(found.v, v, rtol=1e-10, atol=1e-10)
    alpha, sigma = column(angle_t.cos(), z), column(angle_t.sin(), z)
    torch.testing.assert_close(found.x, alpha * z - sigma * v, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("num_steps", "to_steps", "plan"),
    [
        (64, 8, [32, 16, 8]),
        (8, 8, []),
        (2, 1, [1]),
        (1024, 1, [2**k for k in range(9, -1, -1)]),
        (12, 3, [6, 3]),
        (12, 1, [6, 3, 1]),
        (12, 2, [6, 2]),
        (1000, 1, [500, 250, 125, 25, 5, 1]),
    ],
)
def test_halving_plan(num_steps, to_steps, plan):
    assert halving_plan(num_steps, to_steps) == plan


@pytest.mark.parametrize(
    ("num_steps", "to_steps", "message"),
    [
        (16, 3, "16 steps cannot become 3"),
        (8, 16, "8 steps cannot become 16"),
        (8, 0, "0"),
        (8, -1, "-1"),
        (0, 0, "0 steps cannot become 0"),
    ],
)
def test_halving_plan_refuses_what_it_never_reaches(num_steps, to_steps, message):
    with pytest.raises(ValueError, match=message):
        halving_plan(num_steps, to_steps)


@pytest.mark.parametrize(
    ("phases", "fitting"),
    [([100, 30], [100, 25]), ([128, 30, 7, 1], [128, 32, 8, 1]), ([64, 8, 1], [64, 8, 1]), ([8, 9, 9], [8, 4, 2]),
     ([7, 3, 1], [7, 1])],
)  # fmt: skip
def test_the_nearest_list_that_falls_by_whole_ratios(phases, fitting):
    assert fitting_phases(phases) == fitting


def test_where_halving_begins():
    pairs = ((1000, 1), (1000, 4), (1000, 5), (1000, 125), (1024, 1), (999, 998))
    assert [halving_start(*pair) for pair in pairs] == [512, 512, 640, 1000, 1024, 998]
