"""Images that lie on the disk: folders, archives, prepared datasets; the registry is at the foot."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
from numpy.lib import format as npy

from vdiff.data.image_files import MAX_FILE_BYTES, UnreadableImageError, check_bytes
from vdiff.data.labels import (
    EDGE_BYTES,
    LABEL_FILES,
    MARK,
    SAMPLES_FILE,
    clean_name,
    read_labels,
    record_of_samples,
)
from vdiff.data.listing import OWN_PICTURES, SPLITS, Item, ListingWriter, key_of
from vdiff.data.source import Defaults, Sample, Source, SourceOptions
from vdiff.data.store import DATA_FILE, JOB_FILE, PARTIAL_SUFFIX, ImageStore, is_lmdb
from vdiff.data.tar_files import is_tar, members
from vdiff.errors import OptionError, VdiffError
from vdiff.files import write_whole
from vdiff.text import cause_of

MAX_RATIO = 100
"""How many times smaller a compressed tar of pictures may be; packed pictures hardly shrink."""


class _OnDisk(Source):
    """What folders and archives have in common."""

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        self.path = self.root = path
        self.options = options or SourceOptions()
        self.options.refuse(str(path), "image_column")
        split = self.options.split.lower()
        suffix = "" if SPLITS.get(split, split) in ("", "train") else f"_{split}"
        self.name = clean_name((path.resolve().name if path.is_dir() else path.name.split(".")[0]) or "images") + suffix

    def identity(self) -> dict[str, Any]:
        """The path, for a file also its size and time; which part of it was asked for."""
        status = self.root.stat()
        of_file = {} if self.root.is_dir() else {"bytes": status.st_size, "modified": status.st_mtime_ns}
        asked = {key: value for key in ("split", "label_column") if (value := getattr(self.options, key))}
        return {"path": str(self.root.resolve()), **of_file, **asked}


class _Files(_OnDisk):
    """Files in a folder or an archive: images, label files, and what vdiff itself left among them."""

    def fill(self, listing: ListingWriter) -> None:
        """All files but vdiff's own pictures, with their classes where label files give them."""
        listing.split = self.options.split
        labels, samples, sheets = [], [], []
        for name, place in self._files():
            item, (folder, _, base) = Item(name, place=place), name.rpartition("/")
            if not key_of(name):
                continue
            if base in LABEL_FILES:
                labels.append(item)
            elif base.lower().endswith((".png", ".webp")) and MARK in self._edge_of(item):
                listing.ignore(OWN_PICTURES)
            elif base == DATA_FILE:
                listing.ignore("datasets")
                sheets.append(f"{folder}.png")
            else:
                listing.add_file(name, place)
                if base == SAMPLES_FILE and record_of_samples(self._text(item)):
                    samples.append(folder)
        if listing.leave_out_own(samples, sheets):
            labels = [item for item in labels if not item.name.startswith(tuple(f"{folder}/" for folder in samples))]
        column, told = self.options.label_column, False
        for item in sorted(labels, key=lambda item: item.name):
            found = None if column == "none" else read_labels(item.name, self._text(item), column)
            if found is None:
                listing.add_file(item.name)
            else:
                listing.add_labels(item.name.rpartition("/")[0], found)
                told = True
        if column == "none":
            listing.class_names = ()
        elif column and not told:
            raise OptionError(
                f"--label_column {column}: {self.root} has no such column in a metadata.csv or metadata.jsonl",
                "leave it out, or give none for no classes",
            )

    @abstractmethod
    def _files(self) -> Iterator[tuple[str, str]]:
        """The names of all files, `/` between folders, and where their bytes lie."""

    @abstractmethod
    def _open(self, item: Item) -> AbstractContextManager[tuple[IO[bytes], int]]:
        """A file at its first byte, and its length; errors in the block become an UnreadableImageError."""

    def read(self, item: Item) -> Sample:
        """The bytes of a file."""
        with self._open(item) as (file, num_bytes):
            check_bytes(num_bytes)
            return Sample(self._content(file, num_bytes), item.label)

    def _content(self, file: IO[bytes], num_bytes: int) -> bytes:
        return file.read(num_bytes)

    def _edge_of(self, item: Item) -> bytes:
        """Where a picture says who wrote it: the first of its bytes, of a WebP the last; b"" if unreadable."""
        with suppress(UnreadableImageError), self._open(item) as (file, num_bytes):
            if item.name.lower().endswith(".webp"):
                file.seek(max(num_bytes - EDGE_BYTES, 0), os.SEEK_CUR)
            return file.read(min(num_bytes, EDGE_BYTES))
        return b""

    def _text(self, item: Item) -> bytes:
        try:
            data = self.read(item).data
        except UnreadableImageError as error:
            raise VdiffError(f"{self.root}: cannot read {item.name}: {error}", "mend it, or move it away") from None
        assert isinstance(data, bytes)
        return data


