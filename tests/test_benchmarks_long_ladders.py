"""The benchmark of precision in long ladders: its parts, its table, and that it continues."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks import long_ladders, report
from benchmarks.distances import drawn
from tests.toy import write_checkpoint, write_dataset
from vdiff.models.checkpoint import read_config


def test_halvings_lead_from_one_number_to_another():
    assert long_ladders.halvings(8, 1) == [8, 4, 2, 1]
    assert long_ladders.halvings(1024, 256) == [1024, 512, 256]


@pytest.mark.slow
def test_every_stage_has_the_precision_of_its_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(long_ladders, "SHORTEST_IN_HALF", 4)
    monkeypatch.setitem(long_ladders.PARTS, "auto", [("fp32", 4), ("bf16", 1)])
    write_checkpoint(tmp_path / "teacher", dataset=str(write_dataset(tmp_path / "toy_4")))
    words = ["--teacher", "teacher", "--data", "toy_4", "--preset", "toy", "--ladders", "8", "--updates", "2"]
    words += ["--batch_size", "4", "--num", "6", "--most", "4", "--work", "work", "--precisions", "bf16,auto"]

    def run() -> str:
        result = CliRunner().invoke(long_ladders.main, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return next((tmp_path / "results").glob("long_ladders*.md")).read_text()

    text = run()
    assert [line.split("|")[1].strip() for line in text.splitlines()[6:]] == ["8 → 4", "4 → 2", "2 → 1"]
    for kind, precisions in {"bf16": ["bf16"] * 3, "auto": ["fp32", "bf16", "bf16"]}.items():
        folders = [tmp_path / f"work/8_{kind}/base_{k}" for k in range(3)]
        assert [read_config(folder).num_timesteps for folder in folders] == [4, 2, 1]
        for folder, precision in zip(folders, precisions, strict=True):
            assert f'precision = "{precision}"' in (folder / "run.toml").read_text()
    known = json.loads((tmp_path / "work/figures.json").read_text())
    found = known["work/8_bf16/base_0, 4 steps, n 6"]
    images, theirs = (drawn(tmp_path / name, 4, "ddim", 6, 0) for name in ("work/8_bf16/base_0", "teacher"))
    assert found[1] == pytest.approx(float((images - theirs).square().mean().sqrt()))
    students = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("model.safetensors")}
    assert run() == text
    assert {path: path.stat().st_mtime_ns for path in students} == students
