"""What bf16 costs in ladders from very many steps to one: the quality of each student, by the precision of training.

    python benchmarks/fewstep.py --dry_run     # trains the teacher, fewstep/original
    python benchmarks/long_ladders.py          # digits of 8×8 pixels: half an hour on one core

The precision `auto` is what `--precision auto` does on CUDA: fp32 where the teacher takes more than 64 steps, then
bf16. Every ladder starts from the same teacher, and its stages have the same number of updates. Students are drawn in
fp32, in at most `--most` of their steps, from the same noise. Beside the Fréchet distance on pixels is the RMSE to the
images that the teacher draws in `--most` steps. The same command continues.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.distances import PixelDistance, drawn, images_of
from benchmarks.report import machine, write_report
from vdiff.files import read_json, write_json
from vdiff.models.checkpoint import read_config
from vdiff.training.stages import SHORTEST_IN_HALF

DISTILL = Path(__file__).parent.parent / "distill.py"
UNCHECKED = {"check_images": 0, "distance_every": 0, "report": False, "sample_interval": 10**6, "tracker": "none"}
PARTS = {"fp32": [("fp32", 1)], "bf16": [("bf16", 1)], "auto": [("fp32", SHORTEST_IN_HALF), ("bf16", 1)]}
"""Precision → the precisions of a ladder's parts, and the steps at which each part ends."""


def distilled(teacher: Path, place: Path, first: int, precision: str, settings: dict[str, Any]) -> list[Path]:
    """The students of a ladder from `first` steps, trained where they are missing."""
    base, steps = place / "original", first
    if not base.exists():
        shutil.copytree(teacher, base, ignore=shutil.ignore_patterns("state", "log", "samples"))
    students = [place / f"base_{k}" for k in range(first.bit_length() - 1)]
    for part, end in PARTS[precision]:
        if end < steps:
            flags = {"base": base, "precision": part, "phases": ",".join(map(str, halvings(steps, end))), **settings}
            words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            subprocess.run([sys.executable, DISTILL, *words], check=True)
            base, steps = students[len(halvings(first, end)) - 2], end
    return students


def halvings(first: int, last: int) -> list[int]:
    """`first`, its half, and so on to `last`: powers of 2."""
    return [1 << k for k in range(first.bit_length() - 1, last.bit_length() - 2, -1)]


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path, exists=True), default=Path("fewstep/original"))
@click.option("--data", default="data/digits_8", show_default=True, help="The dataset.")
@click.option("--preset", default="digits", show_default=True, help="Settings of the students.")
@click.option("--ladders", default="1024,8192", show_default=True, help="Steps of the teacher: powers of 2.")
@click.option("--precisions", default="fp32,bf16,auto", show_default=True)
@click.option("--updates", default=60, show_default=True, help="Of each stage; more for students of 2 steps and 1.")
@click.option("--batch_size", default=64, show_default=True)
@click.option("--num", default=500, show_default=True, help="Samples of each distance.")
@click.option("--most", default=32, show_default=True, help="Steps in which a student is drawn that has more.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("long_ladders"), show_default=True)
@click.option("--name", default="long_ladders", show_default=True, help="Of the file in benchmarks/results.")
def main(
    teacher: Path,
    data: str,
    preset: str,
    ladders: str,
    precisions: str,
    updates: int,
    batch_size: int,
    num: int,
    most: int,
    work: Path,
    name: str,
) -> None:
    """Print the table and write it to benchmarks/results/NAME.md."""
    reference = PixelDistance(images_of(data, read_config(teacher).image_size))
    theirs, file = drawn(teacher, most, "ddim", num, 0), work / "figures.json"
    known = read_json(file, "delete it: the figures are measured again") if file.exists() else {}
    settings = {"data": data, "preset": preset, "num_iters": updates, "batch_size": batch_size, **UNCHECKED}
    kinds, rows = precisions.split(","), []
    for first in map(int, ladders.split(",")):
        found = {kind: distilled(teacher, work / f"{first}_{kind}", first, kind, settings) for kind in kinds}
        for k, steps in enumerate(halvings(first, 1)[1:]):
            row = [f"{2 * steps:,} → {steps:,}"]
            for students in found.values():
                key = f"{students[k].as_posix()}, {min(steps, most)} steps, n {num}"
                if key not in known:
                    images = drawn(students[k], min(steps, most), "ddim", num, 0)
                    known[key] = [reference(images), float((images - theirs).square().mean().sqrt())]
                    write_json(file, known)
                row += [f"{known[key][0]:.3f}", f"{known[key][1]:.4f}"]
            rows.append(row)
    write_report(
        name,
        f"Ladders on {data} by precision, {updates} updates of {batch_size} images a stage: Fréchet distance of {num} "
        f"samples (teacher, {most} steps: {reference(theirs):.3f}), RMSE to the teacher's images",
        ["stage", *(f"{kind}, {what}" for kind in kinds for what in ("distance", "RMSE"))],
        rows,
        machine(),
    )


if __name__ == "__main__":
    main()
