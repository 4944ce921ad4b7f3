"""Classes from a label file beside the images, and the mark of vdiff's own pictures."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vdiff.errors import VdiffError
from vdiff.files import parse

LABELS_FILE = "dataset.json"
SAMPLES_FILE = "samples.json"
DO_WITHOUT = "correct it, or give --label_column none to prepare without classes"
# written by `save_png` and sample.py's animations as EXIF Software; within the first or last EDGE bytes of a file
MARK = b"picture by vdiff\0"
EDGE_BYTES = 512


@dataclass(frozen=True)
class FileLabels:
    """The contents of a label file: (image, class) pairs; images are relative to its folder; None: no class.

    `order` lists class names in the order of their numbers, if the file has numbers.
    """

    pairs: Iterable[tuple[str, str | None]]
    order: tuple[str, ...] = ()


def clean_name(name: str) -> str:
    r"""A class name for any file: bytes that are not UTF-8 and control characters become `\xe9`, `\n`."""
    text = name.encode("utf-8", "surrogateescape" if _is_bytes(name) else "backslashreplace")
    return "".join(
        repr(letter)[1:-1] if unicodedata.category(letter) == "Cc" else letter
        for letter in text.decode("utf-8", "backslashreplace")
    )


def _is_bytes(name: str) -> bool:
    """Whether all surrogates in `name` represent bytes of a file name; JSON can hold others."""
    return all("\udc80" <= letter <= "\udcff" for letter in name if "\ud800" <= letter <= "\udfff")


def read_labels(place: str, data: bytes, column: str) -> FileLabels | None:
    """The classes in the label file at `place` (base name: one of `LABEL_FILES`); None: it has no classes.

    Raises:
        VdiffError: the file cannot be read, or holds something other than classes.
    """
    try:
        return LABEL_FILES[place.rpartition("/")[2]](data, column or "label")
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, csv.Error) as error:
        raise VdiffError(f"{place} cannot be read: {' '.join(str(error).split())}", DO_WITHOUT) from None


def _edm(data: bytes, column: str) -> FileLabels | None:
    """`{"labels": [["00000/img00000000.png", 3], …]}` of StyleGAN and EDM, also as an object, or null: no classes."""
    del column
    values = parse(data)
    if not isinstance(values, dict) or "labels" not in values:
        return None
    names = tuple(clean_name(str(name)) for name in values.get("class_names", ()))
    pairs = ((str(file), _class(label, names)) for file, label in dict(values["labels"] or {}).items())
    return FileLabels(list(pairs), names)


def _csv(data: bytes, column: str) -> FileLabels | None:
    """A table with the columns `file_name` and `column`, as image folders of the Hugging Face hub have."""
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""))
    return _table(rows, column) if {"file_name", column} <= set(rows.fieldnames or ()) else None


def _jsonl(data: bytes, column: str) -> FileLabels | None:
    """The same as one JSON object a line."""
    rows = [parse(line) for line in data.splitlines() if line.strip()]
    return _table(rows, column) if any(column in row for row in rows) else None


def _table(rows: Iterable[Mapping[str, Any]], column: str) -> FileLabels:
    return FileLabels([(str(row["file_name"]), _class(row.get(column))) for row in rows])


def _class(label: Any, names: tuple[str, ...] = ()) -> str | None:
    """The name of a class: the entry of `names` for its number, or the number, or the text itself."""
    if label is None or label == "":
        return None
    if isinstance(label, str):
        return clean_name(label)
    if isinstance(label, list | dict) or label != int(label):
        raise ValueError(f"{str(label)[:40]} is a value, not a class")
    number = int(label)
    if number < 0 or (names and number >= len(names)):
        raise ValueError(f"{number} is not the number of a class")
    return names[number] if names else str(number)


def in_order(found: Iterable[str], order: Iterable[str]) -> list[str]:
    """Class names in their known order, then numbers by value, then others by text."""
    known = {name: number for number, name in enumerate(order)}

    def key(name: str) -> tuple[int, int, str]:
        if name in known:
            return 0, known[name], ""
        return (1, int(name), "") if name.isascii() and name.isdecimal() and len(name) < 20 else (2, 0, name)

    return sorted(found, key=key)


def record_of_samples(data: bytes) -> dict[str, Any]:
    """The record that sample.py writes beside its images; empty if the file is not one."""
    try:
        record = parse(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and {"checkpoint", "fingerprint", "sampler"} <= record.keys() else {}


LABEL_FILES: dict[str, Callable[[bytes, str], FileLabels | None]] = {
    LABELS_FILE: _edm,
    "metadata.csv": _csv,
    "metadata.jsonl": _jsonl,
}
