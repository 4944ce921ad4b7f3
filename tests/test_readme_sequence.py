"""README's commands work as typed, one after another: the quickstart, the lines after it, and then images of one's own.

Only their size is changed, by variables of the environment and a small network; the lines are taken from README.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.commands import ROOT, TINY, done
from vdiff.models.checkpoint import read_config

pytestmark = pytest.mark.slow
SMALL = {
    "VDIFF_CONFIG": "tiny.toml",
    "VDIFF_PRESET": "toy",
    "VDIFF_NUM_ITERS": "1",
    "VDIFF_BATCH_SIZE": "2",
    "VDIFF_NUM": "2",
    "VDIFF_NUM_WORKERS": "0",
    "VDIFF_DEVICE": "cpu",
    "VDIFF_CHECK_IMAGES": "0",
    "VDIFF_DISTANCE_EVERY": "0",
}


def lines_of(heading: str) -> list[str]:
    """The commands that README shows under a heading, without `python` and without comments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^    (?:\S*python )?((?:prepare_data|train|distill|sample)\.py.*?)(?:\s+#.*)?$", section, re.M)
    assert found
    return [str(line) for line in found]


def test_the_readme_after_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    generator = np.random.default_rng(0)
    Path("photos").mkdir()
    for k in range(4):
        PIL.Image.fromarray(generator.integers(0, 256, (70, 64, 3), dtype=np.uint8)).save(f"photos/{k}.png")

    said = [done(line, SMALL).stderr for line in lines_of("Quickstart")]
    assert [read_config(Path(f"checkpoints/base_{k}")).num_timesteps for k in (0, 5, 6)] == [64, 2, 1]
    assert "checkpoints/base_6 is finished already" in said[-2]
    assert "checkpoints/base_6 is the newest model in checkpoints/" in said[-1]
    digits = Path("checkpoints/base_6/model.safetensors").read_bytes()

    for line in lines_of("Your images"):
        done(line, SMALL)
    assert read_config(Path("checkpoints/photos/base_1")).num_timesteps == 4  # the small teacher takes 16
    assert read_config(Path("checkpoints/photos/base_1")).dataset == "data/photos_64"
    assert next(Path("samples/photos").glob("base_1-*")).is_dir()
    assert Path("checkpoints/base_6/model.safetensors").read_bytes() == digits
