"""Every way to few steps on points of the plane, where a run takes minutes and its maps can be seen.

    python benchmarks/toy2d.py             # results/toy2d.md and toy2d.png
    python benchmarks/toy2d.py --defaults  # results/toy2d_defaults.md: the methods with other parameters
    python benchmarks/toy2d.py --quick     # half a minute, to see that it runs; writes nothing

Data: eight Gaussians on a ring, two moons, a spiral, all within about ±1. The teacher is an MLP that predicts v, taken
at 64 DDIM steps; its map from noise to points is what students should learn. Losses, weights, averages, plans and the
methods' defaults are those of distill.py.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from PIL.Image import Dither, Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.plane import DATA, MODES, points_of, rms, shadows
from benchmarks.plane_picture import data_panel, map_panel, noise_panel
from benchmarks.plane_teachers import PARTS, TEACHER_STEPS, Scale, TeacherPool, guided_pool, open_pool, settings_of
from benchmarks.report import RESULTS, machine, write_report
from vdiff.data.images import captioned_grid, save_png
from vdiff.diffusion.samplers import Denoise
from vdiff.models.condition import Condition
from vdiff.models.denoiser import Denoiser, GuidedDenoiser

STEPS = (1, 2, 4, 8)
COMPARED = ("progressive", "tract", "consistency", "trajectory")
SAMPLERS_TRIED = ("ddim", "dpmpp_2m", "dpmpp_3m", "heun")
SHORTENED = ("progressive", "tract")
WEIGHTS = (0.0, 1.0, 3.0)
PICTURED = 2000
COLOURS = 128
QUICK = Scale(seeds=1, teacher=400, part=25, points=1024, directions=16)
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


@dataclass
class Examination:
    """What all networks of a pool are measured by.

    Attributes:
        z: the same noise for each, (n·S, 2), row r for network r mod S.
        real: shadows of data, (S, directions, n).
        target: where the teacher leads z in 64 steps, (S, n, 2).
    """

    z: Tensor
    real: Tensor
    target: Tensor

    def points(self, denoise: Denoise, steps: int, sampler: str = "ddim") -> Tensor:
        """Where z is led: (S, n, 2)."""
        return apart(points_of(denoise, steps, self.z, sampler), len(self.real))

    def distance(self, points: Tensor) -> Tensor:
        """W of the points (S, n, 2) to data: (S,)."""
        return rms(shadows(points, self.real.shape[1]) - self.real)


def apart(rows: Tensor, count: int) -> Tensor:
    """(n·S, 2), row r of network r mod S, as (S, n, 2)."""
    return rows.reshape(-1, count, 2).transpose(0, 1)


@dataclass
class Row:
    """A line of the table.

    Attributes:
        distances, errors: steps → W and RMSE of each network, (S,).
        evaluations: of networks, for the 1-step student.
    """

    name: str
    distances: dict[int, Tensor] = field(default_factory=dict)
    errors: dict[int, Tensor] = field(default_factory=dict)
    evaluations: int = 0
    is_method: bool = False

    def add(self, steps: int, examination: Examination, points: Tensor) -> None:
        """Measure points (S, n, 2)."""
        self.distances[steps] = examination.distance(points)
        self.errors[steps] = rms(points - examination.target)


def examine(pool: TeacherPool) -> Examination:
    """Noise, data and the teacher's map for the networks of a pool."""
    scale = pool.scale
    generator = torch.Generator().manual_seed(1)
    real = torch.stack([DATA[name](scale.points, generator)[0] for name in pool.data for _ in range(scale.seeds)])
    noise = torch.randn(scale.points, 2, generator=generator)
    z = noise.repeat_interleave(len(real), 0)
    target = apart(points_of(pool.teacher, TEACHER_STEPS, z), len(real))
    return Examination(z, shadows(real, scale.directions), target)


