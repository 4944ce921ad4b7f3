"""The images of a source in their final order, in a file: memory does not grow with their number."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from vdiff.errors import VdiffError

BATCH_ROWS = 2_000


@dataclass(frozen=True)
class Item:
    """One image of a source: its name there, the index of its class if that is known, where its bytes lie."""

    name: str
    label: int | None = None
    place: str = ""


class Listing:
    """Images in order, class names, the files passed over by extension, and a remark for people.

    `fingerprint` = SHA-256 (hex) over names, labels and class names in order.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        ((facts, self._length),) = database.execute("SELECT facts, (SELECT max(rowid) FROM images) FROM facts")
        values: dict[str, Any] = json.loads(facts)
        self.class_names: tuple[str, ...] = tuple(values["class_names"])
        self.ignored: dict[str, int] = values["ignored"]
        self.remark: str = values["remark"]
        self.fingerprint: str = values["fingerprint"]

    def __len__(self) -> int:
        return self._length or 0

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """The images of positions `start` … `stop` − 1."""
        rows = self._database.execute(
            "SELECT name, label, place FROM images WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
            (start, len(self) if stop is None else stop),
        )
        for name, label, place in rows:
            yield Item(_decode(name), label, place)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


class ListingWriter:
    """Takes the images of a source in any order; `finish` gives them theirs.

    Args:
        path: the file to be; it appears when it is whole. None keeps the listing in memory.
        extensions: what tells an image from other files, lower case with the dot.
        shuffled: order by a hash of the name instead of the name, so that neighbours have nothing in common.
    """

    def __init__(self, path: Path | None, extensions: Collection[str] = (), *, shuffled: bool = False) -> None:
        self.path, self.extensions, self.shuffled = path, extensions, shuffled
        self.class_names: tuple[str, ...] | None = None
        self._ignored = Counter[str]()
        self._rows: list[tuple[bytes, bytes, int | None, str]] = []
        self._temporary = path and path.with_name(f".{path.name}.tmp")
        if self._temporary:
            self._temporary.unlink(missing_ok=True)
        self._database = sqlite3.connect(self._temporary or ":memory:", isolation_level=None)
        # a listing that is cut short is made again, so nothing in it needs to be durable before the end
        self._execute("PRAGMA journal_mode = OFF")
        self._execute("PRAGMA synchronous = OFF")
        self._execute("CREATE TABLE found (key BLOB PRIMARY KEY, name BLOB, label INTEGER, place TEXT) WITHOUT ROWID")
        self._execute("CREATE TABLE images (name BLOB, label INTEGER, place TEXT)")
        self._execute("CREATE TABLE facts (facts TEXT)")

    def __enter__(self) -> ListingWriter:
        self._execute("BEGIN")
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._database.close()
            if self._temporary:
                self._temporary.unlink(missing_ok=True)

    def add_file(self, name: str, place: str = "") -> None:
        """Take a file by its `/`-separated name; hidden files and `__MACOSX` do not count, others are no images."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return
        extension = os.path.splitext(parts[-1])[1].lower()
        if extension in self.extensions:
            self._add("\0".join(parts), name, None, place)
        else:
            self._ignored[extension or "no extension"] += 1

    def add(self, number: int, label: int | None = None) -> None:
        """Take image `number` of a source that numbers its images, and its class if that is known without reading."""
        self._add(f"{number:012d}", f"{number:07d}", label, "")

    def finish(self) -> Listing:
        """Put the images in order.

        Files that all lie in folders get the first folder's name as their class; folders that all files share are
        looked through first. A source that sets `class_names` gives its labels itself.
        """
        self._write_rows()
        remark = ""
        label_of: dict[bytes, int] = {}
        depth = 0
        class_names = self.class_names
        if class_names is None:
            depth, folders, loose = self._folders()
            if folders and loose:
                remark = f"no classes: {loose} of {self._count()} images lie outside the class folders"
            class_names = () if loose else tuple(_decode(folder) for folder in folders)
            label_of = {} if loose else {folder: number for number, folder in enumerate(folders)}
        self._database.create_function("label_of", 1, lambda key: label_of.get(_folder(key, depth)), deterministic=True)
        self._database.create_function("shuffle", 1, lambda key: hashlib.sha256(key).digest(), deterministic=True)
        order = "shuffle(key)" if self.shuffled else "key"
        self._execute(
            "INSERT INTO images SELECT name, ifnull(label, label_of(key)), place FROM found ORDER BY " + order
        )
        self._execute("DROP TABLE found")
        facts = {
            "class_names": class_names,
            "ignored": dict(sorted(self._ignored.items())),
            "remark": remark,
            "fingerprint": self._fingerprint(class_names),
        }
        self._execute("INSERT INTO facts VALUES (?)", (json.dumps(facts),))
        self._execute("COMMIT")
        if self.path is None or self._temporary is None:
            return Listing(self._database)
        self._database.close()
        os.replace(self._temporary, self.path)
        return open_listing(self.path)

    def _add(self, key: str, name: str, label: int | None, place: str) -> None:
        self._rows.append((_encode(key), _encode(name), label, place))
        if len(self._rows) >= BATCH_ROWS:
            self._write_rows()

    def _write_rows(self) -> None:
        try:
            self._database.executemany("INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?)", self._rows)
        except sqlite3.Error as error:
            raise self._refused(error) from None
        self._rows.clear()

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._refused(error) from None

    def _refused(self, error: sqlite3.Error) -> VdiffError:
        return VdiffError(f"cannot write {self.path}: {error}", "free space or choose another --out")

    def _count(self) -> int:
        return int(self._execute("SELECT count(*) FROM found")[0][0])

    def _folders(self) -> tuple[int, list[bytes], int]:
        """How many folders all images share, the folders below them in order, and how many images lie in none."""
        ends = self._execute("SELECT min(key), max(key) FROM found")[0]
        if ends[0] is None:
            return 0, [], 0
        first, last = (key.split(b"\0")[:-1] for key in ends)
        # keys are sorted, so what the first and the last share, all share
        depth = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))))
        folders, loose = dict[bytes, None](), 0
        for (key,) in self._database.execute("SELECT key FROM found ORDER BY key"):
            folder = _folder(key, depth)
            if folder:
                folders[folder] = None
            else:
                loose += 1
        return depth, list(folders), loose

    def _fingerprint(self, class_names: tuple[str, ...]) -> str:
        digest = hashlib.sha256(json.dumps(class_names).encode())
        for name, label in self._database.execute("SELECT name, label FROM images ORDER BY rowid"):
            digest.update(b"%d %s %d " % (len(name), name, -1 if label is None else label))
        return digest.hexdigest()


def open_listing(path: Path) -> Listing:
    """The listing in a file that `ListingWriter` finished.

    Raises:
        VdiffError: it cannot be read.
    """
    try:
        return Listing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True))
    except (sqlite3.Error, ValueError) as error:
        raise VdiffError(f"{path} cannot be read: {error}", "give --overwrite to begin anew") from None


def _folder(key: bytes, depth: int) -> bytes:
    """The folder at `depth` on the way to a file; empty for a file that lies there itself."""
    parts = key.split(b"\0")
    return parts[depth] if len(parts) > depth + 1 else b""


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # file names may be no text at all


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
