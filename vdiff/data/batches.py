"""Batches for training: the batch of an optimiser step is a pure function of seed and step."""

from __future__ import annotations

import atexit
import io
import math
import shutil
import signal
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vdiff.data.pixel_cache import PixelCache, cache_limit
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError
from vdiff.reporting import Reporter, Silent

SHARED_MEMORY = Path("/dev/shm")
# the first word of each random stream, so that order and flips never share numbers
_ORDER, _FLIPS = 0, 1
PREFETCH = 2  # batches that each worker is asked for in advance
# slot of the ring, indices, flips
_Request = tuple[int, np.ndarray, np.ndarray]
_PREPARE_AGAIN = "prepare the images again with prepare_data.py"


@dataclass(frozen=True)
class Batch:
    """`images`: (B, C, H, W) uint8 on the CPU, mirrored where the plan says so; `classes`: (B,) int64, or None.

    Whoever trains moves the bytes first and applies `from_uint8` there: a quarter of the traffic.
    """

    images: Tensor
    classes: Tensor | None


class BatchPlan:
    """Which images make up each batch, and which of them are mirrored: pure functions of seed and step.

    Position p = step · batch_size + i of the endless stream is image `permutation(seed, p // n)[p % n]`: every epoch
    shows each of the n images once, and batches run across the borders of epochs. Flips depend on (seed, step, i).
    """

    def __init__(self, *, length: int, batch_size: int, seed: int, flip: bool) -> None:
        if length < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"length {length}, batch_size {batch_size}, seed {seed}; need length >= 1, batch_size >= 1, seed >= 0"
            )
        self.length, self.batch_size, self.seed, self.flip = length, batch_size, seed, flip
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> np.ndarray:
        """(B,) int64: the images of batch `step`."""
        first, left = step * self.batch_size, self.batch_size
        parts = []
        while left:
            epoch, offset = divmod(first, self.length)
            part = self.permutation(epoch)[offset : offset + left]
            parts.append(part)
            first, left = first + len(part), left - len(part)
        return np.concatenate(parts)

    def flips(self, step: int) -> np.ndarray:
        """(B,) bool: which images of batch `step` are mirrored."""
        if not self.flip:
            return np.zeros(self.batch_size, bool)
        return _generator(self.seed, _FLIPS, step).integers(0, 2, self.batch_size).astype(bool)

    def permutation(self, epoch: int) -> np.ndarray:
        """(n,) int64: the order of epoch `epoch`."""
        if epoch != self._epoch:
            self._permutation = _generator(self.seed, _ORDER, epoch).permutation(self.length)
            self._epoch = epoch
        return self._permutation


def _generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, counter])))


