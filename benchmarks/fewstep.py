"""How near students of 8, 4, 2 and 1 steps come to the data, method by method, at equal numbers of network evaluations.

    python benchmarks/fewstep.py --dry_run                       # what would be done, and for how long
    python benchmarks/fewstep.py                                 # digits of 8×8 pixels: hours on two CPU cores
    python benchmarks/fewstep.py --config benchmarks/digits_16.toml --teacher_iters 10000 --batch_size 32 \
        --targets 4,1 --budgets 600,2400 --name fewstep_digits       # a smaller network
    python benchmarks/fewstep.py --data data/noto_32 --config benchmarks/emoji_classes_32.toml --batch_size 32 \
        --num 500 --budgets 100,400 --seeds 1 --name fewstep_emoji --work fewstep_emoji

**Budget.** A forward pass of one image is 1, forward and backward 3, a derivative along the flow (scm, meanflow) what
it takes in time, measured here. `--budgets` counts in updates of halvings: of 5 evaluations each (the teacher's two,
the student's three). The ladder of halvings spends a budget on its way to one step; what it has spent when it passes 8,
4 and 2 steps is what every other method may spend to get there.

**Learning rates.** Every method tries each of `--rates` with the first budget, for one step, on a seed that is not
reported, and keeps the rate with the least Fréchet distance. If this is the least or the greatest that was tried, the
next one outside follows (… 1e-4, 3e-4, 1e-3, …). NAME_rates.md has all of them; `--seeds 0` ends there.

**Variants.** `progressive4` has stages that divide the steps by 4, `+last3` gives the last stage three times the share
of each other one, `+average` makes students of averaged weights; these can be combined. `--seeds 0 --methods
progressive,progressive4,progressive+last3,…` finds the best of them.

**Figures.** Of `--num` samples against all images: Fréchet distance on pixels and on the features of an autoencoder,
which is trained once, and their excess over the teacher's many steps; on pixels recall, density and coverage (lost
diversity shows in recall and coverage); RMSE to the teacher's images of the same noise; seconds of training. Mean ±
standard deviation over seeds. The picture beside the table has images of the students of the fewest steps, with the
largest budget, of the same noise.

Runs and figures that are finished are not done again: the same command continues.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.distances import density_coverage, drawn, images_of
from benchmarks.report import machine, write_report
from vdiff.cli.console import Console
from vdiff.data.images import captioned_grid, save_png
from vdiff.diffusion.continuous import TangentMethod
from vdiff.diffusion.distillation import METHODS
from vdiff.evaluation.features import Features, FileFeatures, pixel_vectors
from vdiff.evaluation.metrics import Manifold, frechet_distance, precision_recall
from vdiff.files import read_json, write_json
from vdiff.models.checkpoint import load_checkpoint, read_config
from vdiff.models.condition import Condition
from vdiff.models.feature_network import write_features
from vdiff.text import duration
from vdiff.training.base import resolve_training
from vdiff.training.base_training import train
from vdiff.training.dataset import TrainingData, open_images
from vdiff.training.engine import build_engine
from vdiff.training.feature_training import FeatureTraining, train_features
from vdiff.training.ladder import run_stages
from vdiff.training.objectives import TrainBatch, bind_derivative
from vdiff.training.stages import plan_stages, resolve_distillation
from vdiff.training.step import StudentState
from vdiff.training.student import stage_run

SEARCH_SEED = 1000
HALVING = 5
COMPARED = "progressive,progressive4,tract,consistency,trajectory,scm,ect,meanflow"
AVERAGE = 1e-3  # weight of a stage's first update in an average, relative to its last
PICTURED = 12
FIGURES = ("fd", "fd_features", "recall", "density", "coverage", "rmse", "seconds")


@dataclass(frozen=True)
class Variant:
    """A method as it is compared.

    Attributes:
        kind: as distill.py calls it.
        ratio: how progressive stages divide the steps.
        last: the share of the last stage, relative to that of each other stage.
        average: whether students are averages of their weights; if not, the method decides.
    """

    kind: str
    ratio: int = 2
    last: int = 1
    average: bool = False


def variant(name: str) -> Variant:
    """`scm`, `tract+last3`, `progressive4+last3+average`."""
    found = re.fullmatch(r"([a-z_]+)([2-9]?)(?:\+last([1-9]))?(\+average)?", name)
    kind = found[1] if found else ""
    if not found or kind not in METHODS or (found[2] and kind != "progressive"):
        raise click.BadParameter(
            f"{name}: give a method, or such as progressive4+last3+average", param_hint="--methods"
        )
    if found[3] and len(METHODS[kind]().plan(8, 1)) == 1:
        raise click.BadParameter(f"{name}: {kind} has one stage", param_hint="--methods")
    return Variant(found[1], int(found[2] or 2), int(found[3] or 1), bool(found[4]))


@dataclass(frozen=True)
class Journey:
    """A ladder of one method to one number of steps (of all in `phases` where the method halves), with its budget.

    Attributes:
        budget: evaluations per image of a batch, that is `HALVING` times the updates of halvings.
        lr: the learning rate; 0: the preset's and the method's.
    """

    method: str
    phases: tuple[int, ...]
    budget: float
    lr: float

    @property
    def name(self) -> str:
        """`tract-32-4-1-4500-0.001`."""
        return "-".join([self.method, *map(str, self.phases), f"{self.budget:.0f}", f"{self.lr:g}"])

    def budget_of(self, stage: int) -> float:
        """The share of a stage, by its number from 0."""
        stages, last = len(self.phases) - 1, variant(self.method).last
        return self.budget * (last if stage == stages - 1 else 1) / (stages - 1 + last)


def phases_of(method: str, teacher_steps: int, steps: int) -> tuple[int, ...]:
    """The stages to `steps`: all divisions by the ratio, two for tract, one for the others."""
    way, ratio = [steps], variant(method).ratio
    if ratio == 2:
        return (teacher_steps, *METHODS[variant(method).kind]().plan(teacher_steps, steps))
    while way[0] < teacher_steps:
        way.insert(0, min(ratio * way[0], teacher_steps))
    return tuple(way)


def spent_by_halvings(teacher_steps: int, updates: int) -> dict[int, float]:
    """Steps → what the ladder of halvings has spent when it gets there, in evaluations per image of a batch.

    Every halving gets the same share.
    """
    stages = teacher_steps.bit_length() - 1
    return {teacher_steps >> k: updates * HALVING * k / stages for k in range(1, stages + 1)}


@dataclass
class Bench:
    """What every run of the comparison shares.

    Attributes:
        real: all images.
        classes: those that samples have in turn, as often as the images; None: the network takes none.
        known: figures by run, which a file remembers.
        theirs: the teacher's images by seed.
    """

    teacher: Path
    teacher_steps: int
    work: Path
    options: dict[str, Any]
    file: Path | None
    count: int
    console: Console
    images: TrainingData
    real: torch.Tensor
    classes: list[int] | None
    features: Features
    derivative: float
    known: dict[str, dict[str, float]] = field(default_factory=dict)
    theirs: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pixels, self.real_features = pixel_vectors(self.real), self.features(self.real)
        self.manifold = Manifold(self.pixels)
        if self.path.exists():
            self.known = read_json(self.path, "delete it: the figures are measured again")

    @property
    def path(self) -> Path:
        """The figures' file."""
        return self.work / "figures.json"

    def cost(self, journey: Journey, place: Path, before: int, after: int) -> float:
        """Evaluations per image of an update of a stage: passes of an actual update are counted."""
        config, described = self.settings(journey, place, before, after, 1)
        stage = plan_stages(config, described)[0]
        run = stage_run(stage, stage.settings(config), self.images, build_engine(config), {})
        student, passes = run.denoiser, []
        method = config.build_method(stage.method)
        of_student = self.derivative if isinstance(method, TangentMethod) else 1.0
        size = 4 * stage.num_steps
        x = torch.zeros(size, *described.shape)
        condition = student.condition(classes=torch.zeros(size, dtype=torch.int64) if described.class_names else None)
        batch = TrainBatch(x, torch.randn_like(x), torch.arange(size).double() / size, condition)
        teacher = run.objective.teacher  # type: ignore[attr-defined]
        hooks = [
            network.register_forward_pre_hook(lambda _, given, weight=weight: passes.append(weight * len(given[0])))
            for network, weight in ((teacher.network, 1.0), (student.network, of_student))
        ]
        run.objective(batch, StudentState(student, student, 1.0, method.networks(student)))
        for hook in hooks:
            hook.remove()
        return 3 + sum(passes) / size

    def settings(self, journey: Journey, place: Path, before: int, after: int, updates: int) -> Any:
        """The settings of one stage, and its teacher."""
        folder = place / journey.name / "original"
        k = journey.phases.index(before)
        base = folder if k == 0 else folder.with_name(f"base_{k - 1}")
        way = variant(journey.method)
        flags: dict[str, Any] = {
            "base": base.as_posix(), "method": way.kind, "phases": f"{before},{after}", "last_factor": 1.0,
            "num_iters": max(1, round(updates / max(1.0, np.log2(before / after)))), "check_images": 0,
            "tracker": "none", "sample_interval": 10**6, "ckpt_interval": 10**6, **self.options,
        }  # fmt: skip
        if journey.lr:
            flags["lr"] = journey.lr
        if way.average:
            flags["ema_remainder"] = AVERAGE
        return resolve_distillation(flags, self.file)

    def run(self, journey: Journey, seed: int) -> Path:
        """Do what is left of a journey; answers where its students lie."""
        place = self.work / f"seed_{seed}"
        base = place / journey.name / "original"
        if not base.exists():
            shutil.copytree(self.teacher, base, ignore=shutil.ignore_patterns("state", "log", "samples"))
        for stage, (before, after) in enumerate(pairwise(journey.phases)):
            updates = round(journey.budget_of(stage) / self.cost(journey, place, before, after))
            config, described = self.settings(journey, place, before, after, updates)
            config = type(config)(**{**vars(config), "seed": seed})
            run_stages(
                plan_stages(config, described), config, self.images, build_engine(config), overwrite=False,
                reporter=self.console,
            )  # fmt: skip
        return base.parent

    def drawn(self, model: Path, steps: int, sampler: str = "ddim", seed: int = 0, count: int = 0) -> torch.Tensor:
        """`count` samples (0: those of the figures)."""
        return drawn(model, steps, sampler, count or self.count, seed, self.classes)

    def figures(self, what: str, models: Sequence[Path], steps: int, sampler: str, seed: int) -> dict[str, float]:
        """The figures of the last of `models`, measured once; the seconds are those that all of them were trained."""
        key = f"{what}, {steps} steps, {sampler}, seed {seed}, n {self.count}"
        if key not in self.known:
            if seed not in self.theirs:
                self.theirs[seed] = self.drawn(self.teacher, self.teacher_steps, "ddim", seed)
            images = self.drawn(models[-1], steps, sampler, seed)
            vectors = pixel_vectors(images)
            values = (
                frechet_distance(vectors, self.pixels),
                frechet_distance(self.features(images), self.real_features),
                precision_recall(vectors, self.manifold)[1].value,
                *density_coverage(vectors, self.manifold),
                float((images - self.theirs[seed]).square().mean().sqrt()),
                sum(read_config(folder).train_seconds for folder in models),
            )
            self.known[key] = dict(zip(FIGURES, values, strict=True))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.known)
        self.console.line(f"{key}: " + ", ".join(f"{name} {value:.4f}" for name, value in self.known[key].items()))
        return self.known[key]


