"""The contents of a report: distances and times, tables, sentences, and the commands that reproduce the ladder."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vdiff.data.datasets import open_dataset
from vdiff.errors import VdiffError, shell
from vdiff.evaluation.results import ARTICLES, NOT_TRAINED, EvalRow, Evaluation, Metric, Quality, Scale, read_quality
from vdiff.models.codec import CODECS, LATENTS, PIXEL_CODEC
from vdiff.models.kinds import TEXT
from vdiff.projects import CHECKPOINTS
from vdiff.records import RUN_FILE, WEB_PAGE, record_of
from vdiff.report.formatting import bounded, figure, milliseconds_text, seconds_text, times_text, whole
from vdiff.report.ladder import PLAIN, LadderModel, LadderRun
from vdiff.report.plots import Curve, Point
from vdiff.reporting import DOUBTFUL
from vdiff.text import plural

DISTANCES = {"fid": "FID", "fd": "Fréchet distance", "kid": "KID", "kd": "Kernel distance"}
"""Metrics for the distance of samples to the data, the preferred one first."""
EFFORT = ("num_iters", "num_images", "train_seconds")
AGAIN = "again"
OF_TEACHER = f"teacher, {PLAIN}"
AS_SAID = {word: f"is {word}" for word in (NOT_TRAINED, "usable", "good")} | {"memorises": "memorises its data"}
"""The words of `Quality` in a sentence."""
NO_CURVE = Curve("students", ())


# Distances and times


@dataclass(frozen=True)
class Distances:
    """The distances of a ladder's models to the data.

    Attributes:
        name: of the distance, with its features.
        basis: the numbers of samples and images, as text.
        students: by the fingerprint of their weights and their steps.
        student_curve: the same, over the evaluations per image.
        samplers: each training-free sampler on the first teacher, over the evaluations per image.
        teacher: the first teacher, in the most steps that were measured.
        left_out: number of rows of the evaluation with models outside this ladder.
        scale: the scale of these distances; None if they have none.
    """

    name: str = ""
    basis: str = ""
    students: dict[tuple[str, int], Point] = field(default_factory=dict)
    student_curve: Curve = NO_CURVE
    samplers: tuple[Curve, ...] = ()
    teacher: Point | None = None
    left_out: int = 0
    scale: Scale | None = None

    @property
    def curves(self) -> list[Curve]:
        """All curves with points, the students first."""
        return [curve for curve in (self.student_curve, *self.samplers) if curve.points]

    def teacher_at(self, steps: int) -> Point | None:
        """The teacher's distance with ddim in a number of steps."""
        points = [point for curve in self.samplers if curve.label == OF_TEACHER for point in curve.points]
        return next((p for p in [*points, *([self.teacher] if self.teacher else [])] if p.x == steps), None)


def distances_of(ladder: LadderRun) -> Distances:
    """The known distances: from the evaluation, else from the verdicts on the students."""
    found = _from_evaluation(ladder, ladder.evaluation) if ladder.evaluation else None
    return found or _from_verdicts(ladder)


def _from_evaluation(ladder: LadderRun, evaluation: Evaluation) -> Distances | None:
    """The distances in an evaluation; None if it has none of this ladder."""
    known = {model.fingerprint for model in ladder.models}
    rows = [row for row in evaluation.rows if row.checkpoint_fingerprint in known]
    metric = next((name for name in DISTANCES if any(_is_finite(row, name) for row in rows)), None)
    if metric is None:
        return None

    def point(row: EvalRow) -> Point:
        found = row.metrics[metric]
        return Point(row.evaluations, found.value, found.low, found.high)

    rows = [row for row in rows if _is_finite(row, metric)]
    students: dict[tuple[str, int], Point] = {}
    for model in ladder.students:
        own = [row for row in rows if (row.checkpoint_fingerprint, row.num_steps) == model.key]
        if own:
            students[model.key] = point(next((row for row in own if row.sampler == PLAIN), own[0]))
    of_teacher = [row for row in rows if row.checkpoint_fingerprint == ladder.first.fingerprint]
    samplers: dict[str, list[Point]] = {}
    for row in of_teacher:
        name = row.sampler if row.grid in ("", "uniform") else f"{row.sampler}, {row.grid}"
        samplers.setdefault(name, []).append(point(row))
    curves = [Curve(f"teacher, {name}", _ordered(points)) for name, points in samplers.items()]
    return Distances(
        name=f"{DISTANCES[metric]} on {evaluation.features}" if metric in ("fd", "kd") else DISTANCES[metric],
        basis=_basis(rows, evaluation),
        students=students,
        student_curve=Curve("students", _ordered(students.values())),
        samplers=tuple(sorted(curves, key=lambda curve: (curve.label != OF_TEACHER, curve.label))),
        teacher=max(map(point, of_teacher), key=lambda point: point.x, default=None),
        left_out=sum(row.checkpoint_fingerprint not in known for row in evaluation.rows),
        scale=evaluation.scale if metric == "fd" else None,
    )


