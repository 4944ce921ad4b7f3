"""Sources on disk: folders, archives, prepared datasets; the registry is at the foot."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import os
import stat
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
from numpy.lib import format as npy

from vdiff.data.conditions import ConditionFolder
from vdiff.data.image_files import MAX_FILE_BYTES, UnreadableImageError, check_bytes, unreadable_if_refused
from vdiff.data.labels import (
    CLASS_SUFFIX,
    DO_WITHOUT,
    EDGE_BYTES,
    LABEL_FILES,
    LABELS_FILE,
    MARK,
    NO_CAPTIONS,
    SAMPLES_FILE,
    TABLES,
    clean_name,
    read_captions,
    read_labels,
    record_of_samples,
    suffix_of,
)
from vdiff.data.listing import OWN_PICTURES, SPLITS, Item, ListingWriter, key_of
from vdiff.data.source import COLUMNS, OPTIONS_OF_FILES, Defaults, Sample, Source, SourceOptions
from vdiff.data.store import DATA_FILE, JOB_FILE, PARTIAL_SUFFIX, ImageStore, is_lmdb
from vdiff.data.tar_files import is_tar, members
from vdiff.errors import OptionError, VdiffError, explained
from vdiff.files import check_regular, write_whole

MAX_RATIO = 100
"""The largest compression ratio of a tar of pictures; compressed pictures hardly shrink."""
TOO_LARGE = f"it unpacks to more than {MAX_RATIO} times its size"
IMAGES_ARRAY = "arr_0.npy"
DAMAGE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError)
"""Errors that reading a damaged archive may raise."""
COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class _OnDisk(Source):
    """The common part of folders and archives."""

    unknown_options: tuple[str, ...] = COLUMNS
    advice = ""

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        self.path = self.root = self.plain = path  # `plain` is elsewhere after unpacking
        self.options = options or SourceOptions()
        self.options.refuse(path, *self.unknown_options)
        split = self.options.split.lower()
        suffix = "" if SPLITS.get(split, split) in ("", "train") else f"_{split}"
        self.name = clean_name((path.resolve().name if path.is_dir() else path.name.split(".")[0]) or "images") + suffix

    def identity(self) -> dict[str, Any]:
        """The path, for a file also its size and time, and the chosen part of it."""
        status = self.root.stat()
        of_file = {} if self.root.is_dir() else {"bytes": status.st_size, "modified": status.st_mtime_ns}
        keys = ("split", "label_column", *OPTIONS_OF_FILES)
        asked = {key: value for key in keys if (value := getattr(self.options, key))}
        return {"path": str(self.root.resolve()), **of_file, **asked}

    def _damage_explained(self, *kinds: type[Exception]) -> AbstractContextManager[None]:
        return explained(f"cannot read {self.root}", self.advice, *DAMAGE, *kinds)

    def _unpack_to(self, target: Path, packed: IO[bytes]) -> None:
        """Unpack `packed` to `target`, in full or not at all; it is read from there."""
        most = max(MAX_RATIO * self.root.stat().st_size, MAX_FILE_BYTES)

        def read() -> bytes:
            with self._damage_explained():
                return packed.read(2**20)

        def copy(temporary: Path) -> None:
            with open(temporary, "wb") as unpacked:
                while block := read():
                    if unpacked.tell() + len(block) > most:
                        raise ValueError(TOO_LARGE)
                    unpacked.write(block)

        write_whole(target, copy)


class _Files(_OnDisk):
    """Files in a folder or an archive: images, label files, and vdiff's own files among them."""

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        super().__init__(path, options)
        folder = self.options.condition
        self.conditions = ConditionFolder(Path(folder), path) if folder else None
        self.has_conditions = bool(folder)

    def fill(self, listing: ListingWriter) -> None:
        """All files except vdiff's own pictures, with classes if label files give them."""
        options = self.options
        listing.split, listing.only_captioned = options.split, options.only_captioned
        listing.has_repeats = options.repeats
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
            elif base.lower().endswith(self.text_suffixes()):
                listing.add_text(name, place)
            else:
                listing.add_file(name, place)
                if base == SAMPLES_FILE and record_of_samples(self._text(item)):
                    samples.append(folder)
        if listing.leave_out_own(samples, sheets):
            labels = [item for item in labels if not item.name.startswith(tuple(f"{folder}/" for folder in samples))]
        column, told = options.label_column, False
        has_captions = self._read_list(listing) if options.captions else False
        for item in sorted(labels, key=lambda item: item.name):
            data, (folder, _, base) = self._text(item), item.name.rpartition("/")
            found = None if column == "none" else read_labels(item.name, data, column)
            captions = None
            if not options.captions and base != LABELS_FILE:
                try:
                    captions = read_captions(item.name, data, options.caption_column)
                except VdiffError as error:
                    if column != "none":
                        raise
                    listing.remark(error.cause)  # it is known to be no table of classes
            if found is not None:
                listing.add_labels(folder, found)
                told = True
            if captions is not None:
                listing.add_captions(folder, captions, item.name)
                has_captions = True
            if found is None and captions is None:
                listing.add_file(item.name)
        told |= listing.read_texts(self._decoded)
        if self.conditions is not None:
            self.conditions.check(listing)
        if options.caption_column and not has_captions:
            raise OptionError(
                f"--caption_column {options.caption_column}: {self.root} has no such column in a metadata file",
                "leave it out, or give the file with --captions FILE",
            )
        if column == "none":
            listing.class_names = ()
        elif column and not told:
            raise OptionError(
                f"--label_column {column}: {self.root} has no such column in a metadata.csv or metadata.jsonl",
                "leave it out, or give none for no classes",
            )

    @abstractmethod
    def _files(self) -> Iterator[tuple[str, str]]:
        """The names of all files, with `/` between folders, and the places of their bytes."""

    @abstractmethod
    def _open(self, item: Item) -> AbstractContextManager[tuple[IO[bytes], int]]:
        """The file, opened at its first byte, and its length; errors in the block become an UnreadableImageError."""

    def read(self, item: Item) -> Sample:
        """The bytes of a file, and those of its condition image."""
        condition = self.conditions.read(item.name) if self.conditions is not None else None
        return Sample(self._bytes(item), item.label, condition)

    def _bytes(self, item: Item) -> bytes:
        with self._open(item) as (file, num_bytes):
            check_bytes(num_bytes)
            return self._content(file, num_bytes)

    def _content(self, file: IO[bytes], num_bytes: int) -> bytes:
        return file.read(num_bytes)

    def _edge_of(self, item: Item) -> bytes:
        """The bytes of a picture that may hold vdiff's mark: the first ones, of a WebP the last; b"" if unreadable."""
        with suppress(UnreadableImageError), self._open(item) as (file, num_bytes):
            if item.name.lower().endswith(".webp"):
                file.seek(max(num_bytes - EDGE_BYTES, 0), os.SEEK_CUR)
            return file.read(min(num_bytes, EDGE_BYTES))
        return b""

    def _read_list(self, listing: ListingWriter) -> bool:
        """Take the captions that `--captions FILE` lists; answers whether there is such a file."""
        options, flag = self.options, f"--captions {self.options.captions}"
        if options.captions == "none":
            return False
        if suffix_of(options.captions) not in TABLES:
            raise OptionError(f"{flag} is none of {', '.join(TABLES)}", "give a table with file_name and text")
        with explained(f"{flag} cannot be read", "give a .csv, .jsonl or .parquet file", OSError, ValueError):
            check_regular(Path(options.captions))
            data = Path(options.captions).read_bytes()
        captions = read_captions(options.captions, data, options.caption_column)
        if not captions:
            need = f"file_name and {options.caption_column or 'text'}"
            raise OptionError(f"{flag} has no captions: it needs the columns {need}", "see --caption_column")
        root = f"{self.root.as_posix()}/"
        captions = [(name.removeprefix(root), caption) for name, caption in captions]
        if not listing.add_captions("", captions, options.captions):
            shown = clean_name(captions[0][0])
            raise OptionError(
                f"{flag} names none of the {listing.noun}s: {shown}", "names are relative to the top folder"
            )
        return True

    def text_suffixes(self) -> tuple[str, ...]:
        """Of the files that hold the captions of an image, and in tars its class."""
        return () if self.options.captions else (".txt", ".caption")

    def _decoded(self, item: Item) -> str:
        """The text beside an image."""
        try:
            return self._text(item).decode("utf-8-sig")
        except UnicodeDecodeError:
            hint = DO_WITHOUT if item.name.lower().endswith(CLASS_SUFFIX) else NO_CAPTIONS
            raise VdiffError(f"{self.root}: {item.name} is not UTF-8", hint) from None

    def _text(self, item: Item) -> bytes:
        with explained(f"{self.root}: cannot read {item.name}", "fix it, or move it away", UnreadableImageError):
            return self._bytes(item)