def sampler_rows(
    pool: TeacherPool, examination: Examination, samplers: Sequence[str] = SAMPLERS_TRIED
) -> Iterator[Row]:
    """Other data, and the teacher with every sampler."""
    scale = pool.scale
    generator = torch.Generator().manual_seed(2)
    other = torch.stack([DATA[name](scale.points, generator)[0] for name in pool.data for _ in range(scale.seeds)])
    yield Row("other data", {TEACHER_STEPS: examination.distance(other)})
    for sampler in samplers:
        row = Row(f"teacher, {sampler}")
        for evaluations in (*STEPS, TEACHER_STEPS):
            steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
            row.add(evaluations, examination, examination.points(pool.teacher, steps, sampler))
        yield row


def student_of(pool: TeacherPool, method: str, changes: dict[str, Any], steps: int) -> tuple[Denoiser, int]:
    """The students of a method with changed parameters, and the evaluations that one of them took."""
    return pool.student(settings_of(method, changes, pool.scale), steps)


def method_row(pool: TeacherPool, examination: Examination, method: str, changes: dict[str, Any]) -> Row:
    """The students of a method."""
    said = ", ".join(f"{name} {value}" for name, value in changes.items())
    row = Row(f"{method}, {said}" if said else method, is_method=True)
    for steps in sorted(STEPS, reverse=True):
        student, row.evaluations = student_of(pool, method, changes, steps)
        row.add(steps, examination, examination.points(student, steps))
    return row


def told(denoiser: Denoiser, classes: Tensor, weight: float) -> Denoise:
    """A denoiser with classes and a weight of guidance."""
    condition = Condition({"classes": classes, "guidance": torch.full((len(classes),), weight)})
    return lambda z, t: denoiser(z, t, condition)


def guided_rows(scale: Scale) -> Iterator[tuple[str, list[Row]]]:
    """For each weight of guidance: the guided teacher with DDIM, and the students of `guided`."""
    plain = open_pool(["ring"], scale, num_classes=MODES)
    pool = guided_pool(plain)
    teacher = GuidedDenoiser(plain.teacher)
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(MODES, (scale.points,), generator=generator).repeat_interleave(scale.seeds)
    z, other = (torch.randn(scale.points, 2, generator=generator).repeat_interleave(scale.seeds, 0) for _ in range(2))
    students = {
        (method, steps): student_of(pool, method, {}, steps)
        for method in SHORTENED
        for steps in sorted(STEPS, reverse=True)
    }
    for weight in WEIGHTS:
        guided = told(teacher, classes, weight)
        here, there = (apart(points_of(guided, TEACHER_STEPS, noise), scale.seeds) for noise in (z, other))
        examination = Examination(z, shadows(there, scale.directions), here)
        plainly = Row("guided teacher, ddim")
        for steps in (*STEPS, TEACHER_STEPS):
            plainly.add(steps, examination, examination.points(guided, steps))
        rows = [plainly]
        for method in SHORTENED:
            rows.append(Row(f"guided, then {method}", is_method=True))
            for steps in STEPS:
                student, evaluations = students[method, steps]
                rows[-1].add(steps, examination, examination.points(told(student, classes, weight), steps))
                rows[-1].evaluations = rows[-1].evaluations or evaluations
        yield f"ring, w = {weight:g}", rows


# The table

COLUMNS = (*STEPS, TEACHER_STEPS)
HEAD = ["data", "", *(f"W, {k}" for k in COLUMNS), *(f"RMSE, {k}" for k in COLUMNS), "evaluations"]


def lines(title: str, rows: Sequence[Row], pick: Callable[[Tensor], Tensor] = lambda values: values) -> list[list[str]]:
    """Rows as text; `pick` takes what is meant from the values of all networks."""
    table = []
    for k, row in enumerate(rows):
        cells = [title if k == 0 else "", row.name]
        for own, all_methods in (
            (row.distances, [other.distances for other in rows if other.is_method]),
            (row.errors, [other.errors for other in rows if other.is_method]),
        ):
            for steps in COLUMNS:
                if steps not in own:
                    cells.append("")
                    continue
                values = pick(own[steps])
                best = min((float(pick(each[steps]).mean()) for each in all_methods if steps in each), default=-1)
                cells.append(words(values, bold=row.is_method and float(values.mean()) == best))
        table.append([*cells, f"{row.evaluations / 1e6:.1f}M" if row.evaluations else ""])
    return table


