"""The registry of all sources, and sources from libraries: digits, torchvision, the Hugging Face hub."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.error import URLError

from vdiff.data.audio import EXTENSIONS as SOUNDS
from vdiff.data.disk_sources import ON_DISK, Tars
from vdiff.data.image_files import UnreadableImageError, extensions
from vdiff.data.labels import CAPTION_COLUMNS, NO_CAPTIONS, caption_in
from vdiff.data.listing import Item, Listing, ListingWriter
from vdiff.data.source import COLUMNS, OPTIONS_OF_FILES, Defaults, Sample, Source, SourceOptions
from vdiff.data.store import is_dataset, is_lmdb
from vdiff.data.tar_files import require_webdataset
from vdiff.errors import OptionError, VdiffError, explained, shell, suggestion
from vdiff.files import check_regular, elsewhere
from vdiff.network import hub_answers
from vdiff.text import cause_of, root_of


class Digits(Source):
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
        """The digit as the bytes of a PGM file; the source carries all digits, so workers do not need scikit-learn."""
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
    """A torchvision dataset: its class, its splits (the first is the default), and how they are chosen.

    `argument` is the parameter for the split; `train` receives whether the split is "train".
    """

    kind: str
    splits: tuple[str, ...] = ("train", "test")
    argument: str = "split"
    defaults: Defaults = field(default_factory=Defaults)
    extra: Mapping[str, Any] = field(default_factory=dict)
    downloads: bool = True


class Torchvision(Source):
    """A torchvision dataset under `root`, where torchvision downloads it if necessary."""

    def __init__(self, name: str, options: SourceOptions) -> None:
        self.set = TORCHVISION[name]
        options.refuse(name, "kind", *COLUMNS, "label_column", *OPTIONS_OF_FILES)
        self.split = options.split or self.set.splits[0]
        # the classes of LSUN are splits too: bedroom_train
        if self.split not in self.set.splits and not (name == "lsun" and "_" in self.split):
            raise OptionError(
                f"--split {self.split}: {name} has no such split", f"choose from {', '.join(self.set.splits)}"
            )
        self.name = name if self.split == self.set.splits[0] else f"{name}_{self.split}"
        self.defaults = self.set.defaults
        self.root = options.root

    def identity(self) -> dict[str, Any]:
        """Name, split and root folder."""
        return {"name": self.set.kind, "split": self.split, "root": str(self.root.resolve())}

    def fetch(self, scratch: Path) -> None:
        """Load the dataset; download it if it is missing and torchvision can."""
        del scratch
        for download in (False, True):
            try:
                if download:
                    self.root.mkdir(parents=True, exist_ok=True)
                self._opened = self._build(download=download)
                return
            except (RuntimeError, OSError, ImportError) as error:
                if download or not self.set.downloads or isinstance(error, ImportError):
                    raise self._failed(error) from None

    def fill(self, listing: ListingWriter) -> None:
        """The images in the dataset's order; with classes if the dataset has names for them."""
        listing.class_names = self._class_names()
        for number in range(len(self._get())):
            listing.add(number)

    def read(self, item: Item) -> Sample:
        """The picture and, in a dataset with class names, its class."""
        try:
            picture, target = self._get()[int(item.name)]
        except Exception as error:  # the dataset's loader raises many types
            raise UnreadableImageError("unreadable", f"{type(error).__name__}: {error}") from None
        return Sample(picture, int(target) if self._class_names() else None)

    def keywords(self, *, download: bool) -> dict[str, Any]:
        """The arguments of the dataset's class in torchvision."""
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
        if self._opened is None:
            self._opened = self._build(download=False)
        return self._opened

    def _class_names(self) -> tuple[str, ...]:
        loaded = self._get()
        names = getattr(loaded, "classes", None) or getattr(loaded, "categories", None)
        if self.set.kind == "SVHN":
            names = range(10)
        if self.set.kind == "CelebA" or not names:  # its targets are attributes, not classes
            return ()
        return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)

    def _failed(self, error: Exception) -> VdiffError:
        if isinstance(error, URLError):
            said = f"{self.set.kind} cannot be downloaded: {cause_of(error.reason)}"
            return VdiffError(said, "check the network, or give its folder with --root")
        get = "" if self.set.downloads else "; torchvision cannot download this set: get it from its publisher"
        return VdiffError(f"{self.set.kind} under {self.root}: {cause_of(error)}{get}", "give its folder with --root")