def feature_network(path: Path, images: TrainingData) -> Features:
    """An autoencoder of the images, trained once: its features see blur, and a lack of variety within a class."""
    if not path.exists():
        assert images.store is not None
        training = FeatureTraining(kind="autoencoder")
        write_features(*train_features(images.store, images.image_size, training, reporter=Console()), path)
    return FileFeatures(path, image_size=images.image_size, channels=images.channels)


def classes_of(images: TrainingData) -> list[int]:
    """The classes of all images, in a random order."""
    store = images.store
    assert store is not None
    return [store.label(k) or 0 for k in np.random.default_rng(0).permutation(len(store)).tolist()]


def derivative_cost(teacher: Path) -> tuple[float, float]:
    """A derivative in forward passes, and the seconds on the processor of a forward pass of one image; medians of 9."""
    denoiser, described = load_checkpoint(teacher)
    condition = denoiser.condition(classes=torch.zeros(64, dtype=torch.int64) if described.class_names else None)
    z, t = torch.randn(64, *described.shape), torch.linspace(0.1, 0.9, 64, dtype=torch.float64)
    derive = bind_derivative(denoiser.eval(), condition or Condition())

    def seconds(act: Any) -> float:
        times = []
        for _ in range(10):
            began = time.process_time()
            act()
            times.append(time.process_time() - began)
        return float(np.median(times[1:]))

    with torch.no_grad():
        forward = seconds(lambda: denoiser(z, t, condition))
    return seconds(lambda: derive(z, t, z, t)) / forward, forward / 64