def words(values: Tensor, *, bold: bool) -> str:
    """`0.123 ± 0.004`."""
    text = f"{float(values.mean()):.3f}" + (f" ± {float(values.std()):.3f}" if len(values) > 1 else "")
    return f"**{text}**" if bold else text


def blocks(rows: Sequence[Row], data: Sequence[str]) -> list[list[str]]:
    """The rows for each data set, and for the mean over them."""
    table = []
    for k, name in enumerate(data):
        table += lines(name, rows, lambda values, k=k: values.reshape(len(data), -1)[k])
    return table + lines("mean", rows, lambda values: values.reshape(len(data), -1).mean(0))


def compare(pool: TeacherPool, examination: Examination, variants: Sequence[tuple[str, dict[str, Any]]]) -> list[Row]:
    """The students of methods, with the time of each on stderr."""
    rows = []
    for method, changes in variants:
        began = time.monotonic()
        rows.append(method_row(pool, examination, method, changes))
        print(f"{rows[-1].name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def picture(pool: TeacherPool, examination: Examination) -> Image:
    """The maps of each data set's first networks: rows in 1 and 4 steps, columns the teacher and the methods."""
    seeds, count = pool.scale.seeds, min(PICTURED, pool.scale.points)
    noise = apart(examination.z, len(examination.real))[0, :count]
    generator = torch.Generator().manual_seed(1)
    rows, names = [], []
    for k, name in enumerate(pool.data):
        data, target = DATA[name](count, generator)[0], examination.target[k * seeds, :count]
        for steps, first in ((1, noise_panel(noise)), (4, data_panel(data))):
            drawn = [first, map_panel(noise, target)]
            for denoiser in (pool.teacher, *(student_of(pool, method, {}, steps)[0] for method in COMPARED)):
                drawn.append(map_panel(noise, examination.points(denoiser, steps)[k * seeds, :count]))
            rows.append(drawn)
            names.append(f"{name}\n{steps} step{'s' if steps > 1 else ''}")
    titles = ["noise,\ndata below", f"teacher,\n{TEACHER_STEPS} steps", "teacher", *COMPARED]
    return captioned_grid(rows, titles, names, "Where noise is led, in the colours of the noise", scale=1)


@click.command()
@click.option("--quick", is_flag=True, help="A try of seconds, one seed; writes nothing.")
@click.option("--defaults", is_flag=True, help="Other parameters of the methods instead.")
@click.option("--seeds", default=3, show_default=True, help="Networks for each data set.")
def main(quick: bool, defaults: bool, seeds: int) -> None:
    """Print the table, and write it and the picture to benchmarks/results."""
    scale = QUICK if quick else Scale(seeds=seeds)
    pool = open_pool(list(DATA), scale)
    examination = examine(pool)
    if defaults:
        variants = [(method, changes) for method, each in VARIANTS.items() for changes in each]
        table = lines(
            "mean", compare(pool, examination, variants), lambda values: values.reshape(len(DATA), -1).mean(0)
        )
    else:
        rows = list(sampler_rows(pool, examination))
        rows += compare(pool, examination, [(method, {}) for method in COMPARED])
        table = blocks(rows, pool.data)
        for title, guided in guided_rows(scale):
            table += lines(title, guided)
    if quick:
        print("\n".join(" | ".join(row) for row in [HEAD, *table]))
        return
    title = (
        f"Sliced Wasserstein distance W to data and RMSE to the teacher's {TEACHER_STEPS}-step points, "
        f"n = {scale.points}, {seeds} seeds, {PARTS[1] * scale.part:,} updates × {scale.batch_size} to 1 step"
    )
    write_report("toy2d_defaults" if defaults else "toy2d", title, HEAD, table, machine())
    if not defaults:
        few = picture(pool, examination).quantize(COLOURS, dither=Dither.NONE)
        save_png(few, RESULTS / "toy2d.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
