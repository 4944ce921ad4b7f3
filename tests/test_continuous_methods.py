"""Methods that learn at any time: closed forms, fixed points, and derivatives against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import column, gaussian, mixture, randn, random_teacher
from tests.written_out import EXACT, Answer, images, lesson, middles
from vdiff.diffusion.continuous import angle_rate
from vdiff.diffusion.distillation import METHODS, DistillContext
from vdiff.diffusion.ect import Ect
from vdiff.diffusion.meanflow import MeanFlow
from vdiff.diffusion.method import TrainTarget
from vdiff.diffusion.prediction import Prediction, from_v
from vdiff.diffusion.schedules import CosineSchedule, LinearSchedule, Schedule
from vdiff.diffusion.scm import Scm
from vdiff.errors import OptionError, VdiffError
from vdiff.models.condition import Condition
from vdiff.models.denoiser import Denoiser
from vdiff.models.kinds import build_network
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training.objectives import bind_derivative

COUNT = 24
SCHEDULES: dict[str, Schedule] = {"cosine": CosineSchedule(), "linear": LinearSchedule(240)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_student = pytest.mark.parametrize("num_steps", [1, 3])


def difference(answer: Answer, step: float = 1e-6) -> Callable[..., tuple[Tensor, Tensor]]:
    """`DistillContext.derivative` by central differences."""

    def derive(z: Tensor, t: Tensor, dz: Tensor, dt: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        up, down = (answer(z + h * dz, t + h * dt, **inputs).v for h in (step, -step))
        return answer(z, t, **inputs).v, (up - down) / (2 * step)

    return derive


def taught(method, schedule: Schedule, teacher: Answer, student: Answer, num_steps: int, **more) -> TrainTarget:
    x, noise = images(COUNT)
    given = {"student": student, "derivative": difference(student), "progress": 1.0, **more}
    u = torch.rand(COUNT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return method(lesson(schedule, teacher, num_steps, 8 * num_steps, **given), x, noise, u)


def ends_of(schedule: Schedule, t: Tensor, num_steps: int) -> Tensor:
    """The angle of the end of each segment, looked for among all."""
    grid = [i / num_steps for i in range(num_steps)]
    ends = torch.tensor([max(s for s in grid if s < value - 1e-12) for value in t.tolist()], dtype=torch.float64)
    return torch.where(ends > 0, schedule.angle(ends), 0)


def flow_of_gaussian(c: float, angle_t: Tensor, angle_s: Tensor) -> Tensor:
    """Data N(0, c²): the flow multiplies z by √(α_s² c² + σ_s²)/√(α_t² c² + σ_t²) from φ_t to φ_s."""
    deviations = [(a.cos() ** 2 * c**2 + a.sin() ** 2).sqrt() for a in (angle_s, angle_t)]
    return deviations[0] / deviations[1]


def perfect_jump(schedule: Schedule, c: float, num_steps: int) -> Answer:
    """The student that jumps along the flow of N(0, c²) to the end of its segment, or to the time that it is told."""

    def answer(z: Tensor, t: Tensor, second_time: Tensor | None = None) -> Prediction:
        angle = schedule.angle(t)
        if second_time is None:
            end = ends_of(schedule, t, num_steps)
        else:
            end = torch.where(second_time > 0, schedule.angle(second_time), 0)
        delta = angle - end
        by_sine = (delta.cos() - flow_of_gaussian(c, angle, end)) / delta.sin()
        alpha, sigma = angle.cos(), angle.sin()
        at_once = alpha * sigma * (1 - c**2) / (alpha**2 * c**2 + sigma**2)
        return from_v(z, column(torch.where(delta.abs() < 1e-9, at_once, by_sine), z) * z, angle)

    return answer


# Continuous consistency


@every_schedule
@every_student
def test_the_flow_map_of_a_gaussian_is_the_fixed_point_of_scm(schedule, num_steps):
    """In closed form, without normalisation: the target of the perfect student is what it says."""
    student = perfect_jump(schedule, 0.4, num_steps)
    found = taught(Scm(tangent_norm=0.0), schedule, gaussian(schedule, 0.4), student, num_steps)
    torch.testing.assert_close(found.x, student(found.z, found.t).x, rtol=1e-5, atol=2e-6)
    other = perfect_jump(schedule, 0.7, num_steps)
    wrong = taught(Scm(tangent_norm=0.0), schedule, gaussian(schedule, 0.4), other, num_steps)
    assert (wrong.x - other(wrong.z, wrong.t).x).abs().amax((1, 2, 3)).min() > 1e-4


@every_schedule
@every_student
def test_the_tangent_of_scm_is_the_derivative_of_the_jump_along_the_flow(schedule, num_steps):
    """On a mixture, for any student: cos δ times how the end of its jump moves with a short step of the teacher."""
    teacher, student = mixture(schedule), random_teacher(schedule, seed=3)
    found = taught(Scm(tangent_norm=0.0), schedule, teacher, student, num_steps)
    angle, end = schedule.angle(found.t), ends_of(schedule, found.t, num_steps)

    def jump(h: float) -> Tensor:
        """The end of the jump that begins h further along the teacher's flow (a second-order step of it)."""
        half = found.z + h / 2 * teacher(found.z, found.t).v
        z = found.z + h * teacher(half, schedule.time(angle + h / 2)).v
        said = student(z, schedule.time(angle + h))
        delta = angle + h - end
        return column(delta.cos(), z) * z - column(delta.sin(), z) * said.v

    moved = (jump(1e-5) - jump(-1e-5)) / 2e-5
    alpha, sigma = (column(f(angle), found.z) for f in (torch.cos, torch.sin))
    g = (alpha * found.z - found.x) / sigma - student(found.z, found.t).v
    torch.testing.assert_close(g, column((angle - end).cos(), g) * moved, rtol=1e-4, atol=1e-4)


