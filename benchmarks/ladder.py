"""A whole ladder, from a teacher of 1024 steps down to a student of one: how long it takes, and how near it comes.

    python prepare_data.py noto-emoji-64.zip --size 64 --out data/emoji_64
    python benchmarks/ladder.py --data data/emoji_64 --config benchmarks/emoji_64.toml   # made for one GPU
    python benchmarks/ladder.py --data data/digits_8 --teacher_steps 64                  # a CPU will do

Settings of teacher and students are those of `--config` over the preset for the image size. The same command goes on
where it was stopped, and does nothing twice. Beside each student stand DDIM and DPM-Solver++ (2M) of the undistilled
teacher at as many evaluations, drawn from the same noise in the same run. Distances are Fréchet distances between
`vdiff.evaluation.features.pixel_vectors` of `--num` samples and of all images. The picture beside the table shows every
model's images of the same noise.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.distances import SOLVERS, Distances, PixelDistance, images_of
from benchmarks.report import machine, write_report
from vdiff.cli.console import Console
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, read_config
from vdiff.records import LADDER_PICTURE
from vdiff.text import duration
from vdiff.training.base import resolve_training
from vdiff.training.base_training import train
from vdiff.training.comparison import compare, known_rows
from vdiff.training.engine import build_engine
from vdiff.training.folder import is_run
from vdiff.training.ladder import run_stages
from vdiff.training.stages import plan_stages, resolve_distillation, teachers_images

MOST_OF_A_SOLVER = 64


def line(config: CheckpointConfig, name: str, steps: int) -> list[str]:
    """What a checkpoint says of itself: name, steps, updates, time, images a second."""
    speed = config.num_images / config.train_seconds if config.train_seconds else 0.0
    return [name, f"{steps:,}", f"{config.num_iters:,}", duration(config.train_seconds), f"{speed:,.0f}"]


@click.command()
@click.option("--data", default="data/emoji_64", show_default=True, help="The dataset.")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Settings of train.py, and of distill.py in [distill].",
)
@click.option("--teacher_steps", default=1024, show_default=True, help="Steps that are distilled.")
@click.option("--num", default=500, show_default=True, help="Samples of each distance.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("ladder"), show_default=True)
@click.option("--name", default="ladder", show_default=True, help="Of the files in benchmarks/results.")
def main(data: str, file: Path | None, teacher_steps: int, num: int, work: Path, name: str) -> None:
    """Print the table and write it to benchmarks/results/NAME.md, the picture to NAME.png."""
    console, teacher = Console(), work / "original"
    resume = is_run(teacher)
    training, images = resolve_training(
        {} if resume else {"data": data}, None if resume else file, folder=teacher, resume=resume
    )
    train(training, images, folder=teacher, resume=resume, overwrite=False, reporter=console)

    flags = {"base": teacher.as_posix(), "data": data, "teacher_steps": teacher_steps, "to_steps": 1}
    config, described = resolve_distillation(flags, file)
    stages = plan_stages(config, described)
    engine = build_engine(config)
    run_stages(stages, config, teachers_images(config, described), engine, overwrite=False, reporter=console)
    if known_rows(stages, seed=config.seed) is None:
        budget = sum(stage.budget(config) for stage in stages)
        compare(stages, seed=config.seed, device=engine.device, reporter=console, budget=budget)

    reference = PixelDistance(images_of(data, described.image_size))
    distances = Distances(work / "distances.json", reference, num, console)
    own = distances.of("teacher", teacher, teacher_steps)
    rows = [[*line(described, "teacher", teacher_steps), f"{own:.3f}", *("" for _ in SOLVERS)]]
    for stage in stages:
        steps = stage.num_steps
        found = distances.of(stage.folder.name, stage.folder, steps)
        solved = [
            f"{distances.of(f'teacher, {sampler}', teacher, steps, sampler):.3f}" if steps <= MOST_OF_A_SOLVER else ""
            for sampler in SOLVERS
        ]
        rows.append([*line(read_config(stage.folder), stage.folder.name, steps), f"{found:.3f}", *solved])
    students = [read_config(stage.folder) for stage in stages]
    updates, seconds = sum(each.num_iters for each in students), sum(each.train_seconds for each in students)
    rows.append(["all students", "", f"{updates:,}", duration(seconds), "", "", *("" for _ in SOLVERS)])
    size = sum(each.numel() for each in load_checkpoint(teacher)[0].parameters()) / 1e6
    report = write_report(
        name,
        f"The ladder from {teacher_steps} steps to 1 on {data}, {described.image_size} pixels: "
        f"{size:.1f}M parameters, batches of {training.batch_size} and {config.batch_size}, {engine.description}; "
        f"Fréchet distance of {num} samples",
        ["model", "steps", "updates", "training", "images/s", "distance", *(f"teacher, {each}" for each in SOLVERS)],
        rows,
        machine(),
    )
    shutil.copyfile(stages[-1].folder / LADDER_PICTURE, report.with_suffix(".png"))


if __name__ == "__main__":
    main()
