"""Images that lie on the disk: folders, archives, prepared datasets; the registry is at the foot."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from vdiff.data.image_files import MAX_FILE_BYTES, UnreadableImageError, check_bytes
from vdiff.data.listing import Item, ListingWriter
from vdiff.data.shard_files import is_tar, members
from vdiff.data.source import Defaults, Sample, Source
from vdiff.data.store import ImageStore, is_lmdb
from vdiff.errors import VdiffError
from vdiff.files import write_whole

MAX_RATIO = 100
"""How many times smaller a compressed tar of pictures may be; packed pictures hardly shrink."""


class _OnDisk:
    """What folders and archives have in common."""

    defaults = Defaults()

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.root = path
        self.name = (path.resolve().name if path.is_dir() else path.name.split(".")[0]) or "images"

    def identity(self) -> dict[str, Any]:
        """The path; for a file also its size and time."""
        status = self.root.stat()
        of_file = {} if self.root.is_dir() else {"bytes": status.st_size, "modified": status.st_mtime_ns}
        return {"path": str(self.root.resolve()), **of_file}

    def fetch(self, scratch: Path) -> None:
        """Nothing to do."""


class Folder(_OnDisk):
    """A folder of images, flat or with a folder for each class; links are followed."""

    def fill(self, listing: ListingWriter) -> None:
        """All files below the folder."""
        for name in self._names():
            listing.add_file(name)

    def read(self, item: Item) -> Sample:
        """The bytes of the file."""
        path = self.root / item.name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, for ever
                raise UnreadableImageError("unreadable", "not a regular file")
            check_bytes(path.stat().st_size)
            return Sample(path.read_bytes(), item.label)
        except OSError as error:
            raise UnreadableImageError("unreadable", error.strerror or str(error)) from None

    def _names(self) -> Iterator[str]:
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
            relative = Path(folder).relative_to(self.root)
            for file in files:
                yield (relative / file).as_posix()


class Zip(_OnDisk):
    """A zip of images, by the same rules as a folder; every process opens it for itself."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def fill(self, listing: ListingWriter) -> None:
        """All members of the zip."""
        for info in self._archive().infolist():
            if not info.is_dir():
                listing.add_file(info.filename)

    def read(self, item: Item) -> Sample:
        """The bytes of the member."""
        archive = self._archive()
        try:
            info = archive.getinfo(item.name)
            check_bytes(info.file_size)
            with archive.open(info) as member:
                # bzip2 and LZMA unpack all that they are given, whatever size is said: so they are given little
                return Sample(b"".join(iter(lambda: member.read(4096), b"")), item.label)
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


class Tar(_OnDisk):
    """A tar of images, by the same rules as a folder; a compressed one is unpacked once, to be read from anywhere."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
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

    def fill(self, listing: ListingWriter) -> None:
        """All members of the tar, and where they lie."""
        try:
            with open(self.plain, "rb") as file:
                for _, member in members(file):
                    if not member.isdir():
                        is_whole = member.isreg() and not member.issparse()
                        listing.add_file(member.name, f"{member.offset_data} {member.size}" if is_whole else "")
        except (tarfile.TarError, OSError) as error:
            raise self._damaged(error) from None

    def read(self, item: Item) -> Sample:
        """The bytes of the member."""
        if not item.place:
            raise UnreadableImageError("unreadable", "not a regular file")
        offset, num_bytes = map(int, item.place.split())
        check_bytes(num_bytes)
        try:
            with open(self.plain, "rb") as file:
                file.seek(offset)
                return Sample(file.read(num_bytes), item.label)
        except OSError as error:
            raise UnreadableImageError("unreadable", error.strerror or str(error)) from None

    def _damaged(self, error: Exception) -> VdiffError:
        return VdiffError(f"cannot read {self.root}: {error}", "give an intact tar, or a folder")


class Dataset(_OnDisk):
    """A prepared dataset, ours or a rosinality-style LMDB: its largest images once more."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
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


COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ON_DISK: tuple[tuple[Callable[[Path], bool], Callable[[Path], Source]], ...] = (
    (is_lmdb, Dataset),
    (Path.is_dir, Folder),
    (zipfile.is_zipfile, Zip),
    (is_tar_file, Tar),
)