def students(place: Path, journey: Journey) -> list[Path]:
    """The students of a journey, from the first to the last."""
    return [place / f"base_{k}" for k in range(len(journey.phases) - 1)]


@dataclass(frozen=True)
class Tried:
    """The one-step student of a learning rate, on a seed that is not reported."""

    rate: float
    student: Path
    figures: dict[str, float]


def tried_rates(bench: Bench, method: str, budget: float, rates: Sequence[float]) -> list[Tried]:
    """A method with each learning rate, and with others while the best is at an end: from the nearest to the data."""
    found: list[Tried] = []
    waiting = list(rates)
    while waiting:
        for rate in waiting:
            journey = Journey(method, phases_of(method, bench.teacher_steps, 1), budget, rate)
            models = students(bench.run(journey, SEARCH_SEED), journey)
            found.append(Tried(rate, models[-1], bench.figures(journey.name, models, 1, "ddim", SEARCH_SEED)))
        found.sort(key=lambda each: each.figures["fd"])
        waiting = outside(found[0].rate, [each.rate for each in found])
    return found


def outside(best: float, tried: Sequence[float]) -> list[float]:
    """The next rate of … 1e-4, 3e-4, 1e-3, … beyond the best one if that is the least or greatest of several."""
    if len(tried) == 1:
        return []
    known = [float(f"{digit}e{power}") for power in range(-6, 0) for digit in (1, 3)]
    below, above = [rate for rate in known if rate < best], [rate for rate in known if rate > best]
    return below[-1:] * (best == min(tried)) + above[:1] * (best == max(tried))


