"""The registry of kinds of output."""

from __future__ import annotations

from pathlib import Path

from vdiff.sampling.archive import Archive
from vdiff.sampling.folder import PngFolder
from vdiff.sampling.outputs import ImageKind, Output
from vdiff.sampling.packing import PACKERS


def open_output(form: str, path: Path, kind: ImageKind, process: int = 0) -> Output:
    """The output of format `form` at `path`, for the process of that number."""
    return PngFolder(path, kind) if form == "png" else Archive(path, kind, form, process)


FORMATS = ("png", *PACKERS)
