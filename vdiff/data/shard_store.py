"""Opening tar shards: a folder or URL with an index, or other programs' tars."""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from vdiff.data.remote_files import BUFFER_BYTES, COPY_AGAIN, check_place, damaged, opened, scheme_of, shown
from vdiff.data.shards import LABEL, Shard, fingerprint_of, parse_index, suffix_of
from vdiff.data.store import DATA_FILE, INDEX_FILE, DatasetMeta, incomplete, partial_folder
from vdiff.data.tar_files import is_image, read_samples, require_webdataset
from vdiff.errors import VdiffError
from vdiff.files import MAX_TEXT_BYTES, read_text
from vdiff.replacing import Kind

PREPARE = "make a dataset of the tar: python prepare_data.py TAR"
MAX_CLASSES = 100_000
OTHER_FILES = r"index\.json|rejected\.jsonl"
LMDB_FILES = r"(data|lock)\.mdb|rejected\.jsonl|samples\.json"
MARK_OF_META = b'"vdiff_version": "'


class ShardStore:
    """Tar shards to read: a folder or a URL with an index, or local tars without one, as a path or a brace pattern.

    Tars without an index are scanned once, by their headers: their images must be squares, and a `cls` beside each
    image, if there is one, its class as a decimal number. `path` is what was given, as text without passwords. A store
    holds no open file, so it may be pickled and carried across a fork.

    Raises:
        VdiffError: no such dataset, an incomplete one, a shard that is missing or of another length, another version;
            shards at a URL without an index; webdataset is not installed.
    """

    meta: DatasetMeta
    shards: tuple[Shard, ...]

    def __init__(self, source: Path | str) -> None:
        require_webdataset()
        place = source.as_posix() if isinstance(source, Path) else source
        if scheme_of(place):
            check_place(place)
        self.path = shown(place)
        self._base = ""
        if scheme_of(place):
            self._open_url(place)
        elif not Path(place).is_dir() and ("{" in place or place.endswith(".tar")):
            folder = Path(place).with_suffix("")
            # `--out data/photos.tar` made the folder data/photos
            if not Path(place).exists() and (folder / INDEX_FILE).is_file():
                self._open_folder(folder)
            else:
                self.meta, self.shards, self._suffixes = scan_foreign(place)
        else:
            self._open_folder(Path(place))
        self._length = sum(shard.images for shard in self.shards)

    def __len__(self) -> int:
        return self._length

    @property
    def num_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def check_size(self, size: int) -> None:
        """Do nothing if the dataset has images of `size`.

        Raises:
            VdiffError: it has not; the hint names the sizes it has.
        """
        self.meta.check_size(size, self.path)

    def place(self, shard: Shard) -> str:
        """The path or URL of a shard."""
        if not scheme_of(self._base):
            return str(Path(self._base, shard.file))
        parts = urlsplit(self._base)  # a query, such as a token, is for every file there
        name = quote(shard.file) if parts.scheme in ("http", "https") else shard.file
        return urlunsplit(parts._replace(path=f"{parts.path}/{name}"))

    def samples(
        self, number: int, sizes: Sequence[int], skip: int = 0
    ) -> Generator[tuple[str, dict[int, bytes], int | None], None, None]:
        """(key, {size: encoded}, class) of the images of shard `number` in order, without the first `skip`.

        Raises:
            VdiffError: the shard cannot be read, is damaged (its checksum is known at its end), or lacks something.
        """
        shard = self.shards[number]
        place = self.place(shard)
        wanted = {LABEL, *(suffix for size in sizes for suffix in self._suffixes[size])}
        count = skip
        # what is read from beginning to end anyway is compared with its checksum
        is_whole = bool(shard.sha256) and not skip and set(sizes) == set(self.meta.sizes)
        mode = "r|" if scheme_of(place) or is_whole else "r:"
        with opened(place, shard.bytes) as stream:
            file: Any = _Hashed(stream) if is_whole else stream
            for key, contents in read_samples(file, wanted.__contains__, mode=mode, skip=skip):
                where = f"{shown(place)}: image {key}"
                yield key, {size: self._image(contents, size, where) for size in sizes}, self._label(contents, where)
                count += 1
            if count != shard.images:
                raise damaged(shown(place), f"{count} images, not {shard.images}")
            if is_whole and file.sha256() != shard.sha256:
                raise damaged(shown(place), "its checksum is another one")

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The dataset in pieces that may be read by different processes: the images of each shard."""
        start = 0
        for shard in self.shards:
            yield start, start + shard.images
            start += shard.images

    def stretch(self, start: int, stop: int) -> Iterator[tuple[str, dict[int, bytes], int | None]]:
        """Name, encoded images by size, and class of the images `start` … `stop` − 1, counted through all shards."""
        for number, (first, end) in enumerate(self.stretches()):
            if first < stop and start < end:
                with contextlib.closing(self.samples(number, self.meta.sizes, max(start - first, 0))) as samples:
                    yield from islice(samples, min(stop, end) - max(start, first))

    def fingerprint(self) -> str:
        """What `meta.fingerprint` is if every shard is what was written; reads them all."""
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

    def _open_folder(self, folder: Path) -> None:
        if folder.name == INDEX_FILE:
            folder = folder.parent
        self.path = folder.as_posix()
        self._base = str(folder)
        try:
            text = read_text(folder / INDEX_FILE)
        except FileNotFoundError:
            if not folder.exists() and not partial_folder(folder).exists():
                raise VdiffError(f"{folder}: no such dataset", "give what prepare_data.py wrote (--data)") from None
            raise incomplete(folder) from None
        except (OSError, ValueError) as error:
            raise VdiffError(f"{folder / INDEX_FILE} cannot be read: {error}", COPY_AGAIN) from None
        self._read_index(text, str(folder / INDEX_FILE))
        for shard in self.shards:
            path = folder / shard.file
            if not path.is_file():
                raise VdiffError(f"{path} is missing", COPY_AGAIN)
            if path.stat().st_size != shard.bytes:
                raise damaged(path, f"it has {path.stat().st_size} bytes, not {shard.bytes}")

    def _open_url(self, url: str) -> None:
        parts = urlsplit(url)
        if "{" in parts.path or parts.path.endswith(".tar"):
            raise VdiffError(
                f"{self.path} has no index to say what is in it",
                f"put the {INDEX_FILE} of the dataset beside the shards, and give the URL of their folder",
            )
        path = parts.path.removesuffix(INDEX_FILE).rstrip("/")
        self._base = urlunsplit(parts._replace(path=path, fragment=""))
        self.path = shown(self._base)
        index = self.place(Shard(INDEX_FILE, 0, 0))
        with opened(index) as file:
            text = b"".join(islice(iter(lambda: file.read(BUFFER_BYTES), b""), MAX_TEXT_BYTES // BUFFER_BYTES))
        self._read_index(text, shown(index))

    def _read_index(self, text: str | bytes, place: str) -> None:
        self.meta, self.shards = parse_index(text, place)
        self._suffixes = {size: (suffix_of(self.meta, size),) for size in self.meta.sizes}


def _files_of_dataset(folder: Path) -> str:
    """Both kinds, whole or damaged; an LMDB is recognised by the description in it."""
    if (index := folder / INDEX_FILE).is_file():
        return "|".join([*(re.escape(shard.file) for shard in parse_index(index.read_bytes(), "")[1]), OTHER_FILES])
    with open(folder / DATA_FILE, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return LMDB_FILES if data.find(MARK_OF_META) >= 0 else ""


DATASET = Kind("dataset", _files_of_dataset)


class _Hashed:
    """A file that is read once from its beginning, and the SHA-256 of what was read."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        data: bytes = self._file.read(size)
        self._hash.update(data)
        return data

    def sha256(self) -> str:
        """The SHA-256 (hex) of the whole file, of which the rest is read now."""
        while self.read(BUFFER_BYTES):
            pass
        return self._hash.hexdigest()


