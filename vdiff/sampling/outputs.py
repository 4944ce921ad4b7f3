"""What an output is: where images go, whatever kind it is, and when an earlier call's may be gone on with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from vdiff.data.images import PICTURE
from vdiff.errors import VdiffError
from vdiff.replacing import check_free, check_ours, is_free, locked
from vdiff.sampling.packing import SAMPLES
from vdiff.sampling.spec import RECORD, SampleSpec, read_record

GRID, STRIP, ANIMATION = PICTURES = ("grid.png", "trajectory.png", "trajectory.webp")
State = Literal["anew", "going on", "finished"]


@dataclass(frozen=True)
class ImageKind:
    """What all images of an output share.

    Attributes:
        size, channels: pixels of a side; 1 or 3.
        class_names: of the model's classes; empty: it has none.
    """

    size: int
    channels: int
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise VdiffError(
                f"the model's images have {self.channels} channels, and pictures 1 or 3",
                "latents need their autoencoder; vdiff.load draws them as tensors",
            )


class Output(ABC):
    """Where images go. Every process may add images of its own; the first one checks, begins and finishes."""

    def __init__(self, path: Path, kind: ImageKind) -> None:
        self.path, self.kind = path, kind

    @property
    @abstractmethod
    def place(self) -> Path:
        """The folder where images are until all are there."""

    @abstractmethod
    def check(self, spec: SampleSpec, num: int, *, overwrite: bool) -> State:
        """How far an earlier call came; nothing is changed.

        Raises:
            VdiffError: the place is taken by something else, or by images drawn in another way.
        """

    @abstractmethod
    def begin(self, spec: SampleSpec, state: State) -> None:
        """Make the place, emptied where it begins anew; where all is finished, take leftovers away."""

    @abstractmethod
    def held(self, num: int) -> np.ndarray:
        """Which of the images 0 … `num` − 1 are there: (num,) bool."""

    @abstractmethod
    def encode(self, index: int, image: Tensor) -> bytes:
        """Image (C, H, W) in [−1, 1] as it is kept; called in threads, several at once."""

    @abstractmethod
    def commit(self, images: Sequence[tuple[int, bytes]]) -> None:
        """Keep what `encode` answered."""

    @abstractmethod
    def images(self, indices: Sequence[int]) -> Tensor:
        """Images that are there: (N, C, H, W) in [−1, 1].

        Raises:
            VdiffError: one is damaged.
        """

    @abstractmethod
    def finish(self, spec: SampleSpec, num: int) -> None:
        """Put the whole in its place, where that is still to be done."""

    def picture(self, name: str) -> Path:
        """`OUT.grid.png`: beside the output, as tools that read a folder of images take every picture for a sample."""
        path = self.path if self.path.name.strip(".") else self.path.resolve()
        return path.with_name(f"{path.name}.{name}")

    def picture_in_work(self, name: str) -> Path:
        """Where the picture called `name` is until all is done."""
        return self.picture(name)

    def check_pictures(self) -> None:
        """See that no picture that another program drew lies where those of a new output go.

        Raises:
            VdiffError: one does.
        """
        for name in PICTURES:
            check_free(self.picture(name), PICTURE, overwrite=True)

    def locked(self, *, mine: bool) -> AbstractContextManager[None]:
        """Keep other commands from writing here; `mine`: whether this is the first process."""
        return locked(self.path, self.place, *map(self.picture, PICTURES), mine=mine)


def check_form(record: object, form: str, place: Path) -> None:
    """Refuse to go on with images that are kept in another way, as their record says.

    Raises:
        VdiffError: as said.
    """
    found = record.get("format", "png") if isinstance(record, dict) else form
    if found != form:
        raise VdiffError(f"{place} holds images as {found}, not {form}", "give --overwrite, or another --out")


def is_ours(place: Path, spec: SampleSpec, form: str, *, overwrite: bool) -> bool:
    """Whether the folder is to be gone on with; False: to be made, or replaced.

    Raises:
        VdiffError: it holds something else.
    """
    if is_free(place):
        return False
    if overwrite:
        check_free(place, SAMPLES, overwrite=True)
    else:
        check_ours(place, SAMPLES)
        record = read_record(place / RECORD)
        check_form(record, form, place)
        spec.check_same(record, place)
    return not overwrite
