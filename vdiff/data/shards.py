"""Writing tar shards as WebDataset reads them, and the index beside them that makes them a dataset."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any

from msgspec import Meta

from vdiff.data.remote_files import opened
from vdiff.data.store import INDEX_FILE, PREPARE_AGAIN, DatasetMeta
from vdiff.data.tar_files import read_samples, require_webdataset
from vdiff.errors import VdiffError
from vdiff.files import fsync, make_folder, parse, refusal, write_text
from vdiff.records import record_of

IMAGES_PER_SHARD = 10_000
LABEL = "cls"
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True)
class Shard:
    """One tar: its file name beside the index (without an index its path), and what is in it."""

    file: str
    images: Annotated[int, Meta(ge=1)]
    bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    sha256: str = ""


def suffix_of(meta: DatasetMeta, size: int) -> str:
    """`jpg`, or `64.jpg` in a set of several sizes: what follows an image's number in its name."""
    extension = EXTENSIONS[meta.image_format]
    return extension if len(meta.sizes) == 1 else f"{size}.{extension}"


def fingerprint_of(digests: Iterable[str]) -> str:
    """SHA-256 (hex) over the SHA-256 of all shards in order, each in hex and a line of its own."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def write_index(folder: Path, meta: DatasetMeta, shards: Sequence[Shard]) -> None:
    """Write `folder/index.json`, whole or not at all."""
    index: dict[str, Any] = {"meta": json.loads(meta.to_json()), "shards": [asdict(shard) for shard in shards]}
    index["check"] = _check_of(index)
    write_text(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def _check_of(index: Mapping[str, Any]) -> int:
    """CRC-32 of what an index says, so that a changed bit is seen."""
    return zlib.crc32(json.dumps([index["meta"], index["shards"]], sort_keys=True).encode())


def parse_index(text: str | bytes, place: str) -> tuple[DatasetMeta, tuple[Shard, ...]]:
    """What an index says; `place` names it in errors.

    Raises:
        VdiffError: no index, one of another version, one of an unfinished dataset, or shards that lie elsewhere.
    """
    try:
        values = parse(text)
        description = json.dumps(values["meta"])
        shards = tuple(record_of(Shard, entry, place, PREPARE_AGAIN) for entry in values["shards"])
        if any(shard.images > shard.bytes or not shard.sha256.isalnum() for shard in shards):
            raise ValueError
    except (ValueError, TypeError, KeyError, VdiffError):
        raise VdiffError(f"{place} is no index of tar shards", PREPARE_AGAIN) from None
    # a dataset from elsewhere must not make this machine read other files, or run anything
    if foreign := [shard.file for shard in shards if not re.fullmatch(r"[^/\\:\0\r\n]+\.tar", shard.file)]:
        raise VdiffError(f"{place} names the shard {foreign[0]!r}, which is not a file beside it", PREPARE_AGAIN)
    try:
        meta = DatasetMeta.from_json(description)
    except VdiffError as error:
        raise VdiffError(f"{place}: {error.cause}", error.hint) from None
    if meta.image_format not in EXTENSIONS:
        raise VdiffError(f"{place}: no shards hold images in the format {meta.image_format!r}", PREPARE_AGAIN)
    if not meta.complete:
        raise VdiffError(f"{place} is of an incomplete dataset", PREPARE_AGAIN)
    if values.get("check", _check_of(values)) != _check_of(values):
        raise VdiffError(f"{place} is damaged: it is not what was written", PREPARE_AGAIN)
    return meta, shards


def describe(path: Path, images: int | None = None) -> Shard:
    """A shard on disk with its SHA-256; its images are counted where their number is not given."""
    with opened(path) as file:
        if images is None:
            images = sum(1 for _ in read_samples(file, lambda _: False))
            file.seek(0)
        return Shard(path.name, images, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


class ShardWriter:
    """Writes `folder/name-000000.tar`, … and at last `folder/index.json`, which makes the folder a dataset.

    Shard k holds the images of the positions k · images_per_shard …, less those that were rejected. It is written
    under a hidden name and renamed when it is whole, so that a folder whose writing was cut short holds whole shards
    only, and a writer that is opened later goes on after them. Equal images make equal bytes.

    Args:
        start: the position of the first image of all; a multiple of `images_per_shard`.

    Raises:
        VdiffError: the disk is full or refuses; webdataset is not installed.
    """

    def __init__(
        self, folder: Path, meta: DatasetMeta, *, name: str, images_per_shard: int = IMAGES_PER_SHARD, start: int = 0
    ) -> None:
        if images_per_shard < 1 or start % images_per_shard:
            raise ValueError(f"start {start}, images_per_shard {images_per_shard}; need a multiple of at least 1")
        self._tar_writer = require_webdataset().TarWriter
        self.folder, self.name, self.images_per_shard = make_folder(folder), name, images_per_shard
        self.meta = replace(meta, complete=False)
        # of shards that an earlier writer wrote, only the names are known
        self._shards: list[Shard | Path] = list(self._tidy_up())
        self.num_committed = len(self._shards)
        if self._shards:
            start = (int(Path(str(self._shards[-1])).stem.rpartition("-")[2]) + 1) * images_per_shard
        if (folder / INDEX_FILE).exists():
            self.meta, _ = parse_index((folder / INDEX_FILE).read_bytes(), str(folder))
        self.position = self._begun_at = start
        self._waiting = 0
        self._tar: Any = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_due(self) -> bool:
        """Whether the open shard is full."""
        return self.position - self._begun_at >= self.images_per_shard

    def add(self, images: Mapping[int, bytes], label: int | None) -> int:
        """Append one image in all its sizes (`{size: encoded}`) and its class; returns its position."""
        if set(images) != set(self.meta.sizes):
            raise ValueError(f"images of sizes {sorted(images)}; need {sorted(self.meta.sizes)}")
        if (label is not None) != bool(self.meta.class_names):
            raise ValueError(f"label {label} in a set with the classes {self.meta.class_names}")
        self._check_room()
        sample: dict[str, Any] = {suffix_of(self.meta, size): encoded for size, encoded in images.items()}
        if label is not None:
            sample[LABEL] = str(label).encode()
        try:
            if self._tar is None:
                if self.meta.complete or self._path.exists():
                    raise ValueError(f"{self._path} is written already")
                self._file = open(self._temporary, "wb")  # noqa: SIM115
                # the clock and the user's name would make equal images differ in bytes
                options = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
                self._tar = self._tar_writer(self._file, **options)
            self._tar.write({"__key__": f"{self.position:09d}", **sample})
        except OSError as error:
            raise refusal(self._path, error) from None
        self._waiting += 1
        self.position += 1
        return self.position - 1

    def skip(self) -> None:
        """Pass over an image that was rejected: the images after it keep their positions, whoever writes them."""
        self._check_room()
        self.position += 1

    def commit(self) -> None:
        """Make the open shard durable and give it its name; without waiting images there is nothing to write."""
        if self._file is not None:
            try:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self._path)
                fsync(self.folder)
            except OSError as error:
                raise refusal(self._path, error) from None
            self._shards.append(describe(self._path, self._waiting))
            self.num_committed += 1
            self._tar = self._file = None
            self._waiting = 0
        self._begun_at = self.position

    def finish(self, counts: Mapping[str, object], fingerprint: str | None = None) -> DatasetMeta:
        """Commit what waits and write the index; shards of an earlier writer are read once, for their SHA-256.

        The fingerprint, if none is given, is that of `fingerprint_of` the shards.
        """
        self.commit()
        shards = [shard if isinstance(shard, Shard) else describe(shard) for shard in self._shards]
        fingerprint = fingerprint_of(shard.sha256 for shard in shards) if fingerprint is None else fingerprint
        self.meta = replace(self.meta, counts=counts, complete=True, fingerprint=fingerprint)
        write_index(self.folder, self.meta, shards)
        return self.meta

    def close(self) -> None:
        """Drop the open shard."""
        if self._file is None:
            return
        for file in (self._tar, self._file):
            with contextlib.suppress(OSError):  # a full disk refuses the last bytes of a file that goes anyway
                file.close()
        self._temporary.unlink(missing_ok=True)
        self._tar = self._file = None
        self.position, self._waiting = self._begun_at, 0

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}-{self._begun_at // self.images_per_shard:06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self._path.name}.tmp"

    def _check_room(self) -> None:
        if self.is_due:
            raise ValueError(f"the shard of position {self._begun_at} is full; commit it first")

    def _tidy_up(self) -> list[Path]:
        """Remove what a writer that was killed left unfinished; returns the whole shards in order."""
        name = re.compile(rf"{re.escape(self.name)}-\d{{6,}}\.tar")
        paths = list(self.folder.iterdir())
        for path in paths:
            if path.name[:1] == "." and path.suffix == ".tmp" and name.fullmatch(path.name[1:-4]):
                path.unlink()
        return sorted((path for path in paths if name.fullmatch(path.name)), key=lambda path: (len(path.name), path))