def _class_in(text: bytes, limit: int) -> int | None:
    """The decimal number below `limit` in `text`; None where there is no such number."""
    digits = text.strip()
    is_number = digits.isdigit() and len(digits) < 100  # Python refuses to convert thousands of digits
    return label if is_number and (label := int(digits)) < limit else None


def scan_foreign(pattern: str) -> tuple[DatasetMeta, tuple[Shard, ...], dict[int, tuple[str, ...]]]:
    """What is in tars that another program wrote: a description, the shards that hold images, the suffixes by size."""
    import PIL.Image
    from braceexpand import braceexpand

    try:
        paths = [Path(place) for place in braceexpand(pattern, escape=False)]
    except ValueError as error:
        raise VdiffError(f"{pattern} is no pattern: {error}", "write it as x-{000000..000009}.tar") from None
    shards: list[Shard] = []
    sizes: dict[str, tuple[int, int]] = {}  # the width and height of the first image of each suffix
    modes: set[str] = set()
    labels: list[int] = []
    num_images = 0

    def is_wanted(suffix: str) -> bool:
        return suffix == LABEL or (is_image(suffix) and suffix not in sizes)

    for path in paths:
        before = num_images
        with opened(path) as file:
            for key, contents in read_samples(file, is_wanted):
                num_images += 1
                if (text := contents.pop(LABEL, None)) is not None:
                    if (label := _class_in(text, MAX_CLASSES)) is None:
                        raise VdiffError(f"{path}: the class of {key} is no number below {MAX_CLASSES}", PREPARE)
                    labels.append(label)
                for suffix, content in contents.items():
                    if content is not None:
                        try:
                            with PIL.Image.open(io.BytesIO(content)) as image:
                                sizes[suffix] = image.size
                                modes.add(image.mode)
                        except OSError:
                            raise VdiffError(f"{path}: {key}.{suffix} is no image", PREPARE) from None
        if num_images > before:
            shards.append(Shard(str(path), num_images - before, path.stat().st_size))
    suffixes: dict[int, tuple[str, ...]] = {}
    for suffix in sorted(sizes, key=lambda suffix: (suffix.count("."), suffix)):
        width, height = sizes[suffix]
        if width == height:
            suffixes[width] = (*suffixes.get(width, ()), suffix)
    if not suffixes:
        found = next((f"its first is {width}×{height}" for width, height in sizes.values()), "it has no images")
        raise VdiffError(f"{pattern} holds no square images: {found}", PREPARE)
    if len(labels) not in (0, num_images):
        raise VdiffError(f"{pattern}: {num_images - len(labels)} of {num_images} images have no class", PREPARE)
    meta = DatasetMeta(
        name=paths[0].stem,
        sizes=tuple(sorted(suffixes)),
        channels=1 if modes <= {"1", "L"} else 3,
        class_names=tuple(map(str, range(max(labels, default=-1) + 1))),
        counts={"images": num_images},
        complete=True,
    )
    return meta, tuple(shards), suffixes
