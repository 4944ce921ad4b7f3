"""Older checkpoints of a run, in `history/`: the last few, and those of every so many updates."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vdiff.files import fsync, make_folder, refusal, remove
from vdiff.models.checkpoint import CONFIG, WEIGHTS

HISTORY_FOLDER = "history"


def take(folder: Path, step: int, *, last: int, every: int) -> None:
    """Take the checkpoint in `folder`, of update `step`, into `history/STEP/`, if it is to be kept.

    The files are linked, not copied, where the file system can; the next checkpoint replaces them by others.

    Args:
        last: checkpoints to keep besides that of `step`.
        every: updates between those that are kept for good; 0: none.
    """
    root = folder / HISTORY_FOLDER
    target, unfinished = root / f"{step:09d}", root / f".{step:09d}.tmp"
    if (last or (every and step % every == 0)) and not target.exists():
        remove(unfinished)
        make_folder(unfinished)
        try:
            for name in (WEIGHTS, CONFIG):
                _link(folder / name, unfinished / name)
            os.replace(unfinished, target)
            fsync(root)
        except OSError as error:
            raise refusal(target, error) from None


def drop(folder: Path, step: int, *, last: int, every: int) -> None:
    """Remove the checkpoints that are not to be kept after update `step`, and those beyond it."""
    root = folder / HISTORY_FOLDER
    if not root.is_dir():
        return
    kept = sorted(path for path in root.iterdir() if path.name.isdigit())
    newest = [path for path in kept if int(path.name) <= step][-(last + 1) :] if last else []
    for path in kept:
        for_good = every and int(path.name) % every == 0 and int(path.name) <= step
        if path not in newest and not for_good:
            remove(path)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
