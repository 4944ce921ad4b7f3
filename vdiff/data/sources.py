"""Where images come from: folders, archives, other datasets, named sets; the registries are at the foot."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from vdiff.data.image_files import UnreadableImageError, extensions
from vdiff.data.listing import Item, Listing, ListingWriter
from vdiff.data.store import ImageStore, is_dataset, is_lmdb
from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.files import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Defaults:
    """What suits the images of a source best, if nothing else is asked for."""

    size: int = 64
    channels: int = 3
    image_format: str = "jpeg"


@dataclass(frozen=True)
class Sample:
    """One image as its source gives it, a file's bytes or a decoded picture, and its class."""

    data: bytes | Image
    label: int | None = None


@dataclass(frozen=True)
class SourceOptions:
    """What named sets can be asked for; empty = their own default."""

    root: Path = Path("downloads")
    split: str = ""
    image_column: str = ""
    label_column: str = ""

    def refuse(self, source: str, *names: str) -> None:
        """Raise if one of the options `names` was given to a source that knows none such."""
        for name in names:
            if value := getattr(self, name):
                raise OptionError(f"--{name} {value} has no meaning for {source}", "leave it out")


class Source(Protocol):
    """Images to prepare. A source is pickled to other processes, which read items by themselves."""

    @property
    def name(self) -> str:
        """What the dataset is called by default."""

    @property
    def path(self) -> Path | None:
        """The file or folder the images are in, None if they come with a library."""

    @property
    def defaults(self) -> Defaults:
        """What suits the images best."""

    def identity(self) -> dict[str, Any]:
        """Plain values that are equal when the images are the same: an unfinished preparation goes on only then."""

    def fetch(self, scratch: Path) -> None:
        """Download or unpack, once, in the main process; `scratch` is a folder that lasts until the work is done."""

    def fill(self, listing: ListingWriter) -> None:
        """Tell the listing of all images, and of the class names if it cannot find them by itself."""

    def read(self, item: Item) -> Sample:
        """One image.

        Raises:
            UnreadableImageError: it cannot be read.
        """


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
        try:
            return Sample(self._archive().read(item.name), item.label)
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
            except (zipfile.BadZipFile, OSError) as error:
                raise VdiffError(f"cannot read {self.root}: {error}", "give an intact zip, or a folder") from None
        return self._opened[1]


class Tar(_OnDisk):
    """A tar of images, by the same rules as a folder; a compressed one is unpacked once, to be read from anywhere."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.plain = path

    def fetch(self, scratch: Path) -> None:
        """Unpack a compressed tar into `scratch`."""
        with open(self.root, "rb") as file:
            head = file.read(8)
        unpack = next((reader for magic, reader in COMPRESSIONS.items() if head.startswith(magic)), None)
        if unpack is not None:
            self.plain = scratch / "unpacked.tar"
            if not self.plain.exists():
                write_whole(self.plain, lambda temporary: self._unpack(unpack, temporary))

    def _unpack(self, reader: Callable[[Path, str], IO[bytes]], target: Path) -> None:
        try:
            with reader(self.root, "rb") as packed, open(target, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
            raise self._damaged(error) from None

    def fill(self, listing: ListingWriter) -> None:
        """All members of the tar, and where they lie."""
        try:
            with tarfile.open(self.plain, "r:") as archive:
                while (member := archive.next()) is not None:
                    if not member.isdir():
                        place = f"{member.offset_data} {member.size}" if member.isreg() and not member.sparse else ""
                        listing.add_file(member.name, place)
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        except (tarfile.TarError, OSError) as error:
            raise self._damaged(error) from None

    def read(self, item: Item) -> Sample:
        """The bytes of the member."""
        if not item.place:
            raise UnreadableImageError("unreadable", "not a regular file")
        offset, num_bytes = map(int, item.place.split())
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


class _InLibrary:
    """What sets that a library keeps have in common."""

    path: Path | None = None

    def fetch(self, scratch: Path) -> None:
        """Nothing to do."""


class Digits(_InLibrary):
    """scikit-learn's 1797 handwritten digits: 8 × 8, levels 0 … 16 as round(level · 255 / 16); classes "0" … "9"."""

    name = "digits"
    defaults = Defaults(8, 1, "png")

    def __init__(self) -> None:
        self._pixels: list[bytes] = []

    def identity(self) -> dict[str, Any]:
        """Its name."""
        return {"name": self.name}

    def fill(self, listing: ListingWriter) -> None:
        """The digits in scikit-learn's order."""
        listing.class_names = tuple("0123456789")
        for number, label in enumerate(self._load()):
            listing.add(number, label)

    def read(self, item: Item) -> Sample:
        """The digit as the bytes of a PGM file; they travel with the source, so that workers need no scikit-learn."""
        if not self._pixels:
            self._load()
        return Sample(b"P5 8 8 255\n" + self._pixels[int(item.name)], item.label)

    def _load(self) -> list[int]:
        import numpy as np
        from sklearn.datasets import load_digits

        images, targets = load_digits(return_X_y=True)
        self._pixels = [row.tobytes() for row in np.floor(images * (255 / 16) + 0.5).astype(np.uint8)]
        return [int(target) for target in targets]