class HuggingFace(Source):
    """A dataset of the Hugging Face hub, or a folder in one of its formats: `hf:NAME` or `hf:NAME:CONFIG`."""

    defaults = Defaults()

    def __init__(self, name: str, options: SourceOptions) -> None:
        self.repository, _, self.config = name.removeprefix("hf:").partition(":")
        if not self.repository:
            raise OptionError(f"{name!r} does not name a dataset", "give hf:OWNER/NAME")
        self.name = Path(self.repository).name
        options.refuse(name, "repeats", "condition")
        if options.captions != "none":
            options.refuse(name, "captions")
        self.options, self.kind = options, options.kind or "image"
        self.split = options.split or "train"

    def identity(self) -> dict[str, Any]:
        """Name, configuration, split and columns."""
        options = asdict(self.options)
        chosen = {key: options[key] for key in ("image_column", "label_column")}
        chosen |= {key: options[key] for key in ("kind", "audio_column", *OPTIONS_OF_FILES) if options[key]}
        return {"name": self.repository, "config": self.config, "split": self.split, **chosen}

    def fetch(self, scratch: Path) -> None:
        """Load the dataset; the library downloads it into its cache."""
        del scratch
        self._get()

    def fill(self, listing: ListingWriter) -> None:
        """All rows, with the names of a class column."""
        data, _, label, text = self._get()
        listing.only_captioned = self.options.only_captioned
        listing.class_names = tuple(data.features[label].names) if label else ()
        labels: Iterable[int | None] = data[label] if label else (None for _ in range(len(data)))
        texts: Iterable[Any] = data[text] if text else repeat(None)
        for number, (target, value) in enumerate(zip(labels, texts, strict=False)):
            if label and (target is None or target < 0):
                raise VdiffError(f"row {number} of {self.repository} has no class", "give --label_column none")
            try:
                caption = caption_in(value)
            except ValueError as error:
                raise VdiffError(f"row {number} of {self.repository}: {error}", NO_CAPTIONS) from None
            listing.add(number, target, caption)

    def read(self, item: Item) -> Sample:
        """The bytes of the image, or sound, undecoded."""
        rows, column, *_ = self._get()
        try:
            value = rows[int(item.name)][column]
            if value is None:
                raise UnreadableImageError("unreadable", f"no {self.kind} in this row")
            data = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
            return Sample(data, item.label)
        except OSError as error:
            raise UnreadableImageError("unreadable", str(error)) from None

    def _get(self) -> tuple[Any, str, str, str]:
        """The rows, the names of the columns of images or sounds, classes and captions (empty: none)."""
        if self._opened is None:
            is_there = Path(self.repository).exists() or hub_answers()
            try:
                import datasets
            except ImportError:
                raise VdiffError("hf:… needs the package datasets", "pip install 'vdiff[hf]'") from None
            try:
                data = datasets.load_dataset(self.repository, self.config or None, split=self.split)
            except Exception as error:  # the library raises its own, the hub's and the network's errors
                cause = cause_of(root_of(error)) if is_there else "the hub does not answer"
                hint = "check the name, --split and the network"
                if isinstance(lacking := root_of(error), ImportError):
                    what = f"pip install {lacking.name}" if lacking.name else "install what it asks for"
                    hint = f"{what}, or give a folder's path without hf:"
                raise VdiffError(f"hf:{self.repository}, split {self.split}: {cause}", hint) from None
            kinds = {"image": datasets.Image, "audio": datasets.Audio}
            chosen = self.options.audio_column or self.options.image_column
            column = self._column(data, chosen, kinds[self.kind], f"{self.kind}_column")
            if not column:
                has_sounds = any(isinstance(feature, datasets.Audio) for feature in data.features.values())
                hint = "give --kind audio for sounds" if has_sounds else "choose another dataset"
                raise VdiffError(f"hf:{self.repository} has no {self.kind} column", hint)
            label = self._column(data, self.options.label_column, datasets.ClassLabel, "label_column")
            wanted = (self.options.caption_column,) if self.options.caption_column else CAPTION_COLUMNS
            text = next((name for name in wanted if name in data.features), "")
            if self.options.caption_column and not text:
                what = f"--caption_column {self.options.caption_column}: hf:{self.repository} has no such column"
                raise OptionError(what, f"choose from {', '.join(data.features)}")
            text = "" if self.options.captions == "none" else text
            # other columns of images or sounds would be decoded with each row
            read = data.select_columns(list(dict.fromkeys(filter(None, (column, label, text)))))
            self._opened = read.cast_column(column, kinds[self.kind](decode=False)), column, label, text
        opened: tuple[Any, str, str, str] = self._opened
        return opened

    def _column(self, data: Any, chosen: str, kind: type, flag: str) -> str:
        """The column of a kind: the chosen one, or the only one ("label" or the first among several)."""
        fitting = [name for name, feature in data.features.items() if isinstance(feature, kind)]
        if chosen == "none" and flag == "label_column":
            return ""
        if chosen and chosen not in fitting:
            what = {"image_column": "images", "audio_column": "sounds"}.get(flag, "classes")
            hint = f"choose from {', '.join(fitting)}" if fitting else "leave it out"
            raise OptionError(f"--{flag} {chosen}: hf:{self.repository} has no such column of {what}", hint)
        return chosen or next(
            (name for name in ("image", "audio", "label") if name in fitting), fitting[0] if fitting else ""
        )


