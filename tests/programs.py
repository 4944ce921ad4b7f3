"""Programs that start at once, as forks of the tests, which have imported torch; several as a launcher has them."""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import util
from pathlib import Path

import accelerate.state
import accelerate.tracking
import torch.utils.tensorboard  # noqa: F401
import torchvision.utils  # noqa: F401

import vdiff.sampling.job
import vdiff.training.base
import vdiff.training.comparison
import vdiff.training.ladder  # noqa: F401
from tests.commands import PROGRAMS

QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Warnings that Python does not show by itself."""


class Forked:
    """A running fork, with what `subprocess.Popen` has of a process."""

    def __init__(self, act: Callable[[], object], folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed when it has ended
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a process with threads, which only wait
            self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                self._become_a_program(folder, env or {})
                code = _code_of(act)
            finally:
                os._exit(code)

    def _become_a_program(self, folder: Path, env: Mapping[str, str]) -> None:
        """Leave behind what belongs to the tests: captured streams, handlers, warnings as errors, launchers' state."""
        os.setsid()
        os.chdir(folder)
        os.environ.update(env)
        for number, file in enumerate(self.files, 1):
            os.dup2(file.fileno(), number)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(k, "w", buffering=1, encoding="utf-8") for k in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        atexit._clear()
        atexit.register(util._exit_function)  # of multiprocessing: it ends the workers
        warnings.resetwarnings()
        for kind in QUIET:
            warnings.simplefilter("ignore", kind)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    def poll(self) -> int | None:
        """The exit code of a program that has ended."""
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it said on stdout and stderr, at its end."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        said = []
        for file in self.files:
            file.seek(0)
            said.append(file.read().decode())
            file.close()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        """To this process, and not to those that it started."""
        os.kill(self.pid, number)


def _code_of(act: Callable[[], object]) -> int:
    """The exit code of a program that does `act`."""
    code = 0
    try:
        act()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def command(line: str) -> Callable[[], object]:
    """What `train.py --seed 1` does."""
    name, *words = shlex.split(line)
    return lambda: PROGRAMS[name].main(words, prog_name=name)


def start(line: str, folder: Path, env: Mapping[str, str] | None = None) -> Forked:
    """Start `train.py --seed 1` in a folder."""
    return Forked(command(line), folder, env)


def launch(act: Callable[[], object], folder: Path, count: int = 2) -> list[Forked]:
    """Start as many processes that find each other as `torchrun --standalone` starts."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    env = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return [Forked(act, folder, env | {"RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(count)]


def ends(programs: list[Forked], timeout: float = 300) -> tuple[list[int | None], str, str]:
    """The exit codes of processes, and all that they said on stdout and on stderr, the first one first."""
    said = [program.communicate(timeout) for program in programs]
    return [program.returncode for program in programs], "".join(s[0] for s in said), "".join(s[1] for s in said)
