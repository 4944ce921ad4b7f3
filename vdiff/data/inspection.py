"""Looking at a dataset: its facts, whether every image is what was written, a sheet to look at."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import PIL.Image

from vdiff.data.store import FIRST_LINK, ImageStore, digest_of, next_link
from vdiff.data.workers import ordered_map
from vdiff.errors import VdiffError, printable
from vdiff.reporting import Reporter, Silent
from vdiff.text import cause_of

# the workers of a verification import this file, and need no torch
if TYPE_CHECKING:
    from torch import Tensor

    from vdiff.data.datasets import AnyStore

Encoded = Callable[[], bytes]
T = TypeVar("T")

SHOWN_PROBLEMS = 20
SHARD_IMAGES = 2_000


def facts(dataset: AnyStore) -> dict[str, Any]:
    """What a dataset is and how it was made, as plain values; `classes` counts images where that is quick (LMDB)."""
    meta = asdict(dataset.meta)
    values: dict[str, Any] = {"path": str(dataset.path), "images": len(dataset), **meta}
    values["format"] = "lmdb" if isinstance(dataset, ImageStore) else "tar shards"
    if isinstance(dataset, ImageStore):
        values["bytes"] = sum(file.stat().st_size for file in dataset.path.iterdir())
        counts = Counter(dataset.label(index) for index in range(len(dataset))) if meta["class_names"] else Counter()
        values["classes"] = {name: counts[number] for number, name in enumerate(meta["class_names"])}
    else:
        values["bytes"] = dataset.num_bytes
        values["shards"] = len(dataset.shards)
    return values


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `problems` says what is wrong where (the first 20); `checked` images were decoded.

    `fingerprint` is "equal", "unequal", or "none" in a dataset that another program wrote.
    """

    path: str
    checked: int
    num_problems: int
    problems: tuple[str, ...]
    fingerprint: str

    @property
    def is_good(self) -> bool:
        """Whether everything is as it was written."""
        return not self.num_problems and self.fingerprint != "unequal"


def verify(dataset: AnyStore, *, num_workers: int = 0, reporter: Reporter | None = None) -> Verification:
    """Decode every image in every size, and compare the checksums with those of the description."""
    reporter = reporter or Silent()
    link, checked, num_problems = FIRST_LINK, 0, 0
    problems: list[str] = []
    stretches = list(dataset.stretches())
    count = len(stretches) if isinstance(dataset, ImageStore) else math.inf  # shards are few and large
    total = len(dataset)
    with reporter.progress("verify", total, "images") as progress:
        for digests, found in ordered_map(partial(_check, dataset), stretches, num_workers, num_items=count):
            for digest in digests:
                link = next_link(link, digest)
            checked += len(digests)
            num_problems += len(found)
            problems += found[: SHOWN_PROBLEMS - len(problems)]
            progress.update(checked, f"{num_problems} problems" if num_problems else "")
    if checked != total:
        num_problems += 1
        problems.append(f"{checked} images, not {total}")
    recorded = dataset.meta.fingerprint
    actual = link.hex() if isinstance(dataset, ImageStore) else dataset.fingerprint()
    state = "none" if not recorded else "equal" if recorded == actual else "unequal"
    return Verification(str(dataset.path), checked, num_problems, tuple(problems), state)


def _check(dataset: AnyStore, stretch: tuple[int, int]) -> tuple[list[bytes], list[str]]:
    """Decode a stretch of a dataset; answers each image's digest, and what is wrong."""
    digests: list[bytes] = []
    problems: list[str] = []
    start, stop = stretch
    while start + len(digests) < stop:
        try:
            for name, images, label in dataset.stretch(start + len(digests), stop):
                digests.append(digest_of(images, label))
                for size, encoded in images.items():
                    if problem := _problem(encoded, size):
                        problems.append(f"image {name}, size {size}: {problem}")
        except VdiffError as error:
            problems.append(error.cause)
            if isinstance(dataset, ImageStore):
                digests.append(b"")  # the images after it can be read
                continue
        break
    return digests, problems


def _problem(encoded: bytes, size: int) -> str:
    """What is wrong with an encoded image; nothing if it is whole."""
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            image.load()
            if image.size != (size, size):
                return f"it is {image.width}×{image.height}"
    except Exception as error:  # decoders raise whatever damaged data makes them stumble over
        return cause_of(error)
    return ""


def sheet(dataset: AnyStore, *, size: int | None = None, columns: int = 10, max_rows: int = 20) -> PIL.Image.Image:
    """A contact sheet: a row for each class (evenly chosen where there are more than rows), or rows without names.

    Images are evenly spread over their class, or over the whole set; of tar shards, over the first images.

    Raises:
        VdiffError: the dataset has no such size, or no images.
    """
    import torch

    from vdiff.data.images import captioned_grid

    size = size or dataset.meta.sizes[-1]
    dataset.check_size(size)
    if not len(dataset):
        raise VdiffError(f"{dataset.path} holds no images", "prepare it again")
    names = dataset.meta.class_names
    pool = _pool(dataset, size)
    if names:
        of_class: dict[int | None, list[Encoded]] = {}
        for label, encoded in pool:
            of_class.setdefault(label, []).append(encoded)
        shown = [names.index(name) for name in _spread(names, max_rows)]
        rows = [_spread(of_class.get(label, []), columns) for label in shown]
        titles = [printable(f"{names[label]} ({len(of_class.get(label, []))})") for label in shown]
    else:
        chosen = _spread([encoded for _, encoded in pool], columns * max_rows)
        rows = [chosen[start : start + columns] for start in range(0, len(chosen), columns)]
        titles = None
    blank = torch.ones(dataset.meta.channels, size, size)
    cells = [[_tensor(get(), dataset.meta.channels) for get in row] + [blank] * (columns - len(row)) for row in rows]
    title = printable(f"{dataset.meta.name}: {len(dataset):,} images of {size} pixels")
    return captioned_grid(cells, [""] * columns, titles, title)


def _pool(dataset: AnyStore, size: int) -> list[tuple[int | None, Encoded]]:
    """The classes of the images to choose from, and how to get each one's bytes."""
    if isinstance(dataset, ImageStore):
        return [(dataset.label(index), partial(dataset.encoded, size, index)) for index in range(len(dataset))]
    samples = (sample for stretch in dataset.stretches() for sample in dataset.stretch(*stretch))
    return [(label, partial(bytes, images[size])) for _, images, label in islice(samples, SHARD_IMAGES)]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[len(items) * k // count] for k in range(count)]


def _tensor(encoded: bytes, channels: int) -> Tensor:
    import torch

    from vdiff.models.codec import from_uint8

    with PIL.Image.open(io.BytesIO(encoded)) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB" if channels == 3 else "L")))
    return from_uint8(pixels.permute(2, 0, 1) if channels == 3 else pixels[None])
