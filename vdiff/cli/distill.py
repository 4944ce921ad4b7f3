"""`distill.py`: halve the sampling steps of a model, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console, duration
from vdiff.cli.options import Command, option, switch
from vdiff.cli.settings import config_option, given, settings
from vdiff.training.config import DistillConfig

if TYPE_CHECKING:
    from vdiff.training.comparison import Row


@click.command(
    cls=Command,
    examples=[
        "python distill.py --base checkpoints/base_5       # one stage: base_6, with half the steps",
        "python distill.py --to_steps 4                    # checkpoints/original down to 4 steps",
        "python distill.py --teacher_steps 64 --to_steps 1 # begin at 64 steps of a continuous-time teacher",
    ],
)
@option(
    "--out",
    group="Run",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="base_0, base_1, … beside --base",
    help="The student's folder, where there is one student.",
)
@config_option
@switch("--overwrite", group="Run", help="Replace students that exist.")
@switch("--dry_run", group="Run", help="Print the stages, then stop.")
@settings(DistillConfig)
def command(out: Path | None, config_file: Path | None, overwrite: bool, dry_run: bool, **flags: Any) -> None:
    """Distil a model into students with half the sampling steps each (Salimans & Ho 2022).

    One stage by default, or a ladder with --to_steps or --stages. The same command goes on where it was stopped, and
    skips the stages that are finished. At the end the teacher and all students are drawn from the same noise:
    ladder.png and ladder.json in the last student's folder.
    """
    from vdiff.training.comparison import PICTURE, compare, known_rows
    from vdiff.training.engine import build_engine, effective_batch
    from vdiff.training.ladder import climb, plan_stages, resolve_distillation, teachers_images

    console = Console()
    config, teacher = resolve_distillation(given(flags), config_file)
    images = teachers_images(config, teacher)
    stages = plan_stages(config, teacher, out)
    console.line(f"preset {config.preset}, {images.name}, method {config.method}")
    if not teacher.is_finished:
        done = f"{teacher.num_iters} of {teacher.target_iters} updates"
        console.line(f"{config.base} is unfinished: {done}")
    if dry_run:
        rows = [
            [
                s.folder.as_posix(),
                s.base.as_posix(),
                f"{s.teacher_steps} → {s.num_steps}",
                f"{n:,}",
                f"{n * config.batch_size:,}",
            ]
            for s in stages
            for n in [config.updates(s.num_steps)]
        ]
        console.table("Stages", ["student", "teacher", "steps", "updates", "images"], rows)
        return
    engine = build_engine(config)
    console.line(f"distilling on {engine.description}, {effective_batch(config, engine)}")
    trained = climb(stages, config, images, engine, overwrite=overwrite, reporter=console)
    if not engine.is_main:
        return
    table = None if trained else known_rows(stages, seed=config.seed)
    table = table or compare(stages, seed=config.seed, device=engine.device, reporter=console)
    console.table("Ladder", HEADINGS, [cells(row) for row in table])
    last = stages[-1].folder
    console.result(f"picture    {last / PICTURE}")
    console.result(f"next       python sample.py --checkpoint {last}")


HEADINGS = ["model", "steps", "updates", "training", "ms/image", "RMSE to teacher", "RMSE to first"]


def cells(row: Row) -> list[str]:
    """One line of the table."""
    errors = ["" if error is None else f"{error:.4f}" for error in (row.rmse_to_teacher, row.rmse_to_first)]
    times = [duration(row.train_seconds), f"{row.ms_per_image:.2f}"]
    return [row.checkpoint, str(row.num_steps), str(row.num_iters), *times, *errors]
