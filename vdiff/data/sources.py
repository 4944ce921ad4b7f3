"""Where images come from: a folder, a zip, the built-in digits. Each lists its images in one fixed, sorted order."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from vdiff.data.conversion import UnreadableImageError
from vdiff.data.store import is_dataset
from vdiff.errors import VdiffError

# fmt: off
EXTENSIONS = frozenset([
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".pbm",
    ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
])
# fmt: on


@dataclass(frozen=True)
class Item:
    """One image of a source: its name there, and the index of its class, if it has one."""

    name: str
    label: int | None = None


@dataclass(frozen=True)
class Listing:
    """Everything a source holds: images in order, class names, and the files passed over, counted by extension."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    remark: str = ""


class Source(Protocol):
    """Images to prepare. A source is pickled to other processes, which read items by themselves."""

    @property
    def name(self) -> str:
        """What the dataset is called by default."""

    @property
    def path(self) -> Path | None:
        """The file or folder the images are in, None if they come with a library."""

    def list(self) -> Listing:
        """All images, in an order that depends on their names alone."""

    def read(self, name: str) -> bytes:
        """The bytes of one image file.

        Raises:
            UnreadableImageError: it cannot be read.
        """


def arrange(names: Iterable[str]) -> Listing:
    """The rules for folders and zips: what is an image, in which order, and of which class.

    Names are `/`-separated. Hidden files and `__MACOSX` do not count. Folders that all images share are looked through;
    if then every image lies in a folder, the first folder's name is its class.
    """
    images, ignored = [], Counter[str]()
    for name in names:
        path = PurePosixPath(name)
        if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            continue
        extension = path.suffix.lower()
        if extension in EXTENSIONS:
            images.append(path)
        else:
            ignored[extension or "no extension"] += 1
    images.sort(key=lambda path: path.parts)
    parents = [path.parts[:-1] for path in images]
    # images are sorted, so what the first and the last share, all share
    pairs = zip(parents[0], parents[-1], strict=False) if parents else ()
    depth = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    folders = [parent[depth] if len(parent) > depth else "" for parent in parents]
    counts = dict(sorted(ignored.items()))
    if any(folders) and all(folders):
        class_names = tuple(sorted(set(folders)))
        index = {name: number for number, name in enumerate(class_names)}
        items = tuple(Item(str(path), index[folder]) for path, folder in zip(images, folders, strict=True))
        return Listing(items, class_names, counts)
    loose = folders.count("")
    remark = f"no classes: {loose} of {len(folders)} images lie outside the class folders" if any(folders) else ""
    return Listing(tuple(Item(str(path)) for path in images), (), counts, remark)


class Folder:
    """A folder of images, flat or with a folder for each class; links are followed."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.name = path.resolve().name or "images"
        self.root = path

    def list(self) -> Listing:
        """All images below the folder."""
        return arrange(self._names())

    def read(self, name: str) -> bytes:
        """The bytes of the file."""
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise UnreadableImageError("unreadable", error.strerror or str(error)) from None

    def _names(self) -> Iterable[str]:
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


class Zip:
    """A zip of images, by the same rules as a folder; every process opens it for itself."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.name = path.stem
        self.file = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def list(self) -> Listing:
        """All images in the zip."""
        return arrange(dict.fromkeys(info.filename for info in self._archive().infolist() if not info.is_dir()))

    def read(self, name: str) -> bytes:
        """The bytes of the member."""
        try:
            return self._archive().read(name)
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
                self._opened = (os.getpid(), zipfile.ZipFile(self.file))
            except (zipfile.BadZipFile, OSError) as error:
                raise VdiffError(f"cannot read {self.file}: {error}", "give an intact zip, or a folder") from None
        return self._opened[1]


class Digits:
    """scikit-learn's 1797 handwritten digits: 8 × 8, levels 0 … 16 as round(level · 255 / 16); classes "0" … "9"."""

    name = "digits"

    def __init__(self) -> None:
        self.path: Path | None = None
        self._pixels: dict[str, bytes] = {}

    def list(self) -> Listing:
        """The digits in scikit-learn's order."""
        import numpy as np
        from sklearn.datasets import load_digits

        images, targets = load_digits(return_X_y=True)
        pixels = np.floor(images * (255 / 16) + 0.5).astype(np.uint8)
        self._pixels = {f"{index:04d}": row.tobytes() for index, row in enumerate(pixels)}
        items = tuple(Item(name, int(target)) for name, target in zip(self._pixels, targets, strict=True))
        return Listing(items, tuple("0123456789"))

    def read(self, name: str) -> bytes:
        """The digit as the bytes of a PGM file; they travel with the source, so that workers need no scikit-learn."""
        if not self._pixels:
            self.list()
        return b"P5 8 8 255\n" + self._pixels[name]


def open_source(path: Path | None) -> Source:
    """The source for a path, or for the name of a built-in one; None is the digits.

    Raises:
        VdiffError: no such path, or nothing that can be read as images.
    """
    if path is None:
        return Digits()
    if not path.exists():
        if str(path) in BUILT_IN:
            return BUILT_IN[str(path)]()
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give a folder of images or a zip"
        raise VdiffError(f"{path}: no such file or folder", hint)
    if is_dataset(path):
        raise VdiffError(f"{path} is a prepared dataset already", f"train on it: python train.py --data {path}")
    for accepts, make in ON_DISK:
        if accepts(path):
            return make(path)
    raise VdiffError(f"{path} is neither a folder nor a zip", "give a folder of images or a zip")


BUILT_IN: dict[str, Callable[[], Source]] = {"digits": Digits}
ON_DISK: tuple[tuple[Callable[[Path], bool], Callable[[Path], Source]], ...] = (
    (Path.is_dir, Folder),
    (zipfile.is_zipfile, Zip),
)
