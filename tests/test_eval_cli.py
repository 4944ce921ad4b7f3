"""`vdiff evaluate`: what it prints, and what it refuses in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.commands import done, error
from tests.evaluating import write_all
from tests.toy import write_checkpoint, write_dataset
from vdiff.data.store import JOB_FILE
from vdiff.errors import VdiffError
from vdiff.evaluation.results import Evaluation, Metric


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_all(folder)
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


FEW = "--data data --num 30 --device cpu"


def test_a_table_says_what_its_figures_rest_on(place):
    line = f"vdiff evaluate model teacher {FEW} --num_timesteps 2,4 --samplers ddim,dpmpp_2m --out two.json"
    result = done(line)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("reference  data: 40 images of 4×4×1, made by another program, fingerprint ")
    assert lines[1] == "features   pixels"
    assert lines[2].startswith("model      model: raw, ")
    assert "samples    30 a row, seed 0, uniform grid, cpu" in lines
    head = lines[lines.index("Evaluation") + 1]
    for word in ("sampler", "steps", "evals", "fd@30", "kd", "precision", "recall", "nearest", "ms/image"):
        assert word in head.split()
    rows = [line.split() for line in lines[lines.index("Evaluation") + 2 :] if line.startswith(("model", "teacher"))]
    assert [row[:4] for row in rows[:2]] == [["model", "ddim", "2", "2"], ["model", "ddim", "4", "4"]]
    assert len(rows) == 8
    assert "fd_inf" not in head
    assert any("fd@30 is biased upwards" in line for line in lines)
    assert any("fd_inf is omitted: it needs 80 samples" in line for line in lines)
    assert lines[-2:] == ["pairs      two-nearest.png", "figures    two.json"]
    found = Evaluation.read(place / "two.json")
    assert found.command == line
    again = done(line)
    assert again.stdout == result.stdout
    assert again.stderr == ""  # nothing was drawn
    printed = json.loads(done(f"{line} --json").stdout)
    assert printed == json.loads((place / "two.json").read_text())
    assert printed["rows"][0]["metrics"]["fd"]["low"] < printed["rows"][0]["metrics"]["fd"]["value"]


def test_it_lies_beside_the_checkpoints_where_the_report_looks(place):
    done(f"vdiff evaluate model {FEW} --metrics kd --num_timesteps 2")
    assert (place / "evaluation.json").exists()
    assert "holds another evaluation" in error(f"vdiff evaluate model {FEW} --metrics kd --seed 1", 1)


def test_steps_that_a_student_was_not_made_for_are_left_out(place):
    write_checkpoint(place / "student", method="progressive", num_timesteps=2)
    result = done(f"vdiff evaluate model student {FEW} --num_timesteps 2,4 --metrics kd --out student.json")
    assert "student in 4 steps is skipped" in result.stderr
    steps = [(row.checkpoint, row.num_steps) for row in Evaluation.read(place / "student.json").rows]
    assert steps == [("model", 2), ("model", 4), ("student", 2)]
    assert "student cannot sample in 4 steps" in error(f"vdiff evaluate student {FEW} --num_timesteps 4", 1)
    assert "2 uniform steps" in error(f"vdiff evaluate student {FEW} --grid logsnr", 1)


WRONG = {
    "none": ("--data data", 1, "none: no such checkpoint|none.*no such"),
    "model --data nothing": ("", 1, "nothing: no such dataset"),
    "model --data small": ("--num 30", 1, "small holds 12 images, fewer than the 16 dimensions of the features pixels"),
    "model --data tiny": ("--metrics kd", 1, "tiny holds 4 images, fewer than 10"),
    "model --data cut": ("", 1, "cut is an incomplete dataset"),
    "model --data colour": ("", 1, "4×4 with 1 channel, but colour holds 4×4 with 3 channels"),
    "model --num 15": (
        "--data data",
        2,
        "is fewer than the 16 dimensions .* --num 16 or more, or vdiff evaluate --metrics",
    ),
    "model --features text.pt2": ("--data data", 1, "text.pt2 is not a network"),
    "model --features none.pt2": ("--data data", 1, "none.pt2: No such file"),
    "model --features inception --weights text.pt2": ("--data data", 1, "text.pt2.*weights|torch-fidelity"),
    "model --weights text.pt2": ("--data data", 2, "is for Inception"),
    "model --metrics fid": ("--data data", 2, "fid needs Inception's features; .* or --metrics fd"),
    "model --metrics isc": ("--data data", 2, "isc needs Inception's features"),
    "model --metrics rmse": ("--data data", 2, "rmse needs a teacher; give --teacher"),
    "model --metrics fdd": ("--data data", 2, "is unknown; did you mean 'fd'"),
    "model --samplers dim": ("--data data", 2, "'dim' is unknown; did you mean 'ddim'"),
    "model --num_timesteps 0": ("--data data", 2, "0"),
    "model --guidance nan": ("--data data", 2, "--guidance nan: model: nan is not a guidance weight"),
    "model --guidance 2": ("--data data", 2, "cannot predict without a class"),
    "model --teacher_steps 4": ("--data data", 2, "needs a teacher"),
    "model --teacher none": ("--data data", 1, "none"),
    "model --out x.txt": ("--data data", 2, "not a name for a JSON file"),
    "model --raw --ema": ("--data data", 2, "exclude each other"),
    "model --raw": ("--data data", 0, ""),
}


@pytest.fixture(scope="module")
def wrong(place):
    """Datasets and files that cannot be used."""
    write_dataset(place / "small", count=12)
    write_dataset(place / "tiny", count=4)
    write_dataset(place / "colour", count=30, channels=3)
    (place / "cut.partial").mkdir()
    (place / "cut.partial" / JOB_FILE).write_text(json.dumps({"command": "python prepare_data.py photos"}))
    (place / "text.pt2").write_text("nothing")


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.usefixtures("wrong")
def test_what_cannot_be_is_refused_in_one_line(words, place):
    more, code, pattern = WRONG[words]
    number = list(WRONG).index(words)
    out = "" if "--out" in words else f"--out wrong-{number}.json"
    line = f"vdiff evaluate {words} {more} --device cpu --cache wrong {out}"
    if code == 0:
        done(f"{line} --num 20 --metrics kd --num_timesteps 2")
        return
    message = error(line, code)
    assert re.search(pattern, message), message
    assert not list(place.glob(f"*wrong-{number}*"))
    assert not list(place.glob(".wrong*"))


def test_figures_have_the_digits_that_their_intervals_bear_out():
    assert str(Metric(0.20812, 0.1961, 0.2201)) == "0.208 ± 0.012"
    assert str(Metric(34.5678, 33.5678, 35.5678)) == "34.6 ± 1.0"
    assert str(Metric(1234.6, 1000, 1469)) == "1235 ± 234"
    assert str(Metric(0.5)) == "0.5"
    assert str(Metric(float("inf"), None, None)) == "inf"
    assert str(Metric(0.0, 0.0, 0.0)) == "0"


def test_the_data_are_those_of_the_first_model_or_the_only_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def measured(_, data: str, **__: object) -> None:
        seen.append(data)
        raise VdiffError("measured", "no more")

    monkeypatch.setattr("vdiff.evaluation.measure.evaluate", measured)
    write_dataset(Path("data/toy_4"))
    for name, dataset in (("first", "data/toy_4"), ("imported", ""), ("moved", "gone"), ("far", "https://a.b/c")):
        write_checkpoint(Path(name), dataset=dataset)
        assert error(f"vdiff evaluate {name}", 1) == "measured; no more"
    write_dataset(Path("data/other"))
    assert error("vdiff evaluate first imported", 1) == "measured; no more"
    assert seen == ["data/toy_4"] * 3 + ["https://a.b/c", "data/toy_4"]
    assert error("vdiff evaluate imported first", 1).startswith("data/ holds several datasets; choose with --data: ")
