"""A dataset on disk: one LMDB folder that any rosinality-style reader can read, plus labels and a description."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import lmdb

from vdiff.data.labels import clean_name
from vdiff.errors import VdiffError
from vdiff.files import parse, read_text

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT_VERSION = 2
DATA_FILE = "data.mdb"
INDEX_FILE = "index.json"  # of tar shards
LENGTH_KEY = b"length"
META_KEY = b"meta"
PREPARE_AGAIN = "run prepare_data.py again with --overwrite"
PARTIAL_SUFFIX = ".partial"
JOB_FILE = "job.json"
FIRST_LINK = bytes(32)
STRETCH = 256


def image_key(size: int, index: int) -> bytes:
    """`64-00007`: the key of image `index` at `size` pixels."""
    return f"{size}-{index:05d}".encode()


def label_key(index: int) -> bytes:
    """`label-00007`: the key of the class of image `index`."""
    return f"label-{index:05d}".encode()


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
    def from_json(cls, text: str) -> DatasetMeta:
        """The inverse of `to_json`.

        Raises:
            VdiffError: not JSON, a newer format, or keys that are missing or unknown.
        """
        try:
            values = json.loads(text)
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
        known = {item.name for item in fields(cls)}
        wrong = [f"lacks {key!r}" for key in sorted(known - set(values))]
        wrong += [f"has the unknown key {key!r}" for key in sorted(set(values) - known)]
        if wrong:
            raise VdiffError(f"the dataset's description {', '.join(wrong)}", PREPARE_AGAIN)
        values["sizes"] = tuple(values["sizes"])
        values["class_names"] = tuple(clean_name(name) for name in values["class_names"])
        return cls(**values)


class _Environment:
    """An LMDB environment and the process that opened it."""

    def __init__(self, path: Path) -> None:
        self.pid = os.getpid()
        self.lmdb = lmdb.open(str(path), max_readers=32, readonly=True, lock=False, readahead=False, meminit=False)


# LMDB refuses to open a file twice in one process: the stores of one file share an environment while any of them lives
_environments: WeakValueDictionary[tuple[int, int], _Environment] = WeakValueDictionary()


class ImageStore:
    """Read access to a dataset; opened when first used in a process, so it may be pickled and carried across a fork.

    Raises:
        VdiffError: no such folder, not a dataset, an incomplete or truncated one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._environment: _Environment | None = None
        _check_folder(self.path)
        length = self._get(LENGTH_KEY)
        meta = self._get(META_KEY)
        if meta is not None:
            self.meta = DatasetMeta.from_json(meta.decode())
        elif length is not None:
            self.meta = self._foreign_meta(int(length))
        if length is None or not self.meta.complete:
            raise incomplete(self.path)
        self._length = int(length)

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None}

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        self._environment = None

    def encoded(self, size: int, index: int) -> bytes:
        """The bytes of the image file `index` at `size`.

        Raises:
            IndexError: `index` outside 0 … len − 1.
            VdiffError: the dataset has no images of this size, or lacks this one.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        self.check_size(size)
        value = self._get(image_key(size, index))
        if value is None:
            raise VdiffError(f"{self.path} has no image {index} of size {size}", PREPARE_AGAIN)
        return value

    def label(self, index: int) -> int | None:
        """The class of image `index`, None in a dataset without classes."""
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        if not self.meta.class_names:
            return None
        value = self._get(label_key(index))
        if value is None:
            raise VdiffError(f"{self.path} has no class for image {index}", PREPARE_AGAIN)
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
        with self._open().begin() as transaction, transaction.cursor() as cursor:
            found = cursor.first()
            while found:
                prefix, dash, _ = bytes(cursor.key()).partition(b"-")
                if dash and prefix.isdigit():
                    yield int(prefix)
                found = cursor.set_range(prefix + b".") if dash else cursor.next()  # "." comes right after "-"

    def _get(self, key: bytes) -> bytes | None:
        with self._open().begin() as transaction:
            value: bytes | None = transaction.get(key)
        return value

    def _open(self) -> lmdb.Environment:
        """This process's environment: a forked child lets the inherited one go and opens its own."""
        pid = os.getpid()
        if self._environment is not None and self._environment.pid == pid:
            return self._environment.lmdb
        _check_folder(self.path)
        status = os.stat(self.path / DATA_FILE)
        identity = (status.st_dev, status.st_ino)
        environment = _environments.get(identity)
        if environment is not None and environment.pid != pid:
            environment.lmdb.close()
            environment = None
        if environment is None:
            environment = _open_environment(self.path, status.st_size)
            _environments[identity] = environment
        self._environment = environment
        return environment.lmdb


def _open_environment(path: Path, file_bytes: int) -> _Environment:
    """Open the LMDB in `path`, but no file shorter than it says: reading past its end would kill the process."""
    try:
        environment = _Environment(path)
        needed = (environment.lmdb.info()["last_pgno"] + 1) * environment.lmdb.stat()["psize"]
    except lmdb.Error as error:
        raise VdiffError(f"{path / DATA_FILE} cannot be read: {error}", PREPARE_AGAIN) from None
    if file_bytes < needed:
        environment.lmdb.close()
        raise VdiffError(f"{path / DATA_FILE} is truncated: {file_bytes} of {needed} bytes", PREPARE_AGAIN)
    return environment


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
    return job if isinstance(job, dict) and "command" in job else {}


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


def find_dataset(root: Path = Path("data")) -> Path:
    """The only dataset under `root`.

    Raises:
        VdiffError: there is none, or there are several.
    """
    folders = sorted(root.iterdir()) if root.is_dir() else []
    found = [folder for folder in folders if is_dataset(folder) and not folder.name.startswith(".")]
    unfinished = [folder for folder in folders if folder.name.endswith(PARTIAL_SUFFIX)]
    if not found and unfinished:
        raise incomplete(unfinished[0])
    if not found:
        raise VdiffError(
            f"no dataset under {root}/", "make one: python prepare_data.py, or python prepare_data.py FOLDER_OF_IMAGES"
        )
    if len(found) > 1:
        raise VdiffError(f"{root}/ holds several datasets", f"choose with --data: {', '.join(map(str, found))}")
    return found[0]


def dataset_of(recorded: str) -> str:
    """The dataset that a model learned from, as its checkpoint records it; where it is gone, the only one there is.

    Raises:
        VdiffError: it is not there, nor is there exactly one.
    """
    return recorded if "://" in recorded or (recorded and Path(recorded).exists()) else str(find_dataset())
