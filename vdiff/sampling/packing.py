"""Packing a complete set of images into a zip, an npz or an LMDB. Equal images give equal bytes."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from vdiff.data.captions import clean_caption
from vdiff.data.labels import LABELS_FILE
from vdiff.data.store import DatasetMeta, StoreWriter
from vdiff.files import json_text, make_folder, parse, write_text
from vdiff.replacing import Kind
from vdiff.sampling.spec import RECORD, is_record, read_record

CAPTIONS_FILE = "metadata.jsonl"
FILES = (
    r"(samples|dataset)\.json|metadata\.jsonl|\d{5,}\.(png|wav|flac)|grid\.png|trajectory\.(png|webp)|(packed\.lmdb/)?(data|lock)\.mdb"
    r"|part-\d{5,}\.images|packed\.(zip|npz|lmdb/samples\.json)"
)
"""A regular expression of the file names in a folder of samples, and of a partial folder."""


@dataclass(frozen=True)
class Contents:
    """The images to pack.

    Attributes:
        name: of a dataset.
        shape: (N, H, W, C).
        images: in order: PNG files, or pixels (H, W, C) for an npz.
        labels: their classes, (N,) int64; None if there are none.
        record: the settings of drawing, as JSON.
        prompts: of each image; empty for a model without prompts.
    """

    name: str
    shape: tuple[int, int, int, int]
    images: Iterator[bytes]
    labels: np.ndarray | None
    class_names: Sequence[str]
    record: str
    prompts: Sequence[str] = ()


def pack_zip(contents: Contents, path: Path) -> None:
    """`00000.png`, …, the record, and `dataset.json`: the classes as StyleGAN's and EDM's readers expect them."""
    with zipfile.ZipFile(path, "w") as file:
        for k, data in enumerate(contents.images):
            file.writestr(_entry(file_name(k)), data)
        if contents.labels is not None:
            file.writestr(_entry(LABELS_FILE), labels_json(contents.labels, contents.class_names))
        if contents.prompts:
            file.writestr(_entry(CAPTIONS_FILE), captions_json(contents.prompts))
        file.writestr(_entry(RECORD), contents.record)


def captions_json(prompts: Sequence[str]) -> str:
    """`metadata.jsonl`, which `prepare_data.py` and the library datasets read: the file name and the text of each."""
    rows = ({"file_name": file_name(k), "text": prompt} for k, prompt in enumerate(prompts))
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def file_name(index: int, suffix: str = "png") -> str:
    """`00007.png`: the file of sample `index`."""
    return f"{index:05d}.{suffix}"


def labels_json(labels: np.ndarray, class_names: Sequence[str], names: Sequence[str] = ()) -> str:
    """`dataset.json` as StyleGAN's and EDM's readers expect it, plus the class names, which those ignore.

    Args:
        names: the files of the images, by default their numbers.
    """
    pairs = [[names[k] if names else file_name(k), label] for k, label in enumerate(labels.tolist())]
    return json.dumps({"labels": pairs, "class_names": list(class_names)})


def pack_npz(contents: Contents, path: Path) -> None:
    """`arr_0` (N, H, W, C) uint8 and, for a class-conditional model, `arr_1` (N,) int64, as evaluation suites expect.

    The record is the comment of the zip file, so that programs which read every array find only these two. It includes
    the class names, if they fit in a comment.
    """
    names = {}
    with zipfile.ZipFile(path, "w") as file:
        with file.open(_entry("arr_0.npy"), "w", force_zip64=True) as stream:
            header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": contents.shape}
            npy.write_array_header_1_0(stream, header)
            for data in contents.images:
                stream.write(data)
        if contents.labels is not None:
            names = {"class_names": list(contents.class_names)}
            with file.open(_entry("arr_1.npy"), "w", force_zip64=True) as stream:
                npy.write_array(stream, contents.labels, version=(1, 0), allow_pickle=False)
        record, named = contents.record.encode(), json_text({**parse(contents.record), **names}).encode()
        file.comment = record if len(named) > zipfile.ZIP_MAX_COMMENT else named


def pack_lmdb(contents: Contents, path: Path) -> None:
    """A dataset as `prepare_data.py` writes it, for `train.py --data`."""
    num, size, _, channels = contents.shape
    meta = DatasetMeta(
        name=contents.name,
        sizes=(size,),
        channels=channels,
        image_format="png",
        class_names=tuple(contents.class_names),
        origin=hashlib.sha256(contents.record.encode()).hexdigest(),
    )
    writer = StoreWriter(make_folder(path), meta)
    for k, data in enumerate(contents.images):
        caption = contents.prompts[k] if contents.prompts else ""
        writer.add({size: data}, None if contents.labels is None else int(contents.labels[k]), clean_caption(caption))
        if writer.is_due:
            writer.commit()
    captions = {"captions": sum(map(bool, contents.prompts))} if any(contents.prompts) else {}
    writer.finish({"images": num, **captions, "skipped": {}, "ignored": {}, "converted": {}})
    write_text(path / RECORD, contents.record)


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry without a timestamp, readable by all users."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    return entry


PACKERS: dict[str, Callable[[Contents, Path], None]] = {"zip": pack_zip, "npz": pack_npz, "lmdb": pack_lmdb}


def read_packed_record(path: Path) -> dict[str, Any] | None:
    """The record in a zip, an npz or a folder; None if vdiff did not write it."""
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
    """A regular expression of the files of a set of samples, which may be named in its record."""
    record = read_packed_record(path)
    if record is None:
        return ""
    names = [name for name in record.get("names") or () if isinstance(name, str)]
    return "|".join([FILES, *map(re.escape, names)])


SAMPLES = Kind("set of samples", _files_of_samples)