class Folder(_Files):
    """A folder of images, flat or with a folder for each class; links are followed."""

    @contextmanager
    def _open(self, item: Item) -> Iterator[tuple[IO[bytes], int]]:
        with unreadable_if_refused():
            path = self.root / item.name
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe might never end
                raise UnreadableImageError("unreadable", "not a regular file")
            with open(path, "rb") as file:
                yield file, status.st_size

    def _files(self) -> Iterator[tuple[str, str]]:
        def refuse(error: OSError) -> None:
            raise VdiffError(f"cannot read {error.filename}: {error.strerror}", "fix the permissions or move it away")

        entered = set()
        for folder, subfolders, files in os.walk(self.root, followlinks=True, onerror=refuse):
            real = os.path.realpath(folder)
            # a link to a parent folder would cause a loop; an unfinished dataset is not a folder of images
            if real in entered or (JOB_FILE in files and folder.endswith(PARTIAL_SUFFIX)):
                subfolders.clear()
                continue
            entered.add(real)
            # hidden folders are skipped; sorting decides which of two links to a folder counts
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            relative = Path(folder).relative_to(self.root)
            yield from (((relative / file).as_posix(), "") for file in files)


class Zip(_Files):
    """A zip of images, with the same rules as a folder; every process opens it itself."""

    advice = "give an intact zip, or a folder"

    def _files(self) -> Iterator[tuple[str, str]]:
        yield from ((info.filename, "") for info in self._archive().infolist() if not info.filename.endswith("/"))

    def _content(self, file: IO[bytes], num_bytes: int) -> bytes:
        del num_bytes
        # bzip2 and LZMA unpack all their input, whatever the header claims, so they get small inputs
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
        except Exception as error:  # errors of zipfile, and of decoders on a damaged member
            is_known = isinstance(error, (*DAMAGE[:3], RuntimeError, zipfile.BadZipFile))
            detail = str(error) if is_known else f"{type(error).__name__}: {error}"
            is_encrypted = isinstance(error, RuntimeError) and "encrypted" in str(error)
            raise UnreadableImageError("encrypted" if is_encrypted else "unreadable", detail) from None

    def _archive(self) -> zipfile.ZipFile:
        # a file handle shared across a fork would share its position
        if self._opened is None or self._opened[0] != os.getpid():
            # zipfile raises many types for a damaged directory
            with self._damage_explained(Exception):
                self._opened = (os.getpid(), zipfile.ZipFile(self.root))
        archive: zipfile.ZipFile = self._opened[1]
        return archive