BUILT_IN: dict[str, Callable[[], Source]] = {"digits": Digits}
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


def open_source(place: Path | str | Sequence[str] | None, options: SourceOptions | None = None) -> Source:
    """The source at a path or with a name; None: the digits. Paths take precedence over names.

    Args:
        place: several paths, or a pattern such as `x-{000..003}.tar` or `x-*.tar`, are the tars of one source.

    Raises:
        VdiffError: the path or name does not exist, or is not a source of images.
        OptionError: the source does not have an option.
    """
    options = options or SourceOptions()
    places = [place or "digits"] if place is None or isinstance(place, Path | str) else list(place)
    name = str(places[0])
    if len(places) == 1 and name.startswith("hf:"):
        return HuggingFace(name, options)
    path = Path(name)
    if len(found := [match for each in places for match in _matches(str(each))]) > 1:
        return Tars([Path(each) for each in found], options)
    path = Path(name := str(found[0]))
    if not path.exists():
        if name in TORCHVISION:
            return Torchvision(name, options)
        if name in BUILT_IN:
            options.refuse(name, "kind", "split", *COLUMNS, "label_column", *OPTIONS_OF_FILES)
            return BUILT_IN[name]()
        if "://" in name:
            raise VdiffError(f"{name} is not downloaded by vdiff", "download it, and give the file or folder")
        raise VdiffError(f"{name}: no such file or folder", _nearest(path))
    check_regular(path)
    if is_dataset(path) and not is_lmdb(path):
        raise VdiffError(f"{path} holds tar shards already", f"train on them: python train.py {shell('--data', path)}")
    for accepts, make in ON_DISK:
        if accepts(path):
            return make(path, options)
    if path.suffix.lower() in (".zip", ".tar", ".tgz"):
        raise VdiffError(f"{path} is damaged: not a whole {path.suffix[1:].lower()}", "copy or download it again")
    raise VdiffError(f"{path} is not a folder, zip, tar or dataset", "give a folder of images, or an archive of them")


def _matches(place: str) -> list[str]:
    """The paths that a pattern names, in order; a path or another name alone."""
    if not any(mark in place for mark in "{*?[") or Path(place).exists():
        return [place]
    parts = [place]
    if "{" in place:
        require_webdataset()
        from braceexpand import braceexpand

        with explained(f"{place} is not a pattern", "write it as x-{000..009}.tar", ValueError):
            parts = list(braceexpand(place, escape=False))
    return [found for part in parts for found in sorted(glob.glob(part)) or [part]]


def _nearest(path: Path) -> str:
    if found := elsewhere(path):
        return found
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := get_close_matches(path.name, siblings, n=1):
        return f"did you mean {path.parent / near[0]}?"
    named = suggestion(str(path), [*TORCHVISION, *BUILT_IN], only_near=True)
    return named or "give a folder of images, a zip or tar, or the name of a set (see --help)"


def build_listing(source: Source, path: Path, noun: str = "image", *, shuffled: bool = False) -> Listing:
    """All images, or sounds, of a source in order, listed in the file `path`."""
    with ListingWriter(path, SOUNDS if noun == "sound" else extensions(), noun=noun, shuffled=shuffled) as listing:
        source.fill(listing)
        return listing.finish()
