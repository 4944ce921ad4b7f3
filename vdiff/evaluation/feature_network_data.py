"""Two parts of a dataset: the images that a feature network is trained on, and those that are held out."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vdiff.data.batches import Batch, decode
from vdiff.data.datasets import AnyStore, open_batches, open_dataset
from vdiff.data.shard_batches import Sample
from vdiff.data.shard_store import ShardStore
from vdiff.data.store import ImageStore
from vdiff.errors import OptionError, VdiffError

HELD_OUT = 10
"""One image of so many is held out."""
MAX_MEASURED = 10_000
WINDOW_IMAGES = 512
# the first word of the random stream; batches and shards have the others
_SPLIT = 10


def held_out(count: int, *, seed: int, stretch: int) -> NDArray[np.bool_]:
    """(count,) which images of a stretch of the dataset are held out: count // 10 of them, drawn from the seed."""
    generator = np.random.default_rng([seed, _SPLIT, stretch])
    return generator.permutation(count) < count // HELD_OUT


class StorePart(ImageStore):
    """Some images of a dataset in LMDB, numbered from 0."""

    def __init__(self, whole: ImageStore, indices: NDArray[np.int64]) -> None:
        self.path, self.meta, self.whole, self.indices = whole.path, whole.meta, whole, indices
        self._file = None

    def __len__(self) -> int:
        return len(self.indices)

    def encoded(self, size: int, index: int) -> bytes:
        """The bytes of the image file `index` at `size`."""
        return self.whole.encoded(size, int(self.indices[index]))

    def label(self, index: int) -> int | None:
        """The class of image `index`, None in a dataset without classes."""
        return self.whole.label(int(self.indices[index]))


class ShardPart(ShardStore):
    """Some images of each tar shard of a dataset."""

    def __init__(self, whole: ShardStore, places: Sequence[NDArray[np.int64]]) -> None:
        self.__dict__ = copy.copy(whole.__dict__)
        kept = [number for number, inside in enumerate(places) if len(inside)]
        self.whole, self.numbers, self.places = whole, kept, [places[number] for number in kept]
        self.shards = tuple(replace(whole.shards[number], images=len(places[number])) for number in kept)
        self._length = sum(map(len, self.places))

    def samples(self, number: int, sizes: Sequence[int], skip: int = 0) -> Generator[Sample, None, None]:
        """(key, {size: encoded}, class) of the images of shard `number` in order, without the first `skip`."""
        places = self.places[number]
        if skip >= len(places):
            return
        first, wanted = int(places[skip]), set(places[skip:].tolist())
        with closing(self.whole.samples(self.numbers[number], sizes, first)) as samples:
            for place, sample in enumerate(samples, first):
                if place in wanted:
                    yield sample


def split(store: AnyStore, seed: int) -> tuple[AnyStore, AnyStore]:
    """The images to train on, and those held out: a tenth, drawn from the seed (in tar shards, of each shard).

    Raises:
        VdiffError: too few images to hold one out.
    """
    if isinstance(store, ShardStore):
        masks = [held_out(shard.images, seed=seed, stretch=k) for k, shard in enumerate(store.shards)]
        parts: tuple[AnyStore, AnyStore] = (
            ShardPart(store, [np.flatnonzero(~mask) for mask in masks]),
            ShardPart(store, [np.flatnonzero(mask) for mask in masks]),
        )
    else:
        mask = held_out(len(store), seed=seed, stretch=0)
        parts = StorePart(store, np.flatnonzero(~mask)), StorePart(store, np.flatnonzero(mask))
    if not len(parts[1]):
        raise VdiffError(
            f"{store.path} holds {len(store)} images, too few to hold some out",
            f"prepare a dataset of at least {HELD_OUT} images",
        )
    return parts


def open_sized(place: Path | str, image_size: int | None) -> tuple[AnyStore, int]:
    """The dataset at a path or URL, and the size of its images: the only one, or the one that is asked for.

    Raises:
        VdiffError: no such dataset, an incomplete one, or one without images (of that size).
        OptionError: it has several sizes and none was chosen.
    """
    store = open_dataset(place)
    sizes = store.meta.sizes
    if image_size is None and len(sizes) > 1:
        raise OptionError(f"{store.path} has the sizes {', '.join(map(str, sizes))}", "choose one with --image_size")
    size = image_size or sizes[0]
    store.check_size(size)
    if not len(store):
        raise VdiffError(f"{store.path} holds no images", "prepare it again")
    return store, size


def endless(
    part: AnyStore, *, image_size: int, batch_size: int, seed: int, num_workers: int
) -> Generator[Batch, None, None]:
    """Shuffled batches without end; closing the generator ends the workers."""
    options = {"window": WINDOW_IMAGES} if isinstance(part, ShardStore) else {}
    batches = open_batches(
        part,
        image_size=image_size,
        batch_size=batch_size,
        seed=seed,
        flip=False,
        num_workers=num_workers,
        **options,
    )
    return batches.start_at(0)


def in_order(part: AnyStore, *, image_size: int, batch_size: int, limit: int = MAX_MEASURED) -> Iterator[Batch]:
    """The images of a part once, in order, in batches: all of them, or about `limit`, spread over the part."""
    channels, labelled = part.meta.channels, bool(part.meta.class_names)
    samples = iter(_images(part, image_size, limit))
    while some := list(islice(samples, batch_size)):
        pixels = np.stack(
            [decode(encoded, channels, image_size, f"{part.path}: image {key}") for key, encoded, _ in some]
        )
        labels = torch.tensor([label or 0 for *_, label in some]) if labelled else None
        yield Batch(torch.from_numpy(pixels), labels)


def _images(part: AnyStore, image_size: int, limit: int) -> Iterator[tuple[str, bytes, int | None]]:
    """(name, encoded, class) of all images, or of about `limit`."""
    if isinstance(part, ShardStore):
        of_each = -(-limit // len(part.shards))
        for number in range(len(part.shards)):
            with closing(part.samples(number, (image_size,))) as samples:
                for key, encoded, label in islice(samples, of_each):
                    yield key, encoded[image_size], label
        return
    count = min(len(part), limit)
    for k in range(count):
        index = k * len(part) // count
        yield str(index), part.encoded(image_size, index), part.label(index)