@dataclass(frozen=True)
class NamedSet:
    """One of torchvision's sets: its class there, its splits (the first is the default), and how they are chosen.

    `argument` is the parameter that takes the split; for `train` it is whether the split is "train".
    """

    kind: str
    splits: tuple[str, ...] = ("train", "test")
    argument: str = "split"
    defaults: Defaults = field(default_factory=Defaults)
    extra: Mapping[str, Any] = field(default_factory=dict)
    downloads: bool = True


_GREY_28, _COLOUR_32 = Defaults(28, 1, "png"), Defaults(32, 3, "png")
TORCHVISION = {
    "caltech101": NamedSet("Caltech101", ("all",), ""),
    "caltech256": NamedSet("Caltech256", ("all",), ""),
    "celeba": NamedSet("CelebA", ("train", "valid", "test", "all")),
    "cifar10": NamedSet("CIFAR10", argument="train", defaults=_COLOUR_32),
    "cifar100": NamedSet("CIFAR100", argument="train", defaults=_COLOUR_32),
    "country211": NamedSet("Country211", ("train", "valid", "test")),
    "dtd": NamedSet("DTD", ("train", "val", "test")),
    "emnist": NamedSet("EMNIST", argument="train", defaults=_GREY_28, extra={"split": "balanced"}),
    "eurosat": NamedSet("EuroSAT", ("all",), ""),
    "fashion_mnist": NamedSet("FashionMNIST", argument="train", defaults=_GREY_28),
    "fgvc_aircraft": NamedSet("FGVCAircraft", ("trainval", "train", "val", "test")),
    "flowers102": NamedSet("Flowers102", ("train", "val", "test")),
    "food101": NamedSet("Food101"),
    "gtsrb": NamedSet("GTSRB"),
    "imagenet": NamedSet("ImageNet", ("train", "val"), downloads=False),
    "kmnist": NamedSet("KMNIST", argument="train", defaults=_GREY_28),
    "lsun": NamedSet("LSUN", ("train", "val", "test"), "classes", downloads=False),
    "mnist": NamedSet("MNIST", argument="train", defaults=_GREY_28),
    "oxford_pets": NamedSet("OxfordIIITPet", ("trainval", "test")),
    "places365": NamedSet("Places365", ("train-standard", "val"), extra={"small": True}),
    "stl10": NamedSet("STL10", ("train", "test", "unlabeled", "train+unlabeled"), defaults=Defaults(96, 3, "png")),
    "sun397": NamedSet("SUN397", ("all",), ""),
    "svhn": NamedSet("SVHN", ("train", "test", "extra"), defaults=_COLOUR_32),
    "usps": NamedSet("USPS", argument="train", defaults=Defaults(16, 1, "png")),
}


