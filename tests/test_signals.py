"""Ctrl-C and SIGTERM to real processes: the first is answered at once, the second ends the process within a second."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click
import PIL.Image
import pytest

from tests.commands import TINY, done
from tests.programs import Forked, start
from tests.text_training import write_captioned, write_text_checkpoint
from tests.toy import write_checkpoint, write_dataset
from vdiff.cli.options import Command
from vdiff.signals import stop_requests

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
SECONDS = 120
"""How long the computation of a test would take, which is never waited for."""


def compute() -> None:
    """Keep the main thread from Python, as a long computation does: no handler runs before it is over."""
    Path("computing").touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def an_update() -> None:
    """What the loop of a training does in an update."""
    with stop_requests() as stop:
        stop.answer = lambda: print("finishing update 12", file=sys.stderr, flush=True)
        compute()


@click.command(cls=Command)
def a_command() -> None:
    compute()


def wait_until(is_true: Callable[[], object], seconds: float = SECONDS / 2) -> None:
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_true()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize(
    ("act", "first", "last"),
    [
        (an_update, "finishing update 12\n", "stopped at once; the last checkpoint is on disk\n"),
        (a_command, "stopping; press again to leave now\n", "stopped at once\n"),
    ],
)
def test_signals_are_answered_while_a_computation_keeps_the_main_thread(tmp_path, act, first, last, number, code):
    program = Forked(act if act is an_update else run_a_command, tmp_path)
    wait_until((tmp_path / "computing").exists)
    program.send_signal(number)
    wait_until(lambda: program.said[1].read_text() == first)
    program.send_signal(number)
    _, stderr = program.communicate(timeout=SECONDS / 2)
    assert (program.returncode, stderr) == (code, first + last)


def run_a_command() -> None:
    a_command.main([])


@click.command(cls=Command)
def a_command_that_collects() -> None:
    """The signal arrives in a callback whose exceptions Python ignores."""

    class Collected:
        pass

    def callback(_: object) -> None:
        Path("computing").touch()
        time.sleep(0.5)

    collected = Collected()
    reference = weakref.ref(collected, callback)
    del collected
    assert reference() is None
    time.sleep(SECONDS)


def run_a_command_that_collects() -> None:
    a_command_that_collects.main([])


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interruption_that_python_would_ignore_is_raised_again(tmp_path, number, code, said):
    program = Forked(run_a_command_that_collects, tmp_path)
    wait_until((tmp_path / "computing").exists)
    program.send_signal(number)
    _, stderr = program.communicate(timeout=SECONDS / 2)
    assert (program.returncode, stderr) == (code, f"{said}\n")


def test_a_block_that_is_left_in_time_ends_nothing():
    """The wake-up descriptor of others is given back, and threads end with the block."""
    before = signal.set_wakeup_fd(-1)
    ours = os.open(os.devnull, os.O_WRONLY | os.O_NONBLOCK)
    signal.set_wakeup_fd(ours)
    said: list[str] = []
    try:
        with stop_requests() as stop:
            stop.answer = lambda: said.append("first")
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: said)
        assert (stop.exit_code, said) == (130, ["first"])
        assert signal.set_wakeup_fd(-1) == ours
    finally:
        signal.set_wakeup_fd(before)
        os.close(ours)


WORK = {
    "prepare_data.py photos --size 512 --format png --num_workers 1 --out new": "new.partial",
    "train.py --config tiny.toml --num_iters 100000 --ckpt_interval 50 --compile False --out new": "new/state",
    "distill.py --base checkpoints/base_5 --config tiny.toml --num_iters 100000 --ckpt_interval 50 --compile False": (
        "checkpoints/base_6/state"
    ),
    "sample.py --checkpoint checkpoints/base_5 --num 5000 --batch_size 1 --out new": "new/00001.png",
    "vdiff evaluate checkpoints/base_5 --data data/toy_4 --metrics kd --num 99999 --cache c --out x.json": "*x.json*",
    "vdiff features --data data/digits_8 --num_iters 100000 --out new.pt2": "*new.pt2*",
    "vdiff data encode data/captioned --base checkpoints/sd --batch_size 1": "data/captioned.encoded/encoded.json",
}
"""Long work, and a file that is there when it has begun."""


@pytest.mark.slow
@pytest.mark.parametrize("line", WORK)
def test_a_second_signal_ends_every_command_and_loses_nothing(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/toy_4"))
    write_checkpoint(tmp_path / "checkpoints/base_5", num_timesteps=16)
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "photos").mkdir()
    for k in range(300):
        PIL.Image.new("RGB", (512, 512), (k % 256, 0, 0)).save(tmp_path / f"photos/{k}.png")
    if "digits" in line:
        done("prepare_data.py --num_workers 0")
    if "encode" in line:
        write_captioned(Path("data/captioned"), count=300)
        write_text_checkpoint(Path("checkpoints/sd"), "sd15")
    program = start(line, tmp_path)
    wait_until(lambda: program.returncode is not None or list(tmp_path.glob(WORK[line])), 3 * SECONDS)
    assert program.returncode is None, program.communicate(1)
    for _ in range(2):
        with suppress(ProcessLookupError):  # the first one may have ended it
            program.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, stderr = program.communicate(timeout=30)
    assert program.returncode == 130, stderr
    assert "Traceback" not in stderr
    if line.startswith("prepare"):
        assert "300 images" in done(line).stdout
    if "encode" in line:
        assert "0 of 300 images are encoded, the same command continues" in stderr
        assert "300 images encoded" in done(line).stdout