def _basis(rows: list[EvalRow], evaluation: Evaluation) -> str:
    """`2,000 samples each against 1,797 images of data/digits_8; bars are 95 % intervals`."""
    counts = sorted({row.n for row in rows})
    number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    bounds = any(metric.low is not None for row in rows for metric in row.metrics.values())
    intervals = "; bars are 95 % intervals" if bounds else ""
    reference = evaluation.reference
    part = "" if reference.split in ("", "all") else f", part {reference.split}"
    return (
        f"{number} samples each against {reference.num_images:,} {reference.noun}s of {reference.name}{part}{intervals}"
    )


def _from_verdicts(ladder: LadderRun) -> Distances:
    """The distances in the verdicts, from few images and without other samplers."""
    students: dict[tuple[str, int], Point] = {}
    teacher, counts = None, [0]
    for model in ladder.students:
        own = finite(model.verdict.get("distance"))
        if own is not None and not in_fewer_steps(model):
            students[model.key] = Point(model.steps, own)
            counts.append(int(finite(model.verdict.get("num_images")) or 0))
    for model in ladder.students[:1]:
        far = finite(model.verdict.get("teacher_distance"))
        if far is not None and not in_fewer_steps(model):
            teacher = Point(ladder.teacher_steps, far)
    if not students and teacher is None:
        return Distances()
    return Distances(
        name=f"Fréchet distance on {'log_mel' if noun_of(ladder) == 'sound' else 'pixels'}",
        basis=f"{max(counts):,} samples each, from the checks of the students",
        students=students,
        student_curve=Curve("students", _ordered(students.values())),
        teacher=teacher,
        scale=_scale(ladder.last.verdict.get("scale")) if ladder.last.key in students else None,
    )


def _scale(values: object) -> Scale | None:
    """The scale in a verdict; None if the verdict has none."""
    with contextlib.suppress(VdiffError):
        found = record_of(Scale, values, "", "")
        return found if all(finite(getattr(found, each.name)) is not None for each in fields(Scale)[:4]) else None
    return None


def milliseconds(ladder: LadderRun) -> dict[tuple[str, int], float]:
    """Milliseconds per image, by a model's name and steps: from the comparison, else from the evaluation."""
    rows = [row for row in ladder.evaluation.rows if row.sampler == PLAIN] if ladder.evaluation else []
    times = {
        (model.name, row.num_steps): row.ms_per_image
        for model in ladder.models
        for row in rows
        if row.checkpoint_fingerprint == model.fingerprint
    }
    return times | {line.key: line.ms_per_image for line in ladder.compared if line.ms_per_image is not None}


def time_curve(ladder: LadderRun) -> Curve:
    """Milliseconds per image over the steps: each model of the ladder in its own steps."""
    own = {(model.name, model.steps) for model in ladder.models} | {(ladder.first.name, ladder.teacher_steps)}
    times = {steps: ms for (name, steps), ms in milliseconds(ladder).items() if (name, steps) in own and ms > 0}
    return Curve(f"per {noun_of(ladder)}", tuple(Point(steps, times[steps]) for steps in sorted(times)))


