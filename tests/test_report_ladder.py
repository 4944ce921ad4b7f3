"""A ladder writes its report by itself, and is none the worse where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import TINY, done
from tests.toy import write_dataset
from vdiff.evaluation.results import Evaluation

REPORT = {"VDIFF_REPORT": "True"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, settings, and a base model of 16 steps."""
    folder = tmp_path_factory.mktemp("place")
    write_dataset(folder / "data", count=40)
    (folder / "tiny.toml").write_text(TINY)
    done(f"train.py --config {folder}/tiny.toml --data {folder}/data --out {folder}/checkpoints/original --device cpu")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def long_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder is measured at its end as if its few updates had been many."""
    monkeypatch.setattr("vdiff.training.stages.EVALUATIONS", 10**5)


def distill(place: Path) -> str:
    return (
        f"distill.py --config {place}/tiny.toml --base {place}/checkpoints/original --stages 2 --device cpu "
        f"--check_images 0 --distance_every 1"
    )


@pytest.mark.usefixtures("long_training")
def test_a_ladder_ends_with_its_report(place, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: not opened.append(address))
    result = done(f"{distill(place)} --open", REPORT)
    page = place / "checkpoints" / "report.html"
    assert f"report     {page}" in result.stdout
    assert opened == [page.resolve().as_uri()]
    found = Evaluation.read(place / "checkpoints" / "evaluation.json")
    rows = [(Path(row.checkpoint).name, row.sampler, row.num_steps) for row in found.rows]
    assert rows == [
        ("original", "ddim", 16),
        *(("original", "ddim", steps) for steps in (1, 2, 4, 8)),
        *(("original", "dpmpp_2m", steps) for steps in (1, 2, 4, 8)),
        ("base_0", "ddim", 8),
        ("base_1", "ddim", 4),
    ]
    assert {row.n for row in found.rows} == {256}
    html = page.read_text(encoding="utf-8")
    assert "teacher, dpmpp_2m" in html
    assert html.count('data-view="strip" data-count="8"') == 3

    (place / "checkpoints" / "evaluation.json").write_text(
        found.to_json().replace('"features": "pixels"', '"features": "mine"')
    )
    done(distill(place), REPORT)
    assert "Fréchet distance on mine" in page.read_text(encoding="utf-8"), "an evaluation of these weights is kept"
    done(f"vdiff report {place}/checkpoints --evaluate --num 50 --device cpu")
    assert "50 samples each" in page.read_text(encoding="utf-8"), "unless another one is asked for"


def test_after_a_short_training_nothing_is_measured_for_the_report(place):
    """It would take longer than the training; the page is written with what there is."""
    (place / "checkpoints" / "evaluation.json").unlink(missing_ok=True)
    result = done(f"{distill(place)} --overwrite", REPORT)
    assert (
        f"no evaluation for the report: the training was short; `vdiff report {place}/checkpoints --evaluate` makes one"
    ) in result.stderr.splitlines()
    assert not (place / "checkpoints" / "evaluation.json").exists()
    line = "comparing 8 images of each, without models of more than 4 steps, because the training was short"
    assert line in result.stderr
    assert (place / "checkpoints" / "report.html").is_file()


def test_a_report_that_fails_is_one_line(place, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no plot\nfor you")

    monkeypatch.setattr("vdiff.report.page.render", fail)
    result = done(distill(place), REPORT)
    assert result.stderr.splitlines()[-1] == (
        f"no report was written: RuntimeError: no plot; `vdiff report {place}/checkpoints` tries again"
    )
    assert "next       python sample.py" in result.stdout


def test_a_ladder_without_a_report(place):
    (place / "checkpoints" / "report.html").unlink(missing_ok=True)
    assert "report " not in done(f"{distill(place)} --report False").stdout
    assert not (place / "checkpoints" / "report.html").exists()