def test_the_tangent_of_scm_is_normalised_and_comes_in_by_and_by():
    schedule = SCHEDULES["cosine"]
    teacher, student = mixture(schedule), random_teacher(schedule, seed=3)

    def tangent(method: Scm, progress: float = 1.0) -> Tensor:
        found = taught(method, schedule, teacher, student, 1, progress=progress)
        alpha, sigma = (column(f(schedule.angle(found.t)), found.z) for f in (torch.cos, torch.sin))
        return (alpha * found.z - found.x) / sigma - student(found.z, found.t).v

    plain = tangent(Scm(tangent_norm=0.0))
    size = plain.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(tangent(Scm(tangent_norm=0.3)), plain / (size + 0.3), rtol=1e-6, atol=1e-8)
    none, half = (tangent(Scm(tangent_norm=0.0, tangent_warmup=0.2), p) for p in (0.0, 0.1))
    torch.testing.assert_close(half, (none + plain) / 2, rtol=1e-6, atol=1e-6)
    found = taught(Scm(), schedule, teacher, student, 1)
    matching = teacher(found.z, found.t).v - student(found.z, found.t).v
    torch.testing.assert_close(none, column(schedule.angle(found.t).cos() ** 2, none) * matching, **EXACT)


def test_scm_and_meanflow_follow_the_images_where_they_are_told_to():
    """The target is linear in the velocity but for the derivative; without one it shows v = α ε − σ x."""
    schedule = SCHEDULES["cosine"]
    x, noise = images(COUNT)

    def nobody(*_: object, **__: object) -> Prediction:
        raise AssertionError("no teacher is to be asked")

    still = lambda z, t, **_: from_v(z, torch.zeros_like(z), schedule.angle(t))  # noqa: E731
    method = Scm(flow="data", tangent_norm=0.0, tangent_warmup=1.0)
    found = taught(method, schedule, nobody, still, 1, progress=0.0)
    angle = column(schedule.angle(found.t), x)
    v = angle.cos() * noise - angle.sin() * x
    torch.testing.assert_close(found.x, angle.cos() * found.z - angle.sin() * angle.cos() ** 2 * v, **EXACT)
    flow = taught(MeanFlow(flow="data", flow_share=1.0), schedule, nobody, still, 1)
    angle = column(schedule.angle(flow.t), x)
    torch.testing.assert_close(flow.x, x, **EXACT)


