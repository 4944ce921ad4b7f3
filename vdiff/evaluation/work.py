"""A job with results in files: any process may compute any of them, and a killed job continues with the next.

A result depends only on its number, and results are combined in the order of their numbers. So the final bits do not
depend on interruptions or on the distribution of work among processes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdiff.distributed import Processes
from vdiff.errors import VdiffError
from vdiff.evaluation.metrics import Arrays
from vdiff.files import make_folder, parse, read_text, remove, write_text, write_whole
from vdiff.reporting import Progress, Reporter

JOB = "job.json"
Compute = Callable[[int, Progress, int], Arrays]
"""(number of a result, progress bar, images on the bar so far) → the result."""


def key_of(values: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class WorkFolder:
    """The results of one job, kept until it is done.

    Args:
        job: the key of everything that determines the results; results of another job are deleted.
        noun: what a sample is called.
    """

    def __init__(self, path: Path, job: str, processes: Processes, reporter: Reporter, noun: str) -> None:
        self.path, self.processes, self.reporter, self.noun = path, processes, reporter, noun
        with processes.together():
            if processes.is_main:
                if path.exists() and self._job() != job:
                    remove(path)
                make_folder(path)
                write_text(path / JOB, json.dumps({"job": job}) + "\n")

    def _job(self) -> str:
        try:
            return str(parse(read_text(self.path / JOB))["job"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def file(self, name: str) -> Path:
        """The file of the result `name`."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the result `name` exists; all processes check before any of them continues."""
        with self.processes.together():
            return self.file(name).exists()

    def compute(self, title: str, sizes: Mapping[str, int], result: Compute) -> None:
        """Compute the missing results, each by one process, and wait for all of them.

        Args:
            title: of the progress bar.
            sizes: the name of each result, and the number of images behind it.
            result: computes a result from its number, the index in `sizes`.

        Raises:
            VdiffError: from `result`, in this process or another one.
        """
        names = list(sizes)
        with self.processes.together():
            missing = [name for name in names if not self.file(name).exists()]
        mine = self.processes.share(missing)
        is_alone = self.processes.world_size == 1
        done = sum(size for name, size in sizes.items() if name not in missing) if is_alone else 0
        total = done + sum(sizes[name] for name in mine)
        with self.reporter.progress(title, total, f"{self.noun}s", start=done) as bar, self.processes.together():
            for name in mine:
                write_arrays(self.file(name), result(names.index(name), bar, done))
                done += sizes[name]

    def read(self, name: str) -> dict[str, NDArray[Any]]:
        """A result.

        Raises:
            VdiffError: it cannot be read.
        """
        found = read_arrays(self.file(name))
        if found is None:
            raise VdiffError(f"{self.file(name)} cannot be read", f"remove {self.path}, then run the command again")
        return found

    def remove(self) -> None:
        """Delete all results, once no process reads them any more; every process calls this."""
        with self.processes.together():
            pass
        with self.processes.together():
            if self.processes.is_main:
                remove(self.path)


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write named arrays, whole or not at all.

    Raises:
        VdiffError: the file system refuses.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, write)


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """The arrays that `write_arrays` wrote; None if the file is missing or damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
