"""How near students of 8, 4, 2 and 1 steps come to the data, method by method, at an equal budget.

    python benchmarks/fewstep.py                                 # digits of 8×8 pixels: hours on two CPU cores
    python benchmarks/fewstep.py --data data/emoji_32 --config benchmarks/emoji_32.toml --batch_size 32 --num 500 \
        --budget 200 --name fewstep_emoji --work fewstep_emoji

One teacher, `--teacher_steps` steps of which are distilled. Progressive distillation halves its way down, with
`--budget` updates in all, and what it has spent when it passes 8, 4 and 2 steps is what every other method may spend to
get there: `tract` in two phases (the first takes it to 8 or 4 steps, the second to 2 or 1), `consistency` and
`trajectory` in one stage each. An update is one step of the optimiser on `--batch_size` images for every method; it
asks networks 3 times for each image, and by `trajectory`, in 16 steps, 17 times for students of one step, and about 10,
6 and 4 times for two, four and eight.

Distances are Fréchet distances between `vdiff.evaluation.features.pixel_vectors` of `--num` samples and of all images.
The excess is what a student has over its own teacher of many steps. Runs that are finished are not done again: the same
command goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.distances import SOLVERS, Distances, reference_of
from benchmarks.report import machine, write_report
from vdiff.cli.console import Console
from vdiff.models.checkpoint import read_config
from vdiff.training.base import resolve_training
from vdiff.training.base_training import train
from vdiff.training.dataset import open_images
from vdiff.training.engine import build_engine
from vdiff.training.ladder import run_stages
from vdiff.training.stages import plan_stages, resolve_distillation


@dataclass(frozen=True)
class Journey:
    """A ladder of one method: the steps of its students, and the updates of each stage."""

    method: str
    phases: tuple[int, ...]
    updates: tuple[int, ...]

    @property
    def name(self) -> str:
        """`tract-32-4-1`."""
        return "-".join([self.method, *map(str, self.phases)])


def journeys(
    teacher_steps: int, budget: int, last_factor: float, methods: list[str], steps: list[int]
) -> list[Journey]:
    """What is trained; every method reaches a number of steps with what progressive distillation spent until then."""
    halvings = [teacher_steps >> k for k in range(1, teacher_steps.bit_length())]
    shares = [last_factor if steps <= 2 else 1.0 for steps in halvings]
    spent = dict(zip(halvings, np.cumsum(shares) / sum(shares) * budget, strict=True))
    until = {steps: round(updates) for steps, updates in spent.items()}
    found = []
    for method in methods:
        if method == "progressive":
            ends = [0, *(until[steps] for steps in halvings)]
            updates = tuple(after - before for before, after in pairwise(ends))
            found.append(Journey(method, (teacher_steps, *halvings), updates))
        elif method == "tract":
            for middle, last in pairs_of(steps):
                updates = (until[middle], until[last] - until[middle])
                found.append(Journey(method, (teacher_steps, middle, last), updates))
        else:
            found += [Journey(method, (teacher_steps, last), (until[last],)) for last in steps]
    return found


def pairs_of(steps: list[int]) -> list[tuple[int, int]]:
    """The two phases of each journey of tract: 8, 4, 2, 1 → (8, 2), (4, 1)."""
    half = len(steps) // 2
    return list(zip(steps[:half], steps[-half:], strict=True))


def run(
    journey: Journey,
    teacher: Path,
    work: Path,
    seed: int,
    options: dict[str, Any],
    settings: Path | None,
    console: Console,
) -> None:
    """Do what is left of a journey; its students lie in `work`/NAME."""
    base = work / journey.name / "original"
    if not base.exists():
        shutil.copytree(teacher, base, ignore=shutil.ignore_patterns("state", "log", "samples"))
    for k, (before, after) in enumerate(pairwise(journey.phases)):
        flags = {
            "base": (base if k == 0 else base.with_name(f"base_{k - 1}")).as_posix(),
            "method": journey.method,
            "phases": f"{before},{after}",
            "num_iters": max(1, round(journey.updates[k] / max(1.0, np.log2(before / after)))),
            "last_factor": 1.0,
            "seed": seed,
            "check_images": 0,
            "tracker": "none",
            "sample_interval": 10**6,
            "ckpt_interval": 10**6,
            **options,
        }
        config, described = resolve_distillation(flags, settings)
        images = open_images(config.data, described.image_size)
        run_stages(
            plan_stages(config, described), config, images, build_engine(config), overwrite=False, reporter=console
        )


@dataclass(frozen=True)
class Found:
    """One distance."""

    what: str
    steps: int
    seed: int
    distance: float


def table(found: list[Found], methods: list[str], columns: list[int]) -> list[list[str]]:
    """A line for each way, a column for each number of steps: mean ± spread over seeds, and the excess."""
    teachers = {each.seed: each.distance for each in found if each.what == "teacher"}
    rows = []
    for what in ["teacher", *(f"teacher, {name}" for name in SOLVERS), *methods]:
        row = [what]
        for steps in columns:
            mine = [each for each in found if each.what == what and each.steps in (steps, 0)]
            if not mine:
                row.append("")
                continue
            values = [each.distance for each in mine]
            excess = [each.distance - teachers[each.seed] for each in mine]
            spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
            row.append(f"{np.mean(values):.3f}{spread} (+{np.mean(excess):.3f})")
        rows.append(row)
    return rows


@click.command()
@click.option("--data", default="data/digits_8", show_default=True, help="The dataset.")
@click.option("--preset", default="digits", show_default=True, help="Network and learning rates.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file over the preset.")
@click.option("--teacher", type=click.Path(path_type=Path), default=None, help="A base model [default: trained here].")
@click.option("--teacher_iters", default=4000, show_default=True, help="Updates of the teacher, where it is trained.")
@click.option("--teacher_steps", default=32, show_default=True, help="Steps that are distilled.")
@click.option("--budget", default=2400, show_default=True, help="Updates to reach one step.")
@click.option("--last_factor", default=1.0, show_default=True, help="Of progressive, for 2 steps and 1.")
@click.option("--batch_size", default=64, show_default=True)
@click.option("--num", default=0, show_default="as many as there are images", help="Samples of each distance.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--methods", default="progressive,tract,consistency,trajectory", show_default=True)
@click.option("--steps", default="8,4,2,1", show_default=True, help="Of the students that are looked at.")
@click.option("--set", "settings", multiple=True, metavar="METHOD.NAME=VALUE", help="A setting of a method.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("fewstep"), show_default=True)
@click.option("--name", default="fewstep", show_default=True, help="Of the file in benchmarks/results.")
def main(
    data: str,
    preset: str,
    file: Path | None,
    teacher: Path | None,
    teacher_iters: int,
    teacher_steps: int,
    budget: int,
    last_factor: float,
    batch_size: int,
    num: int,
    seeds: int,
    methods: str,
    steps: str,
    settings: tuple[str, ...],
    work: Path,
    name: str,
) -> None:
    """Print the table and write it to benchmarks/results/NAME.md."""
    console, names = Console(), methods.split(",")
    columns = sorted(map(int, steps.split(",")), reverse=True)
    if teacher is None:
        teacher = work / "original"
        flags = {"data": data, "preset": preset, "num_iters": teacher_iters, "batch_size": batch_size}
        resume = (teacher / "run.toml").exists()
        given, settings_file = ({}, None) if resume else (flags, file)
        config, images = resolve_training(given, settings_file, folder=teacher, resume=resume)
        train(config, images, folder=teacher, resume=resume, overwrite=False, reporter=console)
    image_size = read_config(teacher).image_size
    reference, num_images = reference_of(data, image_size)
    count = num or num_images
    found = []
    distances = Distances(work / "distances.json", reference, count, console)

    def note(what: str, folder: Path, steps: int, sampler: str, seed: int, shown: int | None = None) -> None:
        distance = distances.of(what, folder, steps, sampler, seed)
        found.append(Found(what, steps if shown is None else shown, seed, distance))

    for seed in range(seeds):
        note("teacher", teacher, teacher_steps, "ddim", seed, shown=0)
        for sampler in SOLVERS:
            for num_steps in columns:
                note(f"teacher, {sampler}", teacher, num_steps, sampler, seed)
    for seed in range(seeds):
        for journey in journeys(teacher_steps, budget, last_factor, names, columns):
            mine = [each.partition(".")[2] for each in settings if each.startswith(f"{journey.method}.")]
            options: dict[str, Any] = {"data": data, "preset": preset, "batch_size": batch_size}
            options |= {key: json.loads(value) for key, _, value in (each.partition("=") for each in mine)}
            place = work / f"seed_{seed}"
            run(journey, teacher, place, seed, options, file, console)
            for k, num_steps in enumerate(journey.phases[1:]):
                if num_steps in columns:
                    note(journey.method, place / journey.name / f"base_{k}", num_steps, "ddim", seed)
    write_report(
        name,
        f"Fréchet distance to {data} (excess over the teacher at {teacher_steps} steps), n = {count}, {seeds} seed(s); "
        f"{budget} updates of {batch_size} images to 1 step",
        ["", *(f"{steps} step{'s' if steps > 1 else ''}" for steps in columns)],
        table(found, names, columns),
        machine(),
    )


if __name__ == "__main__":
    main()
