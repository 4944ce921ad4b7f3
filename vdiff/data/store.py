"""A dataset on disk: an LMDB folder for any rosinality-style reader, plus labels and a description.

Its writer may be interrupted at any moment, and continue later.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from vdiff.data.labels import clean_name
from vdiff.data.lmdb_file import LmdbFile
from vdiff.errors import VdiffError
from vdiff.files import parse, read_text
from vdiff.models.codec import PIXEL_CODEC, WAVEFORM, Codec
from vdiff.records import record_of

FORMAT_VERSION = 2
DATA_FILE = "data.mdb"
INDEX_FILE = "index.json"  # of tar shards
LENGTH_KEY, META_KEY, CHECK_KEY = b"length", b"meta", b"check"  # the check is of both
STATE_KEY = b"state"  # of an unfinished dataset
PREPARE_AGAIN = "run prepare_data.py again, with another --out or with --overwrite"
BEGIN_ANEW = "give another --out, or --overwrite to begin again"
PARTIAL_SUFFIX = ".partial"
JOB_FILE, REJECTED_FILE = "job.json", "rejected.jsonl"
FIRST_LINK = bytes(32)
STRETCH = 256
MAX_SIZE = 2**14
MAX_LENGTH, MAX_RATE = 2**22, 192_000  # of sounds
FIRST_MAP_BYTES = 16 * 2**20
PAGE_BYTES = 4096  # of LMDB
BATCH_BYTES = 16 * 2**20
BATCH_IMAGES = 1024
FULL_DISK_BYTES = 2**20
NO_CONDITIONS: Mapping[int, bytes] = {}


class StoredImage(NamedTuple):
    """One image of a dataset: its name, encoded images by size, its class, its captions (one a line, "" = none).

    `shape`: in buckets, what `buckets.Fit.sizes` are. `conditions`: its encoded condition images by size.
    """

    name: str
    images: dict[int, bytes]
    label: int | None
    caption: str = ""
    shape: tuple[int, ...] = ()
    conditions: Mapping[int, bytes] = NO_CONDITIONS


def record_key(kind: int | str, index: int) -> bytes:
    """`64-00007`, `condition-64-00007`, `label-00007`, `check-00007`: of image 7 at 64 pixels … and their checksums.

    A sound of 16,000 samples per second has `audio-16000-00007`.
    """
    return f"{kind}-{index:05d}".encode()


def check_of(*values: bytes) -> bytes:
    """CRC-32 (8 hexadecimal digits) of values, to detect changed bits when they are read."""
    return b"%08x" % zlib.crc32(b"\0".join(values))


def digest_of(
    images: Mapping[int, bytes],
    label: int | None,
    caption: str = "",
    shape: Sequence[int] = (),
    conditions: Mapping[int, bytes] = NO_CONDITIONS,
) -> bytes:
    """SHA-256 of one image in all its sizes, of its class, its captions, its shape and its condition images."""
    digest = hashlib.sha256()
    for size, encoded in images.items():
        # the lengths separate the parts: no two images give the hash the same bytes
        digest.update(b"%d %d " % (size, len(encoded)))
        digest.update(encoded)
    digest.update(b"%d" % (-1 if label is None else label))
    if caption:
        digest.update(b" " + caption.encode())
    if shape:
        digest.update(b"\n%d %d %d %d %d %d" % tuple(shape))
    for size, encoded in conditions.items():
        digest.update(b"\ncondition %d %d " % (size, len(encoded)))
        digest.update(encoded)
    return digest.digest()


def next_link(link: bytes, digest: bytes) -> bytes:
    """The fingerprint after one more image: SHA-256(`link` ‖ `digest`), starting from `FIRST_LINK`."""
    return hashlib.sha256(link + digest).digest()


@dataclass(frozen=True)
class DatasetMeta:
    """How a dataset was made; the JSON under the key `meta`.

    `counts` = `{"images": n, "skipped": {reason: n}, "ignored": {extension: n}, "converted": {kind: n}}`, and
    `"captions"`: the number of images that have one, if any has; `"buckets"`: that of each shape, if there are buckets.
    `fingerprint` = a chain of SHA-256 (hex, `next_link`) over images and classes in index order: equal for equal
    content, empty when another program wrote the dataset. `origin` = SHA-256 (hex) over the settings and the names of
    the images. `repeats`: how often an epoch shows the images of each class; empty: once.
    `rate`: samples per second of sounds, whose only size is the length of a piece; 0: images. `trim`, `loudness`: how
    sounds were made, see `data.audio.AudioConfig`.
    `buckets`: step, least and most side of `data.buckets`; empty: squares. `shard` = `i/n` for a part,
    empty for a whole set. `has_conditions`: every image has a condition image, of the same sizes and channels.
    """

    name: str
    sizes: tuple[int, ...]
    channels: int
    image_format: str = ""
    quality: int | None = None
    crop: str = ""
    resample: str = ""
    background: str = ""
    class_names: tuple[str, ...] = ()
    counts: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    fingerprint: str = ""
    origin: str = ""
    shard: str = ""
    vdiff_version: str = ""
    format_version: int = FORMAT_VERSION
    value_range: str = ""
    repeats: tuple[int, ...] = ()
    buckets: tuple[int, ...] = ()
    has_conditions: bool = False
    rate: int = 0
    trim: float = 0.0
    loudness: str = ""

    @property
    def noun(self) -> str:
        """What one of its samples is called."""
        return self.codec.noun

    @property
    def codec(self) -> Codec:
        """What its samples are."""
        return WAVEFORM if self.rate else PIXEL_CODEC

    def shape(self, size: int) -> tuple[int, ...]:
        """The shape of a sample of this size: (C, H, W) of a square, (C, L) of a sound."""
        return (self.channels, size) if self.rate else (self.channels, size, size)

    def key(self, size: int) -> int | str:
        """The kind of the records of its samples: the size of images, `audio-RATE` of sounds."""
        return f"audio-{self.rate}" if self.rate else size

    @property
    def num_captions(self) -> int:
        """How many images have a caption."""
        return int(self.counts.get("captions", 0))

    def to_json(self) -> str:
        """One JSON object with sorted keys."""
        values = asdict(self)
        added = (
            "repeats",
            "buckets",
            "has_conditions",
            "rate",
            "trim",
            "loudness",
        )  # left out if empty, as in earlier versions
        return json.dumps({k: v for k, v in values.items() if v or k not in added}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> DatasetMeta:
        """The inverse of `to_json`.

        Raises:
            VdiffError: not JSON, a newer format, or keys are missing, unknown or of another type.
        """
        try:
            values = parse(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise VdiffError("the dataset's description is not a JSON object", PREPARE_AGAIN)
        if (version := values.get("format_version")) != FORMAT_VERSION:
            raise VdiffError(
                f"the dataset has format version {version}, but this vdiff reads version {FORMAT_VERSION}",
                f"update vdiff, or {PREPARE_AGAIN}",
            )
        meta = record_of(cls, values, "the dataset's description", PREPARE_AGAIN)
        counts = [meta.counts.get(key, {}) for key in ("skipped", "ignored", "converted", "buckets")]
        if not (
            meta.sizes == tuple(sorted(set(meta.sizes)))
            and meta.sizes[:1] > (0,)
            and meta.sizes[-1] <= (MAX_LENGTH if meta.rate else MAX_SIZE)
            and meta.channels in ((1, 2) if meta.rate else (1, 3))
            and 0 <= meta.rate <= MAX_RATE
            and (not meta.rate or len(meta.sizes) == 1)
            and len(meta.repeats) in (0, len(meta.class_names))
            and len(meta.buckets) in (0, 3)
            and all(0 < repeats < 10_000 for repeats in meta.repeats)
            and re.fullmatch(r"([1-9]\d{0,8}/[1-9]\d{0,8})?", meta.shard)
            and all(type(meta.counts.get(key, 0)) is int for key in ("images", "captions"))
            and all(isinstance(count, dict) and all(type(n) is int for n in count.values()) for count in counts)
        ):
            raise VdiffError("the description is not that of a dataset", PREPARE_AGAIN)
        return replace(meta, class_names=tuple(map(clean_name, meta.class_names)))


class StoredImages:
    """The common part of LMDB datasets and tar shards: path, description and number of images."""

    path: Path | str
    meta: DatasetMeta
    _length: int

    def __len__(self) -> int:
        return self._length

    def check_size(self, size: int) -> None:
        """Raise VdiffError, which names the existing sizes, if the dataset has no images of `size`."""
        if size not in self.meta.sizes:
            sizes = ", ".join(map(str, self.meta.sizes))
            flag, what = ("--length", "length") if self.meta.rate else ("--size", "size")
            hint = f"it has {sizes}; choose one of them or prepare again with {flag} {size}"
            raise VdiffError(f"{self.path} has no {self.meta.noun}s of {what} {size}", hint)

    def check_squares(self) -> None:
        """Raise VdiffError if the dataset has images of many shapes."""
        if self.meta.buckets:
            hint = "prepare the images again without --buckets"
            raise VdiffError(f"{self.path} has images of many shapes, and squares are needed", hint)


class ImageStore(StoredImages):
    """Read access to a dataset; opened at the first use in a process, so it may be pickled and used across a fork.

    Raises:
        VdiffError: the folder is missing, or the dataset is invalid, incomplete or truncated.
    """

    path: Path

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: LmdbFile | None = None
        file = self._opened()
        length, meta, check = map(file.get, (LENGTH_KEY, META_KEY, CHECK_KEY))
        if length is None:
            raise incomplete(self.path)
        if not (length.isdigit() and len(length) < 20 and int(length) <= file.entries):
            raise self._damaged("its length is not the number of its samples")
        if check not in (None, check_of(length, meta or b"")):
            raise self._damaged("its description is not what was written")
        self._length = int(length)
        self.meta = self._foreign_meta(file) if meta is None else DatasetMeta.from_json(meta)
        if not self.meta.complete:
            raise incomplete(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._file = None

    def encoded(self, size: int, index: int) -> bytes:
        """The bytes of the image file `index` at `size`.

        Raises:
            IndexError: `index` outside 0 … len − 1.
            VdiffError: the dataset has no images of this size, or lacks this one.
        """
        self.check_size(size)
        what = f"{self.meta.noun} {index} of size {size}"
        return self._record(self.meta.key(size), index, what, what)

    def condition(self, size: int, index: int) -> bytes:
        """The bytes of the condition image of image `index` at `size`.

        Raises:
            IndexError, VdiffError: as in `encoded`.
        """
        self.check_size(size)
        what = f"condition of image {index} of size {size}"
        return self._record(f"condition-{size}", index, what, f"the {what}")

    def label(self, index: int) -> int | None:
        """The class of image `index`; None in a dataset without classes."""
        if not self.meta.class_names and 0 <= index < len(self):
            return None
        what = f"{self.meta.noun} {index}"
        value = self._record("label", index, f"class for {what}", f"the class of {what}")
        if not (value.isdigit() and len(value) < 10 and int(value) < len(self.meta.class_names)):
            raise self._damaged(f"the class of {what} is {value[:20]!r}, not one of its classes")
        return int(value)

    def caption(self, index: int) -> str:
        """The captions of image `index`, one a line; "" if it has none."""
        if not self.meta.num_captions or self._opened().get(record_key("caption", index)) is None:
            return ""
        what = f"the caption of {self.meta.noun} {index}"
        try:
            return self._record("caption", index, what, what).decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is not UTF-8") from None

    def shape(self, index: int) -> tuple[int, ...]:
        """What `buckets.Fit.sizes` are, of image `index`; empty in a dataset of squares."""
        if not self.meta.buckets:
            return ()
        what = f"the shape of image {index}"
        words = self._record("shape", index, what, what).split()
        if len(words) != 6 or not all(word.isdigit() and len(word) < 6 for word in words):
            raise self._damaged(f"{what} is not six numbers")
        return tuple(map(int, words))

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The dataset in pieces that different processes may read."""
        yield from ((start, min(start + STRETCH, len(self))) for start in range(0, len(self), STRETCH))

    def stretch(self, start: int, stop: int) -> Iterator[StoredImage]:
        """The images `start` … `stop` − 1; the name of each is its index."""
        for index in range(start, stop):
            encoded = {size: self.encoded(size, index) for size in self.meta.sizes}
            sizes = self.meta.sizes if self.meta.has_conditions else ()
            conditions = {size: self.condition(size, index) for size in sizes}
            described = (self.label(index), self.caption(index), self.shape(index))
            yield StoredImage(str(index), encoded, *described, conditions)

    def _foreign_meta(self, file: LmdbFile) -> DatasetMeta:
        """The description of another program's dataset, which has a length and images, but no `meta`."""
        sizes, key = set(), file.first_key(b"")
        while key is not None:  # from prefix to prefix, not from image to image
            prefix, dash, _ = key.partition(b"-")
            if dash and prefix.isdigit() and len(prefix) < 6:
                sizes.add(int(prefix))
            key = file.first_key(prefix + b"." if dash else key + b"\0")  # "." comes right after "-"
        if not sizes:
            raise VdiffError(f"{self.path} is an LMDB without images", "give the folder of a prepared dataset")
        counts = {"images": len(self)}
        return DatasetMeta(self.path.resolve().name, tuple(sorted(sizes)), channels=3, counts=counts, complete=True)

    def _record(self, kind: int | str, index: int, missing: str, what: str) -> bytes:
        """The value of a record of image `index`, checked against its checksum, if there is one."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.meta.noun} {index} of {len(self)}")
        file = self._file or self._opened()
        value, check = file.get(record_key(kind, index)), file.get(record_key("check", index))
        if value is None:
            raise VdiffError(f"{self.path} has no {missing}", PREPARE_AGAIN)
        if check is not None and check_of(value) not in check.split():
            raise self._damaged(f"{what} is not what was written")
        return value

    def _opened(self) -> LmdbFile:
        if self._file is None:
            path = self.path
            if _job(path) or (not path.exists() and partial_folder(path).exists()):
                raise incomplete(path)
            if not path.exists():
                raise VdiffError(f"{path}: no such dataset", "give the folder that prepare_data.py wrote (--data)")
            if not is_lmdb(path):
                what, hint = f"it holds no {DATA_FILE}", "make one of your images: python prepare_data.py PATH"
                if path.name == DATA_FILE:
                    what, hint = "it is a file of one", f"give its folder, {path.parent}"
                raise VdiffError(f"{path} is not a dataset: {what}", hint)
            self._file = LmdbFile(path / DATA_FILE, PREPARE_AGAIN)
        return self._file

    def _damaged(self, reason: str) -> VdiffError:
        return VdiffError(f"{self.path} is damaged: {reason}", PREPARE_AGAIN)


class StoreWriter:
    """Appends images to the LMDB in the existing folder `path`; `finish` makes it a dataset.

    Data that `commit` wrote are durable, and a later writer continues after them. Every transaction depends only on the
    file before it and on its images: LMDB is opened again for each, as it would otherwise leave traces of earlier
    transactions in unused bytes. So the same images in the same batches give the same file, byte for byte, after any
    interruptions. A batch ends after a number of images or bytes, never after a time.

    Raises:
        VdiffError: the disk is full or refuses.
    """

    def __init__(self, path: Path, meta: DatasetMeta) -> None:
        self.path = path
        self.meta = replace(meta, complete=False)
        self.num_committed, self.length, self.link = 0, 0, FIRST_LINK
        self._records: list[tuple[bytes, bytes]] = []
        self._record_bytes = 0
        self._begun_at = 0
        self._map_bytes = FIRST_MAP_BYTES
        if is_lmdb(path):
            self._go_on()

    @property
    def is_due(self) -> bool:
        """Whether there are enough images for the next batch."""
        return self.length - self._begun_at >= BATCH_IMAGES or self._record_bytes >= BATCH_BYTES

    def add(
        self,
        images: Mapping[int, bytes],
        label: int | None,
        caption: str = "",
        shape: Sequence[int] = (),
        conditions: Mapping[int, bytes] = NO_CONDITIONS,
        piece: int = 0,
    ) -> int:
        """Append one image in all its sizes (`{size: encoded}`), its class, captions, shape and condition images.

        Args:
            piece: of a sound that was cut; every piece has an index of its own.

        Returns:
            its index.
        """
        del piece
        index = self.length
        records = {record_key(self.meta.key(size), index): encoded for size, encoded in images.items()}
        if label is not None:
            records[record_key("label", index)] = str(label).encode()
        if caption:
            records[record_key("caption", index)] = caption.encode()
        if shape:
            records[record_key("shape", index)] = " ".join(map(str, shape)).encode()
        records |= {record_key(f"condition-{size}", index): encoded for size, encoded in conditions.items()}
        records[record_key("check", index)] = b" ".join(map(check_of, records.values()))
        self._records += records.items()
        self._record_bytes += sum(map(len, records.values()))
        self.link = next_link(self.link, digest_of(images, label, caption, shape, conditions))
        self.length += 1
        return index

    def skip(self) -> None:
        """Skip a rejected image: indices are dense."""

    def commit(self) -> None:
        """Write the waiting images and the writer's progress in one transaction."""
        if self.length == self._begun_at:
            return
        self.num_committed += 1
        # of constant length, so that it moves nothing else in the file
        state = f"{self.num_committed:012d} {self.length:012d} {self.link.hex()}".encode()
        first = [(META_KEY, self.meta.to_json().encode())] if self.num_committed == 1 else []
        self._write([*first, *self._records, (STATE_KEY, state)])
        self._records.clear()
        self._record_bytes, self._begun_at = 0, self.length

    def finish(self, counts: Mapping[str, object]) -> DatasetMeta:
        """Write the waiting images, the length and the complete description."""
        self.commit()
        self.meta = replace(self.meta, counts=counts, complete=True, fingerprint=self.link.hex())
        length, meta = str(self.length).encode(), self.meta.to_json().encode()
        self._write([(LENGTH_KEY, length), (META_KEY, meta), (CHECK_KEY, check_of(length, meta))], done=True)
        return self.meta

    def _go_on(self) -> None:
        file = LmdbFile(self.path / DATA_FILE, BEGIN_ANEW)
        meta, state = file.get(META_KEY), file.get(STATE_KEY)
        while self._map_bytes <= file.used_bytes:
            self._map_bytes *= 2  # as an uninterrupted writer would have done
        if meta is not None:
            self.meta = DatasetMeta.from_json(meta)
        if state is not None:
            found = re.fullmatch(rb"(\d{12}) (\d{12}) ([0-9a-f]{64})", state)
            if found is None:
                raise VdiffError(f"{self.path} is damaged: its progress is missing", BEGIN_ANEW)
            self.num_committed, self.length = int(found[1]), int(found[2])
            self._begun_at, self.link = self.length, bytes.fromhex(found[3].decode())

    def _write(self, records: list[tuple[bytes, bytes]], *, done: bool = False) -> None:
        """Write records in one durable transaction; if the map is full, double it and write them again."""
        import lmdb

        while True:
            try:
                with lmdb.open(str(self.path), map_size=self._map_bytes, lock=False) as environment:
                    with environment.begin(write=True) as transaction:
                        for key, value in records:
                            transaction.put(key, value)
                        if done:
                            transaction.delete(STATE_KEY)
                    return
            except lmdb.MapFullError:
                self._map_bytes *= 2
            except lmdb.Error as error:
                # LMDB reports an input/output error if a disk ends within a page
                full = shutil.disk_usage(self.path).free < sum(len(value) for _, value in records) + FULL_DISK_BYTES
                reason = os.strerror(errno.ENOSPC) if full else error
                raise VdiffError(f"cannot write {self.path}: {reason}", "free space or choose another --out") from None


def partial_folder(path: Path) -> Path:
    """The folder of an unfinished dataset, beside its final folder."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def incomplete(path: Path) -> VdiffError:
    """The error for an incomplete dataset; it names the command that completes it."""
    jobs = (_job(folder) for folder in (partial_folder(path), path, *path.parents[:1]))
    command = next((job["command"] for job in jobs if job), "")
    return VdiffError(
        f"{path} is an incomplete dataset: its preparation was interrupted",
        f"complete it: {command}" if command else PREPARE_AGAIN,
    )


def _job(folder: Path) -> dict[str, Any]:
    try:
        job = parse(read_text(folder / JOB_FILE))
    except (OSError, ValueError):
        return {}
    return job if isinstance(job, dict) and isinstance(job.get("command"), str) else {}


def is_lmdb(path: Path) -> bool:
    """Whether `path` is a folder that holds an LMDB."""
    return (path / DATA_FILE).is_file()


def is_dataset(path: Path) -> bool:
    """Whether `path` is a folder that holds an LMDB, or tar shards with an index."""
    return is_lmdb(path) or (path / INDEX_FILE).is_file()