class Tar(_Files):
    """A tar of images, with the same rules as a folder; a compressed one is unpacked once, for random access.

    As in WebDataset, `7.cls` has the class of `7.png`, a number or a name.
    """

    advice = "give an intact tar, or a folder"
    unpacked = "unpacked.tar"

    def text_suffixes(self) -> tuple[str, ...]:
        """Also that of classes."""
        return (*super().text_suffixes(), *(() if self.options.label_column == "none" else (CLASS_SUFFIX,)))

    def fetch(self, scratch: Path) -> None:
        """Unpack a compressed tar into `scratch`."""
        if (reader := reader_of(self.root)) is not open:
            self.plain = scratch / self.unpacked
            if not self.plain.exists():
                with self._damage_explained(), reader(self.root, "rb") as packed:
                    self._unpack_to(self.plain, packed)

    def _files(self) -> Iterator[tuple[str, str]]:
        with self._damage_explained(), open(self.plain, "rb") as file:
            for _, member in members(file):
                if not member.isdir():
                    is_whole = member.isreg() and not member.issparse()
                    yield member.name, f"{member.offset_data} {member.size}" if is_whole else ""

    @contextmanager
    def _open(self, item: Item) -> Iterator[tuple[IO[bytes], int]]:
        if not item.place:
            raise UnreadableImageError("unreadable", "not a regular file")
        offset, num_bytes = map(int, item.place.split())  # a listing is checked when it is opened
        with unreadable_if_refused(), open(self.plain, "rb") as file:
            file.seek(offset)
            yield file, num_bytes


