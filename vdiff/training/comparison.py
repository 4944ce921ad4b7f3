"""The ladder in one picture and one table: the teacher and its students, drawn from the same noise."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from vdiff.data.images import captioned_grid, make_grid, save_png
from vdiff.diffusion.samplers import Ddim
from vdiff.files import parse, read_text, write_text
from vdiff.models.checkpoint import load_checkpoint, read_config
from vdiff.models.drawing import draw
from vdiff.reporting import Reporter
from vdiff.training.ladder import steps_text
from vdiff.training.stages import Stage
from vdiff.training.verdict import read_verdict, rmse

PICTURE, TABLE, IMAGES = "ladder.png", "ladder.json", "ladder_images.png"
PICTURE_ROWS = 8
MOST_STEPS = 16
"""The teacher's own steps are drawn too, unless they are more than this many times those that were distilled: of a
ladder of few steps that would be most of its time."""


@dataclass(frozen=True)
class Row:
    """One model of a ladder.

    Attributes:
        seed: of the noise that the comparison begins with.
        train_seconds: of its own training.
        ms_per_image: milliseconds to draw one image in the batch of the comparison.
        rmse_to_teacher: root mean square difference of pixels in [−1, 1] from the model before it, same noise.
        rmse_to_first: the same, from the first model.
        distance: from the data, where a verdict tells it.
    """

    checkpoint: str
    num_steps: int
    seed: int
    num_iters: int
    train_seconds: float
    ms_per_image: float
    rmse_to_teacher: float | None
    rmse_to_first: float | None
    distance: float | None = None


def compare(stages: Sequence[Stage], *, seed: int, device: torch.device, reporter: Reporter) -> list[Row]:
    """Draw images 0, 1, 2, … of `seed` with every model of a ladder; write picture and table beside the last student.

    Where the ladder starts below the teacher's own number of steps, the teacher is drawn with both (`MOST_STEPS`).
    """
    entries = _entries(stages)
    count = 24 if read_config(stages[0].base).image_size <= 32 else 16
    rows: list[Row] = []
    drawn: list[Tensor] = []
    with reporter.progress("comparing", sum(steps for _, steps in entries), "evaluations") as bar:
        done = 0
        for folder, steps in entries:
            denoiser, model = load_checkpoint(folder, device)
            began = time.monotonic()
            images = draw(
                denoiser,
                Ddim(),
                indices=range(count),
                image_size=model.image_size,
                num_steps=steps,
                seed=seed,
                on_step=lambda step, done=done: bar.update(done + step),  # type: ignore[misc]
            )
            seconds = time.monotonic() - began
            done += steps
            rows.append(
                Row(
                    checkpoint=folder.as_posix(),
                    num_steps=steps,
                    seed=seed,
                    num_iters=model.num_iters,
                    train_seconds=model.train_seconds,
                    ms_per_image=1000 * seconds / count,
                    rmse_to_teacher=rmse(images, drawn[-1]) if drawn else None,
                    rmse_to_first=rmse(images, drawn[0]) if drawn else None,
                    distance=_distance(stages, folder, steps),
                )
            )
            drawn.append(images)
    folder = stages[-1].folder
    save_png(picture(rows, drawn), folder / PICTURE)
    few = torch.cat([images[:PICTURE_ROWS] for images in drawn])  # pixel for pixel, a row for each model: the report's
    save_png(make_grid(few, columns=min(PICTURE_ROWS, count), padding=0), folder / IMAGES)
    write_text(folder / TABLE, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return rows


def known_rows(stages: Sequence[Stage], *, seed: int) -> list[Row] | None:
    """The table that an earlier `compare` of the same ladder wrote with `seed`; None where there is none."""
    path = stages[-1].folder / TABLE
    try:
        rows = [Row(**values) for values in parse(read_text(path))]
    except (OSError, ValueError, TypeError):
        return None
    entries = [(folder.as_posix(), steps, seed) for folder, steps in _entries(stages)]
    return rows if [(row.checkpoint, row.num_steps, row.seed) for row in rows] == entries else None


def _entries(stages: Sequence[Stage]) -> list[tuple[Path, int]]:
    """The models of a ladder, and the steps that each takes."""
    first = stages[0]
    own = read_config(first.base).num_timesteps
    teacher = [own, first.teacher_steps] if 1 < own / first.teacher_steps <= MOST_STEPS else [first.teacher_steps]
    return [*((first.base, steps) for steps in teacher), *((stage.folder, stage.num_steps) for stage in stages)]


def picture(rows: Sequence[Row], drawn: Sequence[Tensor]) -> Image:
    """Columns: the models; rows: noise."""
    titles = []
    for row in rows:
        error = f"RMSE {row.rmse_to_first:.3f}" if row.rmse_to_first is not None else ""
        titles.append(f"{Path(row.checkpoint).name}\n{steps_text(row.num_steps)}\n{error}")
    count = min(PICTURE_ROWS, len(drawn[0]))
    return captioned_grid(
        [[images[k] for images in drawn] for k in range(count)],
        titles,
        [f"noise {k}" for k in range(count)],
        f"The same noise, {rows[0].num_steps} to {rows[-1].num_steps} steps",
    )


def _distance(stages: Sequence[Stage], folder: Path, steps: int) -> float | None:
    """What a verdict says of a model: a student's own, or that on the student of a teacher."""
    if folder != stages[0].base:
        own = read_verdict(folder)
        return own.distance if own else None
    first = read_verdict(stages[0].folder) if steps == stages[0].teacher_steps else None
    return first.teacher_distance if first else None
