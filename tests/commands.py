"""Commands as they are typed: in this process or as programs of their own, and what they leave on the disk."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import PIL.Image
import pytest
from click.testing import CliRunner, Result

from vdiff.cli import distill, main, prepare, sample, train
from vdiff.data.store import ImageStore

ROOT = Path(__file__).parent.parent
PROGRAMS: dict[str, click.Command] = {
    "prepare_data.py": prepare.command,
    "train.py": train.command,
    "distill.py": distill.command,
    "sample.py": sample.command,
    "vdiff": main.main,
}
TINY = """
preset = "toy"
num_iters = 4
batch_size = 4
num_timesteps = 16
warmup_iters = 2
dropout = 0.1
ckpt_interval = 2

[unet]
channels = 4
embedding_channels = 8
multipliers = [1]
attention_strides = []

[distill]
num_iters = 3
last_factor = 2.0
batch_size = 4
dropout = 0.1
"""
"""A configuration file for runs of a fraction of a second."""


def run(line: str, env: Mapping[str, str] | None = None) -> Result:
    """Run `train.py --seed 1` in this process."""
    name, *words = shlex.split(line)
    return CliRunner().invoke(PROGRAMS[name], words, prog_name=name, env=env)


def done(line: str, env: Mapping[str, str] | None = None) -> Result:
    """`run` what must succeed."""
    result = run(line, env)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.exception is None
    return result


def error(line: str, code: int, env: Mapping[str, str] | None = None) -> str:
    """`run` what must fail in one line, the last of stderr: what is wrong; what to do."""
    result = run(line, env)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return the_error(result.stdout, result.stderr)


@contextlib.contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """In the block no file grows beyond `num_bytes`: a write fails as on a full disk, and pytest skips on Windows."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def the_error(stdout: str, stderr: str) -> str:
    """The one error line of a command that failed, without "error: "."""
    assert stdout == ""
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], stderr
    message = lines[-1].removeprefix("error: ")
    cause, _, hint = message.partition("; ")
    assert cause
    assert hint, message
    return message


def start(line: str, folder: Path, env: Mapping[str, str] | None = None, **options: int) -> subprocess.Popen[str]:
    """Start `python train.py --seed 1` in a folder that gets the four scripts of the repository."""
    name, *words = shlex.split(line)
    assert name == "python"
    for script in ("prepare_data.py", "train.py", "distill.py", "sample.py"):
        shutil.copy(ROOT / script, folder)
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def typed(line: str, folder: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a program that must succeed and say nothing but progress; its stdout."""
    stdout, stderr = (process := start(line, folder, env)).communicate(timeout=900)
    assert process.returncode == 0, stderr
    for word in ("Warning", "Traceback", "error"):
        assert word not in stderr
    return stdout


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with what it holds, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def image_of(store: ImageStore, size: int, index: int) -> PIL.Image.Image:
    """An image of a dataset."""
    image = PIL.Image.open(io.BytesIO(store.encoded(size, index)))
    return image.convert("RGB" if store.meta.channels == 3 else "L")