def decode(encoded: bytes, channels: int, size: int, where: str) -> np.ndarray:
    """The pixels of an image file: (C, size, size) uint8, C = `channels` 1 or 3, read-only; `where` names it in errors.

    Raises:
        VdiffError: no image, a damaged one, or one of another size.
    """
    mode = "RGB" if channels == 3 else "L"
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            # an image that has the mode already would only be copied
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # decoders raise whatever their format makes them stumble over
        raise VdiffError(f"{where} cannot be decoded: {error}", _PREPARE_AGAIN) from None
    if (width, height) != (size, size):
        raise VdiffError(f"{where} is {width}×{height}, not {size}×{size}", _PREPARE_AGAIN)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def answers_of(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """What a loader answers; closing the generator ends its workers.

    They are not left to the garbage collector: an error's traceback may keep them alive to the very end.
    """
    answers = iter(loader)
    try:
        yield from answers
    finally:
        if loader.num_workers:
            answers._shutdown_workers()  # type: ignore[attr-defined]


def closed_at_exit(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """`batches`, but left open they are closed before the interpreter waits, forever, for workers deaf to SIGTERM."""

    def close() -> None:
        if (found := reference()) is not None:
            found.close()

    reference = weakref.ref(batches, lambda _: atexit.unregister(close))
    atexit.register(close)
    return batches


def workers_with_room(num_workers: int, num_bytes: int, reporter: Reporter | None) -> int:
    """`num_workers`, or 0, and a line, where shared memory, by which their images travel, has not `num_bytes` free."""
    if not num_workers or not SHARED_MEMORY.is_dir() or (free := shutil.disk_usage(SHARED_MEMORY).free) >= num_bytes:
        return num_workers
    (reporter or Silent()).line(
        f"shared memory: {free / 2**20:.0f} of {num_bytes / 2**20:.0f} MiB free, so this process decodes images, "
        "as with --num_workers 0; docker: --shm-size"
    )
    return 0


@contextmanager
def shared_memory_named() -> Iterator[None]:
    """Say in one line that others filled the shared memory meanwhile."""
    try:
        yield
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise VdiffError("shared memory is full", "give --num_workers 0, or docker run a larger --shm-size") from None


def share_of(batch_size: int, rank: int, world_size: int) -> slice:
    """The images of a global batch that process `rank` of `world_size` takes.

    Raises:
        VdiffError: the batch cannot be shared equally.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} processes; need 0 <= rank < world_size")
    if batch_size % world_size:
        raise VdiffError(
            f"a batch of {batch_size} cannot be shared equally by {world_size} processes",
            f"give --batch_size a multiple of {world_size}",
        )
    size = batch_size // world_size
    return slice(rank * size, (rank + 1) * size)


class ImageBatches:
    """Endless batches from a dataset; process `rank` of `world_size` gets its equal part of each global batch.

    Images are decoded when they are first needed, by `num_workers` processes (0 = in this one), and kept in up to
    `cache_bytes` of memory (default: a quarter of what is available, shared by the `world_size` processes; 0 = none).
    Once every image is there the workers end. Neither changes a batch by a bit, nor touches the global random
    generators. `pin_memory` puts images and classes into page-locked memory, for copies to a GPU. Where shared memory
    has no room for what workers decode, this process decodes, and `reporter` is told.

    Raises:
        VdiffError: the dataset lacks `image_size`, or the batch cannot be shared equally.
    """

    def __init__(
        self,
        store: ImageStore,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        flip: bool,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cache_bytes: int | None = None,
        pin_memory: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        store.check_size(image_size)
        self._share = share_of(batch_size, rank, world_size)
        self.plan = BatchPlan(length=len(store), batch_size=batch_size, seed=seed, flip=flip)
        self.pin_memory = pin_memory
        share = self._share.stop - self._share.start
        self._store, self._shape = store, (share, store.meta.channels, image_size, image_size)
        limit = cache_limit() // world_size if cache_bytes is None else cache_bytes
        self._cache = PixelCache(store, self._shape[1:], limit)
        # a loader asks for so many batches in advance, and for one more before it hands out the first of them
        ring_bytes = (PREFETCH * num_workers + 1) * math.prod(self._shape) * world_size
        self.num_workers = 0 if self._cache.is_small else workers_with_room(num_workers, ring_bytes, reporter)

    def start_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of optimiser steps `step`, `step` + 1, … without end; closing the generator ends the workers.

        Raises:
            VdiffError: (from the generator) an image is missing, damaged or of another size.
        """
        return closed_at_exit(self._batches(step))

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        if not self._cache.complete:
            step = yield from self._decoded(step)
        nothing = torch.empty(0)
        for later in count(step):
            yield self._assembled(self._wanted(later), nothing)

    def _decoded(self, step: int) -> Generator[Batch, None, int]:
        """Batches of images that are decoded unless they are in the cache; ends, with the next step, when all are."""
        num_workers = self.num_workers
        ring = torch.empty((PREFETCH * num_workers + 1, *self._shape), dtype=torch.uint8)
        with shared_memory_named():
            decoder = _Decoder(self._store, ring.share_memory_() if num_workers else ring)
        under_way: deque[_Wanted] = deque()

        def requests(first: int) -> Iterator[_Request]:
            for later in count(first):
                wanted = self._wanted(later)
                under_way.append(wanted)
                yield later % len(ring), wanted.indices[wanted.missing], wanted.flips[wanted.missing]

        loader = DataLoader(
            decoder,
            batch_size=None,
            sampler=requests(step),
            num_workers=num_workers,
            prefetch_factor=PREFETCH if num_workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # a loader draws a seed, by default from the global generator
        )
        with closing(answers_of(loader)) as answers:
            for classes in answers:
                if isinstance(classes, VdiffError):
                    raise classes
                wanted, pixels = under_way.popleft(), ring[step % len(ring)]
                indices, flips = wanted.indices[wanted.missing], wanted.flips[wanted.missing]
                self._cache.keep(indices, flips, pixels, classes)
                yield self._assembled(wanted, pixels)
                step += 1
                if self._cache.complete:
                    break
        return step

    def _wanted(self, step: int) -> _Wanted:
        indices = self.plan.indices(step)[self._share]
        return _Wanted(indices, self.plan.flips(step)[self._share], self._cache.rows[indices] < 0)

    def _assembled(self, wanted: _Wanted, decoded: Tensor) -> Batch:
        """The batch of what the cache held when it was asked and, in order, of what was decoded because it did not."""
        cache, others = self._cache, iter(decoded)
        rows, flips, missing = cache.rows[wanted.indices].tolist(), wanted.flips.tolist(), wanted.missing.tolist()
        images = [
            next(others) if new else cache.image(row, mirrored)
            for row, mirrored, new in zip(rows, flips, missing, strict=True)
        ]
        pixels = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self.pin_memory)
        torch.stack(images, out=pixels)
        if cache.classes is None:
            return Batch(pixels, None)
        classes = torch.from_numpy(cache.classes[wanted.indices])
        return Batch(pixels, classes.pin_memory() if self.pin_memory else classes)


@dataclass(frozen=True)
class _Wanted:
    """Images of a batch, whether each is mirrored, and whether it was `missing` in the cache; (B,) each."""

    indices: np.ndarray
    flips: np.ndarray
    missing: np.ndarray


class _Decoder(Dataset[np.ndarray | VdiffError]):
    """Decodes the images of a request into the first places of a slot of the `ring`; answers their classes (0: none).

    The memory of the ring, shared with workers, is used over and over: fresh memory for each batch would cost a good
    part of the time that decoding takes.
    """

    def __init__(self, store: ImageStore, ring: Tensor) -> None:
        self.store, self.ring = store, ring

    def __getitem__(self, request: _Request) -> np.ndarray | VdiffError:
        store, (channels, size, _) = self.store, self.ring.shape[2:]
        slot, indices, flips = request
        pixels, classes = self.ring[slot].numpy(), np.zeros(len(indices), np.int64)
        try:
            for place, (index, mirrored) in enumerate(zip(indices.tolist(), flips.tolist(), strict=True)):
                image = decode(store.encoded(size, index), channels, size, f"{store.path}: image {index}")
                pixels[place] = image[:, :, ::-1] if mirrored else image
                classes[place] = store.label(index) or 0
        except VdiffError as error:
            return error  # raised in a worker, it would reach the user with a worker's traceback in its message
        return classes


def _as_it_is(answer: Any) -> Any:
    """Arrays stay arrays: as tensors they would travel through shared memory of their own."""
    return answer


def leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group lets the trainer finish its step; its end is the end of the workers too."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
