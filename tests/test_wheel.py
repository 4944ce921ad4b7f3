"""A source distribution and the wheel that is built from it: what they hold, and the whole road after installing it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.commands import ROOT

PIP = ["pip", "--disable-pip-version-check", "--no-input"]
ROAD = [
    "prepare",
    "train --preset toy --num_iters 2 --num_timesteps 8 --device cpu",
    "distill --to_steps 4 --num_iters 1 --device cpu --report True",
    "sample --num 4 --device cpu",
    "inspect",
]


def python(*words: str, folder: Path, **env: str) -> str:
    """Run `python -m …` offline; its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env={**os.environ, "PIP_NO_INDEX": "1", **env},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `python -m build` does: from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "vdiff", source / "vdiff", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_sdist('../dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    python(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), ".", folder=unpacked)
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    mine = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vdiff").rglob("*") if path.is_file()}
    mine = {name for name in mine if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == mine
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_the_whole_road_after_installing_the_wheel(wheel, tmp_path):
    """The four scripts are `vdiff prepare`, `train`, `distill` and `sample`; presets and the report come along."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    python(*PIP, "install", "--no-deps", "--target", str(site), str(wheel), folder=work)
    assert next(site.glob("bin/vdiff*")).is_file()
    for line in ROAD:
        python("vdiff", *line.split(), folder=work, PYTHONPATH=str(site), OMP_NUM_THREADS="1")
    assert list(work.glob("samples/*/*.png"))
    assert (work / "checkpoints/report.html").stat().st_size > 10_000
    where = subprocess.run(
        [sys.executable, "-c", "import vdiff; print(vdiff.__file__)"], cwd=work, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)}, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()) == site / "vdiff/__init__.py"
