"""Datasets of both kinds, LMDB and tar shards: open, describe, verify, show and merge them."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageOps

from vdiff.data.audio import decode_sound
from vdiff.data.shards import DATASET, ShardStore, fingerprint_of, write_index
from vdiff.data.store import (
    FIRST_LINK,
    INDEX_FILE,
    REJECTED_FILE,
    DatasetMeta,
    ImageStore,
    StoreWriter,
    digest_of,
    next_link,
)
from vdiff.data.workers import ordered_map
from vdiff.errors import OptionError, VdiffError, printable
from vdiff.files import write_whole
from vdiff.replacing import new_folder
from vdiff.reporting import Reporter, Silent
from vdiff.text import cause_of

# the workers of a verification import this file without torch
if TYPE_CHECKING:
    from torch import Tensor

AnyStore = ImageStore | ShardStore
T = TypeVar("T")

COUNTED = ("skipped", "converted")
SHOWN_PROBLEMS = 20
SHOWN_CAPTIONS = 10
SHEET_IMAGES = 2_000  # most images of tar shards to read for a contact sheet


def open_dataset(place: Path | str) -> AnyStore:
    """The dataset at a path or URL: an LMDB folder, a folder of tar shards, or a pattern of tars.

    Raises:
        VdiffError: the dataset is missing or incomplete.
    """
    text, path = str(place), Path(place)
    if "://" in text or "{" in text or path.suffix in (".tar", ".json") or (path / INDEX_FILE).is_file():
        return ShardStore(text)
    return ImageStore(path)


def open_at_size(place: Path | str, image_size: int | None, *, buckets: bool = False) -> tuple[AnyStore, int]:
    """The dataset at a path or URL, and the size of its images: its only size, or the chosen one.

    Raises:
        VdiffError: the dataset is missing or incomplete, or has no images (of that size).
        OptionError: it has several sizes and none was chosen.
    """
    store = open_dataset(place)
    sizes = store.meta.sizes
    if image_size is None and len(sizes) > 1:
        raise OptionError(f"{store.path} has the sizes {', '.join(map(str, sizes))}", "choose one with --image_size")
    size = image_size or sizes[0]
    _check_images(store, size)
    if not buckets:
        store.check_squares()
    return store, size


def _check_images(store: AnyStore, size: int) -> None:
    store.check_size(size)
    if not len(store):
        raise VdiffError(f"{store.path} holds no {store.meta.noun}s", "prepare it again")


def facts(dataset: AnyStore) -> dict[str, Any]:
    """A dataset's description as plain values; `classes` counts images if that is fast (LMDB)."""
    meta = asdict(dataset.meta)
    values: dict[str, Any] = {"path": str(dataset.path), "images": len(dataset), **meta}
    if isinstance(dataset, ShardStore):
        return {**values, "format": "tar shards", "bytes": dataset.num_bytes, "shards": len(dataset.shards)}
    counts = Counter(dataset.label(index) for index in range(len(dataset))) if meta["class_names"] else Counter()
    return {
        **values,
        "format": "lmdb",
        "bytes": sum(file.stat().st_size for file in dataset.path.iterdir()),
        "classes": {name: counts[number] for number, name in enumerate(meta["class_names"])},
    }


@dataclass(frozen=True)
class Verification:
    """The result of `verify`: the first 20 `problems`, and the number of decoded images, `checked`.

    `fingerprint` is "equal", "unequal", or "none" in a dataset that another program wrote.
    """

    path: str
    checked: int
    num_problems: int
    problems: tuple[str, ...]
    fingerprint: str

    @property
    def is_good(self) -> bool:
        """Whether the dataset is unchanged."""
        return not self.num_problems and self.fingerprint != "unequal"


