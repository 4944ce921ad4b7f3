"""Distances to the data and times, for the models of one ladder, from its evaluation or from its verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from vdiff.evaluation.results import EvalRow, Evaluation, Metric
from vdiff.report.plots import Curve, Point
from vdiff.report.run import LadderRun, Model

DISTANCES = {
    "fid": "FID",
    "fd": "Fréchet distance",
    "kid": "KID",
    "kd": "Kernel distance",
}
"""Metrics that say how far samples are from the data, the one to be shown first."""
PLAIN = "ddim"
NO_CURVE = Curve("students", ())


@dataclass(frozen=True)
class Measured:
    """How far the models of a ladder are from the data.

    Attributes:
        name: of the distance, with the features that it compares.
        basis: n and the like, in words.
        students: by the fingerprint of their weights and their steps.
        student_curve: the same over the evaluations an image.
        samplers: each of the training-free samplers on the first teacher, over the evaluations an image.
        teacher: the first teacher in the most steps that it was measured in.
        left_out: how many rows of the evaluation are of models that are not of this ladder.
    """

    name: str = ""
    basis: str = ""
    students: dict[tuple[str, int], Point] = field(default_factory=dict)
    student_curve: Curve = NO_CURVE
    samplers: tuple[Curve, ...] = ()
    teacher: Point | None = None
    left_out: int = 0

    @property
    def curves(self) -> list[Curve]:
        """All that have points, the students first."""
        return [curve for curve in (self.student_curve, *self.samplers) if curve.points]


def measured(ladder: LadderRun) -> Measured:
    """The distances that are known: by the evaluation, else by the verdicts on the students."""
    found = _evaluated(ladder, ladder.evaluation) if ladder.evaluation else None
    return found or _judged(ladder)


def _evaluated(ladder: LadderRun, evaluation: Evaluation) -> Measured | None:
    """What the evaluation tells of this ladder; None where it tells no distance."""
    known = {model.fingerprint for model in ladder.models}
    rows = [row for row in evaluation.rows if row.checkpoint_fingerprint in known]
    metric = next((name for name in DISTANCES if any(_value(row, name) for row in rows)), None)
    if metric is None:
        return None
    rows = [row for row in rows if _value(row, metric)]
    students: dict[tuple[str, int], Point] = {}
    for model in ladder.students:
        own = [row for row in rows if (row.checkpoint_fingerprint, row.num_steps) == model.key]
        if own:
            students[model.key] = _point(next((row for row in own if row.sampler == PLAIN), own[0]), metric)
    of_teacher = [row for row in rows if row.checkpoint_fingerprint == ladder.first.fingerprint]
    samplers: dict[str, list[Point]] = {}
    for row in of_teacher:
        name = row.sampler if row.grid in ("", "uniform") else f"{row.sampler}, {row.grid}"
        samplers.setdefault(name, []).append(_point(row, metric))
    curves = [Curve(f"teacher, {name}", _ordered(points)) for name, points in samplers.items()]
    return Measured(
        name=f"{DISTANCES[metric]} on {evaluation.features}" if metric in ("fd", "kd") else DISTANCES[metric],
        basis=basis(rows, evaluation),
        students=students,
        student_curve=Curve("students", _ordered(students.values())),
        samplers=tuple(sorted(curves, key=lambda curve: (curve.label != f"teacher, {PLAIN}", curve.label))),
        teacher=max((_point(row, metric) for row in of_teacher), key=lambda point: point.x, default=None),
        left_out=sum(row.checkpoint_fingerprint not in known for row in evaluation.rows),
    )


def basis(rows: Iterable[EvalRow], evaluation: Evaluation) -> str:
    """`n = 2,000 samples each against 1,797 images of data/digits_8, 95 % intervals`."""
    rows = list(rows)
    counts = sorted({row.n for row in rows})
    number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    bounds = any(metric.low is not None for row in rows for metric in row.metrics.values())
    intervals = "; bars are 95 % intervals" if bounds else ""
    reference = evaluation.reference
    part = "" if reference.split in ("", "all") else f", part {reference.split}"
    return f"{number} samples each against {reference.num_images:,} images of {reference.name}{part}{intervals}"


def _judged(ladder: LadderRun) -> Measured:
    """The distances of the verdicts: few images, and no other sampler."""
    students: dict[tuple[str, int], Point] = {}
    teacher, counts = None, set()
    for model in ladder.students:
        own = finite(model.verdict.get("distance"))
        if own is None or in_fewer_steps(model):
            continue
        students[model.key] = Point(model.steps, own)
        counts.add(int(finite(model.verdict.get("num_images")) or 0))
    first = ladder.students[0] if ladder.students else None
    if (
        first is not None
        and not in_fewer_steps(first)
        and (far := finite(first.verdict.get("teacher_distance"))) is not None
    ):
        teacher = Point(teacher_steps(ladder), far)
    if not students and teacher is None:
        return Measured()
    return Measured(
        name="Fréchet distance on pixels",
        basis=f"{max(counts, default=0):,} samples each, as the ladder examined its students",
        students=students,
        student_curve=Curve("students", _ordered(students.values())),
        teacher=teacher,
    )


def teacher_steps(ladder: LadderRun) -> int:
    """The steps in which the first teacher taught: its own, or those that the ladder began with."""
    mine = [line.steps for line in ladder.compared if line.name == ladder.first.name]
    return mine[-1] if mine else ladder.first.steps


def milliseconds(ladder: LadderRun) -> dict[tuple[str, int], float]:
    """Milliseconds an image by the name of a model and its steps: as compared, else as evaluated."""
    times: dict[tuple[str, int], float] = {}
    if ladder.evaluation:
        rows = [row for row in ladder.evaluation.rows if row.sampler == PLAIN]
        for model in ladder.models:
            own = [row for row in rows if row.checkpoint_fingerprint == model.fingerprint]
            times |= {(model.name, row.num_steps): row.ms_per_image for row in own}
    compared = {(line.name, line.steps): line.ms_per_image for line in ladder.compared}
    return times | {key: ms for key, ms in compared.items() if ms is not None}


def time_curve(ladder: LadderRun) -> Curve:
    """Milliseconds an image over the steps: the models of the ladder, each in its own."""
    own = {(model.name, model.steps) for model in ladder.models} | {(ladder.first.name, teacher_steps(ladder))}
    times = {steps: ms for (name, steps), ms in milliseconds(ladder).items() if (name, steps) in own and ms > 0}
    return Curve("an image", tuple(Point(steps, times[steps]) for steps in sorted(times)))


def finite(value: object) -> float | None:
    """A number that a file tells, where it is one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]


def in_fewer_steps(model: Model) -> bool:
    """Whether a student was examined in fewer steps than its own, as its training was short."""
    return (finite(model.verdict.get("every")) or 1) > 1


def attempts(model: Model) -> int:
    """How often the stage of a student was done."""
    return int(finite(model.verdict.get("attempts")) or 1)


def _value(row: EvalRow, metric: str) -> Metric | None:
    found = row.metrics.get(metric)
    return found if found is not None and math.isfinite(found.value) else None


def _point(row: EvalRow, metric: str) -> Point:
    found = row.metrics[metric]
    return Point(row.evaluations, found.value, found.low, found.high)


def _ordered(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda point: point.x))