def test_weights_of_noise_levels_are_learned():
    """e^{w} is used as a weight, and where w learns alone it ends at one over the mean error of v."""
    schedule = CosineSchedule()
    network = Scm(adaptive_weight=True).networks(Denoiser(UNet(small()), schedule, "v"))
    assert network is not None
    assert Scm().networks(Denoiser(UNet(small()), schedule, "v")) is None
    nn.init.normal_(next(network.parameters()), std=0.1)
    found = taught(Scm(), schedule, mixture(schedule), random_teacher(schedule), 1, networks=network)
    torch.testing.assert_close(found.weight, network(found.t).exp())
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    t = torch.linspace(0.05, 1, 32, dtype=torch.float64)
    angle = column(schedule.angle(t), images(32)[0])
    z, off = images(32)[0], 0.2 + t.reshape(-1, 1, 1, 1)
    target = TrainTarget(z, t, z + angle.sin() * off)
    for _ in range(400):
        optimizer.zero_grad()
        Scm().network_loss(network, target, Prediction(z, z, z)).mean().backward()
        optimizer.step()
    torch.testing.assert_close(network(t).exp().double(), 1 / off.flatten() ** 2, rtol=0.1, atol=0.1)


# Tuning


@every_schedule
@every_student
def test_ect_compares_two_noise_levels_of_one_image(schedule, num_steps):
    """z_r from the same image and noise; the student's jump from there; the step that leads there, inverted."""
    student = random_teacher(schedule, seed=3)
    for progress, stage in ((0.0, 1), (0.3, 3), (1.0, 8)):
        found = taught(Ect(), schedule, lesson, student, num_steps, progress=progress)
        x, noise = images(COUNT)
        angle, end = schedule.angle(found.t), ends_of(schedule, found.t, num_steps)
        ratio = angle.tan()
        lower = ratio * (1 - (1 + 8 / (1 + ratio.exp())) / 2**stage).clamp(min=0)
        below = lower.atan()
        first_level = schedule.angle(torch.tensor(1 / schedule.label_scale, dtype=torch.float64))
        below = torch.where(below < first_level, 0, below).maximum(end)
        z_r = column(below.cos(), x) * x + column(below.sin(), x) * noise
        said = student(z_r, schedule.time(below.clamp(min=first_level)))
        landed = column(end.cos(), x) * said.x + column(end.sin(), x) * said.eps
        landed = torch.where(column(below - end, x) > 1e-12, landed, z_r)
        alpha, sigma = (column(f(angle), x) for f in (torch.cos, torch.sin))
        ratio_s = column(end.sin() / angle.sin(), x)
        expected = (landed - ratio_s * found.z) / (column(end.cos(), x) - ratio_s * alpha)
        torch.testing.assert_close(found.z, alpha * x + sigma * noise, **EXACT)
        torch.testing.assert_close(found.x, expected, rtol=1e-6, atol=1e-6)
        assert found.weight is not None
        torch.testing.assert_close(found.weight * (angle - below).sin(), torch.ones_like(angle), **EXACT)
        sigma_gap = taught(Ect(gap_weight="sigma"), schedule, lesson, student, num_steps, progress=progress).weight
        torch.testing.assert_close(1 / sigma_gap, angle.tan() - below.tan(), rtol=1e-6, atol=1e-9)
    assert taught(Ect(gap_weight="none"), schedule, lesson, student, num_steps).weight is None


def test_the_mean_target_of_ect_is_that_of_the_flow_of_the_data():
    """On N(0, c²) the perfect student is a fixed point but for the curvature within the gap, which halves with it."""
    schedule, c, count = CosineSchedule(), 0.4, 200_000
    student = perfect_jump(schedule, c, 1)
    noise, ratio = randn(count, 1, 1, 1, seed=1), 0.7
    x = c * randn(count, 1, 1, 1, seed=2)
    u = torch.full((count,), 1 - float(schedule.time(torch.tensor(math.atan(ratio)).double())), dtype=torch.float64)
    errors = []
    for stages in (3, 6):
        method = Ect(gap_stages=stages)
        found = method(lesson(schedule, lesson, 1, 8, student=student, progress=1.0), x, noise, u)
        off = found.x - student(found.z, found.t).x
        errors.append(float((off * found.z).mean() / found.z.square().mean()))  # the part that is linear in z
    assert abs(errors[1]) < 0.35 * abs(errors[0])
    assert abs(errors[1]) < 0.02


