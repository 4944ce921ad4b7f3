"""Every way to few steps on points of the plane, where a run takes minutes and its maps can be seen.

    python benchmarks/toy2d.py             # a quarter of an hour: results/toy2d.md and toy2d.png
    python benchmarks/toy2d.py --defaults  # results/toy2d_defaults.md: the methods with other parameters
    python benchmarks/toy2d.py --quick     # a minute, to see that it runs; writes nothing

Data: eight Gaussians on a ring, two moons, a spiral, all within about ±1. The teacher is an MLP that predicts v, taken
at 64 DDIM steps; its map from noise to points is what students should learn. All learn by `vdiff.train` and
`vdiff.distill`: losses, weights, averages, plans and the methods' defaults are those of distill.py.

Equal budget: a student of k steps costs the same number of updates by every method, whatever stages the method goes
through: as many as the halving ladder has done when it comes to k with the shares that distill.py gives it (students of
2 and 1 steps: twice the updates), so 3, 4, 6 and 8 parts for 8, 4, 2 and 1 steps. Batch and learning rate are the same
for all. An update asks networks more or fewer times, by method: the column "evaluations" counts the points that went
forward through a network, the teacher's and the student's, for the 1-step student and all that it was learned from.

Figures: sliced 2-Wasserstein distance W to data, over directions spread evenly (other data: as near as a perfect
sampler would come), and RMSE of coordinates to the teacher's 64-step points from the same noise. Samplers stand in the
column of the evaluations that they may use: Heun takes (k + 1)/2 steps, rounded down. Nothing is clipped. Mean ±
standard deviation over seeds, of weights, data and training noise. Bold: the best method.

Guided distillation needs classes: it learns the ring with the number of the Gaussian as its class, in 4 parts more for
its first stage. Its data are the points of the guided teacher in 64 steps, at the same weight w; students are compared
with that teacher's own fewer steps, each of two evaluations. `match` keeps its teacher's steps: it is what `guided`
does first.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
import torch
from PIL.Image import Dither, Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import vdiff
from benchmarks import plane
from benchmarks.report import RESULTS, machine, write_report
from vdiff.data.images import captioned_grid, save_png

STEPS = (1, 2, 4, 8)
COLUMNS, EVALUATIONS = (*STEPS, plane.TEACHER_STEPS), "evaluations"
HEAD = ["data", "", *(f"W, {k}" for k in COLUMNS), *(f"RMSE, {k}" for k in COLUMNS), EVALUATIONS]
COMPARED = ("progressive", "tract", "consistency", "trajectory")
SAMPLERS_TRIED = ("ddim", "dpmpp_2m", "dpmpp_3m", "heun")
SHORTENED = ("progressive", "tract")
WEIGHTS = (0.0, 1.0, 3.0)
PICTURED = 2000
COLOURS = 128
QUICK = plane.Scale(seeds=1, data=2**14, teacher=400, part=25, points=1024, directions=16)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "progressive": [{}, {"last_factor": 1.0}, {"ema_remainder": 1e-3}, {"lr_schedule": "constant"}],
    "tract": [
        *({}, {"self_ema": 0.0}, {"self_ema": 0.9}),
        *({"ema_remainder": 0.0}, {"lr_schedule": "linear"}, {"lr_schedule": "linear", "ema_remainder": 0.0}),
    ],
    "consistency": [
        *({}, {"first_steps": 8}, {"first_steps": 16}, {"addim": 0.75}, {"ema_remainder": 0.0}),
        *({"lr_schedule": "constant"}, {"lr_schedule": "constant", "ema_remainder": 0.0}),
    ],
    "trajectory": [
        *({}, {"path_sampler": "ddim"}, {"path_steps": 8}, {"path_steps": 32}),
        *({"loss": "l2"}, {"loss": "huber"}),
    ],
}
Values = defaultdict[tuple[str, str, str], list[float]]
"""(data, row, column) → the value of each seed."""
Maps = dict[tuple[str, str, int], Tensor]
"""(data, row, steps) → where the first networks lead the first points of noise."""


@dataclass
class Examination:
    """What the networks of one data set and seed are measured by.

    Attributes:
        data: their name in the table.
        z: noise (n, 2), the same for each.
        real: shadows of data, (directions, n).
        target: where the teacher leads z in 64 steps, (n, 2).
    """

    data: str
    z: Tensor
    real: Tensor
    target: Tensor

    def add(self, values: Values, row: str, steps: int, points: Tensor) -> None:
        """Measure where `steps` evaluations lead z, (n, 2)."""
        distance = plane.rms(plane.shadows(points, len(self.real)) - self.real)
        values[self.data, row, f"W, {steps}"].append(distance)
        values[self.data, row, f"RMSE, {steps}"].append(plane.rms(points - self.target))


def points_of(model: vdiff.Model, z: Tensor, steps: int, sampler: str = "ddim", guidance: float = 0.0) -> Tensor:
    """Where noise (n, 2) is led, (n, 2); classes come in turn."""
    return model.sample(noise=z, steps=steps, sampler=sampler, guidance=guidance, batch_size=len(z))


def students_of(
    teacher: vdiff.Model, data: list[plane.Points], seed: int, scale: plane.Scale, method: str, changes: dict[str, Any]
) -> tuple[dict[int, vdiff.Model], int]:
    """Steps → the student of a method, and the evaluations for the one of 1 step."""
    found = {}
    for steps in sorted(STEPS, reverse=True):
        before = plane.Mlp.evaluations
        found[steps] = plane.learning(
            teacher, data, seed, scale, plane.PARTS[steps], method=method, to_steps=steps, **changes
        ).finish()
    return found, plane.Mlp.evaluations - before


def compare(
    name: str, seed: int, scale: plane.Scale, variants: Sequence[tuple[str, dict[str, Any]]], values: Values, maps: Maps
) -> None:
    """Measure the teacher of a data set and a seed with every sampler, and the students of each method."""
    generator = torch.Generator().manual_seed(1 + seed)
    data, real, other = (plane.DATA[name](count, generator) for count in (scale.data, scale.points, scale.points))
    teacher = plane.new_teacher([data], seed, scale)
    z = torch.randn(scale.points, 2, generator=torch.Generator().manual_seed(0))
    target = points_of(teacher, z, plane.TEACHER_STEPS)
    examination = Examination(name, z, plane.shadows(real[0], scale.directions), target)
    values[name, "other data", f"W, {plane.TEACHER_STEPS}"].append(
        plane.rms(plane.shadows(other[0], scale.directions) - examination.real)
    )
    for sampler in SAMPLERS_TRIED:
        for evaluations in COLUMNS:
            steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
            points = points_of(teacher, z, steps, sampler)
            examination.add(values, f"teacher, {sampler}", evaluations, points)
            if sampler == "ddim":
                maps.setdefault((name, "teacher", evaluations), points[:PICTURED])
    maps.setdefault((name, "data", 0), real[0][:PICTURED])
    maps.setdefault((name, "noise", 0), z[:PICTURED])
    for method, changes in variants:
        began, row = time.monotonic(), ", ".join([method, *(f"{key} {value}" for key, value in changes.items())])
        students, evaluations = students_of(teacher, [data], seed, scale, method, changes)
        values[name, row, EVALUATIONS].append(evaluations)
        for steps, student in students.items():
            points = points_of(student, z, steps)
            examination.add(values, row, steps, points)
            maps.setdefault((name, row, steps), points[:PICTURED])
        print(f"{name}, seed {seed}, {row}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def compare_guided(seed: int, scale: plane.Scale, values: Values) -> None:
    """Measure, for each weight of guidance, the guided teacher with DDIM and the students of `guided`."""
    generator = torch.Generator().manual_seed(1 + seed)
    data = [plane.ring(scale.data, generator)]
    teacher = plane.new_teacher(data, seed, scale, num_classes=plane.MODES)
    guided = plane.guided_student(teacher, data, seed, scale)
    students = {method: students_of(guided, data, seed, scale, method, {}) for method in SHORTENED}
    noise = torch.Generator().manual_seed(3)
    z, other = (torch.randn(scale.points, 2, generator=noise) for _ in range(2))
    for weight in WEIGHTS:
        here, there = (points_of(teacher, start, plane.TEACHER_STEPS, guidance=weight) for start in (z, other))
        examination = Examination(f"ring, w = {weight:g}", z, plane.shadows(there, scale.directions), here)
        for steps in COLUMNS:
            points = points_of(teacher, z, steps, guidance=weight)
            examination.add(values, "guided teacher, ddim", steps, points)
        for method, (found, evaluations) in students.items():
            row = f"guided, then {method}"
            values[examination.data, row, EVALUATIONS].append(evaluations)
            for steps, student in found.items():
                examination.add(values, row, steps, points_of(student, z, steps, guidance=weight))


# The table


def add_mean(values: Values) -> None:
    """Add the mean over the data sets, of each seed, as one more of them."""
    for data, row, column in list(values):
        if data == next(iter(plane.DATA)):
            sets = zip(*(values[name, row, column] for name in plane.DATA), strict=True)
            values["mean", row, column] = [fmean(each) for each in sets]


def lines(values: Values, shown: Sequence[str]) -> list[list[str]]:
    """The table: rows of text for each data set that is shown, the best method in bold."""
    table = []
    for data in shown:
        rows = list(dict.fromkeys(row for name, row, _ in values if name == data))
        methods = [row for row in rows if (data, row, EVALUATIONS) in values]
        for k, row in enumerate(rows):
            cells = [data if k == 0 else "", row]
            for column in HEAD[2:-1]:
                found = values.get((data, row, column))
                others = (values.get((data, method, column)) for method in methods)
                best = min((fmean(each) for each in others if each), default=None)
                cells.append(words(found, bold=row in methods and fmean(found) == best) if found else "")
            spent = values.get((data, row, EVALUATIONS))
            table.append([*cells, f"{fmean(spent) / 1e6:.1f}M" if spent else ""])
    return table


def words(values: Sequence[float], *, bold: bool) -> str:
    """`0.123 ± 0.004`."""
    text = f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
    return f"**{text}**" if bold else text


def picture(maps: Maps) -> Image:
    """The maps of each data set's first networks: rows in 1 and 4 steps, columns the teacher and the methods."""
    rows, names = [], []
    for data in plane.DATA:
        noise = maps[data, "noise", 0]
        for steps, first in ((1, plane.panel(noise, 3.2, noise)), (4, plane.panel(maps[data, "data", 0]))):
            led = [
                maps[data, "teacher", plane.TEACHER_STEPS],
                *(maps[data, row, steps] for row in ("teacher", *COMPARED)),
            ]
            rows.append([first, *(plane.panel(points, noise=noise) for points in led)])
            names.append(f"{data}\n{steps} step{'s' if steps > 1 else ''}")
    titles = ["noise,\ndata below", f"teacher,\n{plane.TEACHER_STEPS} steps", "teacher", *COMPARED]
    return captioned_grid(rows, titles, names, "Where noise is led, in the colours of the noise", scale=1)