class Tars(Tar):
    """Several tars, such as the shards of a set. `cat/7.png` of `x-003.tar` is called `cat/x-003.7.png`.

    Raises:
        OptionError: one of them is no tar, or two have one name.
    """

    def __init__(self, paths: Sequence[Path], options: SourceOptions | None = None) -> None:
        super().__init__(paths[0], options)
        self.parts = [Tar(path, options) for path in paths]
        self.stems = [path.name.partition(".tar")[0] for path in paths]
        for number, (path, stem) in enumerate(zip(paths, self.stems, strict=True)):
            if not path.exists():
                raise VdiffError(f"{path}: no such file", "give the tars that there are")
            check_regular(path)
            if path.is_dir() or not is_tar_file(path):
                raise OptionError(f"{path} is not a tar", "give one folder or archive, or several tars")
            if stem in self.stems[:number]:
                raise OptionError(f"two tars are called {stem}", "rename one of them")
            self.parts[number].unpacked = f"unpacked-{number}.tar"
        self.name = clean_name(self.stems[0]).rstrip("-_.0123456789") or self.name

    def identity(self) -> dict[str, Any]:
        """Those of all tars."""
        return {"tars": [part.identity() for part in self.parts]}

    def fetch(self, scratch: Path) -> None:
        """Unpack the compressed ones into `scratch`."""
        for part in self.parts:
            part.fetch(scratch)

    def _files(self) -> Iterator[tuple[str, str]]:
        for number, (part, stem) in enumerate(zip(self.parts, self.stems, strict=True)):
            for name, place in part._files():
                folder, slash, base = name.rpartition("/")
                # a hidden file stays one, and a table stays one that names no files of other tars
                shown = base if base.startswith(".") else f"{stem}.{base}"
                yield f"{folder}{slash}{shown}", f"{number} {place}"

    @contextmanager
    def _open(self, item: Item) -> Iterator[tuple[IO[bytes], int]]:
        number, _, place = item.place.partition(" ")
        with self.parts[int(number)]._open(replace(item, place=place)) as opened:
            yield opened