class Folder(_Files):
    """A folder of images, flat or with a folder for each class; links are followed."""

    @contextmanager
    def _open(self, item: Item) -> Iterator[tuple[IO[bytes], int]]:
        path = self.root / item.name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, for ever
                raise UnreadableImageError("unreadable", "not a regular file")
            with open(path, "rb") as file:
                yield file, status.st_size
        except OSError as error:
            raise UnreadableImageError("unreadable", error.strerror or str(error)) from None

    def _files(self) -> Iterator[tuple[str, str]]:
        def refuse(error: OSError) -> None:
            raise VdiffError(f"cannot read {error.filename}: {error.strerror}", "mend the permissions or move it away")

        entered = set()
        for folder, subfolders, files in os.walk(self.root, followlinks=True, onerror=refuse):
            # a link to a folder above would lead in circles
            real = os.path.realpath(folder)
            if real in entered:
                subfolders.clear()
                continue
            entered.add(real)
            # hidden folders are not worth walking; sorting settles which of two links to a folder counts
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            if JOB_FILE in files and folder.endswith(PARTIAL_SUFFIX):  # a dataset that is being prepared
                subfolders.clear()
                continue
            relative = Path(folder).relative_to(self.root)
            for file in files:
                yield (relative / file).as_posix(), ""


class Zip(_Files):
    """A zip of images, by the same rules as a folder; every process opens it for itself."""

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        super().__init__(path, options)
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _files(self) -> Iterator[tuple[str, str]]:
        for info in self._archive().infolist():
            if not info.filename.endswith("/"):
                yield info.filename, ""

    def _content(self, file: IO[bytes], num_bytes: int) -> bytes:
        del num_bytes
        # bzip2 and LZMA unpack all that they are given, whatever size is said: so they are given little
        return b"".join(iter(lambda: file.read(4096), b""))

    @contextmanager
    def _open(self, item: Item) -> Iterator[tuple[IO[bytes], int]]:
        archive = self._archive()
        try:
            info = archive.getinfo(item.name)
            with archive.open(info) as member:
                yield member, info.file_size
        except UnreadableImageError:
            raise
        except RuntimeError as error:
            raise UnreadableImageError("encrypted" if "encrypted" in str(error) else "unreadable", str(error)) from None
        except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError) as error:
            raise UnreadableImageError("unreadable", str(error)) from None
        except Exception as error:  # zlib.error and its like, from a damaged member
            raise UnreadableImageError("unreadable", f"{type(error).__name__}: {error}") from None

    def _archive(self) -> zipfile.ZipFile:
        # a file handle shared across a fork would share its position
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.root))
            except Exception as error:  # zipfile raises whatever a damaged directory makes it stumble over
                raise VdiffError(f"cannot read {self.root}: {error}", "give an intact zip, or a folder") from None
        return self._opened[1]


class Tar(_Files):
    """A tar of images, by the same rules as a folder; a compressed one is unpacked once, to be read from anywhere."""

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        super().__init__(path, options)
        self.plain = path

    def fetch(self, scratch: Path) -> None:
        """Unpack a compressed tar into `scratch`."""
        if reader_of(self.root) is not open:
            self.plain = scratch / "unpacked.tar"
            if not self.plain.exists():
                write_whole(self.plain, self._unpack)

    def _unpack(self, target: Path) -> None:
        most = max(MAX_RATIO * self.root.stat().st_size, MAX_FILE_BYTES)
        try:
            with reader_of(self.root)(self.root, "rb") as packed, open(target, "wb") as unpacked:
                while block := packed.read(2**20):
                    if unpacked.tell() + len(block) > most:
                        raise ValueError(f"it unpacks to more than {MAX_RATIO} times its size")
                    unpacked.write(block)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, ValueError) as error:
            raise self._damaged(error) from None

    def _files(self) -> Iterator[tuple[str, str]]:
        try:
            with open(self.plain, "rb") as file:
                for _, member in members(file):
                    if not member.isdir():
                        is_whole = member.isreg() and not member.issparse()
                        yield member.name, f"{member.offset_data} {member.size}" if is_whole else ""
        except (tarfile.TarError, OSError) as error:
            raise self._damaged(error) from None

    @contextmanager
    def _open(self, item: Item) -> Iterator[tuple[IO[bytes], int]]:
        if not item.place:
            raise UnreadableImageError("unreadable", "not a regular file")
        offset, num_bytes = map(int, item.place.split())  # a listing is checked when it is opened
        try:
            with open(self.plain, "rb") as file:
                file.seek(offset)
                yield file, num_bytes
        except OSError as error:
            raise UnreadableImageError("unreadable", error.strerror or str(error)) from None

    def _damaged(self, error: Exception) -> VdiffError:
        return VdiffError(f"cannot read {self.root}: {error}", "give an intact tar, or a folder")


