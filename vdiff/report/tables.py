"""The page's tables, as texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdiff.evaluation.results import Metric
from vdiff.report.figures import figure, milliseconds_text, seconds_text, whole
from vdiff.report.measured import PLAIN, Measured, finite, in_fewer_steps, milliseconds, teacher_steps, time_curve
from vdiff.report.plots import Point
from vdiff.report.run import LadderRun
from vdiff.reporting import DOUBTFUL
from vdiff.text import plural

EFFORT = ("num_iters", "num_images", "train_seconds")


@dataclass(frozen=True)
class Table:
    """Column heads, rows of as many cells, and a last line or none."""

    heads: tuple[str, ...]
    rows: list[list[str]]
    foot: tuple[str, ...] = ()


def models(ladder: LadderRun, found: Measured) -> list[dict[str, Any]]:
    """What is known of each model, as plain values that JSON can say; None for what is not.

    The first teacher has one more entry where it taught with fewer steps than its own (`is_again`).
    """
    first, began = ladder.first, teacher_steps(ladder)
    entries = [(first, first.steps, False), *((model, model.steps, False) for model in ladder.students)]
    if began != first.steps:
        entries.insert(1, (first, began, True))
    lines, times = {(line.name, line.steps): line for line in ladder.compared}, milliseconds(ladder)
    told = []
    for model, steps, is_again in entries:
        line = lines.get((model.name, steps))
        error = None if is_again or in_fewer_steps(model) else finite(model.verdict.get("rmse"))
        point = _teacher_at(found, steps) if model is first else found.students.get(model.key)
        told.append(
            {
                "name": model.name,
                "method": str(model.description.get("method", "")),
                "kept_start": model.description.get("kept_start") is True,
                "steps": steps,
                "is_again": is_again,
                **{key: model.number(key) for key in EFFORT},
                "ms_per_image": times.get((model.name, steps)),
                "rmse_to_teacher": error if error is not None or line is None else line.rmse_to_teacher,
                "rmse_to_first": line.rmse_to_first if line else None,
                "distance": point.y if point else None,
                "distance_low": point.low if point else None,
                "distance_high": point.high if point else None,
            }
        )
    return told


def stages(ladder: LadderRun, found: Measured) -> Table:
    """A line for each model, as `models` tells of them."""
    rows = []
    for each in models(ladder, found):
        name, method, effort = each["name"], each["method"], [*map(whole, (each["num_iters"], each["num_images"]))]
        effort.append(seconds_text(each["train_seconds"]))
        if each["kept_start"]:
            method += ", kept start"
        if each["is_again"]:
            method, effort = "in fewer steps", ["", "", ""]
        errors = [each["rmse_to_teacher"], each["rmse_to_first"]]
        rows.append(
            [
                *(name, method, whole(each["steps"]), *effort),
                *("" if error is None else figure(error) for error in errors),
                "" if each["distance"] is None else figure(each["distance"]),
            ]
        )
    sums = [sum(model.number(key) for model in ladder.models) for key in EFFORT]
    foot = ("all", "", "", whole(sums[0]), whole(sums[1]), seconds_text(sums[2]), "", "", "")
    heads = ("model", "method", "steps", "updates", "images seen", "time", "RMSE to teacher", "RMSE to first")
    return Table((*heads, "distance"), rows, foot)


def _teacher_at(found: Measured, steps: int) -> Point | None:
    plain = [point for curve in found.samplers if curve.label == f"teacher, {PLAIN}" for point in curve.points]
    return next((point for point in [*plain, *([found.teacher] if found.teacher else [])] if point.x == steps), None)


def distances(found: Measured) -> Table:
    """A line for each number of evaluations, a column for each curve."""
    rows = []
    for x in sorted({point.x for curve in found.curves for point in curve.points}):
        cells = [next((point for point in curve.points if point.x == x), None) for curve in found.curves]
        rows.append([figure(x), *(_bounded(point) if point else "" for point in cells)])
    return Table(("evaluations", *(curve.label for curve in found.curves)), rows)


def times(ladder: LadderRun) -> Table:
    """Milliseconds an image by steps."""
    rows = [[whole(point.x), milliseconds_text(point.y)] for point in time_curve(ladder).points]
    return Table(("steps", "an image"), rows)


def evaluation(ladder: LadderRun) -> Table:
    """Every row of the evaluation as it was measured."""
    rows = ladder.evaluation.rows if ladder.evaluation else ()
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    heads = ("model", "weights", "sampler", "grid", "steps", "evaluations", "n", "seed", "ms/image", *metrics)
    told = []
    for row in rows:
        own = [Path(row.checkpoint).name, row.weights, row.sampler, row.grid, whole(row.num_steps)]
        own += [figure(row.evaluations), whole(row.n), str(row.seed)]
        own.append(figure(row.ms_per_image) + DOUBTFUL * row.is_time_doubtful)
        told.append([*own, *(_bounded(row.metrics.get(name)) for name in metrics)])
    return Table(heads, told)


def nearest(ladder: LadderRun) -> Table:
    """How near samples of each model, in its own steps, and of the teacher in the most that were measured, come."""
    students = {model.key for model in ladder.students}
    every = ladder.evaluation.rows if ladder.evaluation else ()
    rows = [row for row in every if "nearest" in row.metrics and row.sampler == PLAIN]
    of_teacher = [row for row in rows if row.checkpoint_fingerprint == ladder.first.fingerprint]
    chosen = sorted(of_teacher, key=lambda row: row.num_steps)[-1:]
    chosen += [row for row in rows if (row.checkpoint_fingerprint, row.num_steps) in students]
    told = []
    for row in chosen:
        label = f"{Path(row.checkpoint).name}, {plural(row.num_steps, 'step')}"
        told.append([label, *(_bounded(row.metrics.get(name)) for name in ("nearest", "nearest_data", "closest"))])
    return Table(("samples of", "median to the data", "the same of the data", "the nearest sample"), told)


def _bounded(metric: Metric | Point | None) -> str:
    """`0.36 (0.35 to 0.37)`; empty where there is none."""
    if metric is None:
        return ""
    return _told(metric.y if isinstance(metric, Point) else metric.value, metric.low, metric.high)


def _told(value: float | None, low: float | None, high: float | None) -> str:
    bounds = "" if low is None else f" ({figure(low)} to {figure(high)})"
    return "" if value is None else f"{figure(value)}{bounds}"
