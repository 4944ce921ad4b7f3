"""What a source of images is, and what it may be asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.data.listing import Item, ListingWriter
from vdiff.errors import OptionError

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

    def refuse(self, source: object, *names: str) -> None:
        """Raise if one of the options `names` was given to a source that knows none such."""
        for name in names:
            if value := getattr(self, name):
                raise OptionError(f"--{name} {value} does not apply to {source}", "leave it out")


class Source(ABC):
    """Images to prepare. A source is pickled to other processes, which read items by themselves.

    Attributes:
        name: what the dataset is called by default.
        path: the file or folder the images are in, None if they come with a library.
        defaults: what suits the images best.
    """

    name: str
    path: Path | None = None
    defaults = Defaults()
    _opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # each process opens it for itself

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that are equal when the images are the same: an unfinished preparation goes on only then."""

    def fetch(self, scratch: Path) -> None:
        """Download or unpack, once, in the main process; `scratch` is a folder that lasts until the work is done."""
        del scratch

    @abstractmethod
    def fill(self, listing: ListingWriter) -> None:
        """Tell the listing of all images, and of the class names if it cannot find them by itself."""

    @abstractmethod
    def read(self, item: Item) -> Sample:
        """One image. Raises UnreadableImageError: it cannot be read."""
