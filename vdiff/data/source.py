"""The interface of sources of images, and their options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.data.listing import Item, ListingWriter
from vdiff.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image


OPTIONS_OF_FILES = ("captions", "caption_column", "only_captioned", "repeats", "condition")
"""Those of `SourceOptions` that need further files or columns."""
COLUMNS = ("image_column", "audio_column")


@dataclass(frozen=True)
class Defaults:
    """A source's default settings of the conversion."""

    size: int = 64
    channels: int = 3
    image_format: str = "jpeg"


@dataclass(frozen=True)
class Sample:
    """One image of a source, as a file's bytes or a decoded picture, its class, and the file of its condition image."""

    data: bytes | Image
    label: int | None = None
    condition: bytes | None = None


@dataclass(frozen=True)
class SourceOptions:
    """Options of a source; empty = its default.

    Attributes:
        kind: `audio` for sounds.
        captions: a file that lists them, or `none`.
        only_captioned: leave out images without a caption.
        repeats: folders called `N_name` hold a class `name`, whose images are shown N times in an epoch.
        condition: a folder with a condition image for each image, see `disk_sources.ConditionFolder`.
    """

    root: Path = Path("downloads")
    split: str = ""
    image_column: str = ""
    label_column: str = ""
    captions: str = ""
    caption_column: str = ""
    only_captioned: bool = False
    repeats: bool = False
    condition: str = ""
    audio_column: str = ""
    kind: str = ""

    def refuse(self, source: object, *names: str) -> None:
        """Raise OptionError if one of the options `names` was given to a source that lacks it."""
        for name in names:
            if value := getattr(self, name):
                flag = f"--{name}" if value is True else f"--{name} {value}"
                raise OptionError(f"{flag} does not apply to {source}", "leave it out")


class Source(ABC):
    """Images to prepare. A source is pickled for other processes, which read items themselves.

    Attributes:
        name: the dataset's default name.
        path: the file or folder of the images; None if a library provides them.
        defaults: default settings for these images.
        has_conditions: whether every image has a condition image.
    """

    name: str
    path: Path | None = None
    defaults = Defaults()
    has_conditions = False
    _opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # each process opens it for itself

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that identify the images: an unfinished preparation continues only if they are equal."""

    def fetch(self, scratch: Path) -> None:
        """Download or unpack, once, in the main process; the folder `scratch` exists until the work is done."""
        del scratch

    @abstractmethod
    def fill(self, listing: ListingWriter) -> None:
        """Add all images to the listing, and the class names if it cannot find them itself."""

    @abstractmethod
    def read(self, item: Item) -> Sample:
        """One image. Raises UnreadableImageError: it cannot be read."""