# Mean flows


@every_schedule
def test_the_flow_map_of_a_gaussian_is_the_fixed_point_of_meanflow(schedule):
    """Between any two times; a student that is right only where s = 0 is not one."""
    student = perfect_jump(schedule, 0.4, 1)
    method = MeanFlow(flow_share=0.25)
    found = taught(method, schedule, lambda z, t, **_: gaussian(schedule, 0.4)(z, t), student, 1)
    said = student(found.z, found.t, **found.inputs)
    torch.testing.assert_close(found.x, said.x, rtol=1e-5, atol=1e-5)
    s = found.inputs["second_time"]
    assert bool((s < found.t).any())
    assert bool((s == found.t).any())
    assert bool((s >= 0).all() & (s <= found.t).all())
    other = lambda z, t, **_: perfect_jump(schedule, 0.4, 1)(z, t)  # noqa: E731
    off = taught(method, schedule, lambda z, t, **_: gaussian(schedule, 0.4)(z, t), other, 1)
    assert (off.x - other(off.z, off.t).x).abs().max() > 1e-3


def test_meanflow_learns_jumps_to_the_image():
    """The earlier of two times is one level lower, so that s reaches 0."""
    schedule = SCHEDULES["cosine"]
    x, noise = images(COUNT)
    student = perfect_jump(schedule, 0.4, 1)
    given = lesson(schedule, student, 1, 8, student=student, derivative=difference(student), progress=1.0)
    found = MeanFlow(flow="data")(given, x, noise, torch.full((COUNT,), 1 - 2**-40, dtype=torch.float64))
    assert torch.equal(found.inputs["second_time"], torch.zeros(COUNT, dtype=torch.float64))
    assert (found.t == 1 / schedule.label_scale).all()