@dataclass(frozen=True)
class Found:
    """The figures of one model."""

    what: str
    budget: int
    steps: int
    seed: int
    figures: dict[str, float]


def table(found: list[Found], columns: list[int]) -> list[list[str]]:
    """A line for each method and budget, a cell for each number of steps."""
    teachers = {each.seed: each.figures for each in found if each.steps == 0}
    rows = []
    for what, budget in dict.fromkeys((each.what, each.budget) for each in found):
        row = [what, f"{budget:,}" if budget else ""]
        for steps in columns:
            mine = [each for each in found if (each.what, each.budget) == (what, budget) and each.steps in (steps, 0)]
            row.append(cell(mine, teachers))
        rows.append(row)
    return rows


def cell(mine: list[Found], teachers: dict[int, dict[str, float]]) -> str:
    """`0.240 ± 0.012 (+0.033), F 1.31 (+0.20), R 0.71, D 0.98, C 0.93, RMSE 0.112, 45 s`."""
    if not mine:
        return ""
    mean = {name: fmean(each.figures[name] for each in mine) for name in FIGURES}
    spread = f" ± {stdev(each.figures['fd'] for each in mine):.3f}" if len(mine) > 1 else ""
    pixels, features = (
        fmean(each.figures[name] - teachers[each.seed][name] for each in mine) for name in ("fd", "fd_features")
    )
    return f"{mean['fd']:.3f}{spread} ({pixels:+.3f}), F {mean['fd_features']:.2f} ({features:+.2f}), {others(mean)}"


def others(figures: dict[str, float]) -> str:
    """`R 0.71, D 0.98, C 0.93, RMSE 0.112, 45 s`."""
    return (
        f"R {figures['recall']:.2f}, D {figures['density']:.2f}, C {figures['coverage']:.2f}, "
        f"RMSE {figures['rmse']:.3f}, {figures['seconds']:.0f} s"
    )


