"""The attempts at a stage whose students collapse: set aside, counted, the best of them kept."""

from __future__ import annotations

import glob
import math
from dataclasses import replace
from pathlib import Path

from vdiff.files import remove
from vdiff.training.verdict import Verdict, read_verdict, write_verdict

FAILED = ".failed_"


def failed_attempts(folder: Path) -> list[Path]:
    """The students that were set aside for `folder`, in their order."""
    paths = folder.parent.glob(f"{glob.escape(folder.name)}{FAILED}*")
    numbers = {path: path.name.removeprefix(f"{folder.name}{FAILED}") for path in paths}
    return sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))


def times_failed(folder: Path) -> int:
    """How often the stage of `folder` was done in vain, as the students set aside tell."""
    verdicts = [read_verdict(path) for path in failed_attempts(folder)]
    return max([len(verdicts), *(verdict.attempts for verdict in verdicts if verdict)])


def set_aside(folder: Path) -> None:
    """Make room for another attempt."""
    last = [int(path.name.removeprefix(f"{folder.name}{FAILED}")) for path in failed_attempts(folder)[-1:]]
    folder.rename(folder.with_name(f"{folder.name}{FAILED}{sum(last) + len(last)}"))


def keep_best(folder: Path, verdict: Verdict) -> None:
    """Leave in `folder` the attempt that is nearest to the teacher, and no other; it knows how many there were."""
    best = _nearest([*failed_attempts(folder), folder])
    write_verdict(best, replace(read_verdict(best) or verdict, attempts=verdict.attempts))
    if best != folder:
        set_aside(folder)
        best.rename(folder)
    for path in failed_attempts(folder):
        remove(path)


def finish_keeping(folder: Path, retries: int) -> None:
    """What a kill between the two renames of `keep_best` left undone."""
    if not folder.exists() and times_failed(folder) > retries:
        _nearest(failed_attempts(folder)).rename(folder)


def _nearest(attempts: list[Path]) -> Path:
    verdicts = {path: read_verdict(path) for path in attempts}
    return min(attempts, key=lambda path: verdict.rmse if (verdict := verdicts[path]) else math.inf)
