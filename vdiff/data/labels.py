"""Classes and captions from a file beside the images, and the mark of vdiff's own pictures."""

from __future__ import annotations

import csv
import io
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vdiff.errors import VdiffError, printable
from vdiff.files import parse
from vdiff.text import cause_of

LABELS_FILE = "dataset.json"
SAMPLES_FILE = "samples.json"
DO_WITHOUT = "correct it, or give --label_column none to prepare without classes"
CLASS_SUFFIX = ".cls"
NO_CAPTIONS = "correct it, or give --captions none to prepare without captions"
CAPTION_COLUMNS = ("text", "caption")
MAX_CLASS_NAME = 1000
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
    column = column or "label"
    with _misreading_explained(place, DO_WITHOUT):
        if place.rpartition("/")[2] == LABELS_FILE:
            return _edm(data)
        rows = TABLES[suffix_of(place)](data, ("file_name", column))
        if not any(column in row for row in rows):
            return None
        return FileLabels([(str(row["file_name"]), class_in(row.get(column))) for row in rows])


def read_captions(place: str, data: bytes, column: str) -> list[tuple[str, str]] | None:
    """(image, captions, one a line) of the table at `place`; None: it has no column of captions.

    Args:
        column: that has the captions, a text or a list of texts; empty: the first of `CAPTION_COLUMNS` that is there.

    Raises:
        VdiffError: it cannot be read, or gives something else than captions.
    """
    columns = (column,) if column else CAPTION_COLUMNS
    with _misreading_explained(place, NO_CAPTIONS):
        rows = TABLES[suffix_of(place)](data, ("file_name", *columns))
        rows = [row for row in rows if "file_name" in row]
        found = next((name for name in columns if any(name in row for row in rows)), None)
        return None if found is None else [(str(row["file_name"]), caption_in(row.get(found))) for row in rows]


def caption_in(value: Any) -> str:
    """A text, a list of texts or None of a table as captions, one a line. Raises ValueError: it is something else."""
    texts = [] if value is None else value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{str(value)[:40]} is not a caption")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the caption {printable(clean_name(text))[:40]} is not UTF-8")
    return "\n".join(" ".join(text.split()) for text in texts)


def suffix_of(place: str) -> str:
    """The lower-case extension of a path, with its dot."""
    return posixpath.splitext(place)[1].lower()


@contextmanager
def _misreading_explained(place: str, hint: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, csv.Error) as error:
        raise VdiffError(f"{place} cannot be read: {' '.join(str(error).split())}", hint) from None


def _edm(data: bytes) -> FileLabels | None:
    """`{"labels": [["00000/img00000000.png", 3], …]}` of StyleGAN and EDM, also as an object, or null: no classes."""
    values = parse(data)
    if not isinstance(values, dict) or "labels" not in values:
        return None
    names = tuple(clean_name(str(name)) for name in values.get("class_names", ()))
    pairs = ((str(file), class_in(label, names)) for file, label in dict(values["labels"] or {}).items())
    return FileLabels(list(pairs), names)


def _csv(data: bytes, columns: Sequence[str]) -> list[Mapping[str, Any]]:
    """A table with a column `file_name`, as image folders of the Hugging Face hub have; else nothing."""
    del columns
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""))
    return list(rows) if "file_name" in (rows.fieldnames or ()) else []


def _jsonl(data: bytes, columns: Sequence[str]) -> list[Mapping[str, Any]]:
    """The same as one JSON object a line."""
    del columns
    return [parse(line) for line in data.splitlines() if line.strip()]


def _parquet(data: bytes, columns: Sequence[str]) -> list[Mapping[str, Any]]:
    """The same as a Parquet file, of which only these columns are read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise VdiffError("a .parquet file needs the package pyarrow", "pip install 'vdiff[hf]'") from None
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        there = [name for name in columns if name in file.schema_arrow.names]
        rows: list[Mapping[str, Any]] = file.read(columns=there).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(cause_of(error)) from None
    return rows


def class_in(label: Any, names: tuple[str, ...] = ()) -> str | None:
    """The name of a class: the entry of `names` for its number, or the number, or the text itself."""
    if label is None or label == "":
        return None
    if isinstance(label, str):
        if len(label) > MAX_CLASS_NAME:
            raise ValueError(f"{clean_name(label[:40])}… is a text of {len(label):,} characters, not a class")
        return clean_name(label)
    if isinstance(label, list | dict) or label != int(label):
        raise ValueError(f"{str(label)[:40]} is a value, not a class")
    number = int(label)
    if number < 0 or (names and number >= len(names)):
        raise ValueError(f"{number} is not the number of a class")
    return names[number] if names else str(number)


def class_of(place: str, text: str) -> str | None:
    """The class in the text of the file `place`, `7.cls` of WebDataset: a number or a name; None: it is empty.

    Raises:
        VdiffError: it is something else.
    """
    with _misreading_explained(place, DO_WITHOUT):
        return class_in(" ".join(text.split()))


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


TABLES: dict[str, Callable[[bytes, Sequence[str]], list[Mapping[str, Any]]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
LABEL_FILES = (LABELS_FILE, *(f"metadata{suffix}" for suffix in TABLES))