class Torchvision(_InLibrary):
    """One of torchvision's sets, found under `root` or downloaded there by torchvision."""

    def __init__(self, name: str, options: SourceOptions) -> None:
        self.set = TORCHVISION[name]
        options.refuse(name, "image_column", "label_column")
        self.split = options.split or self.set.splits[0]
        # the classes of LSUN are splits too: bedroom_train
        if self.split not in self.set.splits and not (name == "lsun" and "_" in self.split):
            raise OptionError(
                f"--split {self.split}: {name} has no such split", f"choose from {', '.join(self.set.splits)}"
            )
        self.name = name if self.split == self.set.splits[0] else f"{name}_{self.split}"
        self.defaults = self.set.defaults
        self.root = options.root
        self._loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def identity(self) -> dict[str, Any]:
        """Name, split and where it lies."""
        return {"name": self.set.kind, "split": self.split, "root": str(self.root.resolve())}

    def fetch(self, scratch: Path) -> None:
        """Load the set; download it if torchvision can and it is not there."""
        del scratch
        try:
            self._loaded = self._build(download=False)
        except (RuntimeError, OSError, ImportError) as error:
            if not self.set.downloads or isinstance(error, ImportError):
                raise self._failed(error) from None
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                self._loaded = self._build(download=True)
            except (RuntimeError, OSError) as failure:
                raise self._failed(failure) from None

    def fill(self, listing: ListingWriter) -> None:
        """The images in the set's order; classes where the set has names for them."""
        listing.class_names = self._class_names()
        for number in range(len(self._get())):
            listing.add(number)

    def read(self, item: Item) -> Sample:
        """The picture and, in a set with class names, its class."""
        try:
            picture, target = self._get()[int(item.name)]
        except Exception as error:  # whatever the set's own loader stumbles over
            raise UnreadableImageError("unreadable", f"{type(error).__name__}: {error}") from None
        return Sample(picture, int(target) if self._class_names() else None)

    def keywords(self, *, download: bool) -> dict[str, Any]:
        """The arguments of the set's class in torchvision."""
        chosen: dict[str, Any] = {"root": str(self.root), **self.set.extra}
        if self.set.argument == "train":
            chosen["train"] = self.split == "train"
        elif self.set.argument == "classes":
            chosen["classes"] = self.split if self.split in self.set.splits else [self.split]
        elif self.set.argument:
            chosen["split"] = self.split
        return chosen | ({"download": download} if self.set.downloads else {})

    def _build(self, *, download: bool) -> Any:
        import torchvision.datasets

        return getattr(torchvision.datasets, self.set.kind)(**self.keywords(download=download))

    def _get(self) -> Any:
        if self._loaded is None:
            self._loaded = self._build(download=False)
        return self._loaded

    def _class_names(self) -> tuple[str, ...]:
        loaded = self._get()
        names = getattr(loaded, "classes", None) or getattr(loaded, "categories", None)
        if self.set.kind == "SVHN":
            names = range(10)
        if self.set.kind == "CelebA" or not names:  # its targets are attributes, not classes
            return ()
        return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)

    def _failed(self, error: Exception) -> VdiffError:
        reason = " ".join(str(error).split())
        get = "" if self.set.downloads else "; torchvision cannot download this set: get it from its publisher"
        return VdiffError(f"{self.set.kind} under {self.root}: {reason}{get}", "give the folder it lies in with --root")


