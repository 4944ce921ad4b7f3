"""Where images wait until all are there: files that only grow, one of each process, of any images in any spec.

A record is a mark, the image's number, its length, a checksum and its bytes. Whatever a kill leaves behind, reading
ends before the first record that is not whole; the process that goes on with a file cuts the rest off.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vdiff.errors import VdiffError
from vdiff.files import refusal

HEAD = struct.Struct("<4sQII")
MARK = b"img\n"
NAME, PATTERN = "part-{:05d}.images", "part-*.images"


class RecordLog:
    """The file of process `number` in `folder`, which it alone writes."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / NAME.format(number)
        self._is_open = False

    def append(self, images: Iterable[tuple[int, bytes]]) -> None:
        """Write (number, bytes) of some images, durably.

        Raises:
            VdiffError: the file system refuses.
        """
        try:
            with open(self.path, "rb+" if self.path.exists() else "wb") as file:
                if not self._is_open:
                    file.truncate(sum(HEAD.size + length for _, _, length in _records(self.path)))
                    self._is_open = True
                file.seek(0, os.SEEK_END)
                for index, data in images:
                    file.write(HEAD.pack(MARK, index, len(data), zlib.crc32(data)) + data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._is_open = False  # what was written of them is cut off before the next
            raise refusal(self.path, error) from None


class RecordReader:
    """The images 0 … `num` − 1 that lie in the files of all processes in `folder`."""

    def __init__(self, folder: Path, num: int) -> None:
        self.paths = sorted(folder.glob(PATTERN))
        # 16 bytes an image, so that a million take no memory to speak of
        self.file = np.full(num, -1, np.int32)
        self.offset, self.length = np.zeros(num, np.int64), np.zeros(num, np.uint32)
        for number, path in enumerate(self.paths):
            for index, offset, length in _records(path):
                if index < num:
                    self.file[index], self.offset[index], self.length[index] = number, offset, length

    @property
    def held(self) -> np.ndarray:
        """Which images are there: (num,) bool."""
        return self.file >= 0

    def read(self, indices: Iterable[int]) -> Iterator[bytes]:
        """The bytes of images, in the order asked for.

        Raises:
            VdiffError: an image that is not there.
        """
        files = [open(path, "rb") for path in self.paths]  # noqa: SIM115 - closed below
        try:
            for index in indices:
                if self.file[index] < 0:
                    raise VdiffError(f"image {index} is not there", "give the same command again")
                file = files[self.file[index]]
                file.seek(int(self.offset[index]))
                yield file.read(int(self.length[index]))
        finally:
            for file in files:
                file.close()


def _records(path: Path) -> Iterator[tuple[int, int, int]]:
    """Number, offset and length of each whole record from the beginning."""
    with open(path, "rb") as file:
        while len(head := file.read(HEAD.size)) == HEAD.size:
            mark, index, length, checksum = HEAD.unpack(head)
            offset = file.tell()
            if mark != MARK or len(data := file.read(length)) < length or zlib.crc32(data) != checksum:
                return
            yield index, offset, length
