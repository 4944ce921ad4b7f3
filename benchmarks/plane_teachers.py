"""Teachers of points of the plane and their students, each within its budget, see `toy2d`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.plane import MlpsConfig, learn, new_denoiser
from vdiff.diffusion.distillation import METHODS
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.training.config import DistillConfig, TrainConfig, resolve
from vdiff.training.objectives import DenoisingObjective, DistillationObjective
from vdiff.training.stages import Stage

TEACHER_STEPS = 64
PARTS = {8: 3, 4: 4, 2: 6, 1: 8}
GUIDED_PARTS = 4
STUDENT_LR, TEACHER_LR = 1e-3, 2e-3


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        seeds: networks for each data set.
        batch_size: points in an update of a student, for each network.
        teacher: updates of a teacher, of `teacher_batch_size` points.
        part: updates of a part of a student's budget.
        points: samples of each network that are compared, over `directions` directions.
    """

    seeds: int = 3
    batch_size: int = 64
    teacher_batch_size: int = 256
    teacher: int = 6000
    part: int = 150
    points: int = 4096
    directions: int = 64


def settings_of(method: str, changes: Mapping[str, Any], scale: Scale) -> DistillConfig:
    """The settings of distill.py for a method, all with the same learning rate, then `changes`."""
    same = {"lr": STUDENT_LR, "num_iters": 1000}
    values = {**METHODS[method].settings(same), **same, **changes}
    return resolve(DistillConfig, {"a benchmark": {"batch_size": scale.batch_size, "method": method, **values}})


def stages_of(config: DistillConfig, steps: int, updates: int) -> list[tuple[int, int, int]]:
    """(teacher's steps, student's steps, updates) of each stage on the way to `steps`, `updates` in all."""
    students = config.build_method().plan(TEACHER_STEPS, steps)
    stages = list(zip([TEACHER_STEPS, *students], students, strict=False))
    shares = [Stage(Path(), before, Path(), after, config.method).updates(config) for before, after in stages]
    return [(*stage, round(updates * share / sum(shares))) for stage, share in zip(stages, shares, strict=True)]


@dataclass
class TeacherPool:
    """A teacher for each data set and seed, and the students that learn from it; each stage is trained once.

    Attributes:
        students: settings and stages → the students, and the rows through networks that they and their teachers took.
    """

    teacher: Denoiser
    data: Sequence[str]
    scale: Scale
    students: dict[tuple[Any, ...], tuple[Denoiser, int]] = field(default_factory=dict)

    def student(self, config: DistillConfig, steps: int) -> tuple[Denoiser, int]:
        """The students of `steps` steps within their budget, and what one of them took."""
        student, rows = self.learned(config, stages_of(config, steps, PARTS[steps] * self.scale.part))
        return student, rows // self.teacher.network.config.count

    def learned(self, config: DistillConfig, stages: list[tuple[int, int, int]]) -> tuple[Denoiser, int]:
        """The students after the last of `stages`."""
        if not stages:
            return self.teacher, 0
        key = (repr(config), *stages)
        if key not in self.students:
            teacher, spent = self.learned(config, stages[:-1])
            before, after, updates = stages[-1]
            method = config.build_method()
            objective = DistillationObjective(teacher, method, num_steps=after, teacher_steps=before)
            pupil, tally = new_denoiser(teacher.network.config, teacher), teacher.network.tally
            spent -= tally.rows
            pupil = learn(pupil, objective, replace(config, num_iters=updates), self.data, after, method.self_ema)
            self.students[key] = pupil, spent + tally.rows
        return self.students[key]


def open_pool(data: Sequence[str], scale: Scale, *, num_classes: int = 0) -> TeacherPool:
    """Teachers of all times, trained on the data."""
    torch.manual_seed(0)
    teacher = new_denoiser(MlpsConfig(len(data) * scale.seeds, num_classes=num_classes))
    config = TrainConfig(
        num_iters=scale.teacher, batch_size=scale.teacher_batch_size, lr=TEACHER_LR, lr_schedule="cosine", ema=0.0
    )
    return TeacherPool(learn(teacher, DenoisingObjective(teacher.schedule), config, data, 0), data, scale)


def guided_pool(pool: TeacherPool) -> TeacherPool:
    """A pool whose teachers take guidance as an input, as they learned from those of another, told classes."""
    first = pool.teacher
    config = settings_of("guided", {}, pool.scale)
    config = replace(config, num_iters=GUIDED_PARTS * pool.scale.part)
    method = config.build_method("guided")
    objective = DistillationObjective(
        GuidedDenoiser(first), method, num_steps=TEACHER_STEPS, teacher_steps=TEACHER_STEPS
    )
    pupil = new_denoiser(replace(first.network.config, guidance_input=True), first)
    return TeacherPool(learn(pupil, objective, config, pool.data, 0), pool.data, pool.scale)