def finite(value: object) -> float | None:
    """The number if it is finite, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]


def in_fewer_steps(model: LadderModel) -> bool:
    """Whether a student was checked in fewer steps than its own, because its training was short."""
    return (finite(model.verdict.get("every")) or 1) > 1


def _is_finite(row: EvalRow, metric: str) -> bool:
    return metric in row.metrics and math.isfinite(row.metrics[metric].value)


def _ordered(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda point: point.x))


# Tables


@dataclass(frozen=True)
class Table:
    """Column heads, rows of as many cells, and an optional last line."""

    heads: tuple[str, ...]
    rows: list[list[str]]
    foot: tuple[str, ...] = ()


def models(ladder: LadderRun, found: Distances) -> list[dict[str, Any]]:
    """Everything known about each model, as plain values for JSON; None for unknown values.

    The first teacher has a second entry if it taught with fewer steps than its own (`is_again`).
    """
    first, began = ladder.first, ladder.teacher_steps
    entries = [(first, first.steps, False), *((model, model.steps, False) for model in ladder.students)]
    if began != first.steps:
        entries.insert(1, (first, began, True))
    lines, times = {line.key: line for line in ladder.compared}, milliseconds(ladder)
    result = []
    for model, steps, is_again in entries:
        line = lines.get((model.name, steps))
        error = None if is_again or in_fewer_steps(model) else finite(model.verdict.get("rmse"))
        point = found.teacher_at(steps) if model is first else found.students.get(model.key)
        result.append(
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
    return result


def stage_table(ladder: LadderRun, found: Distances) -> Table:
    """A row for each entry of `models`."""
    rows = []
    for each in models(ladder, found):
        method = each["method"] + ", kept start" * each["kept_start"]
        effort = [whole(each["num_iters"]), whole(each["num_images"]), seconds_text(each["train_seconds"])]
        if each["is_again"]:
            method, effort = "in fewer steps", ["", "", ""]
        numbers = [each["rmse_to_teacher"], each["rmse_to_first"], each["distance"]]
        shown = ["" if number is None else figure(number) for number in numbers]
        rows.append([each["name"], method, whole(each["steps"]), *effort, *shown])
    sums = [sum(model.number(key) for model in ladder.models) for key in EFFORT]
    foot = ("all", "", "", whole(sums[0]), whole(sums[1]), seconds_text(sums[2]), "", "", "")
    heads = ("model", "method", "steps", "updates", f"{noun_of(ladder)}s seen", "time")
    return Table((*heads, "RMSE to teacher", "RMSE to first", "distance"), rows, foot)


def distance_table(found: Distances) -> Table:
    """A row for each number of evaluations, a column for each curve."""
    rows = []
    for x in sorted({point.x for curve in found.curves for point in curve.points}):
        cells = [next((point for point in curve.points if point.x == x), None) for curve in found.curves]
        rows.append([figure(x), *(bounded(point.y, point.low, point.high) if point else "" for point in cells)])
    return Table(("evaluations", *(curve.label for curve in found.curves)), rows)


def time_table(ladder: LadderRun) -> Table:
    """Milliseconds per image, by steps."""
    rows = [[whole(point.x), milliseconds_text(point.y)] for point in time_curve(ladder).points]
    return Table(("steps", f"per {noun_of(ladder)}"), rows)


def evaluation_table(ladder: LadderRun) -> Table:
    """Every row of the evaluation."""
    rows = ladder.evaluation.rows if ladder.evaluation else ()
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    heads = ("model", "weights", "sampler", "grid", "steps", "evaluations", "n", "seed")
    cells = []
    for row in rows:
        own = [Path(row.checkpoint).name, row.weights, row.sampler, row.grid, whole(row.num_steps)]
        own += [figure(row.evaluations), whole(row.n), str(row.seed)]
        own.append(figure(row.ms_per_image) + DOUBTFUL * row.is_time_doubtful)
        cells.append([*own, *(_cell(row.metrics.get(name)) for name in metrics)])
    return Table((*heads, f"ms/{noun_of(ladder)}", *metrics), cells)


def nearest_table(ladder: LadderRun) -> Table:
    """Distances to the nearest image of the data: each model in its own steps, the teacher in the most measured."""
    students = {model.key for model in ladder.students}
    every = ladder.evaluation.rows if ladder.evaluation else ()
    end = "_features" * (noun_of(ladder) == "sound")
    rows = [row for row in every if f"nearest{end}" in row.metrics and row.sampler == PLAIN]
    of_teacher = [row for row in rows if row.checkpoint_fingerprint == ladder.first.fingerprint]
    shown = sorted(of_teacher, key=lambda row: row.num_steps)[-1:]
    shown += [row for row in rows if (row.checkpoint_fingerprint, row.num_steps) in students]
    cells = [
        [
            f"{Path(row.checkpoint).name}, {plural(row.num_steps, 'step')}",
            *(_cell(row.metrics.get(name)) for name in (f"nearest{end}", f"nearest_data{end}", "closest")),
        ]
        for row in shown
    ]
    return Table(("samples of", "median to the data", "the same of the data", "the nearest sample"), cells)


def _cell(metric: Metric | None) -> str:
    return bounded(metric.value, metric.low, metric.high) if metric else ""


# Sentences and commands


def title(ladder: LadderRun) -> str:
    """The project's name: its folder's, or in the folder of projects without a name, its dataset's."""
    folder = ladder.root.resolve().name
    data = re.sub(r"(_\d+)+$", "", Path(str(ladder.first.description.get("dataset", ""))).stem)
    return data if folder == CHECKPOINTS.name and data else folder


