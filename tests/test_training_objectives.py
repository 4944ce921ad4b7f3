"""Examples and losses against the formulas written out: which times, noisy images, targets and weights."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracles import ALL_SCHEDULES, TABLES, Z_SHAPE, column, condition, gaussian, randn, random_teacher
from vdiff.diffusion.distillation import METHODS, TrainTarget
from vdiff.diffusion.parameterisation import Vp
from vdiff.diffusion.prediction import PREDICTION_TYPES, Prediction
from vdiff.diffusion.schedules import CosineSchedule, LinearSchedule
from vdiff.diffusion.targets import progressive_target
from vdiff.diffusion.weighting import WEIGHTINGS
from vdiff.models.denoiser import Denoiser
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training.objectives import (
    DenoisingObjective,
    DistillationObjective,
    StudentState,
    TrainBatch,
    stratified,
    weighted_losses,
)

every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
ALMOST_ONE = 1 - 2**-53
UNIFORM = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.75, 0.999, ALMOST_ONE], dtype=torch.float64)


def learn(objective, x, noise, u, classes=None) -> TrainTarget:
    """The example of an objective that asks nothing of its student."""
    student = network(0)
    return objective(TrainBatch(x, noise, u, condition(classes)), StudentState(student, student, 0.0))


def distil(teacher, num_steps: int) -> DistillationObjective:
    """Progressive distillation to `num_steps`."""
    return DistillationObjective(teacher, METHODS["progressive"](), num_steps, 2 * num_steps)


def weighted_loss(prediction, example, schedule, weighting):
    """The mean over a batch, as the loop takes it."""
    return weighted_losses(prediction, example, schedule.logsnr(example.t), weighting).mean()


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and noise of different sizes of numbers."""
    return randn(count, 2, 3, 2).tanh(), randn(count, 2, 3, 2, seed=1)


# Base training


@pytest.mark.parametrize("logsnr_max", [20.0, 6.0])
def test_continuous_times_are_one_minus_u_and_images_are_noised_by_the_cosine(logsnr_max):
    """z = cos φ x + sin φ ε with tan φ = e^(−λ/2), λ from `logsnr_max` down to −`logsnr_max`."""
    x, noise = images(len(UNIFORM))
    example = learn(DenoisingObjective(CosineSchedule(logsnr_max=logsnr_max)), x, noise, UNIFORM)
    low, high = math.atan(math.exp(-logsnr_max / 2)), math.atan(math.exp(logsnr_max / 2))
    for k, u in enumerate(UNIFORM.tolist()):
        angle = low + (1 - u) * (high - low)
        expected = math.cos(angle) * x[k] + math.sin(angle) * noise[k]
        torch.testing.assert_close(example.z[k], expected, rtol=1e-12, atol=1e-12)
        assert example.t[k].item() == 1 - u
    assert example.t.min() > 0
    assert example.t.max() == 1
    assert torch.equal(example.x, x)


@pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES)
def test_tables_are_trained_at_their_levels_only_and_at_each_of_them(schedule):
    """z = √ᾱ_k x + √(1 − ᾱ_k) ε with ᾱ_k from the β of the papers, k = 1 … N equally often."""
    n = schedule.num_levels
    u = (torch.arange(4 * n, dtype=torch.float64) + 0.5) / (4 * n)
    x, noise = randn(4 * n, 1, 1, 1), randn(4 * n, 1, 1, 1, seed=1)
    example = learn(DenoisingObjective(schedule), x, noise, u)
    levels = example.t * n
    torch.testing.assert_close(levels, torch.arange(1, n + 1).repeat_interleave(4).double(), rtol=0, atol=1e-9)
    kept = torch.tensor([1 - beta for beta in schedule.betas()], dtype=torch.float64).cumprod(0).repeat_interleave(4)
    expected = kept.sqrt()[:, None, None, None] * x + (1 - kept).sqrt()[:, None, None, None] * noise
    torch.testing.assert_close(example.z, expected, rtol=1e-9, atol=1e-9)
    labels = schedule.timestep(example.t)
    torch.testing.assert_close(labels, labels.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_levels", [1, 2, 3, 5, 7, 49, 1000, 1023, 1024])
def test_levels_and_grids_never_leave_their_ends(num_levels):
    """u from 0 to the last number before 1, whatever ⌊u·N⌋ rounds to."""
    u = torch.tensor([0.0, 2**-60, 1 - 2**-52, ALMOST_ONE], dtype=torch.float64)
    x, noise = images(4)
    table = learn(DenoisingObjective(LinearSchedule(num_levels)), x, noise, u)
    teacher = said_by(random_teacher(CosineSchedule()), CosineSchedule())
    grid = learn(distil(teacher, num_levels), x, noise, u)
    for t in (table.t, grid.t):
        assert t.tolist() == [1 / num_levels, 1 / num_levels, 1, 1]


def test_the_precision_of_images_is_kept_and_times_stay_in_float64():
    x, noise = (tensor.float() for tensor in images(len(UNIFORM)))
    for objective in (
        DenoisingObjective(CosineSchedule()),
        distil(said_by(gaussian(CosineSchedule(), 0.5), CosineSchedule()), 4),
    ):
        example = learn(objective, x, noise, UNIFORM)
        assert (example.z.dtype, example.t.dtype, example.x.dtype) == (torch.float32, torch.float64, torch.float32)


# Distillation


def said_by(answer, schedule):
    """A denoiser with a closed form, as a model that an objective takes: it keeps what it was asked."""

    class Model:
        def __init__(self) -> None:
            self.schedule, self.parameterisation = schedule, Vp("v")
            self.asked: list[tuple[torch.Tensor, torch.Tensor | None]] = []

        def __call__(self, z, t, told) -> Prediction:
            assert "guidance" not in told.tensors
            self.asked.append((t, told.tensors.get("classes")))
            return answer(z, t)

    return Model()


@every_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 4, 500])
def test_students_learn_at_every_level_of_their_grid_and_nowhere_else(schedule, num_steps):
    """Once in each N-th part of u: t = 1/N … 1, both ends included."""
    if schedule.num_levels == 1024 and num_steps == 500:
        num_steps = 512
    teacher = said_by(random_teacher(schedule), schedule)
    inside = torch.rand(num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = (torch.arange(num_steps) + inside) / num_steps
    x, noise = images(num_steps)
    example = learn(distil(teacher, num_steps), x, noise, u)
    assert example.t.tolist() == [(i + 1) / num_steps for i in range(num_steps)]
    assert example.t[-1] == 1
    angle = schedule.angle(example.t)
    expected = column(angle.cos(), x) * x + column(angle.sin(), x) * noise
    torch.testing.assert_close(example.z, expected, rtol=1e-12, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_target_is_where_two_steps_of_the_teacher_lead(schedule, num_steps):
    """Against `progressive_target`, and by its own meaning: with x* and the ε* of z, one DDIM step lands on z″."""
    answer, count = random_teacher(schedule), 3 * num_steps
    x, noise = images(count)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    example = learn(distil(said_by(answer, schedule), num_steps), x, noise, u)
    expected = progressive_target(answer, schedule, z=example.z, t=example.t, num_steps=num_steps)
    assert torch.equal(example.x, expected.x)

    def ratios(t):
        angle = schedule.angle(t) * (t > 1e-9)
        return column(angle.cos(), x), column(angle.sin(), x)

    z = example.z
    for start, end in ((0, 0.5), (0.5, 1)):
        said, (alpha, sigma) = answer(z, example.t - start / num_steps), ratios(example.t - end / num_steps)
        z = alpha * said.x + sigma * said.eps
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ratios(example.t), ratios(example.t - 1 / num_steps)
    student = alpha_s * example.x + sigma_s * (example.z - alpha_t * example.x) / sigma_t
    torch.testing.assert_close(student, z, rtol=1e-9, atol=1e-9)


def test_targets_are_not_the_images():
    x, noise = images(4)
    schedule = CosineSchedule()
    teacher = said_by(gaussian(schedule, 0.5), schedule)
    example = learn(distil(teacher, 4), x, noise, UNIFORM[:4])
    assert not torch.allclose(example.x, x, atol=0.1)


def test_the_teacher_is_told_the_classes():
    x, noise = images(4)
    classes = torch.tensor([3, 1, 0, 2])
    teacher = said_by(gaussian(CosineSchedule(), 0.5), CosineSchedule())
    learn(distil(teacher, 2), x, noise, UNIFORM[:4], classes)
    assert len(teacher.asked) == 2
    assert all(torch.equal(told, classes) for _, told in teacher.asked)


def network(seed: int, prediction: str = "v") -> Denoiser:
    """A real denoiser with random weights everywhere."""
    channels = 2 * PREDICTION_TYPES[prediction].channel_factor
    config = UNetConfig(2, channels, channels=4, embedding_channels=4, multipliers=(1,), attention_strides=())
    denoiser = Denoiser(UNet(config), CosineSchedule(), prediction)
    for i, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(0.3 * randn(*parameter.shape, seed=seed + i))
    return denoiser


@pytest.mark.parametrize("prediction", ["v", "x", "both"])
def test_the_teacher_gets_no_gradient_and_the_student_does(prediction):
    teacher, student = network(1, prediction), network(50, prediction)
    x, noise = (randn(3, 2, 4, 4, seed=seed, dtype=torch.float32) for seed in (7, 8))
    example = learn(distil(teacher, 4), x, noise, UNIFORM[:3])
    assert not example.x.requires_grad
    loss = weighted_loss(student(example.z, example.t), example, student.schedule, WEIGHTINGS["truncated_snr"])
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert loss > 0


# Losses

BY_HAND = {
    "constant": lambda _: 1.0,
    "snr": lambda snr: snr,
    "truncated_snr": lambda snr: max(snr, 1.0),
    "snr_plus_one": lambda snr: snr + 1,
    "min_snr": lambda snr: min(snr, 5.0),
}


@every_schedule
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_loss_is_the_weighted_mean_square_written_out(schedule, name):
    """(1/B) Σ_b w(α_b²/σ_b²) · (1/D) Σ_d (x − x̂)²: the weight stands outside the square, once."""
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    x, said = randn(*Z_SHAPE), randn(*Z_SHAPE, seed=1)
    nothing = torch.full_like(x, math.nan)
    loss = weighted_loss(Prediction(said, nothing, nothing), TrainTarget(nothing, t, x), schedule, WEIGHTINGS[name])
    expected = 0.0
    for k, angle in enumerate(schedule.angle(t).tolist()):
        squares = [(a - b) ** 2 for a, b in zip(x[k].flatten().tolist(), said[k].flatten().tolist(), strict=True)]
        expected += BY_HAND[name](math.cos(angle) ** 2 / math.sin(angle) ** 2) * sum(squares) / len(squares)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected / 3, rel=1e-10)


@every_schedule
@pytest.mark.parametrize(("name", "currency"), [("snr_plus_one", "v"), ("snr", "eps"), ("constant", "x")])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_weights_turn_the_x_error_into_the_error_of_v_and_eps(schedule, name, currency, prediction):
    """SNR + 1 is the plain mean square of v, SNR that of ε, whatever the network predicts."""
    t = torch.tensor([0.125, 0.5, 0.875], dtype=torch.float64)
    angle = schedule.angle(t)
    alpha, sigma = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
    x, eps = randn(*Z_SHAPE), randn(*Z_SHAPE, seed=1)
    z, b, c = alpha * x + sigma * eps, *Z_SHAPE[:2]
    output = randn(b, c * PREDICTION_TYPES[prediction].channel_factor, *Z_SHAPE[2:], seed=2)
    said = PREDICTION_TYPES[prediction].read(z, output, angle)
    truth = {"x": x, "eps": eps, "v": alpha * eps - sigma * x}[currency]
    loss = weighted_loss(said, TrainTarget(z, t, x), schedule, WEIGHTINGS[name])
    torch.testing.assert_close(loss, (truth - getattr(said, currency)).square().mean(), rtol=1e-9, atol=0)


def test_a_loss_of_low_precision_has_the_weight_of_high_precision():
    """The SNR is taken in float64: near t = 0, float32 angles would be several percent off."""
    t = torch.tensor([1e-3], dtype=torch.float64)
    x = torch.ones(1, 1, 2, 2)
    loss = weighted_loss(Prediction(0 * x, x, x), TrainTarget(x, t, x), CosineSchedule(), WEIGHTINGS["snr"])
    low, high = math.atan(math.exp(-10)), math.atan(math.exp(10))
    angle = low + 1e-3 * (high - low)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 / math.tan(angle) ** 2, rel=1e-6)