def verify(dataset: AnyStore, *, num_workers: int = 0, reporter: Reporter | None = None) -> Verification:
    """Decode every image in every size, and compare the checksums with those of the description."""
    link, checked, num_problems, total = FIRST_LINK, 0, 0, len(dataset)
    problems: list[str] = []
    stretches = list(dataset.stretches())
    count = len(stretches) if isinstance(dataset, ImageStore) else math.inf  # shards are few and large
    with (reporter or Silent()).progress("verify", total, f"{dataset.meta.noun}s") as progress:
        for digests, found in ordered_map(partial(_check, dataset), stretches, num_workers, num_items=count):
            for digest in digests:
                link = next_link(link, digest)
            checked += len(digests)
            num_problems += len(found)
            problems += found[: SHOWN_PROBLEMS - len(problems)]
            progress.update(checked, f"{num_problems} problems" if num_problems else "")
    if checked != total:
        num_problems += 1
        problems.append(f"{checked} {dataset.meta.noun}s, not {total}")
    recorded = dataset.meta.fingerprint
    actual = link.hex() if isinstance(dataset, ImageStore) else dataset.fingerprint()
    state = "none" if not recorded else "equal" if recorded == actual else "unequal"
    return Verification(str(dataset.path), checked, num_problems, tuple(problems), state)


def _check(dataset: AnyStore, stretch: tuple[int, int]) -> tuple[list[bytes], list[str]]:
    """Decode a stretch of a dataset; returns each image's digest, and the problems."""
    digests: list[bytes] = []
    problems: list[str] = []
    start, stop = stretch
    while start + len(digests) < stop:
        try:
            for name, images, label, caption, shape, conditions in dataset.stretch(start + len(digests), stop):
                digests.append(digest_of(images, label, caption, shape, conditions))
                for what, files in ((dataset.meta.noun, images), ("condition", conditions)):
                    for size, encoded in files.items():
                        if problem := _problem(dataset, encoded, shape[-2:] or dataset.meta.shape(size)[1:]):
                            problems.append(f"{what} {name}, size {size}: {problem}")
            break
        except VdiffError as error:
            problems.append(error.cause)
            if not isinstance(dataset, ImageStore):
                break
            digests.append(b"")  # later images can be read
    return digests, problems


def _problem(dataset: AnyStore, encoded: bytes, shape: Sequence[int]) -> str:
    """The problem of an encoded image or sound; empty if it has none."""
    meta = dataset.meta
    try:
        if meta.rate:
            decode_sound(encoded, meta.channels, shape[0], meta.rate, "it")
            return ""
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            image.load()
            return "" if image.size == (shape[1], shape[0]) else f"it is {image.width}×{image.height}"
    except Exception as error:  # decoders raise many types for damaged data
        return cause_of(error)


def sheet(dataset: AnyStore, *, size: int | None = None, columns: int = 10, max_rows: int = 20) -> PIL.Image.Image:
    """A contact sheet: a row for each class (evenly chosen if there are too many), or rows without names.

    Images are evenly spread over their class, or over the whole set; of tar shards, over the first images. A condition
    image is shown on the left of its image.

    Raises:
        VdiffError: the dataset has no such size, or no images.
    """
    import torch

    from vdiff.data.images import captioned_grid, labelled_grid
    from vdiff.models.codec import from_uint8

    def tensor(encoded: bytes) -> Tensor:
        if dataset.meta.buckets:
            with PIL.Image.open(io.BytesIO(encoded)) as image:
                padded = PIL.ImageOps.pad(image.convert("RGB" if channels == 3 else "L"), (side, side), color="white")
            return from_uint8(torch.from_numpy(np.array(padded)).reshape(side, side, channels).permute(2, 0, 1))
        return meta.codec.pictures(_decoded(dataset, encoded, side)[None])[0]

    meta, side = dataset.meta, size or dataset.meta.sizes[-1]
    channels = meta.channels
    titles, read = _shown(dataset, side, columns, max_rows)
    found = [[(torch.cat([tensor(file) for file in files], -1), caption) for files, caption in row] for row in read]
    blank = torch.ones_like(next(image for row in found for image, _ in row)), ""
    cells = [row + [blank] * (columns - len(row)) for row in found]
    title = printable(f"{meta.name}: {len(dataset):,} {meta.noun}s of {side} {'samples' if meta.rate else 'pixels'}")
    if meta.num_captions:
        images, captions = zip(*(cell for row in cells for cell in row), strict=True)
        words = [printable(caption.partition("\n")[0]) for caption in captions]
        return labelled_grid(torch.stack(images), words, columns, title=title)
    return captioned_grid([[image for image, _ in row] for row in cells], [""] * columns, titles, title)