class Dataset(_OnDisk):
    """A prepared dataset, ours or a rosinality-style LMDB: its largest images once more."""

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        super().__init__(path, options)
        self.options.refuse(str(path), "split", "label_column")
        self.store = ImageStore(path)
        meta = self.store.meta
        self.size = meta.sizes[-1]
        self.defaults = Defaults(self.size, meta.channels, meta.image_format or "jpeg")

    def identity(self) -> dict[str, Any]:
        """The path and what the dataset holds."""
        return {"path": str(self.root.resolve()), "fingerprint": self.store.meta.fingerprint, "size": self.size}

    def fill(self, listing: ListingWriter) -> None:
        """All images in the dataset's order, with its classes."""
        listing.class_names = self.store.meta.class_names
        for index in range(len(self.store)):
            listing.add(index, self.store.label(index))

    def read(self, item: Item) -> Sample:
        """The encoded image."""
        try:
            return Sample(self.store.encoded(self.size, int(item.name)), item.label)
        except VdiffError as error:
            raise UnreadableImageError("unreadable", error.cause) from None


def reader_of(path: Path) -> Callable[..., IO[bytes]]:
    """What opens a file that may be compressed: `open` where it is not."""
    with open(path, "rb") as file:
        head = file.read(8)
    return next((reader for magic, reader in COMPRESSIONS.items() if head.startswith(magic)), open)


def is_tar_file(path: Path) -> bool:
    """Whether a file is a tar, perhaps a compressed one."""
    with suppress(OSError, EOFError, lzma.LZMAError, zlib.error), reader_of(path)(path, "rb") as file:
        return is_tar(file)
    return False


class Npz(_OnDisk):
    """`arr_0` (N, H, W, C) uint8 and, where there are classes, `arr_1` (N,), as sample.py and ADM write samples."""

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        super().__init__(path, options)
        self.options.refuse(str(path), "split", "label_column")
        self.plain = path  # until it is unpacked
        with self._archive(path) as archive, archive.open(IMAGES_ARRAY) as file:
            read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
            self.shape, is_fortran, dtype = read(file)
            self.offset = file.tell()
            if dtype != np.uint8 or is_fortran or len(self.shape) != 4 or self.shape[3] not in (1, 3):
                raise ValueError(f"arr_0 is {dtype} {self.shape}, not uint8 (N, H, W, 1 or 3)")
        self.defaults = Defaults(min(self.shape[1:3]), self.shape[3], "png")
        self._images: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}

    def fetch(self, scratch: Path) -> None:
        """Unpack the images into `scratch`, to be read from anywhere."""
        self.plain = scratch / IMAGES_ARRAY
        if not self.plain.exists():
            write_whole(self.plain, self._unpack)

    def _unpack(self, target: Path) -> None:
        with self._archive(self.root) as archive, archive.open(IMAGES_ARRAY) as file, open(target, "wb") as out:
            num_bytes = archive.getinfo(IMAGES_ARRAY).file_size
            if num_bytes > max(MAX_RATIO * self.root.stat().st_size, MAX_FILE_BYTES):
                raise ValueError(f"it unpacks to more than {MAX_RATIO} times its size")
            if num_bytes != self.offset + math.prod(self.shape):
                raise ValueError(f"arr_0 has {num_bytes} bytes, which are not {self.shape}")
            shutil.copyfileobj(file, out, 2**20)

    def fill(self, listing: ListingWriter) -> None:
        """The images in their order, with their classes; numbers are names where the file knows none."""
        with self._archive(self.root) as archive:
            listing.class_names, labels = (), [None] * self.shape[0]
            if "arr_1.npy" in archive.namelist():
                with archive.open("arr_1.npy") as file:
                    numbers = npy.read_array(file, allow_pickle=False)
                if numbers.shape != self.shape[:1] or numbers.dtype.kind not in "iu":
                    raise ValueError(f"arr_1 is {numbers.dtype} {numbers.shape}, not one class for each image")
                found, labels = (values.tolist() for values in np.unique(numbers, return_inverse=True))
                names = [clean_name(str(name)) for name in record_of_samples(archive.comment).get("class_names", ())]
                known = found[0] >= 0 and found[-1] < len(names)
                listing.class_names = tuple(names[label] if known else str(label) for label in found)
        for number, label in enumerate(labels):
            listing.add(number, label)

    def read(self, item: Item) -> Sample:
        """The picture."""
        if self._images is None:
            self._images = np.memmap(self.plain, np.uint8, "r", self.offset, self.shape)
        pixels = self._images[int(item.name)]
        return Sample(PIL.Image.fromarray(pixels[..., 0] if self.shape[3] == 1 else pixels), item.label)

    @contextmanager
    def _archive(self, path: Path) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(path) as archive:
                yield archive
        except (
            zipfile.BadZipFile,
            OSError,
            EOFError,
            ValueError,
            KeyError,
            MemoryError,
            NotImplementedError,
            zlib.error,
        ) as error:
            raise VdiffError(
                f"cannot read {path}: {cause_of(error)}", "give an npz of samples, or images in a folder"
            ) from None


IMAGES_ARRAY = "arr_0.npy"
COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ON_DISK: tuple[tuple[Callable[[Path], bool], Callable[[Path, SourceOptions], Source]], ...] = (
    (is_lmdb, Dataset),
    (Path.is_dir, Folder),
    (lambda path: path.suffix.lower() == ".npz", Npz),
    (zipfile.is_zipfile, Zip),
    (is_tar_file, Tar),
)
