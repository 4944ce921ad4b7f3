"""Does the parameterisation matter for distillation? The same network and data under vp, edm and flow.

    python benchmarks/parameterisations.py          # twenty minutes of a free core: results/parameterisations.md
    python benchmarks/parameterisations.py --state rows.jsonl --updates 0.25   # continues where it was stopped
    python benchmarks/parameterisations.py --quick  # a minute, to see that it runs; writes nothing

Data, network, budgets and distances are those of `toy2d`: points of the plane, an MLP, 64 DDIM steps of a teacher, and
its students of 4, 2 and 1 steps by `progressive`. A teacher learns as its family does by default: its schedule, the
distribution of its noise levels, and the weighting of its errors (vp: cosine, uniform times, max(SNR, 1)). EDM is told
σ_data of the data. All networks begin with the same weights, and all students learn with the same settings.

Figures: sliced 2-Wasserstein distance W to data, and RMSE of coordinates to the points of the own teacher in 64 steps
from the same noise. Mean ± standard deviation over seeds.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plane
from benchmarks.report import machine, write_report
from vdiff.diffusion.parameterisation import Edm, Flow, Parameterisation, Vp

STEPS = (4, 2, 1)
ROWS = ("vp, v", "edm", "flow")
NOISE_SCALE = 250.0
"""The network's waves are made for times up to about 1000."""
HEAD = ["data", "parameterisation", "W, teacher", *(f"W, {k}" for k in STEPS), *(f"RMSE, {k}" for k in STEPS)]
QUICK = plane.Scale(seeds=1, data=2**13, teacher=300, part=15, points=512, directions=16)
Values = defaultdict[tuple[str, str, str], list[float]]
"""(data, parameterisation, column) → the value of each seed."""


def families(data: plane.Points) -> dict[str, Parameterisation]:
    """Those that are compared, for data of this standard deviation."""
    deviation = round(float(data[0].std()), 3)
    return dict(zip(ROWS, (Vp("v"), Edm(deviation, noise_scale=NOISE_SCALE), Flow()), strict=True))


def figures(name: str, seed: int, row: str, scale: plane.Scale) -> dict[str, float]:
    """What is measured on the teacher of one parameterisation and on its students, by column."""
    generator = torch.Generator().manual_seed(1 + seed)
    data, real = (plane.DATA[name](count, generator) for count in (scale.data, scale.points))
    z = torch.randn(scale.points, 2, generator=torch.Generator().manual_seed(0))
    shadows = plane.shadows(real[0], scale.directions)

    def distance(points: torch.Tensor) -> float:
        return plane.rms(plane.shadows(points, scale.directions) - shadows)

    teacher = plane.new_teacher([data], seed, scale, parameterisation=families(data)[row])
    target = teacher.sample(noise=z, batch_size=len(z))
    found = {"W, teacher": distance(target)}
    for steps in STEPS:
        learning = plane.learning(teacher, [data], seed, scale, plane.PARTS[steps], to_steps=steps)
        points = learning.finish().sample(noise=z, batch_size=len(z))
        found |= {f"W, {steps}": distance(points), f"RMSE, {steps}": plane.rms(points - target)}
    return found


def measured(scale: plane.Scale, state: Path | None) -> Values:
    """All figures, seed by seed; each row is kept in `state` when it is finished, and taken from there."""
    kept = [json.loads(line) for line in state.read_text().splitlines()] if state and state.exists() else []
    values = Values(list)
    for seed in range(scale.seeds):
        for name in plane.DATA:
            for row in ROWS:
                began, key = time.monotonic(), [name, seed, row, repr(replace(scale, seeds=0))]
                found = next((figures for known, figures in kept if known == key), None)
                if found is None:
                    found = figures(name, seed, row, scale)
                    print(f"{name}, seed {seed}, {row}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
                    if state:
                        with state.open("a") as file:
                            print(json.dumps([key, found]), file=file)
                for column, value in found.items():
                    values[name, row, column].append(value)
    return values


def lines(values: Values) -> list[list[str]]:
    """The table, and the means over the data sets."""
    rows = list(dict.fromkeys(row for _, row, _ in values))
    names = list(dict.fromkeys(name for name, _, _ in values))
    table = [[name, row, *(words(values[name, row, column]) for column in HEAD[2:])] for name in names for row in rows]
    means = {
        (row, column): [fmean(each) for each in zip(*(values[name, row, column] for name in names), strict=True)]
        for row in rows
        for column in HEAD[2:]
    }
    return table + [["mean", row, *(words(means[row, column]) for column in HEAD[2:])] for row in rows]


def words(values: list[float]) -> str:
    """`0.123 ± 0.004`."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


@click.command()
@click.option("--quick", is_flag=True, help="A try of a minute, one seed; writes nothing.")
@click.option("--seeds", default=3, show_default=True, help="Networks for each data set.")
@click.option("--updates", default=1.0, show_default=True, help="Share of the updates of toy2d.")
@click.option("--state", type=click.Path(path_type=Path), help="Keep finished rows in this file, and continue from it.")
def main(quick: bool, seeds: int, updates: float, state: Path | None) -> None:
    """Print the table, and write it to benchmarks/results."""
    usual = plane.Scale(seeds=seeds)
    usual = replace(usual, teacher=round(updates * usual.teacher), part=round(updates * usual.part))
    scale = QUICK if quick else usual
    values = measured(scale, state)
    table = lines(values)
    if quick:
        print("\n".join(" | ".join(row) for row in [HEAD, *table]))
        return
    budgets = ", ".join(f"{plane.PARTS[steps] * scale.part:,}" for steps in STEPS)
    title = (
        f"Parameterisations: sliced Wasserstein distance W to data and RMSE to the own teacher's "
        f"{plane.TEACHER_STEPS}-step points, n = {scale.points}, {seeds} seeds; "
        f"{scale.teacher:,} updates of a teacher, {budgets} of its students of {', '.join(map(str, STEPS))} steps"
    )
    write_report("parameterisations", title, HEAD, table, machine())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
