"""The comparison of methods at equal evaluations: budgets, costs, figures, and that it continues."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import fewstep, report
from benchmarks.distances import density_coverage, drawn, images_of
from benchmarks.fewstep import Bench, Found, Journey, cell, classes_of, main, phases_of, spent_by_halvings, tried_rates
from tests.oracles import randn
from tests.toy import write_checkpoint, write_dataset
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.evaluation.features import FileFeatures
from vdiff.evaluation.metrics import NEIGHBOURS, Manifold, frechet_distance
from vdiff.files import read_json
from vdiff.models.checkpoint import read_config
from vdiff.models.drawing import classes_in_turn, draw
from vdiff.training.dataset import open_images
from vdiff.training.feature_training import FeatureTraining

METHODS_RUN = ("progressive", "progressive4+last3+average", "trajectory", "scm")
FLAGS = (
    "--preset toy --teacher_steps 8 --budgets 6,24 --rates 1e-3,3e-3 --seeds 1 --steps 2,1 --batch_size 4 "
    f"--methods {','.join(METHODS_RUN)}"
)


def test_phases_and_budgets_are_those_of_their_methods():
    assert phases_of("progressive", 32, 4) == (32, 16, 8, 4)
    assert phases_of("progressive4", 32, 1) == (32, 16, 4, 1)
    assert phases_of("progressive4", 32, 2) == (32, 8, 2)
    assert phases_of("progressive8+last3+average", 32, 1) == (32, 8, 1)
    assert phases_of("progressive+last3", 8, 1) == (8, 4, 2, 1)
    last = Journey("progressive+last3", (8, 4, 2, 1), 50.0, 0.0)
    assert [last.budget_of(stage) for stage in range(3)] == [10, 10, 30]
    even = Journey("tract", (32, 8, 1), 50.0, 0.0)
    assert [even.budget_of(stage) for stage in range(2)] == [25, 25]
    assert phases_of("tract", 32, 1) == (32, 8, 1)
    assert phases_of("scm", 32, 2) == (32, 2)
    assert spent_by_halvings(8, 6) == {4: 10.0, 2: 20.0, 1: 30.0}


@pytest.mark.parametrize("name", ["nothing", "scm4", "progressive1", "tract+last0", "scm+last3", "scm:x", "tract+mean"])
def test_names_that_are_no_methods_are_refused(name):
    result = CliRunner().invoke(main, ["--methods", name, "--teacher", "none"])
    assert result.exit_code == 2
    assert f"Invalid value for --methods: {name}: " in result.output + result.stderr


def test_density_and_coverage_are_those_of_the_paper():
    """Written out over all pairs; a sample that repeats one image covers few, and is dense."""
    reference, samples = randn(40, 3, seed=1).numpy(), randn(30, 3, seed=2).numpy()
    pairs = np.linalg.norm(samples[:, None] - reference[None], axis=-1)
    own = np.linalg.norm(reference[:, None] - reference[None], axis=-1)
    radii = np.sort(own, axis=1)[:, NEIGHBOURS]
    inside = pairs <= radii[None]
    expected = inside.sum() / (NEIGHBOURS * 30), inside.any(0).mean()
    assert density_coverage(samples, Manifold(reference)) == pytest.approx(expected)
    same = np.repeat(reference[:1], 30, axis=0)
    density, coverage = density_coverage(same, Manifold(reference))
    assert density >= 1 / NEIGHBOURS
    assert coverage < 0.3


def test_a_cell_has_the_excess_of_each_seed():
    figures = {"fd_features": 4.0, "recall": 0.5, "density": 1.0, "coverage": 0.75, "rmse": 0.1, "seconds": 9.0}
    mine = [Found("scm", 6, 1, seed, {"fd": fd, **figures}) for seed, fd in ((0, 1.0), (1, 2.0))]
    text = cell(mine, {0: {"fd": 0.5, "fd_features": 1.0}, 1: {"fd": 0.5, "fd_features": 3.0}})
    assert text == "1.500 ± 0.707 (+1.000), F 4.00 (+2.00), R 0.50, D 1.00, C 0.75, RMSE 0.100, 9 s"


def test_samples_have_the_classes_of_the_images_as_often(tmp_path):
    data = write_dataset(tmp_path / "toy_4", classes="abc", count=10)
    classes = classes_of(open_images(str(data), 4))
    assert sorted(classes) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    denoiser = write_checkpoint(tmp_path / "teacher", classes=3)
    images = drawn(tmp_path / "teacher", 2, "ddim", 14, 0, classes)
    for k in (0, 3, 13):
        alone = partial(classes_in_turn, choices=[classes[k % 10]])
        how = {"indices": [k], "image_size": 4, "num_steps": 2, "seed": 1, "conditions": alone}
        assert torch.allclose(images[k], draw(denoiser.eval(), SAMPLERS["ddim"](), **how)[0], atol=1e-5)
    assert not torch.allclose(images, drawn(tmp_path / "teacher", 2, "ddim", 14, 0), atol=1e-2)


def test_the_search_of_rates_ends_between_two_that_are_worse():
    """Of a bench whose distance is least at a rate that is not among the given ones."""

    class Ideal:
        teacher_steps = 32

        def __init__(self, best: float) -> None:
            self.best, self.tried = best, []

        def run(self, journey: Journey, _: int) -> Path:
            self.tried.append(journey.lr)
            return Path()

        def figures(self, *_) -> dict[str, float]:
            return {"fd": abs(math.log(self.tried[-1] / self.best))}

    for best, expected in (
        (1e-3, [3e-4, 1e-3, 3e-3]),
        (2.5e-2, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (1e-4, [3e-4, 1e-3, 3e-3, 1e-4, 3e-5]),
    ):
        bench = Ideal(best)
        found = tried_rates(bench, "tract", 6.0, (3e-4, 1e-3, 3e-3))
        assert bench.tried == expected
        assert found[0].rate == pytest.approx(best, rel=0.25)
        assert [each.figures["fd"] for each in found] == sorted(each.figures["fd"] for each in found)
    assert tried_rates(Ideal(1.0), "tract", 6.0, (3e-4,))[0].rate == 3e-4  # one rate is not a search


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(fewstep, "FeatureTraining", partial(FeatureTraining, num_iters=10))
    data = write_dataset(tmp_path / "toy_8", size=8)  # feature networks need 8 pixels
    write_checkpoint(tmp_path / "teacher", dataset=str(data), image_size=8)
    return tmp_path


def run(*more: str) -> str:
    words = [*FLAGS.split(), "--data", "toy_8", "--teacher", "teacher", "--work", "work", *more]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output + result.stderr


def test_a_dry_run_estimates_and_trains_nothing(place):
    assert "evaluations in all, about" in run("--dry_run")
    assert not (place / "work/seed_0").exists()


@pytest.mark.slow
def test_the_comparison_continues_and_ends_with_a_table(place, monkeypatch):
    costs: dict[str, float] = {}
    count = Bench.cost

    def noted(bench: Bench, journey: Journey, *stage) -> float:
        costs[journey.method] = count(bench, journey, *stage)
        return costs[journey.method]

    monkeypatch.setattr(Bench, "cost", noted)
    run()
    text = (place / "results/fewstep.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 8  # four methods, two budgets
    for row in rows:
        cells = row.split("|")[3:5]
        assert all(" R " in each and " C " in each for each in cells), row
    rates = (place / "results/fewstep_rates.md").read_text()
    assert [line.split("|")[1].strip() for line in rates.splitlines()[6:]] == [f"`{name}`" for name in METHODS_RUN]
    tried = read_json(place / "work/figures.json", "")["scm-8-1-30-0.003, 1 steps, ddim, seed 1000, n 10"]
    assert f"| {tried['fd']:.3f}, F {tried['fd_features']:.2f}, R " in rates
    network = FileFeatures(place / "work/features.pt2", image_size=8, channels=1)
    many = drawn(place / "teacher", 8, "ddim", len(real := images_of("toy_8", 8)), 0)
    known = read_json(place / "work/figures.json", "")[f"teacher, 8 steps, ddim, seed 0, n {len(real)}"]
    assert known["fd_features"] == pytest.approx(frechet_distance(network(many), network(real)))
    assert known["rmse"] == 0
    assert costs["progressive"] == 5  # the teacher twice, the student, and its gradient
    assert costs["progressive4+last3+average"] == pytest.approx(3 + 4)  # of the last stage, 4 → 1
    assert costs["scm"] > 4 + 1  # the teacher, a derivative, the student and its gradient
    assert costs["trajectory"] == pytest.approx(3 + 16)  # a path of 16 steps for one image
    ways = {path.parent.name.split("-")[0]: read_config(path) for path in (place / "work/seed_0").glob("*-1-*/base_*")}
    assert {name: config.weights for name, config in ways.items() if "progressive" in name} == {
        "progressive": "raw",
        "progressive4+last3+average": "ema",
    }
    assert (place / "work/seed_1000").exists()
    assert (place / "results/fewstep.png").exists()
    students = {path: path.stat().st_mtime_ns for path in (place / "work").rglob("model.safetensors")}
    run()
    assert (place / "results/fewstep.md").read_text() == text
    known = read_json(place / "work/figures.json", "")
    run("--seeds", "2", "--methods", "progressive:1,trajectory:0,scm:1")
    assert read_json(place / "work/figures.json", "").keys() - known.keys() == {
        f"teacher, {k} steps, {sampler}, seed 1, n {len(real)}"
        for k, sampler in ((8, "ddim"), (2, "ddim"), (1, "ddim"), (2, "dpmpp_2m"), (1, "dpmpp_2m"))
    }
    text = (place / "results/fewstep.md").read_text()
    assert "`trajectory`" not in text
    assert text.count("`scm`, lr 0.0") == text.count(", 1 seed(s) |") / 2 == 2  # two budgets
    assert {path: path.stat().st_mtime_ns for path in students} == students
    assert math.isfinite(sum(students.values()))