def test_meanflow_divides_a_loss_by_the_size_of_its_tangent():
    schedule = SCHEDULES["cosine"]
    teacher, student = (lambda z, t, seed=seed, **_: random_teacher(schedule, seed)(z, t) for seed in (1, 3))
    found, plain = (taught(MeanFlow(loss_power=p), schedule, teacher, student, 1) for p in (0.75, 0.0))
    angle = column(schedule.angle(found.t), found.z)
    g = (student(found.z, found.t).x - found.x) / angle.sin()
    expected = (g.square().mean((1, 2, 3)) + 1e-3) ** -0.75
    torch.testing.assert_close(found.weight, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(plain.weight, torch.ones(COUNT).double())


# Times


@every_schedule
@pytest.mark.parametrize("method", [Scm(proposal="-0.5,1.2"), Ect(proposal="-0.5,1.2")])
def test_noise_levels_are_drawn_as_they_are_asked_for(schedule, method):
    u = middles(2000)
    uniform = type(method)().times(schedule, u)
    torch.testing.assert_close(uniform, (1 - u).clamp(min=1 / schedule.label_scale), **EXACT)
    t = method.times(schedule, u)
    assert float(t.min()) >= 1 / schedule.label_scale
    assert float(t.max()) <= 1
    inside = (t > 1.01 / schedule.label_scale) & (t < 0.999)
    expected = torch.distributions.Normal(-0.5, 1.2).cdf(schedule.angle(t).tan().log())
    torch.testing.assert_close(expected[inside], (1 - u)[inside], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("words", ["normal", "1", "0,0", "1,2,3", "nan,1", "0,inf"])
def test_what_is_no_distribution_is_refused(words):
    with pytest.raises(OptionError, match=f"--proposal {words}: not a distribution"):
        Scm(proposal=words)


@every_schedule
def test_the_rate_of_the_angle_is_its_derivative(schedule):
    t = torch.linspace(0.0031, 0.9973, 50, dtype=torch.float64)
    expected = (schedule.angle(t + 1e-7) - schedule.angle(t - 1e-7)) / 2e-7
    torch.testing.assert_close(angle_rate(schedule, t), expected, rtol=1e-5, atol=1e-6)


# Derivatives of networks


def small(**more) -> UNetConfig:
    return UNetConfig(
        1, 1, channels=8, embedding_channels=16, multipliers=(1, 2), attention_strides=(1, 2), num_classes=3, **more
    )  # fmt: skip


DIFFUSERS = {
    "UNet2DModel": {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4,
        "layers_per_block": 1, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "attention_head_dim": 4,
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip


def denoiser_of(kind: str) -> tuple[Denoiser, Condition]:
    """A denoiser in float64 with random weights everywhere, and its condition."""
    condition = Condition()
    if kind == "unet":
        network, condition = UNet(small(second_time=True)), Condition({"classes": torch.arange(6) % 3})
    else:
        pytest.importorskip("diffusers")
        network = build_network("diffusers", {"class": kind, "config": DIFFUSERS[kind]}, None)
    denoiser = Denoiser(network, CosineSchedule(), "v").double().eval()
    for i, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(0.2 * randn(*parameter.shape, seed=i))
    return denoiser, condition


@pytest.mark.parametrize("along_time", [False, True])
@pytest.mark.parametrize("kind", ["unet", *DIFFUSERS])
def test_the_derivative_of_a_network_is_that_of_finite_differences(kind, along_time):
    """Through fused attention too, which has none itself: the same answer, and no gradient of any weight.

    Along the time to a hundredth: networks take sines of it in float32, which a small difference does not survive.
    """
    denoiser, condition = denoiser_of(kind)
    z, dz = randn(6, 1, 8, 8, seed=50), randn(6, 1, 8, 8, seed=51)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    dt = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64) * along_time
    inputs = {"second_time": t / 2} if kind == "unet" else {}
    with torch.inference_mode():
        theirs = dz + 0
    if kind == "UNet2DModel" and torch.__version__ < "2.14":
        with pytest.raises(VdiffError, match="the network cannot be differentiated along the flow"):
            bind_derivative(denoiser, condition)(z, t, theirs, dt)
        return
    v, along = bind_derivative(denoiser, condition)(z, t, theirs, dt, **inputs)

    def answer(z: Tensor, t: Tensor, **inputs: Tensor) -> Prediction:
        with torch.no_grad():
            return denoiser(z, t, condition.with_tensors(**inputs))

    plain, expected = difference(answer, 1e-4)(z, t, dz, dt, **inputs)
    torch.testing.assert_close(v, plain, **EXACT)
    assert (along - expected).norm() < (1e-2 if along_time else 1e-5) * expected.norm()
    assert not v.requires_grad
    assert not along.requires_grad


def test_a_derivative_is_that_of_fp32_at_every_precision():
    denoiser, condition = denoiser_of("unet")
    denoiser = denoiser.float()
    z, t = randn(6, 1, 8, 8).float(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    derive = bind_derivative(denoiser, condition)
    once = derive(z, t, z, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = derive(z, t, z, t)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


class Rounding(torch.autograd.Function):
    """An operation that has no forward derivative."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.round()

    @staticmethod
    def setup_context(*_: object) -> None:
        return


def test_a_network_without_a_derivative_is_one_line(monkeypatch):
    denoiser, condition = denoiser_of("unet")
    plain = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda h, **_: Rounding.apply(plain(h)))
    z, t = randn(6, 1, 8, 8), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    with pytest.raises(VdiffError, match="the network cannot be differentiated along the flow"):
        bind_derivative(denoiser, condition)(z, t, z, t)


@pytest.mark.parametrize("name", ["scm", "ect", "meanflow"])
def test_continuous_methods_keep_the_precision_of_the_images(name):
    schedule = CosineSchedule()
    x, noise = (each.float() for each in images(COUNT))
    student = lambda z, t, **_: random_teacher(schedule, 3)(z, t)  # noqa: E731
    given: DistillContext = lesson(schedule, student, 1, 8, student=student, derivative=difference(student, 1e-3))
    found = METHODS[name]()(replace(given, progress=0.5), x, noise, middles(COUNT))
    assert (found.x.dtype, found.z.dtype, found.t.dtype) == (torch.float32, torch.float32, torch.float64)
    assert found.x.isfinite().all()
