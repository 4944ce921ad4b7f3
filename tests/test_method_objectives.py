"""Whom a distillation objective asks, about which classes and weights of guidance; and the losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.oracles import column, condition, gaussian, randn
from tests.written_out import (
    EXACT,
    closed_form,
    middles,
    walk,
)
from vdiff.diffusion.distillation import METHODS, Consistency, DistillContext, Guided, Match, TrainTarget, Trajectory
from vdiff.diffusion.parameterisation import Vp
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.diffusion.weighting import HUBER, LOSSES
from vdiff.models.condition import Condition
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training.objectives import DistillationObjective, StudentState, TrainBatch, bind_condition


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


def draws(count: int = 8, guidance: Tensor | None = None) -> TrainBatch:
    x, noise = randn(count, 2, 4, 4, seed=5).tanh(), randn(count, 2, 4, 4, seed=6)
    return TrainBatch(x, noise, middles(count), condition(CLASSES[:count], guidance))


def taught(
    method, teacher, student=None, given: TrainBatch | None = None, *, num_steps: int = 4, **more
) -> TrainTarget:
    student = student or network(90)
    objective = DistillationObjective(teacher, method, num_steps, 2 * num_steps, **more)
    return objective(given or draws(), StudentState(student, student, 1.0))


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
        told_class, none = (
            teacher(found.z, found.t, condition(classes)).x for classes in (CLASSES, torch.full((8,), 3))
        )
    w = column(weights, found.x)
    torch.testing.assert_close(found.x, (1 + w) * told_class - w * none, rtol=1e-10, atol=1e-10)
    assert (told_class - none)[:3].abs().max() > 0.01


class Classed:
    """The perfect denoiser of data whose spread depends on the class, that keeps what it was asked."""

    schedule, parameterisation, training = CosineSchedule(), Vp("v"), False

    def __init__(self, spreads: tuple[float, ...]) -> None:
        self.spreads, self.asked = spreads, []

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def __call__(self, z: Tensor, t: Tensor, told: Condition) -> Prediction:
        classes = told.tensors["classes"]
        self.asked.append((classes.tolist(), told.tensors["guidance"].tolist()))
        parts = [gaussian(self.schedule, self.spreads[k]) for k in classes.tolist()]
        said = [part(z[b][None], t[b][None]) for b, part in enumerate(parts)]
        return Prediction(*(torch.cat([getattr(each, name) for each in said]) for name in ("x", "eps", "v")))


def test_paths_are_of_the_classes_of_their_rows():
    """Teacher and student are asked about the classes and weights of the noise that a path begins with."""
    teacher, student = Classed((0.2, 0.5, 0.9, 1.2)), Classed((0.3, 0.6, 1.1, 1.4))
    weights = torch.arange(8.0)
    given = draws(guidance=weights)
    found = DistillationObjective(teacher, Trajectory(12, "ddim"), 3, 12)(given, StudentState(student, student, 0.0))
    assert found.rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert teacher.asked == [([2, 0, 1], [0.0, 1, 2])] * 12
    assert student.asked == [([2, 0, 1], [0.0, 1, 2])] * 2
    told_rows = given[found.rows].condition.tensors
    assert told_rows["classes"].tolist() == [2, 2, 2, 0, 0, 0, 1, 1]
    assert told_rows["guidance"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
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
    found = DistillationObjective(teacher, METHODS[name](), 2, 4)(given, StudentState(student, average, 0.0))
    assert found.rows is None
    for each in kinds:
        assert all(asked == (CLASSES.tolist(), list(range(8))) for asked in each.asked)
    asked = {"progressive": (2, 0, 0), "tract": (1, 0, 1), "consistency": (1, 1, 0)}.get(name, (1, 0, 0))
    assert tuple(len(each.asked) for each in kinds) == asked


def test_what_an_objective_tells_its_method():
    lessons = []

    def method(lesson: DistillContext, _: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        lessons.append((lesson, torch.is_grad_enabled(), student.training))
        z, t = randn(2, 2, 4, 4, seed=9), torch.full((2,), 0.5, dtype=torch.float64)
        return TrainTarget(
            noise, u, torch.cat([getattr(lesson, who)(z, t).x for who in ("teacher", "student", "average")])
        )

    teacher, student, average = network(1).eval(), network(60, dropout=0.5), network(120).eval()
    given, pupil = draws(), StudentState(student.train(), average, 0.25)
    found = DistillationObjective(teacher, method, 4, 32, 16)(given, pupil)
    ((told_lesson, with_grad, was_training),) = lessons
    assert (told_lesson.num_steps, told_lesson.teacher_steps, told_lesson.levels) == (4, 32, 16)
    assert (told_lesson.progress, told_lesson.predicts_noise, told_lesson.schedule) == (0.25, False, teacher.schedule)
    assert (with_grad, was_training, student.training) == (False, False, True)
    assert not found.x.requires_grad
    z, t = randn(2, 2, 4, 4, seed=9), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        said = [each.eval()(z, t, condition(CLASSES[:2])).x for each in (teacher, student, average)]
    torch.testing.assert_close(found.x, torch.cat(said), rtol=0, atol=0)
    teacher.parameterisation = Vp("eps")
    DistillationObjective(teacher, method, 4, 32)(given, pupil)
    assert lessons[-1][0].predicts_noise
    assert lessons[-1][0].levels is None


@pytest.mark.parametrize("mode", [True, False])
def test_a_student_is_left_in_the_mode_that_it_was_in(mode):
    student = network(1).train(mode)

    def fail(*_: object) -> TrainTarget:
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
    asked = bind_condition(teacher, draws().condition, torch.inference_mode)(z, t).x
    mine = bind_condition(student, draws().condition)(z, t).x
    assert asked.is_inference()
    assert not mine.is_inference()
    assert not mine.requires_grad
    torch.testing.assert_close(mine, student(z, t, condition(CLASSES[:3])).x.detach(), rtol=0, atol=0)


def test_draws_are_cut_row_by_row():
    given = draws(guidance=torch.arange(8.0))
    rows = torch.tensor([3, 3, 0])
    for cut, index in ((given[2:4], [2, 3]), (given[rows], [3, 3, 0])):
        for name in ("images", "noise", "u"):
            assert torch.equal(getattr(cut, name), getattr(given, name)[index])
        for name, tensor in given.condition.tensors.items():
            assert torch.equal(cut.condition.tensors[name], tensor[index])
    bare = TrainBatch(given.images, given.noise, given.u)[1:]
    assert (dict(bare.condition.tensors), len(bare.u)) == ({}, 7)


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
    assert set(expected) == set(LOSSES)
    assert c == HUBER
    for name, values in expected.items():
        assert LOSSES[name](error).tolist() == pytest.approx(values, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_without_errors_has_finite_gradients(name):
    error = torch.zeros(2, 1, 2, 2, requires_grad=True)
    LOSSES[name](error).sum().backward()
    assert torch.equal(error.grad, torch.zeros_like(error))