class HuggingFace(_InLibrary):
    """A dataset of the Hugging Face hub, or a folder in one of its formats: `hf:NAME` or `hf:NAME:CONFIG`."""

    defaults = Defaults()

    def __init__(self, name: str, options: SourceOptions) -> None:
        self.repository, _, self.config = name.removeprefix("hf:").partition(":")
        if not self.repository:
            raise OptionError(f"{name!r} names no dataset", "give hf:OWNER/NAME")
        self.name = Path(self.repository).name
        self.options = options
        self.split = options.split or "train"
        self._loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def identity(self) -> dict[str, Any]:
        """Name, configuration, split and columns."""
        chosen = {key: value for key, value in asdict(self.options).items() if key.endswith("column")}
        return {"name": self.repository, "config": self.config, "split": self.split, **chosen}

    def fetch(self, scratch: Path) -> None:
        """Load the dataset, which downloads it into the library's own cache."""
        del scratch
        self._get()

    def fill(self, listing: ListingWriter) -> None:
        """All rows, with the names of a class column."""
        data, _, label = self._get()
        listing.class_names = tuple(data.features[label].names) if label else ()
        labels: Iterable[int | None] = data[label] if label else (None for _ in range(len(data)))
        for number, target in enumerate(labels):
            if label and (target is None or target < 0):
                raise VdiffError(f"row {number} of {self.repository} has no class", "give --label_column none")
            listing.add(number, target)

    def read(self, item: Item) -> Sample:
        """The bytes of the image, undecoded."""
        rows, image, _ = self._get()
        try:
            value = rows[int(item.name)][image]
            if value is None:
                raise UnreadableImageError("unreadable", "no image in this row")
            data = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
            return Sample(data, item.label)
        except OSError as error:
            raise UnreadableImageError("unreadable", str(error)) from None

    def _get(self) -> tuple[Any, str, str]:
        """The rows, the name of the image column and that of the class column (empty: no classes)."""
        if self._loaded is None:
            try:
                import datasets
            except ImportError:
                raise VdiffError("hf:… needs the package datasets", "pip install 'vdiff[hf]'") from None
            try:
                data = datasets.load_dataset(self.repository, self.config or None, split=self.split)
            except Exception as error:  # the library raises its own, the hub's and the network's errors
                reason = " ".join(str(error).split())
                raise VdiffError(
                    f"hf:{self.repository}, split {self.split}: {reason}", "check the name, --split and the network"
                ) from None
            image = self._column(data, self.options.image_column, datasets.Image, "image_column")
            if not image:
                raise VdiffError(f"hf:{self.repository} has no image column", "choose another dataset")
            label = self._column(data, self.options.label_column, datasets.ClassLabel, "label_column")
            self._loaded = data.cast_column(image, datasets.Image(decode=False)), image, label
        loaded: tuple[Any, str, str] = self._loaded
        return loaded

    def _column(self, data: Any, chosen: str, kind: type, flag: str) -> str:
        """The column of a kind: the chosen one, or the only one ("label" or the first among several)."""
        fitting = [name for name, feature in data.features.items() if isinstance(feature, kind)]
        if chosen == "none" and flag == "label_column":
            return ""
        if chosen and chosen not in fitting:
            what = "images" if flag == "image_column" else "classes"
            hint = f"choose from {', '.join(fitting)}" if fitting else "leave it out"
            raise OptionError(f"--{flag} {chosen}: hf:{self.repository} has no such column of {what}", hint)
        return chosen or next((name for name in ("image", "label") if name in fitting), fitting[0] if fitting else "")


def open_source(place: Path | str | None, options: SourceOptions | None = None) -> Source:
    """The source at a path or of a name; None is the digits. What lies on the disk goes before a name.

    Raises:
        VdiffError: no such path or name, or nothing that can be read as images.
        OptionError: an option that the source knows nothing of.
    """
    options = options or SourceOptions()
    if place is None:
        place = "digits"
    if str(place).startswith("hf:"):
        return HuggingFace(str(place), options)
    path = Path(place)
    if not path.exists():
        if str(place) in TORCHVISION:
            return Torchvision(str(place), options)
        if str(place) not in BUILT_IN:
            raise VdiffError(f"{place}: no such file or folder", _nearest(path))
    options.refuse(str(place), "split", "image_column", "label_column")
    if not path.exists():
        return BUILT_IN[str(place)]()
    if is_dataset(path) and not is_lmdb(path):
        raise VdiffError(f"{path} holds tar shards already", f"train on them: python train.py --data {path}")
    for accepts, make in ON_DISK:
        if accepts(path):
            return make(path)
    raise VdiffError(f"{path} is no folder, zip, tar or dataset", "give a folder of images, or an archive of them")


def _nearest(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := get_close_matches(path.name, siblings, n=1):
        return f"did you mean {path.parent / near[0]}?"
    named = suggestion(str(path), [*TORCHVISION, *BUILT_IN], only_near=True)
    return named or "give a folder of images, a zip or tar, or the name of a set (see --help)"


def build_listing(source: Source, path: Path | None = None, *, shuffled: bool = False) -> Listing:
    """All images of a source in order, kept in the file `path` or in memory."""
    with ListingWriter(path, extensions(), shuffled=shuffled) as listing:
        source.fill(listing)
        return listing.finish()


COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
BUILT_IN: dict[str, Callable[[], Source]] = {"digits": Digits}
ON_DISK: tuple[tuple[Callable[[Path], bool], Callable[[Path], Source]], ...] = (
    (is_lmdb, Dataset),
    (Path.is_dir, Folder),
    (zipfile.is_zipfile, Zip),
    (tarfile.is_tarfile, Tar),
)
