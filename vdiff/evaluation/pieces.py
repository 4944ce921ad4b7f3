"""Work in pieces whose results are files: any process may do any of them, and a killed job goes on with the next.

A piece is a function of its number alone, and what is made of all pieces is made in their order. So the result has the
same bits however often the work was cut short, and whoever did which piece.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vdiff.distributed import Processes
from vdiff.errors import VdiffError
from vdiff.files import make_folder, parse, read_text, remove, write_text, write_whole

Arrays = Mapping[str, NDArray[Any]]
T = TypeVar("T")
JOB = "job.json"


def key_of(values: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class WorkFolder:
    """The results of the pieces of one job, kept until the job is done.

    Args:
        job: the key of all that decides the results; what was kept of another job is thrown away.
    """

    def __init__(self, path: Path, job: str, processes: Processes) -> None:
        self.path, self.processes = path, processes
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
        """Where the result `name` is, or will be."""
        return self.path / name

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those results that are not there."""
        return [name for name in names if not self.file(name).exists()]

    def do(self, names: Sequence[str], compute: Callable[[str], Arrays]) -> None:
        """Have those results that are missing computed, each by one process, and wait for all.

        Raises:
            VdiffError: from `compute`, in this process or another one.
        """
        with self.processes.together():
            missing = self.missing(names)
        with self.processes.together():
            for name in self.processes.share(missing):
                write_arrays(self.file(name), compute(name))

    def read(self, name: str) -> dict[str, NDArray[Any]]:
        """A result.

        Raises:
            VdiffError: it cannot be read.
        """
        found = read_arrays(self.file(name))
        if found is None:
            raise VdiffError(f"{self.file(name)} cannot be read", f"remove {self.path}, then give the command again")
        return found

    def remove(self) -> None:
        """Throw all of it away."""
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
    """What `write_arrays` wrote; None where there is no such file, or none that is whole."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
