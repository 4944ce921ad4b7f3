"""Packing images that are all there into one whole: a zip, an npz or an LMDB. Equal images make equal bytes."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from vdiff.data.labels import LABELS_FILE
from vdiff.data.store import DatasetMeta
from vdiff.data.writer import StoreWriter
from vdiff.errors import VdiffError
from vdiff.files import json_text, make_folder, parse, write_text
from vdiff.replacing import Kind
from vdiff.sampling.spec import RECORD, is_record, read_record

BLOCK = 4096
FILES = (
    r"(samples|dataset)\.json|\d{5,}\.png|grid\.png|trajectory\.(png|webp)|(packed\.lmdb/)?(data|lock)\.mdb"
    r"|part-\d{5,}\.images|packed\.(zip|npz|lmdb/samples\.json)"
)
"""A regular expression of the names in a folder of samples, and of those that wait to be packed."""


@dataclass(frozen=True)
class Contents:
    """What is packed.

    Attributes:
        labels: the classes of images, None where there are none.
        images: the images in order, as the packer takes them.
        record: JSON of how they were drawn.
    """

    name: str
    num: int
    size: int
    channels: int
    class_names: Sequence[str]
    labels: Callable[[Sequence[int]], Tensor | None]
    images: Callable[[], Iterator[bytes]]
    record: str

    def all_labels(self) -> np.ndarray | None:
        """(num,) int64."""
        found = self.labels(range(self.num))
        return None if found is None else found.numpy()


@dataclass(frozen=True)
class Packer:
    """How to pack, and whether it takes PNG files or plain pixels (H, W, C)."""

    pack: Callable[[Contents, Path], None]
    takes_png: bool = True


def write_packed(form: str, contents: Contents, path: Path) -> None:
    """Pack the contents as `form` at `path`, where nothing is yet."""
    PACKERS[form].pack(contents, path)


def pack_zip(contents: Contents, path: Path) -> None:
    """`00000.png`, …, the record, and `dataset.json`: the classes as StyleGAN's and EDM's readers expect them."""
    names = [f"{k:05d}.png" for k in range(contents.num)]
    with zipfile.ZipFile(path, "w") as file:
        for name, data in zip(names, contents.images(), strict=True):
            file.writestr(_entry(name), data)
        if (labels := contents.all_labels()) is not None:
            file.writestr(_entry(LABELS_FILE), labels_json(names, labels.tolist(), contents.class_names))
        file.writestr(_entry(RECORD), contents.record)


def labels_json(files: Sequence[str], labels: Sequence[int], class_names: Sequence[str]) -> str:
    """`dataset.json` as StyleGAN's and EDM's readers expect it, and the names of the classes, which those pass over."""
    pairs = [[file, label] for file, label in zip(files, labels, strict=True)]
    return json.dumps({"labels": pairs, "class_names": list(class_names)})


def pack_npz(contents: Contents, path: Path) -> None:
    """`arr_0` (N, H, W, C) uint8 and, of a class-conditional model, `arr_1` (N,) int64, as evaluation suites read.

    The record is the comment of the zip file, so that those who take every array of it find these two alone; with the
    names of the classes, where a comment has room for them.
    """
    shape = (contents.num, contents.size, contents.size, contents.channels)
    with zipfile.ZipFile(path, "w") as file:
        with file.open(_entry("arr_0.npy"), "w", force_zip64=True) as stream:
            header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(stream, header)
            for data in contents.images():
                stream.write(data)
        if (labels := contents.all_labels()) is not None:
            with file.open(_entry("arr_1.npy"), "w", force_zip64=True) as stream:
                npy.write_array(stream, labels, version=(1, 0), allow_pickle=False)
        names = {"class_names": list(contents.class_names)} if labels is not None else {}
        record, named = contents.record.encode(), json_text({**parse(contents.record), **names}).encode()
        file.comment = record if len(named) > zipfile.ZIP_MAX_COMMENT else named


def pack_lmdb(contents: Contents, path: Path) -> None:
    """A dataset as `prepare_data.py` makes them, which `train.py --data` reads."""
    meta = DatasetMeta(
        name=contents.name,
        sizes=(contents.size,),
        channels=contents.channels,
        image_format="png",
        class_names=tuple(contents.class_names),
        origin=hashlib.sha256(contents.record.encode()).hexdigest(),
    )
    with StoreWriter(make_folder(path), meta) as writer:
        images = contents.images()
        for first in range(0, contents.num, BLOCK):
            block = range(first, min(first + BLOCK, contents.num))
            labels = contents.labels(block)
            for place in range(len(block)):
                writer.add({contents.size: next(images)}, None if labels is None else int(labels[place]))
                if writer.is_due:
                    writer.commit()
        writer.finish({"images": contents.num, "skipped": {}, "ignored": {}, "converted": {}})
    write_text(path / RECORD, contents.record)


def check_record(form: str, record: str) -> None:
    """Refuse a record that is too long for the comment of a zip file.

    Raises:
        VdiffError: as said.
    """
    if form == "npz" and len(record) > zipfile.ZIP_MAX_COMMENT:
        raise VdiffError("an npz cannot record so many classes", "name fewer with --classes, or give --format zip")


def read_packed_record(path: Path) -> dict[str, Any] | None:
    """The record in a zip, an npz or a folder; None where it is none of ours."""
    if path.is_dir():
        record = read_record(path / RECORD)
    else:
        try:
            with zipfile.ZipFile(path) as file:
                record = parse(file.read(RECORD) if RECORD in file.namelist() else file.comment)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
    return record if is_record(record) else None


def _files_of_samples(path: Path) -> str:
    return FILES if read_packed_record(path) is not None else ""


SAMPLES = Kind("set of samples", _files_of_samples)


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry without the time of day, readable by all."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    return entry


PACKERS: dict[str, Packer] = {
    "zip": Packer(pack_zip),
    "npz": Packer(pack_npz, takes_png=False),
    "lmdb": Packer(pack_lmdb),
}
