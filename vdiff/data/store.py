"""A dataset on disk: one LMDB folder that any rosinality-style reader can read, plus labels and a description."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.data.labels import clean_name
from vdiff.data.lmdb_file import LmdbFile
from vdiff.errors import VdiffError
from vdiff.files import parse, read_text
from vdiff.records import record_of

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT_VERSION = 2
DATA_FILE = "data.mdb"
INDEX_FILE = "index.json"  # of tar shards
LENGTH_KEY = b"length"
META_KEY = b"meta"
CHECK_KEY = b"check"  # of both
PREPARE_AGAIN = "run prepare_data.py again with --overwrite"
PARTIAL_SUFFIX = ".partial"
JOB_FILE = "job.json"
FIRST_LINK = bytes(32)
STRETCH = 256
MAX_SIZE = 2**14


def image_key(size: int, index: int) -> bytes:
    """`64-00007`: the key of image `index` at `size` pixels."""
    return f"{size}-{index:05d}".encode()


def label_key(index: int) -> bytes:
    """`label-00007`: the key of the class of image `index`."""
    return f"label-{index:05d}".encode()


def check_key(index: int) -> bytes:
    """`check-00007`: the key of the checksums of image `index` in all its sizes, and of its class."""
    return f"check-{index:05d}".encode()


def check_of(*values: bytes) -> bytes:
    """CRC-32 (8 hexadecimal digits) of values, so that a changed bit is seen when they are read."""
    return b"%08x" % zlib.crc32(b"\0".join(values))


def digest_of(images: Mapping[int, bytes], label: int | None) -> bytes:
    """SHA-256 of one image in all its sizes and of its class."""
    digest = hashlib.sha256()
    for size, encoded in images.items():
        # the lengths keep the parts apart: no two images feed the hash the same bytes
        digest.update(b"%d %d " % (size, len(encoded)))
        digest.update(encoded)
    digest.update(b"%d" % (-1 if label is None else label))
    return digest.digest()


def next_link(link: bytes, digest: bytes) -> bytes:
    """The fingerprint of a dataset with one image more: SHA-256(`link` ‖ `digest`), beginning with `FIRST_LINK`."""
    return hashlib.sha256(link + digest).digest()


@dataclass(frozen=True)
class DatasetMeta:
    """How a dataset was made; the JSON under the key `meta`.

    `counts` = `{"images": n, "skipped": {reason: n}, "ignored": {extension: n}, "converted": {kind: n}}`.
    `fingerprint` = a chain of SHA-256 (hex, `next_link`) over images and classes in index order: equal for equal
    content, empty when another program wrote the dataset. `origin` = SHA-256 (hex) over the settings and the names of
    the images. `shard` = `i/n` for a part, empty for a whole set.
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

    def check_size(self, size: int, path: Path | str) -> None:
        """Do nothing if the dataset at `path` has images of `size`.

        Raises:
            VdiffError: it has not; the hint names the sizes it has.
        """
        if size not in self.sizes:
            sizes = ", ".join(map(str, self.sizes))
            raise VdiffError(
                f"{path} has no images of size {size}",
                f"it has {sizes}; choose one of them or prepare again with --size {size}",
            )

    def to_json(self) -> str:
        """One JSON object with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> DatasetMeta:
        """The inverse of `to_json`.

        Raises:
            VdiffError: not JSON, a newer format, or keys that are missing, unknown or of another kind.
        """
        try:
            values = parse(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise VdiffError("the dataset's description is not a JSON object", PREPARE_AGAIN)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise VdiffError(
                f"the dataset has format version {version}, this vdiff reads version {FORMAT_VERSION}",
                f"update vdiff, or {PREPARE_AGAIN}",
            )
        meta = record_of(cls, values, "the dataset's description", PREPARE_AGAIN)
        meta = replace(meta, class_names=tuple(map(clean_name, meta.class_names)))
        counts = [meta.counts.get(key, {}) for key in ("skipped", "ignored", "converted")]
        if not (
            meta.sizes == tuple(sorted(set(meta.sizes)))
            and meta.sizes[:1] > (0,)
            and meta.sizes[-1] <= MAX_SIZE
            and meta.channels in (1, 3)
            and re.fullmatch(r"([1-9]\d{0,8}/[1-9]\d{0,8})?", meta.shard)
            and type(meta.counts.get("images", 0)) is int
            and all(isinstance(count, dict) and all(type(n) is int for n in count.values()) for count in counts)
        ):
            raise VdiffError("the dataset's description says what no dataset is", PREPARE_AGAIN)
        return meta


class ImageStore:
    """Read access to a dataset; opened when first used in a process, so it may be pickled and carried across a fork.

    Raises:
        VdiffError: no such folder, not a dataset, an incomplete or truncated one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        _check_folder(self.path)
        self._file: LmdbFile | None = LmdbFile(self.path / DATA_FILE, PREPARE_AGAIN)
        length, meta, check = (self._get(key) for key in (LENGTH_KEY, META_KEY, CHECK_KEY))
        if length is None:
            raise incomplete(self.path)
        if not (length.isdigit() and len(length) < 20 and int(length) <= self._file.entries):
            raise self._damaged("its length is not the number of its images")
        if check not in (None, check_of(length, meta or b"")):
            raise self._damaged("its description is not what was written")
        self.meta = self._foreign_meta(int(length)) if meta is None else DatasetMeta.from_json(meta)
        if not self.meta.complete:
            raise incomplete(self.path)
        self._length = int(length)

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        self._file = None

    def encoded(self, size: int, index: int) -> bytes:
        """The bytes of the image file `index` at `size`.

        Raises:
            IndexError: `index` outside 0 … len − 1.
            VdiffError: the dataset has no images of this size, or lacks this one.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        self.check_size(size)
        value, check = self._get(image_key(size, index)), self._get(check_key(index))
        if value is None:
            raise VdiffError(f"{self.path} has no image {index} of size {size}", PREPARE_AGAIN)
        if check is not None and check_of(value) not in check.split():
            raise self._damaged(f"image {index} of size {size} is not what was written")
        return value

    def label(self, index: int) -> int | None:
        """The class of image `index`, None in a dataset without classes."""
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        if not self.meta.class_names:
            return None
        value, check = self._get(label_key(index)), self._get(check_key(index))
        if value is None:
            raise VdiffError(f"{self.path} has no class for image {index}", PREPARE_AGAIN)
        if check is not None and check_of(value) not in check.split():
            raise self._damaged(f"the class of image {index} is not what was written")
        if not (value.isdigit() and len(value) < 10 and int(value) < len(self.meta.class_names)):
            raise self._damaged(f"the class of image {index} is {value[:20]!r}, not one of its classes")
        return int(value)

    def image(self, size: int, index: int) -> Image:
        """The decoded image, RGB or L as `meta.channels` says."""
        import PIL.Image

        with PIL.Image.open(io.BytesIO(self.encoded(size, index))) as image:
            return image.convert("RGB" if self.meta.channels == 3 else "L")

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The dataset in pieces that may be read by different processes."""
        yield from ((start, min(start + STRETCH, len(self))) for start in range(0, len(self), STRETCH))

    def stretch(self, start: int, stop: int) -> Iterator[tuple[str, dict[int, bytes], int | None]]:
        """Name, encoded images by size, and class of the images `start` … `stop` − 1."""
        for index in range(start, stop):
            yield str(index), {size: self.encoded(size, index) for size in self.meta.sizes}, self.label(index)

    def check_size(self, size: int) -> None:
        """Do nothing if the dataset has images of `size`.

        Raises:
            VdiffError: it has not; the hint names the sizes it has.
        """
        self.meta.check_size(size, self.path)

    def _foreign_meta(self, length: int) -> DatasetMeta:
        """What can be said of a dataset that another program wrote: `length` and images, but no `meta`."""
        sizes = tuple(sorted(self._sizes_in_keys()))
        if not sizes:
            raise VdiffError(f"{self.path} is an LMDB without images", "give the folder of a prepared dataset")
        counts = {"images": length}
        return DatasetMeta(self.path.resolve().name, sizes, channels=3, counts=counts, complete=True)

    def _sizes_in_keys(self) -> Iterator[int]:
        """The N of all keys `N-…`, by jumping from prefix to prefix instead of walking through every image."""
        assert self._file is not None
        key = self._file.first_key(b"")
        while key is not None:
            prefix, dash, _ = key.partition(b"-")
            if dash and prefix.isdigit() and len(prefix) < 6:
                yield int(prefix)
            key = self._file.first_key(prefix + b"." if dash else key + b"\0")  # "." comes right after "-"

    def _get(self, key: bytes) -> bytes | None:
        if self._file is None:
            _check_folder(self.path)
            self._file = LmdbFile(self.path / DATA_FILE, PREPARE_AGAIN)
        return self._file.get(key)

    def _damaged(self, reason: str) -> VdiffError:
        return VdiffError(f"{self.path} is damaged: {reason}", PREPARE_AGAIN)


