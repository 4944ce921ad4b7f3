"""A folder of PNG files, filled in the open."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdiff.data.labels import LABELS_FILE
from vdiff.errors import VdiffError
from vdiff.files import fsync_folder, refusal, remove, write_text
from vdiff.replacing import start_folder, sweep_inside
from vdiff.sampling.codecs import from_png, png
from vdiff.sampling.outputs import GRID, PICTURES, Output, State, is_ours
from vdiff.sampling.packing import SAMPLES, labels_json
from vdiff.sampling.spec import RECORD, SampleSpec

FSYNCS_AT_ONCE = 16
"""File systems make several files durable in the time of one: 500 in 0.3 s instead of 4 (ext4)."""


class PngFolder(Output):
    """`00000.png`, …, the record, and `dataset.json` with the classes; the pictures lie beside the folder."""

    @property
    def place(self) -> Path:
        """The folder itself."""
        return self.path

    def check(self, spec: SampleSpec, num: int, *, overwrite: bool) -> State:
        """Finished: all images, their classes and the grid are there."""
        if not is_ours(self.path, spec, "png", overwrite=overwrite):
            return "anew"
        is_finished = bool(self.held(num).all()) and any(path.exists() for path in self._places(GRID))
        is_finished &= self._labels.exists() or not spec.classes
        return "finished" if is_finished else "going on"

    def begin(self, spec: SampleSpec, state: State) -> None:
        """Write the record; remove grid and classes, as those of fewer images must not pass for those of all."""
        if state == "anew":
            for name in PICTURES:
                remove(self.picture(name))
            start_folder(self.path, RECORD, spec.to_json(format="png"))
        for now, before in map(self._places, PICTURES):
            if before.exists():
                os.replace(before, now)
        if state != "finished":
            remove(self.picture(GRID))
            remove(self._labels)
        sweep_inside(self.path, SAMPLES)

    def held(self, num: int) -> np.ndarray:
        """Which files are there."""
        names = {entry.name for entry in os.scandir(self.path)} if self.path.is_dir() else set()
        return np.fromiter((image_path(self.path, k).name in names for k in range(num)), bool, num)

    def encode(self, index: int, image: Tensor) -> bytes:
        """Write the file under another name: that is all there is to do before it is kept."""
        try:
            _temporary(self.path, index).write_bytes(png(image))
        except OSError as error:
            raise refusal(image_path(self.path, index), error) from None
        return b""

    def commit(self, images: Sequence[tuple[int, bytes]]) -> None:
        """Make the files durable, then give them their names."""
        try:
            with ThreadPoolExecutor(FSYNCS_AT_ONCE) as pool:
                list(pool.map(lambda image: _fsync(_temporary(self.path, image[0])), images))
            for index, _ in images:
                os.replace(_temporary(self.path, index), image_path(self.path, index))
            fsync_folder(self.path)
        except OSError as error:
            raise refusal(self.path, error) from None

    def images(self, indices: Sequence[int]) -> Tensor:
        """From their files."""
        return torch.stack([self._image(image_path(self.path, k)) for k in indices])

    def _image(self, path: Path) -> Tensor:
        try:
            return from_png(path.read_bytes())
        except (OSError, SyntaxError):  # Pillow's word for a broken PNG is SyntaxError
            raise VdiffError(f"{path} is damaged", "delete it, then give the same command again") from None

    def finish(self, spec: SampleSpec, num: int) -> None:
        """Write the classes; all else is where it belongs."""
        if (labels := spec.labels(range(num))) is not None:
            files = [image_path(self.path, k).name for k in range(num)]
            write_text(self._labels, labels_json(files, labels.tolist(), self.kind.class_names))

    @property
    def _labels(self) -> Path:
        return self.path / LABELS_FILE

    def _places(self, name: str) -> tuple[Path, Path]:
        """Where a picture is, and where earlier versions put it: among the images."""
        return self.picture(name), self.path / name


def image_path(folder: Path, index: int) -> Path:
    """`00007.png`: image `index`."""
    return folder / f"{index:05d}.png"


def _temporary(folder: Path, index: int) -> Path:
    """Where image `index` lies before it is kept."""
    return folder / f".{index:05d}.png.tmp"


def _fsync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
