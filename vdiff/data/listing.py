"""The images of a source in their final order, in a file, so that memory does not grow with their number."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import compress, takewhile
from pathlib import Path
from typing import Any

from vdiff.data.captions import clean_caption, has_control_characters
from vdiff.data.labels import CLASS_SUFFIX, FileLabels, class_of, clean_name, in_order
from vdiff.errors import OptionError, VdiffError, explained
from vdiff.files import check_regular, parse
from vdiff.text import plural

SHOWN_NAMES = 5
OWN_PICTURES = "drawn by vdiff"
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Item:
    """One image of a source: its name, its class number if known, the place of its bytes, its captions."""

    name: str
    label: int | None = None
    place: str = ""
    caption: str = ""


class Listing:
    """Images in order, class names, ignored files by extension, and remarks for the user.

    `fingerprint` = SHA-256 (hex) over names, labels, captions and class names in order. `repeats`: how often an epoch
    shows the images of each class; empty: once.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        ((facts, self._length),) = database.execute("SELECT facts, (SELECT max(rowid) FROM images) FROM facts")
        values: dict[str, Any] = parse(facts)
        self.class_names: tuple[str, ...] = tuple(values["class_names"])
        self.ignored: dict[str, int] = values["ignored"]
        self.remarks: list[str] = values.get("remarks", [])
        self.repeats: tuple[int, ...] = tuple(values.get("repeats", ()))
        self.fingerprint: str = values["fingerprint"]

    def __len__(self) -> int:
        return self._length or 0

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """The images of positions `start` … `stop` − 1."""
        rows = self._database.execute(
            "SELECT name, label, place, caption FROM images WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
            (start, len(self) if stop is None else stop),
        )
        yield from (Item(_decode(name), label, place, caption) for name, label, place, caption in rows)

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class ListingWriter:
    """Collects the images of a source in any order; `finish` sorts them.

    Args:
        path: the file to write; it appears when it is complete.
        extensions: of images, lower case with the dot.
        noun: what one of them is called in messages.
        shuffled: order by a hash of the name instead of the name, so that neighbours are unrelated.

    Attributes:
        class_names: of a source with its own labels; None: label files and folders give the classes.
        split: which of the folders train, val and test above the classes to use; empty: train; `all`: every one.
        only_captioned: leave out images without a caption.
        has_repeats: folders called `N_name` hold a class `name`, whose images are shown N times in an epoch.
    """

    def __init__(
        self, path: Path, extensions: Collection[str] = (), *, noun: str = "image", shuffled: bool = False
    ) -> None:
        self.path, self.extensions, self.noun, self.shuffled = path, extensions, noun, shuffled
        self.class_names: tuple[str, ...] | None = None
        self.split = ""
        self.only_captioned = self.has_repeats = False
        self._repeats: dict[str, int] = {}
        self._with_control_characters = 0
        self._order: dict[str, None] | None = None
        self._remarks: list[str] = []
        self._ignored = Counter[str]()
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._temporary.unlink(missing_ok=True)
        self._database = sqlite3.connect(self._temporary, isolation_level=None)
        with self._refusals_explained():
            for statement in (
                # an interrupted listing is made again, so nothing needs to be synced before the end
                "PRAGMA journal_mode = OFF",
                "PRAGMA synchronous = OFF",
                "CREATE TABLE found (key BLOB PRIMARY KEY, name BLOB, label INTEGER, place TEXT) WITHOUT ROWID",
                "CREATE TABLE images (name BLOB, label INTEGER, place TEXT, caption TEXT)",
                "CREATE TABLE captions (key BLOB PRIMARY KEY, caption TEXT) WITHOUT ROWID",
                "CREATE TABLE texts (stem BLOB, suffix TEXT, name BLOB, place TEXT, PRIMARY KEY (stem, suffix))",
                "CREATE TABLE facts (facts TEXT)",
                "BEGIN",
            ):
                self._execute(statement)

    def __enter__(self) -> ListingWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._database.close()
            self._temporary.unlink(missing_ok=True)
        if isinstance(error[1], sqlite3.Error):
            with self._refusals_explained():
                raise error[1]

    def add_file(self, name: str, place: str = "") -> None:
        """Add a file by its `/`-separated name; hidden files and `__MACOSX` are skipped, other types counted."""
        key = key_of(name)
        extension = os.path.splitext(key.rpartition("\0")[2])[1].lower()
        if key and extension in self.extensions:
            self._add(key, name, None, place)
        elif key:
            self.ignore(extension or "no extension")

    def ignore(self, what: str, count: int = 1) -> None:
        """Count ignored files."""
        self._ignored[what] += count

    def remark(self, text: str) -> None:
        """Add a line for the user."""
        self._remarks.append(text)

    def add(self, number: int, label: int | None = None, caption: str = "") -> None:
        """Add image `number` of a source with numbered images, its captions, and its class if known without reading."""
        key = f"{number:012d}"
        self._add(key, f"{number:07d}", label, "")
        self._add_caption(_encode(key), caption)

    def add_text(self, name: str, place: str) -> None:
        """Add a file with the captions of the images of the same name, if there are any."""
        stem, suffix = os.path.splitext(name)
        row = (_encode(key_of(stem)), suffix.lower(), _encode(name), place)
        self._database.execute("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?)", row)

    def read_texts(self, read: Callable[[Item], str]) -> bool:
        """Read the texts beside images: `.cls` has the class, `.txt`, else `.caption`, the captions if there are none.

        Returns:
            whether there are classes.

        Raises:
            VdiffError: a class cannot be read.
        """
        self._function("stem", lambda key: os.path.splitext(key)[0])
        self._execute(
            "CREATE TEMP TABLE beside AS SELECT found.key AS key, suffix, texts.name AS name, texts.place AS place "
            "FROM found JOIN texts ON texts.stem = stem(found.key) "
            f"WHERE suffix = '{CLASS_SUFFIX}' OR found.key NOT IN (SELECT key FROM captions) "
            "ORDER BY suffix DESC, found.key"
        )
        if has_classes := bool(self._execute("SELECT 1 FROM beside WHERE suffix = ? LIMIT 1", (CLASS_SUFFIX,))):
            self._class_order()
        for key, suffix, name, place in self._database.execute("SELECT * FROM beside ORDER BY rowid"):
            text = read(Item(_decode(name), place=place))
            if suffix != CLASS_SUFFIX:
                self._add_caption(key, text)
            elif label := class_of(_decode(name), text):
                self._database.execute("INSERT OR IGNORE INTO labels VALUES (?, ?)", (key, label))
        unused = "SELECT suffix, count(*) FROM texts WHERE stem NOT IN (SELECT stem(key) FROM found) GROUP BY suffix"
        for suffix, count in self._execute(unused):
            self.ignore(suffix, count)
        return has_classes

    def ignore_unmatched(self, names: Iterable[str], what: str) -> int:
        """Count those of some files that are not named like an image, without suffix; returns how many are."""
        self._function("stem", lambda key: os.path.splitext(key)[0])
        self._execute("CREATE TEMP TABLE stems AS SELECT DISTINCT stem(key) AS stem FROM found")
        self._execute("CREATE INDEX of_stems ON stems (stem)")
        found = 0
        for name in names:
            stem = _encode(os.path.splitext(key_of(name))[0])
            matches = bool(self._execute("SELECT 1 FROM stems WHERE stem = ?", (stem,)))
            found += matches
            if not matches:
                self.ignore(what)
        return found

    def add_captions(self, folder: str, captions: Sequence[tuple[str, str]], what: str) -> bool:
        """Use the (image, captions) pairs of the table `what` in `folder`; return whether it names any image.

        If it names none, its names may be relative to a folder further down that all images share.
        """
        first = self._value("SELECT min(key) FROM found") or b""
        shared = [_decode(part) for part in first.split(b"\0")[: self._folders()[0]]]
        missing = list(captions)
        for depth in range(len(shared) + 1):
            above = posixpath.join(folder, *shared[:depth])
            keys = [_key_below(above, name) for name, _ in captions]
            there = [bool(self._execute("SELECT 1 FROM found WHERE key = ?", (key,))) for key in keys]
            if any(there):
                for key, (_, caption) in compress(zip(keys, captions, strict=True), there):
                    self._add_caption(key, caption)
                missing = [pair for pair, is_there in zip(captions, there, strict=True) if not is_there]
                break
        if missing:
            count = f"{len(missing)} of {len(captions)} names"
            self._remarks.append(f"{what}: {count} are those of no {self.noun}, such as {clean_name(missing[0][0])}")
        return len(missing) < len(captions)

    def add_labels(self, folder: str, labels: FileLabels) -> None:
        """Use the classes of a label file in `folder` for the images that it names; folders then are not classes."""
        self._class_order().update(dict.fromkeys(labels.order))
        rows = [(key, name) for file, name in labels.pairs if name is not None and (key := _key_below(folder, file))]
        self._database.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?)", rows)

    def _class_order(self) -> dict[str, None]:
        """The names of classes in their known order; the table of labels exists from the first call on."""
        if self._order is None:
            self._order = {}
            self._execute("CREATE TABLE labels (key BLOB PRIMARY KEY, name TEXT) WITHOUT ROWID")
        return self._order

    def leave_out_own(self, folders: Sequence[str], files: Sequence[str]) -> bool:
        """Remove vdiff's files, and folders of samples unless nothing else is left; returns whether folders were."""
        bounds = [(key + b"\0", key + b"\1") for folder in folders if (key := _encode(key_of(folder)))]
        inside = sum(self._value("SELECT count(*) FROM found WHERE key > ? AND key < ?", ends) for ends in bounds)
        before = self._count()
        if others := len(bounds) > 1 or inside < before:
            self._database.executemany("DELETE FROM found WHERE key > ? AND key < ?", bounds)
        self._database.executemany("DELETE FROM found WHERE key = ?", [(_encode(key_of(file)),) for file in files])
        if left := before - self._count():
            self.ignore(OWN_PICTURES, left)
        return others

    def finish(self) -> Listing:
        """Put the images in order.

        Folders that all files share are stripped first. If all folders then are called train, val or test, one of them
        is used. Label files give the classes. Without them, if all files are in folders, the first folder's name is the
        class. A source that sets `class_names` has its own labels. Classes without an image are dropped if labels are
        known before images are read.
        """
        folders = self._choose_split()
        if self.has_repeats:
            self._find_repeats(*folders)
        if self.only_captioned:
            self._leave_out_uncaptioned()
            folders = self._folders(folders[0])
        if self._with_control_characters:
            what = plural(self._with_control_characters, "caption")
            self._remarks.append(f"{what} had control characters, which became spaces")
        if self.class_names is not None:
            names = self._used_classes(self.class_names)
        elif self._order is not None:
            names = self._label_files(self._order)
        else:
            names = self._class_folders(*folders)
        self._function("shuffle", lambda key: hashlib.sha256(key).digest())
        order = "shuffle(key)" if self.shuffled else "key"
        self._execute(
            "INSERT INTO images SELECT name, label, place, coalesce(caption, '') FROM found LEFT JOIN captions "
            "USING (key) ORDER BY " + order
        )
        for table in ("found", "captions", "texts"):
            self._execute(f"DROP TABLE {table}")
        self._execute("DROP TABLE IF EXISTS labels")
        facts: dict[str, Any] = {
            "class_names": names,
            "ignored": dict(sorted(self._ignored.items())),
            "remarks": self._remarks,
        }
        if self._repeats:
            facts["repeats"] = [self._repeats[name] for name in names]
        facts["fingerprint"], check = _checksums(self._database, json.dumps(facts))
        self._execute("INSERT INTO facts VALUES (?)", (json.dumps({**facts, "check": check}),))
        self._execute("COMMIT")
        self._database.close()
        os.replace(self._temporary, self.path)
        return open_listing(self.path)

    def _add(self, key: str, name: str, label: int | None, place: str) -> None:
        row = (_encode(key), _encode(name), label, place)
        self._database.execute("INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?)", row)

    def _add_caption(self, key: bytes, text: str) -> None:
        if caption := clean_caption(text):
            self._with_control_characters += has_control_characters(text)
            self._database.execute("INSERT OR IGNORE INTO captions VALUES (?, ?)", (key, caption))

    def _leave_out_uncaptioned(self) -> None:
        before = self._count()
        self._execute("DELETE FROM found WHERE key NOT IN (SELECT key FROM captions)")
        left = before - self._count()
        if left == before:
            raise OptionError(f"--only_captioned: none of {before} {self.noun}s has a caption", "leave it out")
        if left:
            self.ignore("without a caption", left)

    def _find_repeats(self, depth: int, folders: list[bytes], loose: int) -> None:
        """Take N and the name of each class folder `N_name`; the name is the caption of images without one."""
        first = self._value("SELECT min(key) FROM found") or b""
        # a single folder is one that all images share: it is no class, and repeats change nothing
        shared = [] if folders else first.split(b"\0")[:-1][-1:]
        if self.class_names is not None or self._order is not None or loose * len(folders) or not (folders or shared):
            raise OptionError(
                "--repeats: the classes are not folders", f"sort all {self.noun}s into folders such as 10_dog"
            )
        names = {}
        for folder in folders or shared:
            shown = clean_name(_decode(folder))
            number, _, name = shown.partition("_")
            if not (number.isascii() and number.isdecimal() and len(number) < 5 and int(number) and name.strip()):
                raise OptionError(f"--repeats: the folder {shown} is not called N_name", "call it 10_dog, for instance")
            if name in self._repeats:
                raise OptionError(f"--repeats: two folders give the class {name}", "give it one number of repeats")
            self._repeats[name] = int(number)
            names[folder] = name
        at = depth if folders else depth - 1
        self._function("name_of", lambda key: names[_folder(key, at)])
        self._execute("INSERT OR IGNORE INTO captions SELECT key, name_of(key) FROM found")
        if not folders:
            self._repeats = {}

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self._database.execute(statement, values).fetchall()

    def _value(self, statement: str, values: tuple[Any, ...] = ()) -> Any:
        return self._execute(statement, values)[0][0]

    def _function(self, name: str, function: Callable[[Any], Any]) -> None:
        self._database.create_function(name, 1, function, deterministic=True)

    def _refusals_explained(self) -> AbstractContextManager[None]:
        return explained(f"cannot write {self.path}", "free space or choose another --out", sqlite3.Error)

    def _count(self) -> int:
        return int(self._value("SELECT count(*) FROM found"))

    def _choose_split(self) -> tuple[int, list[bytes], int]:
        """Keep the images of one split, if folders are splits; returns `_folders` below the splits.

        Raises:
            OptionError: the split is missing, or there are no splits.
        """
        depth, folders, loose = self._folders()
        splits = {folder: SPLITS.get(_decode(folder).lower(), "") for folder in folders}
        if not splits or not all(splits.values()):
            if self.split:
                raise OptionError(f"--split {self.split}: there are no folders train, val or test", "leave it out")
            return depth, folders, loose
        there = ", ".join(clean_name(_decode(folder)) for folder in folders)
        wanted = self.split or "train"
        kept = [b for b in folders if wanted in ("all", _decode(b)) or splits[b] == SPLITS.get(wanted.lower())]
        if not kept:
            raise OptionError(f"--split {wanted}: there are only {there}", "choose one of them, or all")
        before = self._count()
        if wanted != "all":
            self._function("folder_of", lambda key: _folder(key, depth))
            marks = ", ".join("?" * len(kept))
            self._execute(f"DELETE FROM found WHERE folder_of(key) NOT IN ({marks})", tuple(kept))
            taken = ", ".join(clean_name(_decode(folder)) for folder in kept)
            self._remarks.append(
                f"split {taken}: {self._count()} of {before} {self.noun}s; there are {there}; --split chooses, all "
                "takes all"
            )
        return self._folders(depth + 1)

    def _used_classes(self, class_names: tuple[str, ...]) -> list[str]:
        """The classes with images, renumbered; all classes of the source if labels come with the images."""
        found = [label for (label,) in self._execute("SELECT DISTINCT label FROM found ORDER BY label")]
        if None in found or len(found) == len(class_names):
            return list(class_names)
        numbers = {label: number for number, label in enumerate(found)}
        empty = [name for label, name in enumerate(class_names) if label not in numbers]
        self._remarks.append(f"{len(empty)} of {len(class_names)} classes have no {self.noun}s, dropped: {few(empty)}")
        self._function("number_of", numbers.__getitem__)
        self._execute("UPDATE found SET label = number_of(label)")
        return [class_names[label] for label in found]

    def _label_files(self, order: dict[str, None]) -> list[str]:
        """Classes from the label files; if some images have a class, those without are left out."""
        found = [name for (name,) in self._execute("SELECT DISTINCT labels.name FROM found JOIN labels USING (key)")]
        if not found:
            if named := self._value("SELECT min(key) FROM labels"):
                shown = _decode(named.replace(b"\0", b"/"))
                raise VdiffError(f"the label file names none of the {self.noun}s: {shown}", "give --label_column none")
            return []
        names = in_order(found, order)
        self._function("number_of", {name: number for number, name in enumerate(names)}.__getitem__)
        self._execute(
            "UPDATE found SET label = (SELECT number_of(labels.name) FROM labels WHERE labels.key = found.key)"
        )
        if without := self._value("SELECT count(*) FROM found WHERE label IS NULL"):
            self._execute("DELETE FROM found WHERE label IS NULL")
            self.ignore("without a class", without)
        return names

    def _class_folders(self, depth: int, folders: list[bytes], loose: int) -> list[str]:
        """Classes from the folders at `depth`, if every image is in one."""
        if loose and folders:
            self._remarks.append(f"no classes: {loose} of {self._count()} {self.noun}s are outside the class folders")
        if loose or not folders:
            return []
        cleaned = {folder: clean_name(_decode(folder)) for folder in folders}
        changed = [name for folder, name in cleaned.items() if name != _decode(folder)]
        if self._repeats:
            cleaned = {folder: name.partition("_")[2] for folder, name in cleaned.items()}
        names = list(dict.fromkeys(cleaned.values()))
        if changed:
            self._remarks.append(f"class names that cannot be printed are written as {few(changed)}")
        numbers = {folder: names.index(name) for folder, name in cleaned.items()}
        self._function("label_of", lambda key: numbers[_folder(key, depth)])
        self._execute("UPDATE found SET label = label_of(key)")
        return names

    def _folders(self, depth: int = 0) -> tuple[int, list[bytes], int]:
        """How many folders all images share (at least `depth`), the folders below, and how many images are in none."""
        first, last = self._execute("SELECT min(key), max(key) FROM found")[0]
        if first is None:
            return depth, [], 0
        # keys are sorted, so all share what the first and the last share
        pairs = zip(first.split(b"\0")[:-1], last.split(b"\0")[:-1], strict=False)
        depth = max(depth, len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))))
        counts = Counter(_folder(key, depth) for (key,) in self._database.execute("SELECT key FROM found ORDER BY key"))
        loose = counts.pop(b"", 0)
        return depth, list(counts), loose


