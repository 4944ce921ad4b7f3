"""Datasets of either kind behind one door: an LMDB folder, or tar shards."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

from vdiff.data.batches import Batch, ImageBatches
from vdiff.data.shard_batches import ShardBatches
from vdiff.data.shard_store import ShardStore
from vdiff.data.store import INDEX_FILE, ImageStore
from vdiff.errors import OptionError, VdiffError

AnyStore = ImageStore | ShardStore


class Batches(Protocol):
    """Endless batches whose order is a function of seed and step."""

    def start_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of optimiser steps `step`, `step` + 1, … without end."""


def open_dataset(place: Path | str) -> AnyStore:
    """The dataset at a path or URL: an LMDB folder, a folder of tar shards, or a pattern of tars.

    Raises:
        VdiffError: no such dataset, or one that is incomplete.
    """
    text, path = str(place), Path(place)
    if "://" in text or "{" in text or path.suffix in (".tar", ".json") or (path / INDEX_FILE).is_file():
        return ShardStore(text)
    return ImageStore(path)


def open_at_size(place: Path | str, image_size: int | None) -> tuple[AnyStore, int]:
    """The dataset at a path or URL, and the size of its images: its only one, or the one that is asked for.

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


def open_batches(store: AnyStore, **options: Any) -> Batches:
    """The batches of a dataset; the options are those of `ImageBatches`, which both kinds share."""
    return ImageBatches(store, **options) if isinstance(store, ImageStore) else ShardBatches(store, **options)
