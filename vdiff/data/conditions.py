"""Condition images in folders: those of the images of a dataset, and those that samples are drawn from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL.ImageColor

from vdiff.data.conversion import ConversionConfig, decode, render
from vdiff.data.image_files import UnreadableImageError, check_bytes, extensions, unreadable_if_refused
from vdiff.data.listing import ListingWriter, key_of
from vdiff.errors import OptionError, VdiffError, explained
from vdiff.files import check_regular


class ConditionFolder:
    """A folder with the condition images of other images: their names without suffix, relative to both folders, agree.

    Args:
        images: the folder or archive of the images.

    Raises:
        OptionError: it is not a folder, or one of the two folders holds the other.
    """

    def __init__(self, root: Path, images: Path) -> None:
        self.root, self.flag = root, f"--condition {root}"
        if not root.is_dir():
            raise OptionError(f"{self.flag} is not a folder", "give a folder of images named like those of PATH")
        mine, theirs = root.resolve(), images.resolve()
        if mine.is_relative_to(theirs) or theirs.is_relative_to(mine):
            raise OptionError(f"{self.flag} and {images} are not separate folders", "give two folders side by side")
        self._names: tuple[str, dict[str, list[str]]] = "", {}  # the last folder that was read, as images come in order

    def check(self, listing: ListingWriter) -> None:
        """Count the images of the folder that belong to no image.

        Raises:
            OptionError: none of them belongs to one.
        """
        if not listing.ignore_unmatched(image_names(self.root), "conditions without an image"):
            hint = "names without suffix, relative to the two folders, must agree"
            raise OptionError(f"{self.flag} holds no image that is named like one of PATH", hint)

    def read(self, name: str) -> bytes:
        """The bytes of the condition of the image `name`.

        Raises:
            UnreadableImageError: there is none, there are several, or it cannot be read.
        """
        folder, _, base = name.rpartition("/")
        if not self._names[1] or self._names[0] != folder:
            found: dict[str, list[str]] = {}
            place, known = self.root / folder, extensions()
            for file in sorted(os.listdir(place)) if place.is_dir() else []:
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in known:
                    found.setdefault(stem, []).append(file)
            self._names = folder, found
        files = self._names[1].get(os.path.splitext(base)[0], [])
        if len(files) != 1:
            raise UnreadableImageError("several conditions" if files else "no condition", ", ".join(files))
        with unreadable_if_refused():
            path = self.root / folder / files[0]
            check_regular(path)
            check_bytes(path.stat().st_size)
            return path.read_bytes()


def image_names(root: Path) -> Iterator[str]:
    """The names of all images in a folder and its subfolders, relative to it; hidden ones are left out."""
    known = extensions()
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            name = Path(folder, file).relative_to(root).as_posix()
            if os.path.splitext(file)[1].lower() in known and key_of(name):
                yield name


class ConditionFiles:
    """The condition images in a folder, from which samples are drawn, in the order of their names.

    Args:
        shape: (C, H, W) of the samples, H = W.
        how: crop, resample and background, as for the images of the training data. Pictures that are not square are
            cropped; of a random crop, or none, the centre is taken.

    Attributes:
        names: of the samples: those of the images, with the suffix `.png`.

    Raises:
        OptionError: the folder is none, or holds no images, or two of the same name.
    """

    def __init__(self, root: Path, shape: Sequence[int], how: Mapping[str, str]) -> None:
        flag = f"--condition {root}"
        if not root.is_dir():
            raise OptionError(f"{flag} is not a folder", "give a folder of condition images")
        self.root, (channels, _, size) = root, shape
        self._files = sorted(image_names(root), key=key_of)
        if not self._files:
            raise OptionError(f"{flag} holds no images", "give a folder of condition images")
        self.names = [f"{os.path.splitext(name)[0]}.png" for name in self._files]
        if len(set(self.names)) < len(self.names):
            twice = next(name for name, after in zip(self.names, self.names[1:], strict=False) if name == after)
            raise OptionError(f"{flag} holds two images whose samples would be called {twice}", "rename one of them")
        crop = how.get("crop", "")
        with explained("the checkpoint's condition_images cannot be read", "restore its config.json", ValueError):
            self.config = ConversionConfig(
                sizes=(size,),
                channels=channels,
                crop=crop if crop in ("pad", "stretch") else "center",
                resample=how.get("resample") or ConversionConfig.resample,
                background=PIL.ImageColor.getrgb(how.get("background") or "white")[:3],
            )

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names and contents of all files."""
        digest = hashlib.sha256()
        for name in self._files:
            digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(self._read(name)).digest())
        return digest.hexdigest()

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """The images `indices`: (B, C, H, W) uint8.

        Raises:
            VdiffError: one of them cannot be read.
        """
        found = []
        for name in (self._files[k] for k in indices):
            with explained(f"{self.root / name} cannot be read", "replace or remove it", UnreadableImageError):
                picture = decode(self._read(name), self.config, is_drafted=False)
            pixels = np.asarray(render(picture, self.config.sizes[0], self.config))
            found.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        return np.stack(found)

    def _read(self, name: str) -> bytes:
        path = self.root / name
        check_regular(path)
        try:
            return path.read_bytes()
        except OSError as error:
            raise VdiffError(f"{path} cannot be read: {error.strerror}", "replace or remove it") from None