def write_players(dataset: AnyStore, out: Path, *, columns: int = 10, max_rows: int = 20) -> None:
    """Write a page on which the sounds of `sheet` are played."""
    from vdiff.data.sound_page import write_page

    meta, side = dataset.meta, dataset.meta.sizes[-1]
    titles, read = _shown(dataset, side, columns, max_rows)
    rows = [
        (title, [(printable(caption), _decoded(dataset, files[0], side)) for files, caption in row])
        for title, row in zip(titles or [""] * len(read), read, strict=True)
    ]
    title = printable(f"{meta.name}: {len(dataset):,} sounds of {side:,} samples")
    write_page(out, title, [], rows, meta.rate)


def _decoded(dataset: AnyStore, encoded: bytes, side: int) -> Tensor:
    """A stored sample as x (C, …)."""
    import torch

    from vdiff.data.batches import decode_stored

    sides = dataset.meta.shape(side)[1:]
    found = decode_stored(dataset, encoded, sides, f"{dataset.meta.noun} of {dataset.path}")
    return dataset.meta.codec.encode(torch.from_numpy(np.array(found)))


def _shown(
    dataset: AnyStore, side: int, columns: int, max_rows: int
) -> tuple[list[str] | None, list[list[tuple[list[bytes], str]]]]:
    """The titles of the rows of a contact sheet (None: no classes), and rows of files of a sample and its caption."""
    _check_images(dataset, side)
    names, titles = dataset.meta.class_names, None
    of_class: dict[int | None, list[Callable[[], tuple[list[bytes], str]]]] = {}
    if isinstance(dataset, ImageStore):

        def stored(index: int) -> tuple[list[bytes], str]:
            conditions = [dataset.condition(side, index)] if dataset.meta.has_conditions else []
            return [*conditions, dataset.encoded(side, index)], dataset.caption(index)

        for index in range(len(dataset)):
            of_class.setdefault(dataset.label(index), []).append(partial(stored, index))
    else:
        for image in islice(dataset.stretch(0, len(dataset)), SHEET_IMAGES):
            cell = ([image.images[side]], image.caption)
            of_class.setdefault(image.label, []).append(partial(lambda cell: cell, cell))
    if names:
        shown = [names.index(name) for name in _spread(names, max_rows)]
        rows = [_spread(of_class.get(label, []), columns) for label in shown]
        titles = [printable(f"{names[label]} ({len(of_class.get(label, []))})") for label in shown]
    else:
        chosen = _spread(of_class[None], columns * max_rows)
        rows = [chosen[start : start + columns] for start in range(0, len(chosen), columns)]
    return titles, [[get() for get in row] for row in rows]