def partial_folder(path: Path) -> Path:
    """Where a dataset is prepared until it is complete: a neighbour of the folder that it will be."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def incomplete(path: Path) -> VdiffError:
    """The error for a dataset whose preparation was cut short; it names the command that completes it."""
    partial = next((folder for folder in (partial_folder(path), path, *path.parents[:1]) if _job(folder)), None)
    command = _job(partial)["command"] if partial else ""
    return VdiffError(
        f"{path} is an incomplete dataset: its preparation was cut short",
        f"complete it: {command}" if command else PREPARE_AGAIN,
    )


def _job(folder: Path) -> dict[str, Any]:
    try:
        job = parse(read_text(folder / JOB_FILE))
    except (OSError, ValueError):
        return {}
    return job if isinstance(job, dict) and isinstance(job.get("command"), str) else {}


def _check_folder(path: Path) -> None:
    if _job(path) or (not path.exists() and partial_folder(path).exists()):
        raise incomplete(path)
    if not path.exists():
        raise VdiffError(f"{path}: no such dataset", "give the folder that prepare_data.py wrote (--data)")
    if not (path / DATA_FILE).is_file():
        raise VdiffError(
            f"{path} is not a dataset: it holds no {DATA_FILE}", "make one of your images: python prepare_data.py PATH"
        )


def is_lmdb(path: Path) -> bool:
    """Whether `path` is a folder that holds an LMDB."""
    return (path / DATA_FILE).is_file()


def is_dataset(path: Path) -> bool:
    """Whether `path` is a folder that holds an LMDB, or tar shards with an index."""
    return is_lmdb(path) or (path / INDEX_FILE).is_file()
