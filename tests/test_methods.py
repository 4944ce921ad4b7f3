"""Every method's targets: closed forms, the papers' formulas written out in α and σ, and what one must make of another.

Nothing here uses angles' differences or v, in which the methods are written: a DDIM step is z_s = α_s x̂ + σ_s ε̂, and
the target is x* = (z_s − (σ_s/σ_t) z)/(α_s − (σ_s/σ_t) α_t).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.oracles import column, gaussian, mixture, randn, random_teacher
from vdiff.diffusion.distillation import (
    METHODS,
    Consistency,
    Example,
    Guided,
    Lesson,
    Match,
    Progressive,
    Tract,
    Trajectory,
    addim_step,
    build_method,
    check_phase,
    grid_times_of,
    single_plan,
    two_phase_plan,
)
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import SAMPLERS, sample
from vdiff.diffusion.schedules import CosineSchedule, LinearSchedule, Schedule
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.models.unet import UNet, UNetConfig
from vdiff.training.config import LOSSES, PATH_SAMPLERS, SHORTENING, DistillConfig
from vdiff.training.objectives import HUBER, DistillationObjective, Draws, Pupil, stratified, told
from vdiff.training.objectives import LOSSES as LOSS_FUNCTIONS

Answer = Callable[[Tensor, Tensor], Prediction]
SCHEDULES: dict[str, Schedule] = {"cosine": CosineSchedule(), "linear": LinearSchedule(240)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
SEGMENTS = [(1, 8), (4, 8), (3, 12), (6, 6), (5, 15)]
every_segment = pytest.mark.parametrize(("num_steps", "fine"), SEGMENTS)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def middles(count: int) -> Tensor:
    """One u for each of `count` levels."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def images(count: int) -> tuple[Tensor, Tensor]:
    """Images and noise, 2 × 3 × 2."""
    return randn(count, 2, 3, 2, seed=5).tanh(), randn(count, 2, 3, 2, seed=6)


def nobody(*_: object) -> Prediction:
    raise AssertionError("the method asks somebody whom it need not ask")


def still(z: Tensor, _: Tensor) -> Prediction:
    """Who answers at once."""
    return Prediction(z, z, 0 * z)


def lesson(schedule: Schedule, teacher: Answer, num_steps: int, fine: int, **more) -> Lesson:
    """A lesson in which nobody but the teacher may be asked, unless they are given."""
    given = {"student": nobody, "average": nobody, "levels": None, **more}
    return Lesson(teacher, schedule, num_steps, fine, **given)


# The formulas written out


