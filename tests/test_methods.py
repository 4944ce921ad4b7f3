"""Every method's targets: closed forms, the papers' formulas, and what one method must make of another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.oracles import column, gaussian, mixture, randn, random_teacher
from tests.written_out import (
    EXACT,
    SCHEDULES,
    Answer,
    closed_form,
    ddim,
    every_schedule,
    factor,
    image_towards,
    images,
    lesson,
    middles,
    nobody,
    noised,
    perfect,
    ratios,
    segment_end,
    walk,
)
from vdiff.diffusion.distillation import Consistency, Match, Progressive, Tract, TrainTarget
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import ddim_step
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.diffusion.targets import addim_velocity

SEGMENTS = [(1, 8), (4, 8), (3, 12), (6, 6), (5, 15)]
every_segment = pytest.mark.parametrize(("num_steps", "fine"), SEGMENTS)


# Progressive


@every_schedule
@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_progressive_of_a_gaussian_has_a_closed_form(schedule, num_steps):
    x, noise = images(num_steps)
    fine, levels = 2 * num_steps, [2 * i for i in range(1, num_steps + 1)]
    found = Progressive()(lesson(schedule, gaussian(schedule, 0.4), num_steps, fine), x, noise, middles(num_steps))
    z = noised(schedule, torch.tensor(levels), fine, x, noise)
    factors = [walk(schedule, 0.4, fine, k, k - 2) for k in levels]
    torch.testing.assert_close(found.t * num_steps, torch.arange(1, num_steps + 1).double(), **EXACT)
    torch.testing.assert_close(found.z, z, **EXACT)
    expected = closed_form(schedule, z, factors, levels, [k - 2 for k in levels], fine)
    torch.testing.assert_close(found.x, expected, **EXACT)
    assert found.rows is None


# Segments


def segmented(method, asked: str, schedule, teacher: Answer, jump: Answer, num_steps: int, fine: int) -> TrainTarget:
    """The example at every fine level, k = 1 … n; `asked` is who jumps."""
    x, noise = images(fine)
    given = lesson(schedule, teacher, num_steps, fine, progress=1.0, **{asked: jump})
    return method(given, x, noise, middles(fine))


SEGMENTED = {"tract": (Tract(), "average"), "consistency": (Consistency(), "student")}
every_segmented = pytest.mark.parametrize(("method", "asked"), SEGMENTED.values(), ids=SEGMENTED)


@every_schedule
@every_segment
@every_segmented
def test_a_fine_step_of_the_teacher_then_a_jump(schedule, num_steps, fine, method, asked):
    """Any teacher, any student: t → t − 1/n by the teacher, on to the segment's end by the student, then inverted."""
    teacher, jump = mixture(schedule), random_teacher(schedule, seed=3)
    found = segmented(method, asked, schedule, teacher, jump, num_steps, fine)
    x, noise = images(fine)
    level = torch.arange(1, fine + 1, dtype=torch.float64)
    end = segment_end(level, num_steps, fine)
    z = noised(schedule, level, fine, x, noise)
    below = ddim(teacher, schedule, z, level, level - 1, fine)
    landed = ddim(jump, schedule, below, level - 1, end, fine)
    torch.testing.assert_close(found.t, level / fine, **EXACT)
    torch.testing.assert_close(found.z, z, **EXACT)
    torch.testing.assert_close(found.x, image_towards(schedule, z, landed, level, end, fine), rtol=1e-8, atol=1e-8)
    assert found.rows is None


@every_schedule
@every_segment
@every_segmented
def test_of_gaussians_the_target_has_a_closed_form(schedule, num_steps, fine, method, asked):
    """Factor of the teacher's data once, then of the student's."""
    found = segmented(method, asked, schedule, gaussian(schedule, 0.4), gaussian(schedule, 0.9), num_steps, fine)
    part, factors, ends = fine // num_steps, [], []
    for k in range(1, fine + 1):
        end = (k - 1) // part * part
        jump = factor(schedule, 0.9, fine, k - 1, end) if k - 1 > end else 1.0
        factors.append(factor(schedule, 0.4, fine, k, k - 1) * jump)
        ends.append(end)
    expected = closed_form(schedule, found.z, factors, list(range(1, fine + 1)), ends, fine)
    torch.testing.assert_close(found.x, expected, **EXACT)