def open_listing(path: Path) -> Listing:
    """The listing in a file that `ListingWriter` finished. Raises VdiffError: it cannot be read."""
    database = None
    try:
        check_regular(path)
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        ((facts,),) = database.execute("SELECT facts FROM facts")
        values = parse(facts)
        before = {key: value for key, value in values.items() if key not in ("fingerprint", "check")}
        fingerprint, check = _checksums(database, json.dumps(before))
        if (values["fingerprint"], values.get("check", check)) != (fingerprint, check):
            raise ValueError("its checksum does not match")
        return Listing(database)
    except (sqlite3.Error, ValueError, TypeError, LookupError) as error:
        if database is not None:
            database.close()
        raise VdiffError(
            f"{path} cannot be read: {error}", "give another --out, or --overwrite to begin again"
        ) from None


def key_of(name: str) -> str:
    """The sort key of a `/`-separated name: its parts with zeros in between; empty for hidden files."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return "" if hidden else "\0".join(parts)


def _key_below(folder: str, name: str) -> bytes:
    """The key of an image that a file in `folder` names; empty where the name leads out of it."""
    below = posixpath.normpath(name.replace("\\", "/"))
    return b"" if below.startswith(("/", "../")) else _encode(key_of(posixpath.join(folder, below)))


def few(names: Sequence[str]) -> str:
    """`cat, dog, owl, fox, hen and 7 more`."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _checksums(database: sqlite3.Connection, facts: str) -> tuple[str, int]:
    """The SHA-256 (hex) of class names, names and labels, and a CRC-32 of everything in a listing."""
    digest, check = hashlib.sha256(json.dumps(parse(facts)["class_names"]).encode()), zlib.crc32(facts.encode())
    rows = database.execute("SELECT name, label, place, caption FROM images ORDER BY rowid")
    for name, label, place, caption in rows:
        digest.update(b"%d %s %d " % (len(name), name, -1 if label is None else label))
        if caption:
            digest.update(b"caption %d %s " % (len(caption.encode()), caption.encode()))
        check = zlib.crc32(place.encode(), check)
    return digest.hexdigest(), check


def _folder(key: bytes, depth: int) -> bytes:
    """The folder at `depth` on the way to a file; empty if the file itself is at `depth`."""
    parts = key.split(b"\0")
    return parts[depth] if len(parts) > depth + 1 else b""


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # file names may not be UTF-8


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