def ratios(schedule: Schedule, level: Tensor, fine: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ at level/fine; level 0 is the image itself."""
    angle = schedule.angle(level.double() / fine)
    return column(torch.where(level > 0, angle.cos(), 1), like), column(torch.where(level > 0, angle.sin(), 0), like)


def ddim(answer: Answer, schedule: Schedule, z: Tensor, level: Tensor, end: Tensor, fine: int) -> Tensor:
    """α_s x̂ + σ_s ε̂ from `level` to `end`; z where they are the same."""
    said = answer(z, level.clamp(min=1) / fine)
    alpha, sigma = ratios(schedule, end, fine, z)
    return torch.where(column(level > end, z) > 0, alpha * said.x + sigma * said.eps, z)


def image_towards(schedule: Schedule, z: Tensor, z_end: Tensor, level: Tensor, end: Tensor, fine: int) -> Tensor:
    """(z_s − (σ_s/σ_t) z)/(α_s − (σ_s/σ_t) α_t)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (ratios(schedule, k, fine, z) for k in (level, end))
    return (z_end - sigma_s / sigma_t * z) / (alpha_s - sigma_s / sigma_t * alpha_t)


def noised(schedule: Schedule, level: Tensor, fine: int, x: Tensor, noise: Tensor) -> Tensor:
    alpha, sigma = ratios(schedule, level, fine, x)
    return alpha * x + sigma * noise


def segment_end(level: Tensor, num_steps: int, fine: int) -> Tensor:
    """The largest multiple of fine/N below `level`, looked for one by one."""
    ends = [max(e for e in range(0, fine, fine // num_steps) if e < k) for k in level.int().tolist()]
    return torch.tensor(ends, dtype=torch.float64)


def perfect(schedule: Schedule, teacher: Answer, num_steps: int, fine: int) -> Answer:
    """The student whose one step leads to the segment's end exactly where the teacher's fine steps lead."""

    def answer(z: Tensor, t: Tensor) -> Prediction:
        level = (t * fine).round()
        end, state, here = segment_end(level, num_steps, fine), z, level
        for _ in range(fine // num_steps):
            below = torch.maximum(here - 1, end)
            state, here = ddim(teacher, schedule, state, here, below, fine), below
        x = image_towards(schedule, z, state, level, end, fine)
        alpha, sigma = ratios(schedule, level, fine, z)
        eps = (z - alpha * x) / sigma
        return Prediction(x, eps, alpha * eps - sigma * x)

    return answer


def factor(schedule: Schedule, c: float, fine: int, level: int, end: int) -> float:
    """Data N(0, c²): a DDIM step from level to end multiplies z by (α_s α_t c² + σ_s σ_t)/(α_t² c² + σ_t²)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (math.cos(angle), math.sin(angle)) if k else (1.0, 0.0)
        for k in (level, end)
        for angle in (schedule.angle(torch.tensor([k / fine], dtype=torch.float64)).item(),)
    )
    return (alpha_s * alpha_t * c**2 + sigma_s * sigma_t) / (alpha_t**2 * c**2 + sigma_t**2)


def walk(schedule: Schedule, c: float, fine: int, level: int, end: int, stride: int = 1) -> float:
    """The product of the factors of steps `stride` long."""
    return math.prod(factor(schedule, c, fine, k, k - stride) for k in range(level, end, -stride))


def closed_form(schedule: Schedule, z: Tensor, factors: list[float], levels: list[int], ends: list[int], fine: int):
    """x* where row b is multiplied by factors[b] on its way from levels[b] to ends[b]."""
    level, end = (torch.tensor(values, dtype=torch.float64) for values in (levels, ends))
    return image_towards(schedule, z, column(torch.tensor(factors, dtype=torch.float64), z) * z, level, end, fine)


# Progressive


@every_schedule
@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_progressive_of_a_gaussian_has_a_closed_form(schedule, num_steps):
    x, noise = images(num_steps)
    found = Progressive()(lesson(schedule, gaussian(schedule, 0.4), num_steps, 99), x, noise, middles(num_steps))
    fine, levels = 2 * num_steps, [2 * i for i in range(1, num_steps + 1)]
    z = noised(schedule, torch.tensor(levels), fine, x, noise)
    factors = [walk(schedule, 0.4, fine, k, k - 2) for k in levels]
    torch.testing.assert_close(found.t * num_steps, torch.arange(1, num_steps + 1).double(), **EXACT)
    torch.testing.assert_close(found.z, z, **EXACT)
    expected = closed_form(schedule, z, factors, levels, [k - 2 for k in levels], fine)
    torch.testing.assert_close(found.x, expected, **EXACT)
    assert found.rows is None


# Segments


def segmented(method, asked: str, schedule, teacher: Answer, jump: Answer, num_steps: int, fine: int) -> Example:
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
    assert Consistency().first_steps == 64


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
    low = Prediction(said.x.float(), said.eps.float(), said.v.float())
    found = addim_step(z.float(), low, x.float(), *angles, 1.0)
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


# Trajectories


def path_lesson(schedule, teacher, student, num_steps: int, **more) -> Lesson:
    return lesson(schedule, teacher, num_steps, 999, student=student, **more)


@every_schedule
@pytest.mark.parametrize(("num_steps", "count"), [(1, 3), (2, 6), (4, 8), (3, 3)])
def test_a_trajectory_s_states_are_the_student_s_and_its_ends_the_teacher_s(schedule, num_steps, count):
    """Walked step by step, from the first rows of the noise; x is not looked at."""
    teacher, student, fine = mixture(schedule), random_teacher(schedule, seed=3), 24 // num_steps * num_steps
    noise, u = randn(count, 2, 3, 2), torch.zeros(count, dtype=torch.float64)
    nothing = torch.full_like(noise, math.nan)
    found = Trajectory(path_steps=24)(path_lesson(schedule, teacher, student, num_steps), nothing, noise, u)
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
    found = Trajectory(path_steps=24)(given, noise, noise, torch.zeros(6, dtype=torch.float64))
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
    found = Trajectory()(given, noise, noise, torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(found.x, student(found.z, found.t).x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 9])
@pytest.mark.parametrize("num_steps", [3, 4])
def test_paths_that_the_batch_cuts_short(num_steps, count):
    """Every example is a state of the path of its own row, on its way to that path's end."""
    schedule, noise = SCHEDULES["cosine"], randn(count, 1, 2, 2)
    given = path_lesson(schedule, gaussian(schedule, 0.4), gaussian(schedule, 0.9), num_steps)
    for u in (0.0, 0.3, 0.7 / 2**20, 0.4 / 2**20):
        numbers = torch.full((count,), u, dtype=torch.float64)
        found = Trajectory(path_steps=12)(given, noise, noise, numbers)
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


@pytest.mark.parametrize("sampler", PATH_SAMPLERS)
def test_the_teacher_of_a_trajectory_walks_by_any_sampler_without_noise(sampler):
    """Ends are where the sampler itself, unclipped, stands at the student's times."""
    schedule, noise, states = SCHEDULES["cosine"], 2 * randn(4, 2, 3, 2), []
    teacher, student = mixture(schedule), random_teacher(schedule, seed=3)
    end = sample(
        teacher, schedule, SAMPLERS[sampler](clip=None), z=noise[:2], num_steps=8, noise=nobody,
        on_state=lambda done, z, _: states.append(z) if done % 4 == 0 else None,
    )  # fmt: skip
    method, given = Trajectory(8, sampler), path_lesson(schedule, teacher, student, 2)
    found = method(given, noise, noise, torch.zeros(4, dtype=torch.float64))
    for row, (start, level) in enumerate(itertools.product(range(2), (2, 1))):
        z_end = (states[1] if level == 2 else end)[start][None]
        at = torch.tensor([level], dtype=torch.float64)
        expected = image_towards(schedule, found.z[row][None], z_end, at, at - 1, 2)
        torch.testing.assert_close(found.x[row][None], expected, rtol=1e-8, atol=1e-8)


def test_a_sampler_that_draws_noise_is_no_path():
    schedule, noise = SCHEDULES["cosine"], randn(4, 1, 1, 1)
    given = path_lesson(schedule, mixture(schedule), mixture(schedule), 2)
    with pytest.raises(ValueError, match="deterministic"):
        Trajectory(path_sampler="ddpm")(given, noise, noise, noise.flatten())


# Whom an objective asks


def network(seed: int, *, scale: float = 0.3, **more) -> Denoiser:
    """A denoiser of three classes and of none, with random weights everywhere, in float64."""
    config = UNetConfig(
        2, 2, channels=4, embedding_channels=4, multipliers=(1,), attention_strides=(), num_classes=3, null_class=True,
        **more,
    )  # fmt: skip
    denoiser = Denoiser(UNet(config), CosineSchedule(), "v").double()
    for i, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(scale * randn(*parameter.shape, seed=seed + i))
    return denoiser


CLASSES = torch.tensor([2, 0, 1, 3, 1, 2, 0, 3])


def draws(count: int = 8, guidance: Tensor | None = None) -> Draws:
    x, noise = randn(count, 2, 4, 4, seed=5).tanh(), randn(count, 2, 4, 4, seed=6)
    return Draws(x, noise, middles(count), CLASSES[:count], guidance)


def taught(method, teacher, student=None, given: Draws | None = None, *, num_steps: int = 4, **more) -> Example:
    student = student or network(90)
    objective = DistillationObjective(teacher, method, num_steps, 2 * num_steps, **more)
    return objective(given or draws(), Pupil(student, student, 1.0))


def test_guided_with_no_weight_is_a_match():
    teacher = network(1).eval()
    plain = taught(Match(), teacher)
    guided = taught(Guided(), GuidedDenoiser(teacher), given=draws(guidance=torch.zeros(8)))
    assert torch.equal(guided.t, plain.t)
    assert torch.equal(guided.z, plain.z)
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-12, atol=1e-12)


def test_a_guided_teacher_speaks_for_each_image_s_own_weight_and_class():
    """x̂_w = (1 + w) x̂_c − w x̂_∅."""
    teacher, weights = network(1).eval(), torch.tensor([0.0, 4, 1.5, 2, -1, 0.5, 3, 1])
    found = taught(Guided(), GuidedDenoiser(teacher), given=draws(guidance=weights))
    with torch.no_grad():
        told_class, none = (teacher(found.z, found.t, classes).x for classes in (CLASSES, torch.full((8,), 3)))
    w = column(weights, found.x)
    torch.testing.assert_close(found.x, (1 + w) * told_class - w * none, rtol=1e-10, atol=1e-10)
    assert (told_class - none)[:3].abs().max() > 0.01


class Classed:
    """The perfect denoiser of data whose spread depends on the class, that keeps what it was asked."""

    schedule, prediction_type, training = CosineSchedule(), "v", False

    def __init__(self, spreads: tuple[float, ...]) -> None:
        self.spreads, self.asked = spreads, []

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def __call__(self, z: Tensor, t: Tensor, classes: Tensor, guidance: Tensor | None = None) -> Prediction:
        self.asked.append((classes.tolist(), None if guidance is None else guidance.tolist()))
        parts = [gaussian(self.schedule, self.spreads[k]) for k in classes.tolist()]
        said = [part(z[b][None], t[b][None]) for b, part in enumerate(parts)]
        return Prediction(*(torch.cat([getattr(each, name) for each in said]) for name in ("x", "eps", "v")))


def test_paths_are_of_the_classes_of_their_rows():
    """Teacher and student are asked about the classes and weights of the noise that a path begins with."""
    teacher, student = Classed((0.2, 0.5, 0.9, 1.2)), Classed((0.3, 0.6, 1.1, 1.4))
    weights = torch.arange(8.0)
    given = draws(guidance=weights)
    found = DistillationObjective(teacher, Trajectory(path_steps=12), 3, 12)(given, Pupil(student, student, 0.0))
    assert found.rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert teacher.asked == [([2, 0, 1], [0.0, 1, 2])] * 12
    assert student.asked == [([2, 0, 1], [0.0, 1, 2])] * 2
    told_rows = given[found.rows]
    assert told_rows.classes.tolist() == [2, 2, 2, 0, 0, 0, 1, 1]
    assert told_rows.guidance.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    schedule = teacher.schedule
    for row, k in enumerate(found.rows.tolist()):
        i = round(found.t[row].item() * 3)
        kind = CLASSES[k].item()
        mine = walk(schedule, student.spreads[kind], 3, 3, i)
        theirs = walk(schedule, teacher.spreads[kind], 12, 12, 4 * (i - 1))
        z = mine * given.noise[k][None]
        torch.testing.assert_close(found.z[row][None], z, **EXACT)
        torch.testing.assert_close(found.x[row][None], closed_form(schedule, z, [theirs / mine], [i], [i - 1], 3))


@pytest.mark.parametrize("name", ["progressive", "tract", "consistency", "match", "guided"])
def test_every_row_is_of_its_own_class(name):
    """Of all who are asked, teacher, student and average."""
    kinds = [Classed((0.2, 0.5, 0.9, 1.2)) for _ in range(3)]
    teacher, student, average = kinds
    given = draws(guidance=torch.arange(8.0))
    found = DistillationObjective(teacher, METHODS[name](), 2, 4)(given, Pupil(student, average, 0.0))
    assert found.rows is None
    for each in kinds:
        assert all(asked == (CLASSES.tolist(), list(range(8))) for asked in each.asked)
    asked = {"progressive": (2, 0, 0), "tract": (1, 0, 1), "consistency": (1, 1, 0)}.get(name, (1, 0, 0))
    assert tuple(len(each.asked) for each in kinds) == asked


def test_what_an_objective_tells_its_method():
    lessons = []

    def method(lesson: Lesson, _: Tensor, noise: Tensor, u: Tensor) -> Example:
        lessons.append((lesson, torch.is_grad_enabled(), student.training))
        z, t = randn(2, 2, 4, 4, seed=9), torch.full((2,), 0.5, dtype=torch.float64)
        return Example(noise, u, torch.cat([getattr(lesson, who)(z, t).x for who in ("teacher", "student", "average")]))

    teacher, student, average = network(1).eval(), network(60, dropout=0.5), network(120).eval()
    given, pupil = draws(), Pupil(student.train(), average, 0.25)
    found = DistillationObjective(teacher, method, 4, 32, 16)(given, pupil)
    ((told_lesson, with_grad, was_training),) = lessons
    assert (told_lesson.num_steps, told_lesson.teacher_steps, told_lesson.levels) == (4, 32, 16)
    assert (told_lesson.progress, told_lesson.predicts_noise, told_lesson.schedule) == (0.25, False, teacher.schedule)
    assert (with_grad, was_training, student.training) == (False, False, True)
    assert not found.x.requires_grad
    z, t = randn(2, 2, 4, 4, seed=9), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        said = [each.eval()(z, t, CLASSES[:2]).x for each in (teacher, student, average)]
    torch.testing.assert_close(found.x, torch.cat(said), rtol=0, atol=0)
    teacher.prediction_type = "eps"
    DistillationObjective(teacher, method, 4, 32)(given, pupil)
    assert lessons[-1][0].predicts_noise
    assert lessons[-1][0].levels is None


@pytest.mark.parametrize("mode", [True, False])
def test_a_student_is_left_in_the_mode_that_it_was_in(mode):
    student = network(1).train(mode)

    def fail(*_: object) -> Example:
        raise RuntimeError("stopped")

    taught(Consistency(), network(2).eval(), student)
    assert student.training is mode
    with pytest.raises(RuntimeError, match="stopped"):
        taught(fail, network(2).eval(), student)
    assert student.training is mode


def test_of_whom_nothing_is_learned_no_gradient_is_kept():
    """The teacher answers in inference mode; what a student says of itself has no gradient, but could be trained on."""
    teacher, student = network(1), network(2)
    z, t = randn(3, 2, 4, 4), torch.full((3,), 0.5, dtype=torch.float64)
    asked = told(teacher, draws(), torch.inference_mode)(z, t).x
    mine = told(student, draws())(z, t).x
    assert asked.is_inference()
    assert not mine.is_inference()
    assert not mine.requires_grad
    torch.testing.assert_close(mine, student(z, t, CLASSES[:3]).x.detach(), rtol=0, atol=0)


def test_draws_are_cut_row_by_row():
    given = draws(guidance=torch.arange(8.0))
    rows = torch.tensor([3, 3, 0])
    for cut, index in ((given[2:4], [2, 3]), (given[rows], [3, 3, 0])):
        for field in dataclasses.fields(Draws):
            assert torch.equal(getattr(cut, field.name), getattr(given, field.name)[index])
    bare = Draws(given.images, given.noise, given.u)[1:]
    assert (bare.classes, bare.guidance, len(bare.u)) == (None, None, 7)


# Losses


def test_losses_are_those_of_their_names():
    """Means over the pixels of an image, of squares or absolute values, and √(rms² + c²) − c with c = 0.00054."""
    error = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1e-3, 1e-3]], dtype=torch.float64).reshape(3, 1, 1, 2)
    c = 0.00054
    expected = {
        "l2": [12.5, 0, 1e-6],
        "l1": [3.5, 0, 1e-3],
        "huber": [math.sqrt(12.5 + c**2) - c, 0, math.sqrt(1e-6 + c**2) - c],
    }
    assert set(expected) == set(LOSS_FUNCTIONS) == set(LOSSES)
    assert c == HUBER
    for name, values in expected.items():
        assert LOSS_FUNCTIONS[name](error).tolist() == pytest.approx(values, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_a_student_without_errors_has_finite_gradients(name):
    error = torch.zeros(2, 1, 2, 2, requires_grad=True)
    LOSS_FUNCTIONS[name](error).sum().backward()
    assert torch.equal(error.grad, torch.zeros_like(error))


# Grids, plans and the registry


@pytest.mark.parametrize("num_steps", [1, 3, 8, 1000])
def test_levels_of_a_grid_are_as_likely_as_one_another(num_steps):
    t = grid_times_of(middles(7 * num_steps), num_steps)
    assert (t * num_steps).round().tolist() == [1 + k // 7 for k in range(7 * num_steps)]
    assert t.max() == 1


def test_a_stage_shortens_to_a_number_that_divides():
    for before, after in itertools.product(range(1, 13), range(-1, 14)):
        if after >= 1 and after < before and before % after == 0:
            check_phase(before, after)
            assert single_plan(before, after) == [after]
        else:
            for check in (check_phase, single_plan, two_phase_plan):
                with pytest.raises(ValueError, match=f"{before} steps cannot become {after}: a smaller number that"):
                    check(before, after)


def test_two_phases_shorten_alike():
    """By factors as near as can be, the larger first; one phase where there is little to shorten."""
    assert two_phase_plan(1024, 1) == [32, 1]
    assert two_phase_plan(1024, 4) == [64, 4]
    assert two_phase_plan(8, 1) == [1]
    assert two_phase_plan(16, 2) == [2]
    assert two_phase_plan(9, 1) == [3, 1]
    for ratio in range(2, 400):
        pairs = [(a, ratio // a) for a in range(2, ratio) if ratio % a == 0]
        plan = two_phase_plan(3 * ratio, 3)
        if ratio <= 8 or not pairs:
            assert plan == [3]
            continue
        middle = plan[0] // 3
        assert plan == [3 * middle, 3]
        nearest = min(max(pair) for pair in pairs)
        assert middle == nearest  # the student of the first phase keeps the larger factor


def test_methods_plan_as_their_papers_do():
    plans = {name: method().plan for name, method in METHODS.items()}
    assert plans["progressive"](16, 2) == [8, 4, 2]
    assert plans["tract"](1024, 1) == [32, 1]
    for name in ("consistency", "trajectory"):
        assert plans[name](1024, 1) == [1]
        assert plans[name](12, 4) == [4]
    for name in ("match", "guided"):
        assert plans[name](12, 12) == [12]
        with pytest.raises(ValueError, match="keeps the 12 steps of the teacher, and does not lead to 6"):
            plans[name](12, 6)


def test_the_registry_knows_what_each_method_needs():
    facts = {
        name: (type(kind()), kind.keeps_steps, kind.needs_images, kind().self_ema) for name, kind in METHODS.items()
    }
    assert facts == {
        "progressive": (Progressive, False, True, None),
        "tract": (Tract, False, True, 0.5),
        "consistency": (Consistency, False, True, None),
        "guided": (Guided, True, True, None),
        "trajectory": (Trajectory, False, False, None),
        "match": (Match, True, True, None),
    }


def test_the_defaults_of_the_papers():
    """TRACT and consistency: a constant learning rate, an average for inference of 0.001^(1/updates), no longer last
    stages; trajectories: absolute errors. All are settings of distill.py."""
    inference = {"lr_schedule": "constant", "ema_remainder": 1e-3, "last_factor": 1.0}
    expected = {"tract": inference, "consistency": inference, "trajectory": {"loss": "l1", "last_factor": 1.0}}
    known = {field.name: field for field in dataclasses.fields(DistillConfig)}
    for name, method in METHODS.items():
        assert method.defaults == expected.get(name, {})
        for key, value in method.defaults.items():
            assert type(value) is type(known[key].default)
    assert (Tract(), Consistency(), Trajectory()) == (Tract(0.5), Consistency(64, 0.0), Trajectory(16, "ddim"))
    for field in ("self_ema", "first_steps", "addim", "path_steps", "path_sampler"):
        owner = next(kind for kind in METHODS.values() if field in {item.name for item in dataclasses.fields(kind)})
        assert known[field].default == getattr(owner(), field)
    assert set(SHORTENING) < set(METHODS)


def test_methods_are_built_from_settings():
    settings = {
        "self_ema": 0.9, "first_steps": 7, "addim": 0.2, "path_steps": 5, "path_sampler": "heun", "lr": 1.0,
    }  # fmt: skip
    assert build_method("tract", settings) == Tract(0.9)
    assert build_method("consistency", settings) == Consistency(7, 0.2)
    assert build_method("trajectory", settings) == Trajectory(5, "heun")
    for name, kind in (("progressive", Progressive), ("match", Match), ("guided", Guided)):
        assert build_method(name, settings) == kind()
    assert build_method("tract", {}) == Tract()