@every_schedule
@every_segment
@every_segmented
@pytest.mark.parametrize("data", [mixture, lambda schedule: gaussian(schedule, 0.4)], ids=["mixture", "gaussian"])
def test_the_composition_of_the_teacher_s_steps_is_a_fixed_point(schedule, num_steps, fine, method, asked, data):
    """A student that has learned all is taught just that."""
    teacher = data(schedule)
    student = perfect(schedule, teacher, num_steps, fine)
    found = segmented(method, asked, schedule, teacher, student, num_steps, fine)
    torch.testing.assert_close(found.x, student(found.z, found.t).x, rtol=1e-8, atol=1e-8)
    if data is not mixture:
        ends = [(k - 1) // (fine // num_steps) * (fine // num_steps) for k in range(1, fine + 1)]
        factors = [walk(schedule, 0.4, fine, k, end) for k, end in zip(range(1, fine + 1), ends, strict=True)]
        expected = closed_form(schedule, found.z, factors, list(range(1, fine + 1)), ends, fine)
        torch.testing.assert_close(found.x, expected, **EXACT)


@every_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_tract_in_segments_of_two_with_a_frozen_average_is_progressive(schedule, num_steps):
    """At the segments' beginnings; half-way the teacher's own next image is learned."""
    teacher = mixture(schedule)
    fine = 2 * num_steps
    found = segmented(Tract(), "average", schedule, teacher, teacher, num_steps, fine)
    x, noise = images(fine)
    at_beginnings = lesson(schedule, teacher, num_steps, fine)
    expected = Progressive()(at_beginnings, x[1::2], noise[1::2], middles(num_steps))
    assert torch.equal(found.t[1::2], expected.t)
    assert torch.equal(found.z[1::2], expected.z)
    torch.testing.assert_close(found.x[1::2], expected.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.x[::2], teacher(found.z[::2], found.t[::2]).x, **EXACT)


@every_schedule
@pytest.mark.parametrize("fine", [1, 4, 9])
def test_consistency_in_one_segment_is_consistency_distillation(schedule, fine):
    """The target is the student's image f(ẑ_{k−1}, t_{k−1}) of the teacher's next state, and the teacher's at k = 1."""
    teacher, student = mixture(schedule), random_teacher(schedule, seed=3)
    found = segmented(Consistency(), "student", schedule, teacher, student, 1, fine)
    level = torch.arange(1, fine + 1, dtype=torch.float64)
    below = ddim(teacher, schedule, found.z, level, level - 1, fine)
    torch.testing.assert_close(found.x[:1], teacher(found.z[:1], found.t[:1]).x, **EXACT)
    if fine > 1:
        torch.testing.assert_close(found.x[1:], student(below[1:], (level[1:] - 1) / fine).x, **EXACT)


@every_segmented
def test_where_nothing_is_left_to_jump_a_network_is_asked_at_a_time_that_it_knows(method, asked):
    """Never at t = 0, nor at the end of another segment's jump."""
    schedule, times = SCHEDULES["cosine"], []

    def jump(z: Tensor, t: Tensor) -> Prediction:
        times.append(t)
        return random_teacher(schedule)(z, t)

    segmented(method, asked, schedule, mixture(schedule), jump, 2, 8)
    assert (times[0] * 8).tolist() == [1, 1, 2, 3, 5, 5, 6, 7]


def test_consistency_has_more_and_more_teacher_steps():
    """first^(1 − p) · last^p, as a multiple of N."""
    schedule, method = SCHEDULES["cosine"], Consistency(first_steps=64)

    def steps(progress: float, num_steps: int = 4, last: int = 1024, method: Consistency = method, **more) -> int:
        return method.steps_at(lesson(schedule, nobody, num_steps, last, progress=progress, **more))

    assert [steps(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [64, 128, 256, 512, 1024]
    assert steps(0.1) == 84  # 64 · 16^0.1 = 84.4
    assert steps(0.99) == 996  # 64 · 16^0.99 = 996.0
    assert [steps(p, num_steps=48, last=480) for p in (0, 0.5, 1)] == [48, 192, 480]  # 1.33 → 1, 3.65 → 4 parts
    assert [steps(p, num_steps=100, last=800) for p in (0, 1)] == [100, 800]  # never less than the student's
    assert [steps(p, last=32) for p in (0, 0.5, 1)] == [32, 32, 32]  # first_steps beyond the teacher's
    assert [steps(p, last=64, levels=64) for p in (0, 0.5, 1)] == [64, 64, 64]
    assert [steps(p, num_steps=1, last=1024, levels=1024) for p in (0, 0.2, 0.5, 0.9, 1)] == [64, 128, 256, 1024, 1024]
    assert [steps(p, last=24, levels=96, method=Consistency(6)) for p in (0, 0.3, 1)] == [8, 8, 24]
    usual = [steps(0, num_steps=1, last=last, method=Consistency()) for last in (1024, 512, 256, 32, 8, 4)]
    assert usual == [64, 64, 32, 4, 1, 1]  # an eighth, at most 64


def test_the_grid_of_consistency_is_that_of_its_progress():
    schedule = SCHEDULES["cosine"]
    x, noise = images(8)
    asked = []

    def teacher(z: Tensor, t: Tensor) -> Prediction:
        asked.append(t)
        return mixture(schedule)(z, t)

    for progress, fine in ((0.0, 4), (0.5, 8), (1.0, 16)):
        given = lesson(schedule, teacher, 2, 16, progress=progress, student=random_teacher(schedule))
        found = Consistency(first_steps=4)(given, x, noise, middles(8))
        assert torch.equal(found.t, asked[-1])
        assert (found.t * fine).tolist() == [math.floor((i + 0.5) / 8 * fine) + 1 for i in range(8)]


@pytest.mark.parametrize(
    ("wanted", "num_steps", "levels", "steps"),
    [
        (64, 4, None, 64),
        (66, 4, None, 64),  # 16.5 is rounded to even
        (67, 4, None, 68),
        (1, 4, None, 4),
        (5.9, 4, None, 4),
        (6.1, 4, None, 8),
        (64, 1, 1000, 50),  # ratios 1.28 and 1.5625 of 50 and 100
        (71, 1, 1000, 100),
        (64, 5, 1000, 50),
        (3, 5, 1000, 5),
        (5000, 5, 1000, 1000),
        (13, 4, 48, 12),
        (14, 4, 48, 16),  # 14/12 > 16/14
        (100, 48, 48, 48),
        (30, 2, 6, 6),
    ],
)
def test_fine_steps_lie_on_the_student_s_grid_and_on_the_teacher_s(wanted, num_steps, levels, steps):
    assert lesson(SCHEDULES["cosine"], nobody, num_steps, 7, levels=levels).fine_steps(wanted) == steps


# aDDIM


def addim_parts(angle_t: float = 1.1, angle_s: float = 0.6, count: int = 5):
    schedule = CosineSchedule(logsnr_max=math.inf)
    angles = [torch.full((count,), angle, dtype=torch.float64) for angle in (angle_t, angle_s)]
    x, noise = images(count)
    z = math.cos(angle_t) * x + math.sin(angle_t) * noise
    return z, mixture(schedule)(z, schedule.time(angles[0])), x, *angles


def addim_step(z: Tensor, said: Prediction, x: Tensor, angle_t: Tensor, angle_s: Tensor, eta: float) -> Tensor:
    return ddim_step(z, addim_velocity(z, said, x, angle_t, angle_s, eta), angle_t, angle_s)


def test_addim_of_a_perfect_image_is_ddim():
    """x̂ = x on the last step, where the added variance and σ_s are both 0."""
    z, said, _, angle_t, angle_s = addim_parts(0.4, 0.0)
    found = addim_velocity(z.float(), as_float(said), said.x.float(), angle_t, angle_s, 1.0)
    assert torch.equal(found, said.v.float())


def as_float(said: Prediction) -> Prediction:
    return Prediction(said.x.float(), said.eps.float(), said.v.float())


def test_addim_without_its_variance_is_ddim():
    z, said, x, angle_t, angle_s = addim_parts()
    expected = math.cos(0.6) * said.x + math.sin(0.6) * said.eps
    torch.testing.assert_close(addim_step(z, said, x, angle_t, angle_s, 0.0), expected, **EXACT)


@pytest.mark.parametrize(("angle_t", "angle_s"), [(1.1, 0.6), (math.pi / 2, 1.5), (0.4, 0.0)])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_addim_has_the_length_of_its_paper(angle_t, angle_s, eta):
    """‖z_s − α_s x̂‖² = σ_s² ‖ε̂‖² + η (α_s − α_t σ_s/σ_t)² ‖x − x̂‖², in the direction of ε̂."""
    z, said, x, *angles = addim_parts(angle_t, angle_s)
    noise = addim_step(z, said, x, *angles, eta) - math.cos(angle_s) * said.x
    gain = math.cos(angle_s) - math.cos(angle_t) * math.sin(angle_s) / math.sin(angle_t)

    def squares(values: Tensor) -> Tensor:
        return (values**2).flatten(1).sum(1)

    expected = math.sin(angle_s) ** 2 * squares(said.eps) + eta * gain**2 * squares(x - said.x)
    torch.testing.assert_close(squares(noise), expected, **EXACT)
    along = (noise * said.eps).flatten(1).sum(1)
    torch.testing.assert_close(along, (squares(noise) * squares(said.eps)).sqrt(), **EXACT)


def test_addim_s_states_vary_as_much_as_noisy_images_do():
    """On a mixture: the variance of z_s is α_s² Var x + σ_s², of which DDIM lacks a part."""
    schedule, means, c, weights = CosineSchedule(), (-0.8, 0.1, 0.7), 0.15, (3, 1, 2)
    generator = torch.Generator().manual_seed(0)
    part = torch.multinomial(torch.tensor(weights).double(), 400 * 256, replacement=True, generator=generator)
    x = (torch.tensor(means).double()[part] + c * randn(400 * 256, seed=1)).reshape(400, 1, 16, 16)
    variance = x.var().item()
    for t, s in ((0.9, 0.7), (0.8, 0.5), (0.6, 0.3)):
        times = [torch.full((400,), value, dtype=torch.float64) for value in (t, s)]
        angles = [schedule.angle(time) for time in times]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((a.cos()[0].item(), a.sin()[0].item()) for a in angles)
        z = alpha_t * x + sigma_t * randn(*x.shape, seed=2)
        said = mixture(schedule, means, c, weights)(z, times[0])
        true = alpha_s**2 * variance + sigma_s**2
        found = [addim_step(z, said, x, *angles, eta).var().item() for eta in (0.0, 1.0)]
        assert found[0] < true
        assert abs(found[1] - true) < 0.6 * abs(found[0] - true)


@every_schedule
@every_segment
def test_consistency_takes_addim_steps_where_it_is_told_to(schedule, num_steps, fine):
    """The missing variance is that of the batch's own images, at every level."""
    teacher, student = mixture(schedule), random_teacher(schedule, seed=3)
    found = segmented(Consistency(addim=0.7), "student", schedule, teacher, student, num_steps, fine)
    x, noise = images(fine)
    level = torch.arange(1, fine + 1, dtype=torch.float64)
    end = segment_end(level, num_steps, fine)
    z = noised(schedule, level, fine, x, noise)
    said = teacher(z, level / fine)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (ratios(schedule, k, fine, z) for k in (level, level - 1))
    lost = 0.7 * (x - said.x).square().mean((1, 2, 3), keepdim=True)
    longer = sigma_s**2 + (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * lost / said.eps.square().mean(
        (1, 2, 3), keepdim=True
    )
    below = alpha_s * said.x + longer.sqrt() * said.eps
    landed = ddim(student, schedule, below, level - 1, end, fine)
    torch.testing.assert_close(found.x, image_towards(schedule, z, landed, level, end, fine), rtol=1e-8, atol=1e-8)


def test_addim_keeps_the_precision_of_the_images():
    z, said, x, *angles = addim_parts()
    found = addim_step(z.float(), as_float(said), x.float(), *angles, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), addim_step(z, said, x, *angles, 1.0), rtol=1e-5, atol=1e-5)


# The same answers


@every_schedule
def test_a_match_learns_the_teacher_s_image_at_every_time(schedule):
    x, noise = images(7)
    u, teacher = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]).double(), mixture(schedule)
    found = Match()(lesson(schedule, teacher, 4, 4), x, noise, u)
    assert torch.equal(found.t, 1 - u)
    torch.testing.assert_close(found.z, noised(schedule, 1 - u, 1, x, noise), **EXACT)
    torch.testing.assert_close(found.x, teacher(found.z, 1 - u).x, **EXACT)
    assert found.rows is None
    known = Match()(lesson(schedule, teacher, 4, 4, levels=12), x, noise, u)
    assert torch.equal(known.t * 12, torch.tensor([1, 2, 4, 7, 10, 11, 12]).double())
    torch.testing.assert_close(known.z, noised(schedule, known.t, 1, x, noise), **EXACT)


@every_schedule
def test_a_match_of_noise_learns_the_image_where_noise_tells_nothing(schedule):
    """x* = α² x̂ + σ² x, x̂ = (z − σ ε̂)/α."""
    x, noise = images(12)
    teacher = mixture(schedule)
    found = Match()(lesson(schedule, teacher, 4, 4, levels=12, predicts_noise=True), x, noise, middles(12))
    alpha, sigma = ratios(schedule, torch.arange(1, 13), 12, x)
    said = (found.z - sigma * teacher(found.z, found.t).eps) / alpha
    torch.testing.assert_close(found.x, alpha**2 * said + sigma**2 * x, **EXACT)


def test_a_match_of_noise_is_unbiased():
    """E[x* | z] is the perfect x̂: no function of z is correlated with the difference."""
    schedule, count = CosineSchedule(), 200_000
    generator = torch.Generator().manual_seed(0)
    part = torch.multinomial(torch.tensor([3.0, 1, 2]), count, replacement=True, generator=generator)
    x = (torch.tensor([-0.8, 0.1, 0.7]).double()[part] + 0.15 * randn(count, seed=2)).reshape(-1, 1, 1, 1)
    noise = randn(count, 1, 1, 1, seed=1)
    teacher = mixture(schedule)
    for t in (0.2, 0.6, 0.95):
        u = torch.full((count,), 1 - t, dtype=torch.float64)
        found = Match()(lesson(schedule, teacher, 4, 4, predicts_noise=True), x, noise, u)
        difference = found.x - teacher(found.z, found.t).x
        assert difference.abs().max() > 0.01
        for probe in (torch.ones_like(found.z), found.z, (3 * found.z).sin(), (found.z > 0.3).double()):
            product = difference * probe
            assert abs(product.mean()) < 4 * product.std() / math.sqrt(count)


def test_a_match_of_noise_is_bounded_at_zero_signal():
    """An error of ε̂ enters α σ times: at most half of it; at no signal at all the target is the image."""
    schedule = CosineSchedule(logsnr_max=math.inf)
    x, noise = images(9)
    teacher = gaussian(schedule, 0.5)

    def wrong(z: Tensor, t: Tensor) -> Prediction:
        nothing = torch.full_like(z, math.nan)
        return Prediction(nothing, teacher(z, t).eps + 0.3, nothing)

    u = torch.linspace(0, 0.99, 9, dtype=torch.float64)
    right, off = (
        Match()(lesson(schedule, each, 4, 4, predicts_noise=True), x, noise, u).x for each in (teacher, wrong)
    )
    angle = schedule.angle(1 - u)
    torch.testing.assert_close(right - off, column(0.3 * angle.cos() * angle.sin(), x).expand_as(x), **EXACT)
    assert (right - off).abs().max() <= 0.15 + 1e-12
    torch.testing.assert_close(off[0], x[0], **EXACT)