def outcome(ladder: LadderRun, found: Distances) -> str:
    """Whether it worked, in one sentence; empty if no distance was measured on the `Scale`."""
    first, last, mine = ladder.first, ladder.last, found.students.get(ladder.last.key)
    teacher = read_quality(first.folder, first.fingerprint) if first.folder else None
    if teacher is None and found.teacher and found.scale:
        teacher = Quality(found.teacher.y, found.scale)
    if teacher and (not ladder.students or teacher.word == NOT_TRAINED):
        begin = "It did not work, as the teacher" if ladder.students else first.name
        return f"{begin} {AS_SAID[teacher.word]}: {str(teacher).partition(': ')[2]}."
    if mine is None or found.scale is None:
        return ""
    student = Quality(mine.y, found.scale)
    worked = {"good": "It worked", "usable": "It worked in part"}.get(student.word, "It did not work")
    copies = f", and its teacher {AS_SAID['memorises']}" if teacher and teacher.word == "memorises" else ""
    return f"{worked}: the student of {plural(last.steps, 'step')} {AS_SAID[student.word]}{copies}."


def summary(ladder: LadderRun, found: Distances) -> list[str]:
    """A few sentences: whether it worked, what was trained, and its cost."""
    first, last = ladder.first, ladder.last
    noun = noun_of(ladder)
    data = str(first.description.get("dataset", "") or f"unknown {noun}s")
    base = f"A model of {plural(first.steps, 'step')} for {samples_of(first.description)}, trained on {data}"
    worked = [sentence] if (sentence := outcome(ladder, found)) else []
    if not ladder.students:
        return [*worked, f"{base}. Nothing has been distilled from it yet."]
    stages, began = len(ladder.students), ladder.teacher_steps
    begin = "" if began == first.steps else f", starting at {plural(began, 'step')},"
    by = f"in {stages} stages" if stages > 1 else "in one stage"
    end = f"into a model that generates {ARTICLES[noun]} {noun} in {plural(last.steps, 'step')}."
    sentences = [*worked, f"{base}, was distilled {by}{begin} {end}"]
    if (gain := speed_up(ladder)) is not None:
        before, after, ratio = gain
        takes = f"takes {milliseconds_text(after)} instead of {milliseconds_text(before)}"
        sentences.append(f"{ARTICLES[noun].capitalize()} {noun} {takes}: it is {times_text(ratio)} as fast.")
    mine = found.students.get(last.key)
    if mine and found.teacher and found.teacher.y > 0:
        times = mine.y / found.teacher.y
        lost = f"{times_text(times)} the teacher's" if times >= 1.005 else "no more than the teacher's"
        sentences.append(
            f"Its distance to the data is {figure(mine.y)}, {lost} {figure(found.teacher.y)} "
            f"in {plural(round(found.teacher.x), 'step')} ({found.name})."
        )
        plain = [point for curve in found.samplers if curve.label == OF_TEACHER for point in curve.points]
        same = next((point for point in plain if point.x == mine.x), None)
        if same and same.y > mine.y:
            sentences.append(f"In {plural(round(mine.x), 'step')}, the teacher itself reaches {figure(same.y)}.")
    if mine is None:
        sentences.append("Whether it worked is unknown, as its distance to the data was not measured.")
    return sentences


