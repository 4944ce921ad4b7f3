"""The ladder in one picture and one table: samples of the teacher and its students from the same noise."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from vdiff.data.captions import fingerprint_of
from vdiff.data.images import captioned_grid, make_grid, save_png
from vdiff.data.sound_page import write_page
from vdiff.diffusion.samplers import Ddim
from vdiff.files import write_text
from vdiff.models.checkpoint import load_checkpoint, read_config
from vdiff.models.checks import default_guidance
from vdiff.models.drawing import Conditions, classes_in_turn, draw_in_batches, images_at_once, rmse
from vdiff.models.speed import impossible_times
from vdiff.records import LADDER, LADDER_IMAGES, LADDER_PICTURE, LADDER_SOUNDS, LadderRow, read_ladder_rows
from vdiff.reporting import Reporter
from vdiff.text import plural
from vdiff.training.sample_prompts import SamplePrompts
from vdiff.training.stages import Stage
from vdiff.training.verdict import read_verdict

PICTURE_ROWS = 8
TIMED_AGAIN = 2
"""How often implausible times are measured again; the shortest counts."""
MOST_STEPS = 16
"""The teacher also samples in its own number of steps, unless that is more than this many times the ladder's first
number: in a short ladder it would take most of the time."""


def plan_comparison(steps: Sequence[int], num_images: int, budget: int) -> tuple[int, int]:
    """How many images to draw of each model, and of which models, for at most about `budget` network evaluations.

    Returns:
        the number of images, from `PICTURE_ROWS` to `num_images`; and the most steps that a model may have to be drawn,
        at least those of the last model.
    """
    drawn = sorted(steps)
    while drawn[-1] > steps[-1] and PICTURE_ROWS * sum(drawn) > budget:
        drawn.pop()
    return max(PICTURE_ROWS, min(num_images, budget // sum(drawn))), drawn[-1]


def compare(
    stages: Sequence[Stage],
    *,
    seed: int,
    device: torch.device,
    reporter: Reporter,
    budget: int,
    guidance: float = 0.0,
    prompts: SamplePrompts | None = None,
    conditions: Conditions = classes_in_turn,
) -> list[LadderRow]:
    """Generate images 0, 1, 2, … of `seed` with every model of a ladder; save picture and table with the last student.

    If the ladder starts below the teacher's own number of steps, the teacher samples in both (`MOST_STEPS`).

    Args:
        budget: how many network evaluations this may use, see `plan_comparison`.
        guidance: the weight of the first teacher's guidance, which the students have learned.
        prompts: of a text-to-image model.
        conditions: of any other model, see `sample_conditions`.
    """
    last = read_config(stages[-1].folder)
    entries = _entries(stages)
    usual = 24 if max(last.shape[1:]) <= 32 else 16
    count, most = plan_comparison([steps for _, steps in entries], usual, budget)
    if count < usual or most < entries[0][1]:
        without = f", without models of more than {plural(most, 'step')}" if most < entries[0][1] else ""
        reporter.line(f"comparing {count} {last.space.noun}s of each{without}, because the training was short")
    at_once = images_at_once(last.signature, last.shape)
    images: dict[int, Tensor] = {}
    times: dict[int, float] = {}

    def draw_entry(k: int, on_step: Callable[[int], None] | None = None) -> Tensor:
        """Draw with a model; its time is the shortest measured so far."""
        folder, steps = entries[k]
        denoiser, model = load_checkpoint(folder, device)
        began = time.monotonic()
        found = draw_in_batches(
            denoiser,
            Ddim(clipping_value=model.space.limit),
            count=count,
            at_once=at_once,
            image_size=last.shape[1:],
            conditions=prompts.condition if prompts else conditions,
            guidance=default_guidance(last) if last.guidance_range else guidance if folder == stages[0].base else 0.0,
            num_steps=steps,
            seed=seed,
            on_step=on_step,
        )
        times[k] = min(times.get(k, math.inf), 1000 * (time.monotonic() - began) / count)
        return found

    wanted = [k for k, (_, steps) in enumerate(entries) if steps <= most]
    batches = -(-count // at_once)
    with reporter.progress("comparing", batches * sum(entries[k][1] for k in wanted), "evaluations") as bar:
        done = 0
        for k in wanted:
            images[k] = draw_entry(k, lambda step, done=done: bar.update(done + step))  # type: ignore[misc]
            done += batches * entries[k][1]
    networks = [read_config(folder).network_id() for folder, _ in entries]

    def doubtful() -> set[int]:
        """Models of more evaluations that took less time than others of the same network."""
        return {wanted[i] for i in impossible_times([(networks[k], entries[k][1], times[k]) for k in wanted])}

    for _ in range(TIMED_AGAIN):
        for k in sorted(doubtful()):
            draw_entry(k)
    suspects, rows = doubtful(), []
    for k, (folder, steps) in enumerate(entries):
        is_student, model = folder != stages[0].base, read_config(folder)
        verdict = read_verdict(folder) if is_student else None
        to_teacher = verdict.rmse if verdict and verdict.every == 1 else None
        if to_teacher is None and is_student and k in images and k - 1 in images:
            to_teacher = rmse(images[k], images[k - 1], model.space)
        row = LadderRow(
            checkpoint=folder.as_posix(),
            num_steps=steps,
            seed=seed,
            num_iters=model.num_iters,
            train_seconds=model.train_seconds,
            ms_per_image=times.get(k),
            rmse_to_teacher=to_teacher,
            rmse_to_first=rmse(images[k], images[0], model.space) if k and 0 in images else None,
            distance=_distance(stages, folder, steps),
            kept_start=model.kept_start,
            is_time_doubtful=k in suspects,
            prompts=fingerprint_of(prompts.texts if prompts else ()),
        )
        rows.append(row)
    folder = stages[-1].folder
    pictures = prompts.decode if prompts else last.space.pictures
    shown = {k: pictures(images[k][:PICTURE_ROWS]) for k in wanted}
    subjects = (prompts and prompts.texts) or read_config(folder).class_names
    save_png(picture([(rows[k], shown[k]) for k in wanted], subjects), folder / LADDER_PICTURE)
    few = torch.cat([shown[k] for k in wanted])  # for the report: pixel for pixel, a row for each model
    save_png(make_grid(few, columns=min(PICTURE_ROWS, count), padding=0), folder / LADDER_IMAGES)
    if last.space.is_sound and last.sample_rate:
        names = last.class_names or [""]
        table = [
            (f"noise {n} {names[n % len(names)]}", [("", images[k][n]) for k in wanted])
            for n in range(min(PICTURE_ROWS, count))
        ]
        heads = [f"{Path(rows[k].checkpoint).name}, {plural(rows[k].num_steps, 'step')}" for k in wanted]
        write_page(folder / LADDER_SOUNDS, f"The same noise of seed {seed}", heads, table, last.sample_rate)
    write_text(folder / LADDER, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return rows


def known_rows(stages: Sequence[Stage], *, seed: int, prompts: Sequence[str] = ()) -> list[LadderRow] | None:
    """The table that an earlier `compare` of a ladder with these last stages wrote with `seed` and `prompts`, or None.

    It also has the earlier models of that ladder: repeating one stage leaves the table and picture of the whole ladder.
    """
    path = stages[-1].folder / LADDER
    try:
        rows = read_ladder_rows(path)
    except (OSError, ValueError):
        return None
    made_of = fingerprint_of(prompts)
    entries = [(folder.as_posix(), steps, seed, made_of) for folder, steps in _entries(stages)]
    recorded = [(row.checkpoint, row.num_steps, row.seed, row.prompts) for row in rows]
    return rows if recorded[-len(entries) :] == entries else None


def _entries(stages: Sequence[Stage]) -> list[tuple[Path, int]]:
    """The models of a ladder, and the steps of each."""
    first = stages[0]
    own = read_config(first.base).num_timesteps
    teacher = [own, first.teacher_steps] if 1 < own / first.teacher_steps <= MOST_STEPS else [first.teacher_steps]
    return [*((first.base, steps) for steps in teacher), *((stage.folder, stage.num_steps) for stage in stages)]


def picture(drawn: Sequence[tuple[LadderRow, Tensor]], subjects: Sequence[str] = ()) -> Image:
    """Columns: the models; rows: noise.

    Args:
        subjects: classes or prompts, which the images have in turn.
    """
    titles = []
    for row, _ in drawn:
        error = f"RMSE {row.rmse_to_first:.3f}" if row.rmse_to_first is not None else ""
        titles.append(f"{Path(row.checkpoint).name}\n{plural(row.num_steps, 'step')}\n{error}")
    count = min(PICTURE_ROWS, len(drawn[0][1]))
    names = [textwrap.fill(name, 24, max_lines=3, placeholder=" …") for name in subjects]
    return captioned_grid(
        [[images[k] for _, images in drawn] for k in range(count)],
        titles,
        [f"noise {k}\n{names[k % len(names)]}" if names else f"noise {k}" for k in range(count)],
        f"The same noise of seed {drawn[0][0].seed}, {drawn[0][0].num_steps} to {drawn[-1][0].num_steps} steps",
    )


def _distance(stages: Sequence[Stage], folder: Path, steps: int) -> float | None:
    """The values of a verdict about a model: a student's own verdict, or a teacher's values in its student's."""
    is_student = folder != stages[0].base
    if not is_student and steps != stages[0].teacher_steps:
        return None
    found = read_verdict(folder if is_student else stages[0].folder)
    if found is None or found.every > 1:  # measured in fewer steps
        return None
    return found.distance if is_student else found.teacher_distance
