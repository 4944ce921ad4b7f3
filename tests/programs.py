"""Programs that start at once: forks of one process that has imported torch already; also several, as by a launcher."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import util
from pathlib import Path
from unittest import mock

from tests.commands import PROGRAMS

SLOW = [
    "accelerate.tracking",
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils.tensorboard",
    "torchvision.utils",
    "vdiff.data.preparation",
    "vdiff.evaluation.measure",
    "vdiff.sampling.job",
    "vdiff.training.base_training",
    "vdiff.training.comparison",
    "vdiff.training.ladder",
]
"""Imported once, and not in every fork. The forks are not of pytest's own process: autograd may have threads there."""
IS_WINDOWS = os.name == "nt"
SERVER = multiprocessing.get_context("spawn" if IS_WINDOWS else "forkserver")
QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Warnings that Python does not show by default."""


class Forked:
    """A running program, with the part of the interface of `subprocess.Popen` that tests use.

    Args:
        act: what it does: a function of a module, or a partial of one.
    """

    def __init__(self, act: Callable[[], object], folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.said = [self.folder / "stdout", self.folder / "stderr"]
        environment = {**os.environ, **(env or {})}
        serve()
        self.process = SERVER.Process(target=become, args=(act, folder, environment, self.said))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code of a program that has ended."""
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it said on stdout and stderr, at its end."""
        self.process.join(timeout)
        if self.returncode is None:
            if not IS_WINDOWS:
                os.killpg(self.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
        stdout, stderr = (path.read_text() if path.exists() else "" for path in self.said)
        shutil.rmtree(self.folder)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """To this process, and not to those that it started."""
        os.kill(self.pid, number)


def serve() -> None:
    """Start the server of forks if it does not run; Windows has no forks, there each program is spawned.

    The server does not take over `sys.path`, so the path of this package goes first into PYTHONPATH.
    """
    if IS_WINDOWS:
        return
    from multiprocessing import forkserver

    SERVER.set_forkserver_preload([__name__, *SLOW])
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()


def become(act: Callable[[], object], folder: Path, env: Mapping[str, str], said: list[Path]) -> None:
    """Turn this process into a program that does `act`, in a process group of its own."""
    if not IS_WINDOWS:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    faulthandler.enable()  # a crash in native code tells where each thread was
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    atexit._clear()
    atexit.register(util._exit_function)  # of multiprocessing: it ends the workers
    warnings.resetwarnings()
    for kind in QUIET:
        warnings.simplefilter("ignore", kind)
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
    os._exit(code)


def do(line: str) -> None:
    """Run `train.py --seed 1`."""
    name, *words = shlex.split(line)
    PROGRAMS[name].main(words, prog_name=name)


def command(line: str) -> Callable[[], object]:
    """What `train.py --seed 1` does."""
    return partial(do, line)


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


def ends(programs: list[Forked], timeout: float = 900) -> tuple[list[int | None], str, str]:
    """The exit codes of processes, and the text of all of them on stdout and on stderr, in their order."""
    said = [program.communicate(timeout) for program in programs]
    return [program.returncode for program in programs], "".join(s[0] for s in said), "".join(s[1] for s in said)
