"""The formulas of the methods written out, and closed forms, for tests.

Nothing here uses angles' differences or v, in which the methods are written: a DDIM step is z_s = α_s x̂ + σ_s ε̂, and
the target is x* = (z_s − (σ_s/σ_t) z)/(α_s − (σ_s/σ_t) α_t).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.oracles import column, randn
from vdiff.diffusion.distillation import DistillContext
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import CosineSchedule, LinearSchedule, Schedule

Answer = Callable[[Tensor, Tensor], Prediction]
SCHEDULES: dict[str, Schedule] = {"cosine": CosineSchedule(), "linear": LinearSchedule(240)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
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


def lesson(schedule: Schedule, teacher: Answer, num_steps: int, fine: int, **more) -> DistillContext:
    """A lesson in which nobody but the teacher may be asked, unless they are given."""
    given = {"student": nobody, "average": nobody, "levels": None, **more}
    return DistillContext(teacher, schedule, num_steps, fine, **given)


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