def facts(ladder: LadderRun, found: Distances) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page: each with its meaning and a value to compare it with."""
    first, last, each = ladder.first, ladder.last, f"per {noun_of(ladder)}"
    result = [(plural(last.steps, "step"), each, f"teacher {first.steps:,}" if ladder.students else "")]
    if (gain := speed_up(ladder)) is not None:
        result.append((milliseconds_text(gain[1]), each, f"{times_text(gain[2])} as fast"))
    if mine := found.students.get(last.key):
        others = f", other {noun_of(ladder)}s {figure(found.scale.same)}" if found.scale else ""
        against = f"teacher {figure(found.teacher.y)}{others}" if found.teacher else others.removeprefix(", ")
        result.append((figure(mine.y), "distance to the data", against))
    own = seconds_text(sum(model.number("train_seconds") for model in ladder.students))
    base = seconds_text(first.number("train_seconds"))
    result.append((own, "of distillation", f"teacher {base}") if ladder.students else (base, "of training", ""))
    images, updates = (sum(m.number(key) for m in ladder.models) for key in ("num_images", "num_iters"))
    result.append((whole(images), f"{noun_of(ladder)}s seen", f"in {whole(updates)} updates"))
    return result


def speed_up(ladder: LadderRun) -> tuple[float, float, float] | None:
    """Milliseconds per image of the first teacher and of the last student, and their ratio; None if unknown."""
    times = milliseconds(ladder)
    before, after = (times.get((model.name, model.steps)) for model in (ladder.first, ladder.last))
    return (before, after, before / after) if ladder.students and before and after else None


def notes(ladder: LadderRun, found: Distances) -> list[str]:
    """Notes that the numbers do not show."""
    result = []
    for model in ladder.models:
        done, asked = model.number("num_iters"), model.number("target_iters")
        if done < asked:
            result.append(f"{model.name} is unfinished: {whole(done)} of {whole(asked)} updates.")
        if model.folder is None:
            result.append(f"{model.name} is gone, or was trained again since: its losses are not shown.")
        if (times := int(finite(model.verdict.get("attempts")) or 1)) > 1:
            result.append(f"The stage of {model.name} was tried {times} times, each time with half the learning rate.")
        if reason := model.verdict.get("kept_start"):
            result.append(f"{model.name} has its initial weights, as training made it worse: {reason}.")
        if reason := model.verdict.get("reason"):
            result.append(f"{model.name} failed its check: {reason}.")
        if model in ladder.students and finite(model.verdict.get("rmse")) is None and model.verdict:
            result.append(f"{model.name} draws values that are not finite.")
    lines = [line.key for line in ladder.compared if line.is_time_doubtful]
    if doubtful := [f"{name} in {plural(steps, 'step')}" for name, steps in lines]:
        result.append(f"The times of {', '.join(doubtful)} are unreliable: more evaluations took less time, twice.")
    if found.left_out:
        rows = plural(found.left_out, "row")
        result.append(f"Not shown: {rows} of the evaluation, measured with other weights than the current ones.")
    return result


def noun_of(ladder: LadderRun) -> str:
    """`image` or `sound`: what the models of a ladder generate."""
    return CODECS.get(ladder.first.description.get("codec", ""), PIXEL_CODEC).noun


def samples_of(description: Mapping[str, Any]) -> str:
    """What a model generates, from its description: `images of 64 × 64 pixels`."""
    if size := description.get("image_size"):
        return f"images of {size} × {size} pixels"
    if rate := description.get("sample_rate"):
        return f"sounds of {description['sample_shape'][-1]:,} samples at {rate:,} Hz"
    what = "latents" if description.get("codec") == LATENTS.name else "samples"
    return f"{what} of {' × '.join(map(str, description.get('sample_shape', [])))}"


def evaluate_command(ladder: LadderRun) -> str:
    """The command that measures the ladder for this page."""
    return shell("vdiff", "report", ladder.folder.as_posix(), "--evaluate")


def sample_command(ladder: LadderRun) -> str:
    """The command that generates samples with the last model."""
    last = ladder.last.folder or Path(ladder.last.name)
    network = ladder.last.description.get("backbone") or {}
    prompt = ["--prompt", "a red fox"] if network.get("kind") == TEXT else []
    return shell("python", "sample.py", "--checkpoint", last.as_posix(), *prompt)


def web_page(ladder: LadderRun, folder: Path) -> tuple[str, str] | None:
    """The address of the page that runs these models, seen from `folder`, and the command that serves it.

    None: there is none beside them.
    """
    page = ladder.folder / WEB_PAGE
    if not page.is_file():
        return None
    address = quote(os.path.relpath(page, folder).replace(os.sep, "/"))
    return address, shell("python", "-m", "http.server", "--directory", page.parent.as_posix())


def recipes(ladder: LadderRun) -> list[tuple[str, str]]:
    """(purpose, command) of all commands that reproduce data, models, samples and this page, in a separate folder."""
    made = [(number, model) for number, model in enumerate(ladder.models) if model.folder and model.settings]
    noun = noun_of(ladder)
    result = [(f"Prepare the {noun}s (if the source is a folder or a file, give its path)", prepare_command(ladder))]
    for number, model in made:
        config = ["--config", ((model.folder or Path()) / RUN_FILE).as_posix(), "--data", f"{AGAIN}/data"]
        command, what = ["python", "train.py", *config], "Train the teacher"
        if number:
            command = ["python", "distill.py", *config, "--base", f"{AGAIN}/{ladder.models[number - 1].name}"]
            what = f"Distil the student of {plural(model.steps, 'step')}"
        result.append((what, shell(*command, "--out", f"{AGAIN}/{model.name}")))
    measure = "Measure all models, and write this page"
    if not made:
        return [(f"Generate {noun}s", sample_command(ladder)), (measure, evaluate_command(ladder))]
    draw = shell("python", "sample.py", "--checkpoint", f"{AGAIN}/{ladder.last.name}", "--out", f"{AGAIN}/samples")
    return [*result, (f"Generate {noun}s", draw), (measure, shell("vdiff", "report", AGAIN, "--evaluate"))]


def prepare_command(ladder: LadderRun) -> str:
    """The command that prepares the first teacher's data again, as far as the dataset or its name tells."""
    first = ladder.first
    data, channels = str(first.description.get("dataset", "")), first.description.get("unet", {}).get("in_channels", 3)
    sizes, source, how = str(first.description.get("image_size")), re.sub(r"(_\d+)+$", "", Path(data).stem), []
    with contextlib.suppress(VdiffError, OSError, ValueError):
        meta = open_dataset(data).meta
        sizes, source = ",".join(map(str, meta.sizes)), meta.name
        if meta.rate:
            flags = {"--kind": "audio", "--rate": meta.rate, "--length": sizes, "--channels": meta.channels}
            flags |= {"--trim": meta.trim, "--loudness": meta.loudness, "--out": f"{AGAIN}/data"}
            words = [word for flag, value in flags.items() if value for word in (flag, value)]
            return shell("python", "prepare_data.py", source, *words)
        flags = {"--format": meta.image_format, "--quality": meta.quality, "--crop": meta.crop}
        flags |= {"--resample": meta.resample, "--background": meta.background}
        how = [word for flag, value in flags.items() if value for word in (flag, value)]
    return shell(
        "python", "prepare_data.py", source, "--size", sizes, "--channels", channels, *how, "--out", f"{AGAIN}/data"
    )