@click.command()
@click.option("--quick", is_flag=True, help="A try of a minute, one seed; writes nothing.")
@click.option("--defaults", is_flag=True, help="Other parameters of the methods instead.")
@click.option("--seeds", default=3, show_default=True, help="Networks for each data set.")
@click.option("--methods", default=",".join(COMPARED), show_default=True, help="With --quick: the methods compared.")
def main(quick: bool, defaults: bool, seeds: int, methods: str) -> None:
    """Print the table, and write it and the picture to benchmarks/results."""
    scale = QUICK if quick else plane.Scale(seeds=seeds)
    compared = methods.split(",") if quick else COMPARED
    variants = [(method, changes) for method in compared for changes in (VARIANTS[method] if defaults else [{}])]
    values, maps = Values(list), Maps()
    for name in plane.DATA:
        for seed in range(scale.seeds):
            compare(name, seed, scale, variants, values, maps)
    add_mean(values)
    for seed in range(0 if defaults else scale.seeds):
        compare_guided(seed, scale, values)
    table = lines(values, ["mean"] if defaults else list(dict.fromkeys(data for data, _, _ in values)))
    if quick:
        print("\n".join(" | ".join(row) for row in [HEAD, *table]))
        return
    title = (
        f"Sliced Wasserstein distance W to data and RMSE to the teacher's {plane.TEACHER_STEPS}-step points, "
        f"n = {scale.points}, {seeds} seeds, {plane.PARTS[1] * scale.part:,} updates × {scale.batch_size} to 1 step"
    )
    write_report("toy2d_defaults" if defaults else "toy2d", title, HEAD, table, machine())
    if not defaults:
        few = picture(maps).quantize(COLOURS, dither=Dither.NONE)
        save_png(few, RESULTS / "toy2d.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
