"""What the page says in sentences, and the commands that it names."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from vdiff.report.figures import figure, milliseconds_text, seconds_text, times_text, whole
from vdiff.report.measured import Measured, attempts, finite, milliseconds, teacher_steps
from vdiff.report.run import LadderRun
from vdiff.text import plural

AGAIN = "again"


@dataclass(frozen=True)
class Fact:
    """A figure at the head of the page, what it is, and what it is held against."""

    value: str
    what: str
    against: str = ""


@dataclass(frozen=True)
class Recipe:
    """A command, and what it is for."""

    why: str
    command: str


def summary(ladder: LadderRun, found: Measured) -> list[str]:
    """Two or three sentences: what was made, and what it costs."""
    first, last = ladder.first, ladder.last
    size = first.description.get("image_size")
    data = str(first.description.get("dataset", "") or "unknown images")
    base = f"A model of {plural(first.steps, 'step')} for images of {size} × {size} pixels, trained on {data}"
    if not ladder.students:
        return [f"{base}. Nothing has been distilled from it yet."]
    stages, began = len(ladder.students), teacher_steps(ladder)
    begin = "" if began == first.steps else f", beginning at {plural(began, 'step')},"
    by = f"in {stages} stages" if stages > 1 else "in one stage"
    sentences = [f"{base}, was distilled {by}{begin} into one that draws an image in {plural(last.steps, 'step')}."]
    if (gain := speed_up(ladder)) is not None:
        before, after, ratio = gain
        sentences.append(
            f"An image takes {milliseconds_text(after)} instead of {milliseconds_text(before)}: "
            f"it is {times_text(ratio)} as fast."
        )
    mine = found.students.get(last.key)
    if mine and found.teacher and found.teacher.y > 0:
        times = mine.y / found.teacher.y
        lost = f"{times_text(times)} the teacher's" if times >= 1.005 else "no more than the teacher's"
        sentences.append(
            f"Its distance to the data is {figure(mine.y)}, {lost} {figure(found.teacher.y)} "
            f"in {plural(round(found.teacher.x), 'step')} ({found.name})."
        )
        plain = next((curve for curve in found.samplers if curve.label == "teacher, ddim"), None)
        same = next((point for point in plain.points if point.x == mine.x), None) if plain else None
        if same and same.y > mine.y:
            sentences.append(f"The teacher itself, drawn in {plural(round(mine.x), 'step')}, is at {figure(same.y)}.")
    return sentences


def facts(ladder: LadderRun, found: Measured) -> list[Fact]:
    """The figures at the head of the page."""
    first, last = ladder.first, ladder.last
    told = [Fact(plural(last.steps, "step"), "to draw an image", f"teacher {first.steps:,}" if ladder.students else "")]
    if (gain := speed_up(ladder)) is not None:
        told.append(Fact(milliseconds_text(gain[1]), "an image", f"{times_text(gain[2])} as fast"))
    if mine := found.students.get(last.key):
        against = f"teacher {figure(found.teacher.y)}" if found.teacher else ""
        told.append(Fact(figure(mine.y), "distance to the data", against))
    own = seconds_text(sum(model.number("train_seconds") for model in ladder.students))
    base = seconds_text(first.number("train_seconds"))
    told.append(Fact(own, "of distillation", f"teacher {base}") if ladder.students else Fact(base, "of training"))
    seen = sum(model.number("num_images") for model in ladder.models)
    told.append(
        Fact(whole(seen), "images seen", f"in {whole(sum(m.number('num_iters') for m in ladder.models))} updates")
    )
    return told


def speed_up(ladder: LadderRun) -> tuple[float, float, float] | None:
    """Milliseconds an image of the first teacher and of the last student, and their ratio; None where unknown."""
    times = milliseconds(ladder)
    before, after = times.get((ladder.first.name, ladder.first.steps)), times.get((ladder.last.name, ladder.last.steps))
    if not ladder.students or not before or not after:
        return None
    return before, after, before / after


def notes(ladder: LadderRun, found: Measured) -> list[str]:
    """What a reader must know that the figures do not say."""
    told = []
    for model in ladder.models:
        done, asked = model.number("num_iters"), model.number("target_iters")
        if done < asked:
            told.append(f"{model.name} is unfinished: {whole(done)} of {whole(asked)} updates.")
        if model.folder is None:
            told.append(f"{model.name} is not here any more, or was trained again since: its losses are not shown.")
        if (times := attempts(model)) > 1:
            told.append(f"The stage of {model.name} was done {times} times, with half the learning rate each time.")
        if reason := model.verdict.get("kept_start"):
            told.append(f"{model.name} is what its training began with, which made it worse: {reason}.")
        if reason := model.verdict.get("reason"):
            told.append(f"{model.name} failed its examination: {reason}.")
        if model in ladder.students and finite(model.verdict.get("rmse")) is None and model.verdict:
            told.append(f"{model.name} draws values that are not finite.")
    doubtful = [f"{line.name} in {plural(line.steps, 'step')}" for line in ladder.compared if line.is_time_doubtful]
    if doubtful:
        told.append(f"The times of {', '.join(doubtful)} cannot be: more evaluations took less time, measured twice.")
    if found.left_out:
        rows = plural(found.left_out, "row")
        told.append(f"{rows} of the evaluation are of other weights than those here, and left out.")
    return told


def evaluate_command(ladder: LadderRun) -> str:
    """The command that makes the evaluation which this page shows."""
    return shlex.join(["vdiff", "report", ladder.folder.as_posix(), "--evaluate"])


def sample_command(ladder: LadderRun) -> str:
    """The command that draws images with the last model."""
    last = ladder.last.folder or Path(ladder.last.name)
    return shlex.join(["python", "sample.py", "--checkpoint", last.as_posix()])


def recipes(ladder: LadderRun) -> list[Recipe]:
    """The commands that make the same models once more, in a folder of their own, and what follows."""
    told = []
    for model in ladder.models:
        if not (model.folder and model.settings):
            continue
        config = ["--config", (model.folder / "run.toml").as_posix()]
        target = f"{AGAIN}/{model.name}"
        if model is ladder.first:
            words, what = ["python", "train.py", *config], "Train the teacher"
        else:
            teacher = ladder.models[ladder.models.index(model) - 1]
            words = ["python", "distill.py", *config, "--base", f"{AGAIN}/{teacher.name}"]
            what = f"Distil the student of {plural(model.steps, 'step')}"
        told.append(Recipe(what, shlex.join([*words, "--out", target])))
    told.append(Recipe("Draw images", sample_command(ladder)))
    made = ladder.evaluation.command if ladder.evaluation else ""
    told.append(Recipe("Measure them", made if made.startswith("vdiff ") else evaluate_command(ladder)))
    told.append(Recipe("Write this page", shlex.join(["vdiff", "report", ladder.folder.as_posix()])))
    return told
