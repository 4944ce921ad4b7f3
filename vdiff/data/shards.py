"""Tar shards in WebDataset's format, with an index that makes them a dataset; also other programs' tars."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import mmap
import os
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any
from urllib.parse import quote, urlsplit, urlunsplit

from msgspec import Meta

from vdiff.data.captions import clean_caption
from vdiff.data.remote_files import BUFFER_BYTES, COPY_AGAIN, check_place, damaged, opened, scheme_of, shown
from vdiff.data.store import (
    DATA_FILE,
    INDEX_FILE,
    NO_CONDITIONS,
    PREPARE_AGAIN,
    DatasetMeta,
    StoredImage,
    StoredImages,
    incomplete,
    partial_folder,
)
from vdiff.data.tar_files import is_image, read_samples, require_webdataset
from vdiff.errors import VdiffError, shell
from vdiff.files import MAX_TEXT_BYTES, fsync, make_folder, parse, read_text, write_text, writing
from vdiff.records import record_of
from vdiff.replacing import Kind

IMAGES_PER_SHARD = 10_000
LABEL, CAPTION = "cls", "txt"
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "flac": "flac"}
PREPARE = "make a dataset of the tar: python prepare_data.py TAR"
MAX_CLASSES = 100_000
OTHER_FILES = r"index\.json|rejected\.jsonl"
LMDB_FILES = r"(data|lock)\.mdb|rejected\.jsonl|samples\.json"
MARK_OF_META = b'"vdiff_version": "'


@dataclass(frozen=True)
class Shard:
    """One tar: its file name beside the index (without an index its path), and its contents."""

    file: str
    images: Annotated[int, Meta(ge=1)]
    bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    sha256: str = ""


def suffix_of(meta: DatasetMeta, size: int) -> str:
    """`jpg`, or `64.jpg` in a set of several sizes: the part of a name after an image's number."""
    extension = EXTENSIONS[meta.image_format]
    return extension if len(meta.sizes) == 1 else f"{size}.{extension}"