def test_the_gradient_is_that_of_the_weighted_square():
    """∂/∂x̂ = 2 w (x̂ − x)/(B·D)."""
    t = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)
    x, said = randn(*Z_SHAPE), randn(*Z_SHAPE, seed=1).requires_grad_()
    schedule = CosineSchedule()
    weighted_loss(Prediction(said, x, x), TrainTarget(x, t, x), schedule, WEIGHTINGS["truncated_snr"]).backward()
    snr = column(schedule.angle(t), x).tan() ** -2
    torch.testing.assert_close(said.grad, 2 * snr.clamp(min=1) * (said.detach() - x) / x.numel(), rtol=1e-9, atol=0)


def test_every_weighting_is_written_out_here():
    assert set(BY_HAND) == set(WEIGHTINGS)


# Times


@pytest.mark.parametrize("size", [1, 2, 3, 7, 128, 2048])
def test_stratified_numbers_lie_one_in_each_part(size):
    u = stratified(size)
    assert u.shape == (size,)
    assert u.dtype == torch.float64
    assert (u * size).floor().tolist() == list(range(size))


def test_stratified_numbers_are_uniform_and_follow_the_generator():
    torch.manual_seed(3)
    first = torch.cat([stratified(8) for _ in range(2000)])
    torch.manual_seed(3)
    assert torch.equal(torch.cat([stratified(8) for _ in range(2000)]), first)
    sorted_, n = first.sort().values, len(first)
    distance = (sorted_ - torch.arange(n) / n).abs().max().item()  # Kolmogorov and Smirnov
    assert distance < 1.95 / math.sqrt(n)
    inside = (first * 8) % 1
    assert inside.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / n))
    assert inside.var().item() == pytest.approx(1 / 12, rel=0.05)
