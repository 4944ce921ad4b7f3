"""The benchmark of a whole ladder: on digits with a tiny network, its table against the files that it tells of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import distances, ladder, report
from benchmarks.distances import PixelDistance, images_of
from tests.toy import write_dataset
from vdiff.diffusion.samplers import Ddim
from vdiff.models.checkpoint import load_checkpoint, read_config
from vdiff.models.drawing import draw

SETTINGS = """
preset = "toy"
num_iters = 6
batch_size = 4
tracker = "none"
[unet]
channels = 4
embedding_channels = 8
multipliers = [1]
attention_strides = []
[distill]
preset = "toy"
num_iters = 2
batch_size = 4
check_images = 2
distance_every = 0
max_regression = 1e9
tracker = "none"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the benchmark ran to its end, from 4 steps to 1."""
    root = tmp_path_factory.mktemp("ladder")
    (root / "tiny.toml").write_text(SETTINGS)
    write_dataset(root / "toy_4")
    return root


def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The cells of the table."""
    monkeypatch.setattr(report, "RESULTS", root / "results")
    arguments = ["--data", str(root / "toy_4"), "--config", str(root / "tiny.toml"), "--teacher_steps", "4"]
    arguments += ["--num", "6", "--work", str(root / "work")]
    result = CliRunner().invoke(ladder.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = next((root / "results").glob("ladder*.md")).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_table_tells_of_every_model_and_the_same_command_does_nothing_twice(done, monkeypatch):
    rows = run(done, monkeypatch)
    folders = [done / "work" / name for name in ("original", "base_0", "base_1")]
    assert [row[0] for row in rows[2:]] == ["teacher", "base_0", "base_1", "all students"]
    assert [row[1] for row in rows[2:]] == ["4", "2", "1", ""]
    updates = [read_config(folder).num_iters for folder in folders]
    assert [row[2] for row in rows[2:]] == [*map(str, updates), str(sum(updates[1:]))]
    assert updates == [6, 4, 4]  # twice as many for 2 steps and for 1
    reference = PixelDistance(images_of(str(done / "toy_4"), 4))
    for row, folder, steps in zip(rows[2:], folders, (4, 2, 1), strict=False):
        images = draw(load_checkpoint(folder)[0], Ddim(), indices=range(6), image_size=4, num_steps=steps, seed=1)
        assert row[5] == f"{reference(images):.3f}"
    undistilled = draw(load_checkpoint(folders[0])[0], Ddim(), indices=range(6), image_size=4, num_steps=2, seed=1)
    assert rows[3][6] == f"{reference(undistilled):.3f}"
    picture = next((done / "results").glob("ladder*.png"))
    assert np.array(Image.open(picture)).std() > 0
    known = json.loads((done / "work" / "distances.json").read_text())
    assert len(known) == 3 + 2 * 2
    before = {path: path.read_bytes() for path in (done / "work").rglob("model.safetensors")}
    monkeypatch.setattr(distances, "drawn", None)  # everything is known
    assert run(done, monkeypatch) == rows
    assert {path: path.read_bytes() for path in (done / "work").rglob("model.safetensors")} == before