def seeds_of(word: str, seeds: int) -> tuple[str, int]:
    """`scm:1` → ("scm", 1); a method without a number has all `seeds`."""
    name, _, limit = word.partition(":")
    variant(name)
    if limit and not limit.isdecimal():
        raise click.BadParameter(f"{word}: give METHOD:SEEDS, such as scm:1", param_hint="--methods")
    return name, min(int(limit or seeds), seeds)


def rate_rows(searched: dict[str, list[Tried]], rates: Sequence[float]) -> list[list[str]]:
    """A line for each method, a cell for each learning rate that it tried: `1.263, F 3.35, R 0.37, …`."""
    rows = []
    for method, found in searched.items():
        texts = {
            each.rate: f"{each.figures['fd']:.3f}, F {each.figures['fd_features']:.2f}, {others(each.figures)}"
            for each in found
        }
        rows.append([f"`{method}`", *(texts.get(rate, "") for rate in rates)])
    return rows


@click.command()
@click.option("--data", default="data/digits_8", show_default=True, help="The dataset.")
@click.option("--preset", default="digits", show_default=True, help="Network and learning rates.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file over the preset.")
@click.option("--teacher", type=click.Path(path_type=Path), default=None, help="A base model [default: trained here].")
@click.option("--teacher_iters", default=4000, show_default=True, help="Updates of the teacher, where it is trained.")
@click.option("--teacher_steps", default=32, show_default=True, help="Steps that are distilled: a power of 2.")
@click.option("--budgets", default="900,3600", show_default=True, help="Updates of halvings to reach one step.")
@click.option("--batch_size", default=64, show_default=True)
@click.option("--num", default=0, show_default="as many as there are images", help="Samples of each model.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--methods", default=COMPARED, show_default=True, help="scm:1 reports one seed of it alone.")
@click.option("--rates", default="3e-4,1e-3,3e-3", show_default=True, help="Learning rates that every method tries.")
@click.option("--steps", default="8,4,2,1", show_default=True, help="Of the students that are looked at.")
@click.option("--targets", default="", show_default="all of --steps", help="Those that not only halvings are led to.")
@click.option("--set", "more", multiple=True, metavar="NAME=VALUE", help="A setting of distill.py, for all methods.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("fewstep"), show_default=True)
@click.option("--name", default="fewstep", show_default=True, help="Of the file in benchmarks/results.")
@click.option("--dry_run", is_flag=True, help="Train the teacher, print what is left to do and its time, and stop.")
def main(
    data: str,
    preset: str,
    file: Path | None,
    teacher: Path | None,
    teacher_iters: int,
    teacher_steps: int,
    budgets: str,
    batch_size: int,
    num: int,
    seeds: int,
    methods: str,
    rates: str,
    steps: str,
    targets: str,
    more: tuple[str, ...],
    work: Path,
    name: str,
    dry_run: bool,
) -> None:
    """Print the table and write it to benchmarks/results/NAME.md."""
    console, limits = Console(), dict(seeds_of(word, seeds) for word in methods.split(","))
    columns, aims = (sorted(map(int, each.split(",")), reverse=True) for each in (steps, targets or steps))
    amounts, tried = [int(word) for word in budgets.split(",")], [float(word) for word in rates.split(",")]
    if teacher is None:
        teacher = work / "original"
        flags = {"data": data, "preset": preset, "num_iters": teacher_iters, "batch_size": batch_size}
        resume = (teacher / "run.toml").exists()
        given, settings_file = ({}, None) if resume else (flags, file)
        config, images = resolve_training(given, settings_file, folder=teacher, resume=resume)
        train(config, images, folder=teacher, resume=resume, overwrite=False, reporter=console)
    given_images = open_images(data, read_config(teacher).image_size)
    measured = work / "derivative.json"  # measured once: the numbers of updates follow from it
    if not measured.exists():
        measured.parent.mkdir(parents=True, exist_ok=True)
        write_json(measured, dict(zip(("derivative", "seconds"), derivative_cost(teacher), strict=True)))
    derivative, seconds = (read_json(measured, "delete it")[key] for key in ("derivative", "seconds"))
    spent = {amount: spent_by_halvings(teacher_steps, amount) for amount in amounts}
    searches = len(limits) * len(tried) * spent[amounts[0]][1]
    reported = sum(
        limit * (each[1] if method == "progressive" else sum(each[k] for k in aims))
        for each in spent.values()
        for method, limit in limits.items()
    )
    total = (searches + reported) * batch_size
    console.line(
        f"a derivative takes {derivative:.2f} forward passes; {total:,.0f} evaluations in all, about "
        f"{duration(total * seconds)} if nothing is done yet, drawing samples apart"
    )
    if dry_run:
        return
    options: dict[str, Any] = {"data": data, "preset": preset, "batch_size": batch_size}
    options |= {key: json.loads(value) for key, _, value in (each.partition("=") for each in more)}
    real, features = images_of(data, given_images.image_size), feature_network(work / "features.pt2", given_images)
    count = num or len(real)
    classes = classes_of(given_images) if read_config(teacher).class_names else None
    bench = Bench(
        teacher, teacher_steps, work, options, file, count, console, given_images, real, classes, features, derivative
    )
    found: list[Found] = []
    shown = {f"teacher, {teacher_steps} steps": bench.drawn(teacher, teacher_steps, count=PICTURED)}
    for seed in range(seeds):
        many = bench.figures("teacher", [teacher], teacher_steps, "ddim", seed)
        found.append(Found("teacher, all steps", 0, 0, seed, many))
        for sampler in ("ddim", "dpmpp_2m"):
            for k in columns:
                few = bench.figures("teacher", [teacher], k, sampler, seed)
                found.append(Found(f"teacher, {sampler}", 0, k, seed, few))
    searched = {method: tried_rates(bench, method, spent[amounts[0]][1], tried) for method in limits}
    chosen = {method: results[0].rate for method, results in searched.items()}
    all_rates = sorted({each.rate for results in searched.values() for each in results})
    shown |= {method: bench.drawn(results[0].student, 1, count=PICTURED) for method, results in searched.items()}
    measures = "recall R, density D, coverage C, RMSE to the teacher, training time"
    report = write_report(
        f"{name}_rates",
        f"One-step students of {data} by learning rate, with the evaluations of {amounts[0]} updates of halvings: "
        f"Fréchet distance on pixels and on features F, {measures}; n = {count}",
        ["", *(f"{rate:g}" for rate in all_rates)],
        rate_rows(searched, all_rates),
        machine(),
    )
    for amount in amounts:
        for seed in range(seeds):
            for method in (name for name, limit in limits.items() if seed < limit):
                title = f"`{method}`, lr {chosen[method]:g}" + f", {limits[method]} seed(s)" * (limits[method] < seeds)
                for target in [1] if method == "progressive" else aims:
                    phases = phases_of(method, teacher_steps, target)
                    journey = Journey(method, phases, spent[amount][target], chosen[method])
                    models = students(bench.run(journey, seed), journey)
                    for k, reached in enumerate(phases[1:], 1):
                        if reached == target or (method == "progressive" and reached in columns):
                            figures = bench.figures(journey.name, models[:k], reached, "ddim", seed)
                            found.append(Found(title, amount, reached, seed, figures))
                    if target == columns[-1] and seed == 0:  # of the last budget in the end
                        shown[method] = bench.drawn(models[-1], target, count=PICTURED)
    if found:
        (work / "found.json").write_text(json.dumps([asdict(each) for each in found], indent=1))
        report = write_report(
            name,
            f"Students of {data} at equal evaluations: Fréchet distance on pixels and on features F (excess over the "
            f"teacher's {teacher_steps} steps), {measures}; n = {count}, {seeds} seed(s)",
            ["", "updates of halvings", *(f"{k} step{'s' if k > 1 else ''}" for k in columns)],
            table(found, columns),
            machine(),
        )
    save_png(captioned_grid([*map(list, shown.values())], [""] * PICTURED, [*shown]), report.with_suffix(".png"))


if __name__ == "__main__":
    main()