class Dataset(_OnDisk):
    """A prepared dataset, by vdiff or a rosinality-style LMDB: its largest images."""

    unknown_options = (*COLUMNS, "split", "label_column", *OPTIONS_OF_FILES)

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        super().__init__(path, options)
        self.store = ImageStore(path)
        self.store.check_squares()
        meta = self.store.meta
        self.size, self.has_conditions = meta.sizes[-1], meta.has_conditions
        self.defaults = Defaults(self.size, meta.channels, meta.image_format or "jpeg")

    def identity(self) -> dict[str, Any]:
        """The path and what the dataset holds."""
        return {"path": str(self.root.resolve()), "fingerprint": self.store.meta.fingerprint, "size": self.size}

    def fill(self, listing: ListingWriter) -> None:
        """All images in the dataset's order, with its classes."""
        listing.class_names = self.store.meta.class_names
        for index in range(len(self.store)):
            listing.add(index, self.store.label(index), self.store.caption(index))

    def read(self, item: Item) -> Sample:
        """The encoded image, and its condition image."""
        size, number = self.size, int(item.name)
        try:
            condition = self.store.condition(size, number) if self.has_conditions else None
            return Sample(self.store.encoded(size, number), item.label, condition)
        except VdiffError as error:
            raise UnreadableImageError("unreadable", error.cause) from None


def reader_of(path: Path) -> Callable[..., IO[bytes]]:
    """The function that opens a file that may be compressed: `open` if it is not."""
    with open(path, "rb") as file:
        head = file.read(8)
    return next((reader for magic, reader in COMPRESSIONS.items() if head.startswith(magic)), open)


def is_tar_file(path: Path) -> bool:
    """Whether a file is a tar, perhaps a compressed one."""
    with suppress(*DAMAGE), reader_of(path)(path, "rb") as file:
        return is_tar(file)
    return False


class Npz(_OnDisk):
    """`arr_0` (N, H, W, C) uint8 and, if there are classes, `arr_1` (N,), as sample.py and ADM write samples."""

    unknown_options = ("kind", *COLUMNS, "split", "label_column", *OPTIONS_OF_FILES)
    advice = "give an npz of samples, or images in a folder"

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        super().__init__(path, options)
        with self._archive() as archive, archive.open(IMAGES_ARRAY) as file:
            read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
            self.shape, is_fortran, dtype = read(file)
            self.offset = file.tell()
            if dtype != np.uint8 or is_fortran or len(self.shape) != 4 or self.shape[3] not in (1, 3):
                raise ValueError(f"arr_0 is {dtype} {self.shape}, not uint8 (N, H, W, 1 or 3)")
        self.defaults = Defaults(min(self.shape[1:3]), self.shape[3], "png")

    def fetch(self, scratch: Path) -> None:
        """Unpack the images into `scratch`, for random access."""
        self.plain = scratch / IMAGES_ARRAY
        if self.plain.exists():
            return
        with self._archive() as archive, archive.open(IMAGES_ARRAY) as file:
            num_bytes = archive.getinfo(IMAGES_ARRAY).file_size
            if num_bytes > max(MAX_RATIO * self.root.stat().st_size, MAX_FILE_BYTES):
                raise ValueError(TOO_LARGE)
            if num_bytes != self.offset + math.prod(self.shape):
                raise ValueError(f"arr_0 has {num_bytes} bytes, which are not {self.shape}")
            self._unpack_to(self.plain, file)

    def fill(self, listing: ListingWriter) -> None:
        """The images in order, with their classes; without class names in the file, numbers are the names."""
        with self._archive() as archive:
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
        if self._opened is None:
            self._opened = np.memmap(self.plain, np.uint8, "r", self.offset, self.shape)
        pixels = self._opened[int(item.name)]
        return Sample(PIL.Image.fromarray(pixels[..., 0] if self.shape[3] == 1 else pixels), item.label)

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with self._damage_explained(KeyError, MemoryError, NotImplementedError), zipfile.ZipFile(self.root) as archive:
            yield archive


ON_DISK: tuple[tuple[Callable[[Path], bool], Callable[[Path, SourceOptions], Source]], ...] = (
    (is_lmdb, Dataset),
    (Path.is_dir, Folder),
    (lambda path: path.suffix.lower() == ".npz", Npz),
    (zipfile.is_zipfile, Zip),
    (is_tar_file, Tar),
)