def fingerprint_of(digests: Iterable[str]) -> str:
    """SHA-256 (hex) of the SHA-256 of all shards in order, each in hex on one line."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def write_index(folder: Path, meta: DatasetMeta, shards: Sequence[Shard]) -> None:
    """Write `folder/index.json`, whole or not at all."""
    index: dict[str, Any] = {"meta": json.loads(meta.to_json()), "shards": [asdict(shard) for shard in shards]}
    index["check"] = _check_of(index)
    write_text(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def _check_of(index: Mapping[str, Any]) -> int:
    """CRC-32 of an index, to detect changed bits."""
    return zlib.crc32(json.dumps([index["meta"], index["shards"]], sort_keys=True).encode())


def parse_index(text: str | bytes, place: str) -> tuple[DatasetMeta, tuple[Shard, ...]]:
    """The contents of an index; `place` names it in errors.

    Raises:
        VdiffError: not an index, another version, an unfinished dataset, or shards in other places.
    """
    try:
        values = parse(text)
        description = json.dumps(values["meta"])
        shards = tuple(record_of(Shard, entry, place, PREPARE_AGAIN) for entry in values["shards"])
        if any(shard.images > shard.bytes or not shard.sha256.isalnum() for shard in shards):
            raise ValueError
    except (ValueError, TypeError, KeyError, VdiffError):
        raise VdiffError(f"{place} is not an index of tar shards", PREPARE_AGAIN) from None
    # an untrusted dataset must not make this machine read other files, or run anything
    if foreign := [shard.file for shard in shards if not re.fullmatch(r"[^/\\:\0\r\n]+\.tar", shard.file)]:
        raise VdiffError(f"{place} names the shard {foreign[0]!r}, which is not a file beside it", PREPARE_AGAIN)
    try:
        meta = DatasetMeta.from_json(description)
    except VdiffError as error:
        raise VdiffError(f"{place}: {error.cause}", error.hint) from None
    if meta.image_format not in EXTENSIONS:
        raise VdiffError(f"{place}: no shards hold {meta.noun}s in the format {meta.image_format!r}", PREPARE_AGAIN)
    if not meta.complete:
        raise VdiffError(f"{place} is of an incomplete dataset", PREPARE_AGAIN)
    if values.get("check", _check_of(values)) != _check_of(values):
        raise VdiffError(f"{place} is damaged: it is not what was written", PREPARE_AGAIN)
    return meta, shards


def describe(path: Path, noun: str, images: int | None = None) -> Shard:
    """A shard on disk with its SHA-256; its images, or sounds, are counted unless their number is given."""
    with opened(path) as file:
        if images is None:
            images = sum(1 for _ in read_samples(file, lambda _: False, noun=noun))
            file.seek(0)
        return Shard(path.name, images, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


class ShardWriter:
    """Writes `folder/name-000000.tar`, … and finally `folder/index.json`, which makes the folder a dataset.

    Shard k holds the images from position k · images_per_shard on, without the rejected ones. It is written under a
    hidden name and renamed when it is complete, so that an interrupted folder holds only complete shards, and a
    later writer continues after them. Equal images give equal bytes.

    Args:
        start: the position of the first image; a multiple of `images_per_shard`.

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
        # of an earlier writer's shards, only the names are known
        self._shards: list[Shard | Path] = list(self._tidy_up())
        self.num_committed = len(self._shards)
        if self._shards:
            start = (int(str(self._shards[-1])[:-4].rpartition("-")[2]) + 1) * images_per_shard
        if (folder / INDEX_FILE).exists():
            self.meta, _ = parse_index((folder / INDEX_FILE).read_bytes(), str(folder))
        self.position = self._begun_at = start
        self._waiting = 0
        self._tar: Any = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Drop the open shard."""
        if self._file is not None:
            for file in (self._tar, self._file):
                with contextlib.suppress(OSError):  # a full disk refuses the last bytes; the file is deleted
                    file.close()
            self._temporary.unlink(missing_ok=True)
            self._tar = self._file = None
            self.position, self._waiting = self._begun_at, 0

    @property
    def is_due(self) -> bool:
        """Whether the open shard is full."""
        return self.position - self._begun_at >= self.images_per_shard

    def add(
        self,
        images: Mapping[int, bytes],
        label: int | None,
        caption: str = "",
        shape: Sequence[int] = (),
        conditions: Mapping[int, bytes] = NO_CONDITIONS,
        piece: int = 0,
    ) -> int:
        """Append one image in all its sizes (`{size: encoded}`), its class and its captions; returns its position.

        Args:
            piece: of a sound that was cut. All pieces have the position of the first one, and are in its shard.
        """
        if set(images) != set(self.meta.sizes) or shape or conditions:
            raise ValueError(f"images of sizes {sorted(images)}; need {sorted(self.meta.sizes)}")
        if (label is not None) != bool(self.meta.class_names):
            raise ValueError(f"label {label} in a set with the classes {self.meta.class_names}")
        if not piece:
            self.skip()
        position = self.position - 1
        sample: dict[str, Any] = {suffix_of(self.meta, size): encoded for size, encoded in images.items()}
        if label is not None:
            sample[LABEL] = str(label).encode()
        if caption:
            sample[CAPTION] = caption.encode()
        with writing(self._path):
            if self._tar is None:
                if self.meta.complete or self._path.exists():
                    raise ValueError(f"{self._path} is written already")
                self._file = open(self._temporary, "wb")  # noqa: SIM115
                # time and user name would make equal images differ in bytes
                options = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
                self._tar = self._tar_writer(self._file, **options)
            self._tar.write({"__key__": f"{position:09d}{f'-{piece:05d}' if piece else ''}", **sample})
        self._waiting += 1
        return position

    def skip(self) -> None:
        """Skip a rejected image: later images keep their positions, whichever writer writes them."""
        if self.is_due:
            raise ValueError(f"the shard of position {self._begun_at} is full; commit it first")
        self.position += 1

    def commit(self) -> None:
        """Sync the open shard and rename it; without waiting images there is nothing to write."""
        if self._file is not None:
            with writing(self._path):
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self._path)
                fsync(self.folder)
            self._shards.append(describe(self._path, self.meta.noun, self._waiting))
            self.num_committed += 1
            self._tar = self._file = None
            self._waiting = 0
        self._begun_at = self.position

    def finish(self, counts: Mapping[str, object]) -> DatasetMeta:
        """Commit waiting images and write the index; an earlier writer's shards are read once, for their SHA-256."""
        self.commit()
        shards = [shard if isinstance(shard, Shard) else describe(shard, self.meta.noun) for shard in self._shards]
        fingerprint = fingerprint_of(shard.sha256 for shard in shards)
        self.meta = replace(self.meta, counts=counts, complete=True, fingerprint=fingerprint)
        write_index(self.folder, self.meta, shards)
        return self.meta

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}-{self._begun_at // self.images_per_shard:06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self._path.name}.tmp"

    def _tidy_up(self) -> list[Path]:
        """Remove unfinished files of a killed writer; returns the complete shards in order."""
        name = re.compile(rf"{re.escape(self.name)}-\d{{6,}}\.tar")
        paths = list(self.folder.iterdir())
        for path in paths:
            if path.name[:1] == "." and path.suffix == ".tmp" and name.fullmatch(path.name[1:-4]):
                path.unlink()
        return sorted((path for path in paths if name.fullmatch(path.name)), key=lambda path: (len(path.name), path))


class ShardStore(StoredImages):
    """Tar shards to read: a folder or a URL with an index, or local tars without one, as a path or a brace pattern.

    Tars without an index are scanned once, by their headers: their images must be square; a `cls` file beside each
    image is its class as a decimal number. `path` is the given place, as text without passwords. A store holds no open
    file, so it may be pickled and used across a fork.

    Raises:
        VdiffError: the dataset is missing, incomplete or of another version; a shard is missing or has another length;
            shards at a URL have no index; or webdataset is not installed.
    """

    shards: tuple[Shard, ...]

    def __init__(self, source: Path | str) -> None:
        require_webdataset()
        place = source.as_posix() if isinstance(source, Path) else source
        path = Path(place)
        self._base = ""
        self._suffixes: dict[int, tuple[str, ...]] = {}
        if scheme_of(place):
            self._open_url(place)
        elif path.is_dir() or not ("{" in place or place.endswith(".tar")):
            self._open_folder(path)
        elif not path.exists() and (path.with_suffix("") / INDEX_FILE).is_file():
            self._open_folder(path.with_suffix(""))  # `--out data/photos.tar` writes the folder data/photos
        else:
            self.path = place
            self.meta, self.shards, self._suffixes = scan_foreign(place)
        self._suffixes = self._suffixes or {size: (suffix_of(self.meta, size),) for size in self.meta.sizes}
        self._length = sum(shard.images for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def place(self, shard: Shard) -> str:
        """The path or URL of a shard."""
        if not scheme_of(self._base):
            return str(Path(self._base, shard.file))
        return _beside(self._base, shard.file)

    def samples(self, number: int, sizes: Sequence[int], skip: int = 0) -> Generator[StoredImage, None, None]:
        """The images of shard `number` in order, without the first `skip`.

        Raises:
            VdiffError: the shard cannot be read, is damaged (its checksum is known at its end), or lacks something.
        """
        shard = self.shards[number]
        place = self.place(shard)
        wanted = {LABEL, CAPTION, *(suffix for size in sizes for suffix in self._suffixes[size])}
        count, noun = skip, self.meta.noun
        # a shard that is read completely is checked against its checksum
        is_whole = bool(shard.sha256) and not skip and set(sizes) == set(self.meta.sizes)
        mode = "r|" if scheme_of(place) or is_whole else "r:"
        with opened(place, shard.bytes) as stream:
            file: Any = _Hashed(stream) if is_whole else stream
            for key, contents in read_samples(file, wanted.__contains__, noun=noun, mode=mode, skip=skip):
                where = f"{shown(place)}: {noun} {key}"
                encoded = {size: self._image(contents, size, where) for size in sizes}
                yield StoredImage(key, encoded, self._label(contents, where), self._caption(contents, where))
                count += 1
            if count != shard.images:
                raise damaged(shown(place), f"{count} {noun}s, not {shard.images}")
            if is_whole and file.sha256() != shard.sha256:
                raise damaged(shown(place), "its checksum does not match")

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The dataset in pieces that different processes may read: the images of each shard."""
        start = 0
        for shard in self.shards:
            yield start, start + shard.images
            start += shard.images

    def stretch(self, start: int, stop: int) -> Iterator[StoredImage]:
        """The images `start` … `stop` − 1, counted through all shards."""
        for number, (first, end) in enumerate(self.stretches()):
            if first < stop and start < end:
                with contextlib.closing(self.samples(number, self.meta.sizes, max(start - first, 0))) as samples:
                    yield from islice(samples, min(stop, end) - max(start, first))

    def fingerprint(self) -> str:
        """The value of `meta.fingerprint` if no shard was changed; reads all shards."""
        digests = []
        for shard in self.shards:
            with opened(self.place(shard), shard.bytes) as file:
                digests.append(_Hashed(file).sha256())
        return fingerprint_of(digests)

    def _image(self, contents: Mapping[str, bytes | None], size: int, where: str) -> bytes:
        for suffix in self._suffixes[size]:
            if (encoded := contents.get(suffix)) is not None:
                return encoded
        raise VdiffError(f"{where} has no size {size}", COPY_AGAIN)

    def _label(self, contents: Mapping[str, bytes | None], where: str) -> int | None:
        if not self.meta.class_names:
            return None
        if (label := _class_in(contents.get(LABEL) or b"", len(self.meta.class_names))) is None:
            raise VdiffError(f"{where} has no class, or an unknown one", COPY_AGAIN)
        return label

    def _caption(self, contents: Mapping[str, bytes | None], where: str) -> str:
        if not self.meta.num_captions:
            return ""
        try:
            return clean_caption((contents.get(CAPTION) or b"").decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise VdiffError(f"{where} has a caption that is not UTF-8", COPY_AGAIN) from None

    def _open_folder(self, folder: Path) -> None:
        if folder.name == INDEX_FILE:
            folder = folder.parent
        self.path, self._base = folder.as_posix(), str(folder)
        index = folder / INDEX_FILE
        try:
            text = read_text(index)
        except FileNotFoundError:
            if not folder.exists() and not partial_folder(folder).exists():
                raise VdiffError(f"{folder}: no such dataset", "give what prepare_data.py wrote (--data)") from None
            raise incomplete(folder) from None
        except (OSError, ValueError) as error:
            raise VdiffError(f"{index} cannot be read: {error}", COPY_AGAIN) from None
        self.meta, self.shards = parse_index(text, str(index))
        for shard in self.shards:
            path = folder / shard.file
            if not path.is_file():
                raise VdiffError(f"{path} is missing", COPY_AGAIN)
            if path.stat().st_size != shard.bytes:
                raise damaged(path, f"it has {path.stat().st_size} bytes, not {shard.bytes}")

    def _open_url(self, url: str) -> None:
        check_place(url)
        parts = urlsplit(url)
        if "{" in parts.path or parts.path.endswith(".tar"):
            raise VdiffError(
                f"{shown(url)} has no index of its contents",
                f"put the {INDEX_FILE} of the dataset beside the shards, and give the URL of their folder",
            )
        self._base = urlunsplit(parts._replace(path=parts.path.removesuffix(INDEX_FILE).rstrip("/"), fragment=""))
        self.path = shown(self._base)
        index = _beside(self._base, INDEX_FILE)
        with opened(index) as file:
            file.check_server()
            text = b"".join(islice(iter(lambda: file.read(BUFFER_BYTES), b""), MAX_TEXT_BYTES // BUFFER_BYTES))
        self.meta, self.shards = parse_index(text, shown(index))


def _beside(base: str, name: str) -> str:
    """The URL of a file in the folder `base`; a query, such as a token, applies to every file there."""
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path}/{quote(name) if parts.scheme in ('http', 'https') else name}"))


def _files_of_dataset(folder: Path) -> str:
    """Datasets of both kinds, even damaged ones; an LMDB is recognised by its description."""
    if (index := folder / INDEX_FILE).is_file():
        return "|".join([*(re.escape(shard.file) for shard in parse_index(index.read_bytes(), "")[1]), OTHER_FILES])
    with open(folder / DATA_FILE, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return LMDB_FILES if data.find(MARK_OF_META) >= 0 else ""


DATASET = Kind("dataset", _files_of_dataset)


class _Hashed:
    """A file that is read once from its beginning, with the SHA-256 of the bytes read."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        data: bytes = self._file.read(size)
        self._hash.update(data)
        return data

    def sha256(self) -> str:
        """The SHA-256 (hex) of the whole file; reads the rest."""
        while self.read(BUFFER_BYTES):
            pass
        return self._hash.hexdigest()


def _class_in(text: bytes, limit: int) -> int | None:
    """The decimal number below `limit` in `text`; None if there is none."""
    digits = text.strip()
    is_number = digits.isdigit() and len(digits) < 100  # Python refuses to convert thousands of digits
    return label if is_number and (label := int(digits)) < limit else None


def scan_foreign(pattern: str) -> tuple[DatasetMeta, tuple[Shard, ...], dict[int, tuple[str, ...]]]:
    """The contents of another program's tars: a description, the shards with images, the suffixes by size."""
    import PIL.Image
    from braceexpand import braceexpand

    try:
        paths = [Path(place) for place in braceexpand(pattern, escape=False)]
    except ValueError as error:
        raise VdiffError(f"{pattern} is not a pattern: {error}", "write it as x-{000000..000009}.tar") from None
    shards: list[Shard] = []
    sizes: dict[str, tuple[int, int]] = {}  # the width and height of the first image of each suffix
    modes: set[str] = set()
    labels: list[int] = []
    num_captions = 0
    for path in paths:
        count = 0
        with opened(path) as file:
            for key, contents in read_samples(
                file, lambda name: name in (LABEL, CAPTION) or (is_image(name) and name not in sizes)
            ):
                count += 1
                num_captions += bool((contents.pop(CAPTION, None) or b"").strip())
                if (text := contents.pop(LABEL, None)) is not None:
                    if (label := _class_in(text, MAX_CLASSES)) is None:
                        raise VdiffError(f"{path}: the class of {key} is not a number below {MAX_CLASSES}", PREPARE)
                    labels.append(label)
                for suffix, content in contents.items():
                    if content is not None:
                        try:
                            with PIL.Image.open(io.BytesIO(content)) as image:
                                sizes[suffix] = image.size
                                modes.add(image.mode)
                        except OSError:
                            raise VdiffError(f"{path}: {key}.{suffix} is not an image", PREPARE) from None
        shards += [Shard(str(path), count, path.stat().st_size)] if count else []
    num_images = sum(shard.images for shard in shards)
    suffixes: dict[int, tuple[str, ...]] = {}
    for suffix in sorted(sizes, key=lambda suffix: (suffix.count("."), suffix)):
        width, height = sizes[suffix]
        if width == height:
            suffixes[width] = (*suffixes.get(width, ()), suffix)
    if not suffixes:
        if not sizes and any(map(_has_sounds, paths)):
            make = shell("python", "prepare_data.py", pattern, "--kind", "audio")
            raise VdiffError(f"{pattern} holds sounds of any rate and length", f"make a dataset of them: {make}")
        found = next((f"its first is {width}×{height}" for width, height in sizes.values()), "it has no images")
        raise VdiffError(f"{pattern} holds no square images: {found}", PREPARE)
    if len(labels) not in (0, num_images):
        raise VdiffError(f"{pattern}: {num_images - len(labels)} of {num_images} images have no class", PREPARE)
    meta = DatasetMeta(
        name=paths[0].stem,
        sizes=tuple(sorted(suffixes)),
        channels=1 if modes <= {"1", "L"} else 3,
        class_names=tuple(map(str, range(max(labels, default=-1) + 1))),
        counts={"images": num_images, **({"captions": num_captions} if num_captions else {})},
        complete=True,
    )
    return meta, tuple(shards), suffixes


def _has_sounds(path: Path) -> bool:
    with opened(path) as file:
        return any(read_samples(file, lambda _: False, noun="sound"))
