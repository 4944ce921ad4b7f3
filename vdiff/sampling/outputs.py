"""Outputs of images or sounds: a folder of files, or one archive of images that is packed at the end."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vdiff.data.audio import decode_sound, encode
from vdiff.data.images import PICTURE, to_pil
from vdiff.data.labels import LABELS_FILE
from vdiff.errors import VdiffError
from vdiff.files import fsync, make_folder, refusal, remove, write_text
from vdiff.models.codec import PIXEL_CODEC, WAVEFORM, from_uint8, to_uint8
from vdiff.replacing import check_free, check_ours, discard, is_free, locked, start_folder, sweep_inside, take_place
from vdiff.sampling.packing import (
    CAPTIONS_FILE,
    PACKERS,
    SAMPLES,
    Contents,
    captions_json,
    file_name,
    labels_json,
    read_packed_record,
)
from vdiff.sampling.record_log import RecordLog, RecordReader
from vdiff.sampling.spec import RECORD, SampleSpec

SOUND_FORMATS = ("wav", "flac")
FORMATS = ("png", *PACKERS)
GRID, STRIP, ANIMATION = PICTURES = ("grid.png", "trajectory.png", "trajectory.webp")
State = Literal["anew", "going on", "finished"]
FSYNCS_AT_ONCE = 16
"""Threads that sync files: file systems sync several at once, 500 in 0.3 s instead of 4 s (ext4)."""


@dataclass(frozen=True)
class ImageKind:
    """The common properties of an output's images, or sounds.

    Attributes:
        size, channels: pixels per side; 1 or 3. Of sounds: samples; 1 or 2.
        class_names: of the model's classes; empty if it has none.
        rate: samples per second of sounds; 0: images.
    """

    size: int
    channels: int
    class_names: Sequence[str] = ()
    rate: int = 0

    @property
    def noun(self) -> str:
        """What one of them is called in messages."""
        return (WAVEFORM if self.rate else PIXEL_CODEC).noun

    def __post_init__(self) -> None:
        if not self.rate and self.channels not in (1, 3):
            raise VdiffError(
                f"the model's images have {self.channels} channels, but pictures need 1 or 3",
                "latents need an autoencoder; vdiff.load draws them as tensors",
            )


class Output(ABC):
    """The destination of images. Every process adds its images; rank 0 checks, begins and finishes.

    Attributes:
        place: the folder of the images until all are drawn.
    """

    def __init__(self, path: Path, place: Path, kind: ImageKind, form: str) -> None:
        self.path, self.place, self.kind, self.form = path, place, kind, form

    @abstractmethod
    def check(self, spec: SampleSpec, num: int, *, overwrite: bool) -> State:
        """The state that an earlier call left; changes nothing.

        Raises:
            VdiffError: the place holds something else, or images drawn with other settings.
        """

    def earlier(self, place: Path, spec: SampleSpec, *, overwrite: bool) -> dict[str, Any] | None:
        """The record of images at `place` that this call continues; None: there are none, or they are replaced.

        Raises:
            VdiffError: the place holds something else, or images of other settings or another format.
        """
        if is_free(place):
            return None
        if overwrite:
            check_free(place, SAMPLES, overwrite=True)
            return None
        check_ours(place, SAMPLES)
        record = read_packed_record(place) or {}
        if (found := record.get("format", "png")) != self.form:
            raise VdiffError(
                f"{place} holds {self.kind.noun}s as {found}, not {self.form}",
                "give another --name or --out, or --overwrite",
            )
        spec.check_same(record, place, self.kind.noun)
        return record

    def check_pictures(self) -> None:
        """Check that the pictures of a new output would not replace another program's.

        Raises:
            VdiffError: they would.
        """
        if is_free(self.path) and is_free(self.place):
            for name in PICTURES:
                check_free(self.picture(name), PICTURE, overwrite=True)

    @abstractmethod
    def begin(self, spec: SampleSpec, state: State) -> None:
        """Create the place, empty for a new output; remove leftovers of a finished one."""

    @abstractmethod
    def held(self, num: int) -> np.ndarray:
        """Which of the images 0 … `num` − 1 exist: (num,) bool."""

    @abstractmethod
    def encode(self, index: int, image: Tensor) -> bytes:
        """Image (C, H, W) in [−1, 1] in its stored form; called in several threads."""

    @abstractmethod
    def commit(self, images: Sequence[tuple[int, bytes]]) -> None:
        """Store results of `encode`."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Stored images: (C, H, W) in [−1, 1].

        Raises:
            VdiffError: an image is damaged.
        """

    @abstractmethod
    def finish(self, spec: SampleSpec, num: int) -> None:
        """Move the output to its final place, if necessary."""

    def picture(self, name: str) -> Path:
        """`OUT.grid.png`, beside the output, as tools that read a folder of images treat every picture as a sample."""
        path = self.path if self.path.name.strip(".") else self.path.resolve()
        return path.with_name(f"{path.name}.{name}")

    def picture_in_work(self, name: str) -> Path:
        """The path of the picture `name` until all is done."""
        return self.picture(name)

    def locked(self, *, mine: bool) -> AbstractContextManager[None]:
        """Lock the output against other commands; `mine`: whether this is the first process."""
        return locked(self.path, self.place, *map(self.picture, PICTURES), mine=mine)


class FileFolder(Output):
    """`00000.png`, … (sounds: `.wav`, `.flac`), the record, `dataset.json` with the classes; pictures are beside it.

    Args:
        names: the files of the images instead of `00000.png`, …, perhaps in subfolders.
    """

    def __init__(self, path: Path, kind: ImageKind, form: str, names: Sequence[str] = ()) -> None:
        super().__init__(path, path, kind, form)
        self.names = names
        self.labels_path, self.captions_path = path / LABELS_FILE, path / CAPTIONS_FILE

    def check(self, spec: SampleSpec, num: int, *, overwrite: bool) -> State:
        """Finished: all images, the classes and the grid exist (earlier versions saved the grid in the folder)."""
        if self.earlier(self.path, spec, overwrite=overwrite) is None:
            return "anew"
        is_finished = bool(self.held(num).all()) and (self.picture(GRID).exists() or (self.path / GRID).exists())
        return "finished" if is_finished and self._has_descriptions(spec) else "going on"

    def _has_descriptions(self, spec: SampleSpec) -> bool:
        """Whether the files with classes and prompts exist, if the images have such."""
        needed = ((self.labels_path, spec.classes), (self.captions_path, spec.prompts))
        return all(path.exists() for path, values in needed if values)

    def begin(self, spec: SampleSpec, state: State) -> None:
        """Write the record; remove the grid, the classes and the prompts, which may be those of fewer images."""
        if state == "anew":
            for name in PICTURES:
                remove(self.picture(name))
            start_folder(self.path, RECORD, spec.to_json(format=self.form))
        for name in PICTURES:
            if (self.path / name).exists():  # of an earlier version
                os.replace(self.path / name, self.picture(name))
        if state != "finished":
            remove(self.picture(GRID))
            remove(self.labels_path)
            remove(self.captions_path)
        sweep_inside(self.path, SAMPLES)

    def held(self, num: int) -> np.ndarray:
        """Which files exist."""
        if self.names:
            return np.fromiter((self._file(k).is_file() for k in range(num)), bool, num)
        names = {entry.name for entry in os.scandir(self.path)} if self.path.is_dir() else set()
        return np.fromiter((file_name(k, self.form) in names for k in range(num)), bool, num)

    def _file(self, index: int) -> Path:
        """The file of image `index`."""
        return self.path / (self.names[index] if self.names else file_name(index, self.form))

    def _temporary(self, index: int) -> Path:
        """The temporary file of image `index`."""
        path = self._file(index)
        return path.with_name(f".{path.name}.tmp")

    def encode(self, index: int, image: Tensor) -> bytes:
        """Write the image to its temporary file."""
        try:
            make_folder(self._file(index).parent)
            data = to_sound(image, self.kind.rate, self.form) if self.kind.rate else to_png(image)
            self._temporary(index).write_bytes(data)
        except OSError as error:
            raise refusal(self._file(index), error) from None
        return b""

    def commit(self, images: Sequence[tuple[int, bytes]]) -> None:
        """Sync the files, then rename them."""
        try:
            with ThreadPoolExecutor(FSYNCS_AT_ONCE) as pool:
                list(pool.map(fsync, [self._temporary(index) for index, _ in images]))
            for index, _ in images:
                os.replace(self._temporary(index), self._file(index))
            for folder in {self._file(index).parent for index, _ in images}:
                fsync(folder)
        except OSError as error:
            raise refusal(self.path, error) from None

    def read(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Read the images from their files."""
        for path in map(self._file, indices):
            try:
                data = path.read_bytes()
                yield from_sound(data, self.kind, str(path)) if self.kind.rate else from_png(data)
            except (OSError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
                raise VdiffError(f"{path} is damaged", "delete it, then run the same command again") from None

    def finish(self, spec: SampleSpec, num: int) -> None:
        """Write the classes and the prompts; everything else is in place."""
        if (labels := spec.labels(range(num))) is not None:
            names = self.names or [file_name(k, self.form) for k in range(num)]
            write_text(self.labels_path, labels_json(labels.numpy(), self.kind.class_names, names))
        if prompts := spec.texts(range(num)):
            write_text(self.captions_path, captions_json(prompts))


class Archive(Output):
    """One file, or one LMDB folder, packed from the images in the record logs of `OUT.partial`."""

    def __init__(self, path: Path, kind: ImageKind, form: str, rank: int = 0) -> None:
        target = path.resolve() if path.is_symlink() else path  # its disk: the output is renamed at the end
        super().__init__(path, target.with_name(f"{target.name}.partial"), kind, form)
        self.log = RecordLog(self.place, rank)
        self.reader: RecordReader | None = None

    def check(self, spec: SampleSpec, num: int, *, overwrite: bool) -> State:
        """Finished: the output is in place, with the same number of images."""
        if self.form == "npz" and len(spec.to_json(format=self.form, num=num)) > zipfile.ZIP_MAX_COMMENT:
            what, flag = ("prompts", "--prompts") if spec.prompts else ("classes", "--classes")
            raise VdiffError(f"an npz cannot record so many {what}", f"name fewer with {flag}, or give --format zip")
        if (record := self.earlier(self.path, spec, overwrite=overwrite)) is not None:
            if record.get("num") == num:
                return "finished"
            raise VdiffError(
                f"{self.path} holds {record.get('num')} images, not {num}",
                "give another --name or --out, or --overwrite",
            )
        return "anew" if self.earlier(self.place, spec, overwrite=overwrite) is None else "going on"

    def begin(self, spec: SampleSpec, state: State) -> None:
        """Create the partial folder; OUT stays until it is replaced."""
        if state != "going on":
            discard(self.place)
        if state == "anew":
            write_text(make_folder(self.place) / RECORD, spec.to_json(format=self.form))
        sweep_inside(self.place, SAMPLES)

    def held(self, num: int) -> np.ndarray:
        """Which images the partial folder holds; reads all of it, and remembers where each image is."""
        self.reader = RecordReader(self.place, num)
        return self.reader.held

    def encode(self, index: int, image: Tensor) -> bytes:
        """PNG, or plain pixels (H, W, C) for an npz."""
        del index
        return to_uint8(image).permute(1, 2, 0).contiguous().numpy().tobytes() if self.form == "npz" else to_png(image)

    def commit(self, images: Sequence[tuple[int, bytes]]) -> None:
        """Append the images to this process's file."""
        self.log.append(images)

    def read(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Read the images from the partial folder."""
        shape = (self.kind.size, self.kind.size, self.kind.channels)
        for data in (self.reader or RecordReader(self.place, max(indices) + 1)).read(indices):
            if self.form == "npz":
                yield from_uint8(torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape).permute(2, 0, 1))
            else:
                yield from_png(data)

    def finish(self, spec: SampleSpec, num: int) -> None:
        """Pack, move the pictures and the output to their places, and remove the partial folder."""
        packed = self.place / f"packed.{self.form}"
        labels = spec.labels(range(num))
        contents = Contents(
            name=self.path.stem,
            shape=(num, self.kind.size, self.kind.size, self.kind.channels),
            images=(self.reader or RecordReader(self.place, num)).read(range(num)),
            labels=None if labels is None else labels.numpy(),
            class_names=self.kind.class_names,
            record=spec.to_json(format=self.form, num=num),
            prompts=spec.texts(range(num)),
        )
        try:
            remove(packed)
            PACKERS[self.form](contents, packed)
            for name in PICTURES:
                remove(self.picture(name))  # also that of an earlier output, if this one has none
                if (self.place / name).exists():
                    shutil.move(self.place / name, self.picture(name))
            take_place(packed, self.path)
            discard(self.place)
        except OSError as error:
            raise refusal(self.path, error) from None

    def picture_in_work(self, name: str) -> Path:
        """In the partial folder, or beside OUT if everything else is done."""
        return self.place / name if self.place.exists() else self.picture(name)


def open_output(form: str, path: Path, kind: ImageKind, rank: int = 0, names: Sequence[str] = ()) -> Output:
    """The output of format `form` at `path`, for the process `rank`.

    Args:
        names: the files in a folder, by default their numbers.
    """
    is_folder = form in ("png", *SOUND_FORMATS)
    return FileFolder(path, kind, form, names) if is_folder else Archive(path, kind, form, rank)


def to_sound(sound: Tensor, rate: int, form: str) -> bytes:
    """A sound (C, L) in [−1, 1] as a file of 16 bits; larger values are clipped."""
    return encode(sound.detach().float().cpu().T.numpy(), rate, form.upper())


def from_sound(data: bytes, kind: ImageKind, where: str) -> Tensor:
    """The inverse of `to_sound`."""
    return WAVEFORM.encode(torch.from_numpy(decode_sound(data, kind.channels, kind.size, kind.rate, where)))


def to_png(image: Tensor) -> bytes:
    """An image in [−1, 1] as a PNG file."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(data: bytes) -> Tensor:
    """The inverse of `to_png`: (C, H, W) in [−1, 1]."""
    with PIL.Image.open(io.BytesIO(data)) as picture:
        array = np.array(picture)
    return from_uint8(torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()))
