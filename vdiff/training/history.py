"""Older checkpoints of a run, in `history/`: the last few, and one every N updates."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vdiff.files import fsync, make_folder, refusal, remove
from vdiff.models.checkpoint import CONFIG, weights_path

HISTORY_FOLDER = "history"


def take(folder: Path, step: int, *, last: int, every: int) -> None:
    """Copy the checkpoint in `folder`, of update `step`, to `history/STEP/`, if it is to be kept.

    The files are hard links if the file system supports them; the next checkpoint replaces files, never changes them.

    Args:
        last: how many checkpoints to keep besides that of `step`.
        every: updates between checkpoints that are kept for good; 0: keep none.
    """
    root = folder / HISTORY_FOLDER
    target, unfinished = root / f"{step:09d}", root / f".{step:09d}.tmp"
    if (last or (every and step % every == 0)) and not target.exists():
        remove(unfinished)
        make_folder(unfinished)
        try:
            for path in (weights_path(folder), folder / CONFIG):
                _link(path, unfinished / path.name)
            os.replace(unfinished, target)
            fsync(root)
        except OSError as error:
            raise refusal(target, error) from None


def drop(folder: Path, step: int, *, last: int, every: int) -> None:
    """Remove the checkpoints that are not kept after update `step`, and those of later updates."""
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