def some_captions(dataset: AnyStore, count: int) -> list[tuple[str, str]]:
    """The name and the first caption of some images that have one: spread over the dataset, of tars the first."""
    if not dataset.meta.num_captions:
        return []
    if isinstance(dataset, ImageStore):
        named = ((str(index), dataset.caption(index)) for index in _spread(range(len(dataset)), SHEET_IMAGES))
    else:
        named = ((image.name, image.caption) for image in islice(dataset.stretch(0, len(dataset)), SHEET_IMAGES))
    return _spread([(name, caption.partition("\n")[0]) for name, caption in named if caption], count)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[len(items) * k // count] for k in range(count)]


def merge(
    paths: Sequence[Path], out: Path, *, overwrite: bool = False, reporter: Reporter | None = None
) -> DatasetMeta:
    """Merge all parts 1/n … n/n of one preparation, in any order, into the folder `out`.

    The result equals that of one run over all images, byte for byte; tar shards are linked or copied.

    Raises:
        VdiffError: a part is missing, given twice, incomplete or of another preparation; `out` exists; or the disk
            refuses.
    """
    parts = in_order([open_dataset(path) for path in paths])
    whole = replace(parts[0].meta, shard="", counts={}, fingerprint="")
    counts = {key: sum((Counter(part.meta.counts[key]) for part in parts), Counter[str]()) for key in COUNTED}
    sums: dict[str, Any] = {key: dict(sorted(joined.items())) for key, joined in counts.items()}
    if captions := sum(part.meta.num_captions for part in parts):
        sums["captions"] = captions
    if parts[0].meta.buckets:
        found = sum((Counter(part.meta.counts["buckets"]) for part in parts), Counter[str]())
        sums["buckets"] = dict(sorted(found.items()))
    # every part listed all files, so the ignored ones are the same in all
    sums |= {"images": sum(part.meta.counts["images"] for part in parts), "ignored": parts[0].meta.counts["ignored"]}
    with new_folder(out, DATASET, overwrite=overwrite) as folder:
        if stores := [part for part in parts if isinstance(part, ImageStore)]:
            meta = _join_stores(stores, folder, whole, sums, reporter or Silent())
        else:
            meta = join_shards([part for part in parts if isinstance(part, ShardStore)], folder, whole, sums)
        if rejected := [path for part in parts if (path := Path(part.path) / REJECTED_FILE).exists()]:
            text = b"".join(path.read_bytes() for path in rejected)
            write_whole(folder / REJECTED_FILE, lambda target: target.write_bytes(text))
    return meta


def in_order(parts: Sequence[AnyStore]) -> list[AnyStore]:
    """The parts 1/n … n/n. Raises VdiffError: they are not all parts of one preparation, each given once."""
    first = parts[0]
    count = first.meta.shard.partition("/")[2]
    of_number: dict[int, AnyStore] = {}
    for part in parts:
        number, _, of = part.meta.shard.partition("/")
        if not number:
            raise VdiffError(f"{part.path} is not a part of a dataset", "give folders that --shard i/n prepared")
        if (part.meta.origin, type(part)) != (first.meta.origin, type(first)):
            raise VdiffError(
                f"{part.path} and {first.path} come from different {part.meta.noun}s or settings",
                "prepare all parts from the same source with the same options",
            )
        if of != count:
            raise VdiffError(f"{part.path} is part {part.meta.shard}, {first.path} one of {count}", "use one n in i/n")
        if (other := of_number.setdefault(int(number), part)) is not part:
            raise VdiffError(f"{part.path} and {other.path} are both part {number}", "give each once")
    if missing := [f"{number}/{count}" for number in range(1, int(count) + 1) if number not in of_number]:
        raise VdiffError(f"part {', '.join(missing)} is missing", f"prepare it with --shard {missing[0]}")
    return [of_number[number] for number in sorted(of_number)]


def _join_stores(
    parts: Sequence[ImageStore], folder: Path, meta: DatasetMeta, counts: dict[str, Any], reporter: Reporter
) -> DatasetMeta:
    writer = StoreWriter(folder, meta)
    with reporter.progress("merge", sum(map(len, parts)), f"{meta.noun}s") as progress:
        for part in parts:
            for _, images, label, caption, shape, conditions in part.stretch(0, len(part)):
                writer.add(images, label, caption, shape, conditions)
                if writer.is_due:
                    writer.commit()
                    progress.update(writer.length)
            part.close()
        progress.update(writer.length)
    return writer.finish(counts)


def join_shards(
    parts: Sequence[ShardStore], folder: Path, meta: DatasetMeta, counts: Mapping[str, object]
) -> DatasetMeta:
    """Link (or copy, across disks) the shards of parts in order into `folder` and write their common index.

    Raises:
        VdiffError: two parts have a shard of the same name; the disk refuses.
    """
    shards = [shard for part in parts for shard in part.shards]
    for part in parts:
        for shard in part.shards:
            source, target = Path(part.place(shard)), folder / shard.file
            if target.exists():
                raise VdiffError(f"{part.path} has a shard {shard.file}, and so has another part", "give each once")
            try:
                os.link(source, target)
            except OSError:
                write_whole(target, partial(shutil.copyfile, source))
    meta = replace(meta, counts=counts, complete=True, fingerprint=fingerprint_of(shard.sha256 for shard in shards))
    write_index(folder, meta, shards)
    return meta
