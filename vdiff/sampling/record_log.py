"""Append-only files for images until all are drawn: one per process, with any images in any order.

A record is a mark, the image's number, its length, a checksum and its bytes. After a kill, reading ends before the
first incomplete record, and the process that continues a file cuts off the rest.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from vdiff.errors import VdiffError
from vdiff.files import refusal

HEAD = struct.Struct("<4sQII")
MARK = b"img\n"
NAME, PATTERN = "part-{:05d}.images", "part-*.images"
PLACE = np.dtype([("file", "i4"), ("offset", "i8"), ("length", "u4")])
"""The position of an image: 16 bytes, so that a million images take little memory."""


class RecordLog:
    """The file of process `rank` in `folder`; no other process writes it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / NAME.format(rank)
        self._is_whole = False

    def append(self, images: Iterable[tuple[int, bytes]]) -> None:
        """Write (number, bytes) of some images, durably.

        Raises:
            VdiffError: the file system refuses.
        """
        try:
            if not self._is_whole and self.path.exists():
                os.truncate(self.path, sum(HEAD.size + length for _, _, length in _records(self.path)))
            self._is_whole = False
            with open(self.path, "ab") as file:
                for index, data in images:
                    file.write(HEAD.pack(MARK, index, len(data), zlib.crc32(data)) + data)
                file.flush()
                os.fsync(file.fileno())
            self._is_whole = True
        except OSError as error:
            raise refusal(self.path, error) from None


class RecordReader:
    """The images 0 … `num` − 1 in the files of all processes in `folder`."""

    def __init__(self, folder: Path, num: int) -> None:
        self.paths = sorted(folder.glob(PATTERN))
        self.places = np.zeros(num, PLACE)
        for number, path in enumerate(self.paths, 1):
            for index, offset, length in _records(path):
                if index < num:
                    self.places[index] = number, offset, length

    @property
    def held(self) -> np.ndarray:
        """Which images exist: (num,) bool."""
        return self.places["file"] > 0

    def read(self, indices: Sequence[int]) -> Iterator[bytes]:
        """The bytes of images, in the given order.

        Raises:
            VdiffError: an image is missing.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb")) for path in self.paths]
            for index in indices:
                number, offset, length = self.places[index].item()
                if not number:
                    raise VdiffError(f"image {index} is missing", "run the same command again")
                files[number - 1].seek(offset)
                yield files[number - 1].read(length)


def _records(path: Path) -> Iterator[tuple[int, int, int]]:
    """Number, offset and length of each complete record from the beginning."""
    with open(path, "rb") as file:
        while len(head := file.read(HEAD.size)) == HEAD.size:
            mark, index, length, checksum = HEAD.unpack(head)
            offset = file.tell()
            if mark != MARK or len(data := file.read(length)) < length or zlib.crc32(data) != checksum:
                return
            yield index, offset, length
