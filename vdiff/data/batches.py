"""Batches for training: the batch of an optimiser step is a pure function of seed and step."""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import mmap
import shutil
import signal
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError
from vdiff.reporting import Reporter, Silent

SHARED_MEMORY = Path("/dev/shm")
# the first word of each random stream, so that order and flips never share numbers
_ORDER, _FLIPS = 0, 1
PREFETCH = 2  # batches that each worker is asked for in advance
_Request = tuple[int, np.ndarray]  # slot of the ring, indices
# so few pixels are decoded before a worker process has started
ALONE_BYTES = 16 * 2**20
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


@contextlib.contextmanager
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


def cache_limit() -> int:
    """A quarter of the memory that is available now, in bytes: how much of it decoded images may take."""
    import psutil

    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup/memory.max")  # a container's share of the machine
    if group.exists() and (text := group.read_text().strip()).isdigit():
        available = min(available, int(text))
    return int(available) // 4


class PixelCache:
    """Decoded images in the memory of this process. What is in it stays.

    Only the trainer's process reads and writes it, so nothing is shared, locked, or copied to workers. A set that is
    too large has part of its images here, and as epochs show all alike, it does not matter which.
    """

    def __init__(self, store: ImageStore, image_shape: tuple[int, ...], limit_bytes: int) -> None:
        self.pixels = _room((min(len(store), limit_bytes // math.prod(image_shape)), *image_shape))
        self.rows = np.full(len(store), -1)  # where each image of the set is; −1: not here
        self.classes = np.zeros(len(store), np.int64) if store.meta.class_names else None
        self.used = 0

    @property
    def complete(self) -> bool:
        """Whether every image of the set is here."""
        return self.used == len(self.rows)

    @property
    def is_small(self) -> bool:
        """Whether all images will be here before workers would be of help."""
        return len(self.pixels) == len(self.rows) and self.pixels.nbytes <= ALONE_BYTES

    def keep(self, indices: np.ndarray, pixels: np.ndarray, classes: np.ndarray) -> None:
        """Take in decoded images as far as there is room, and all classes."""
        if self.classes is not None:
            self.classes[indices] = classes
        for index, image in zip(indices.tolist(), pixels, strict=False):
            if self.used == len(self.pixels):
                break
            if self.rows[index] < 0:  # it may have been asked for twice before it came
                self.pixels[self.used], self.rows[index] = image, self.used
                self.used += 1


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An uint8 array whose memory is taken as it is written, where possible in large pages: far fewer page faults."""
    num_bytes = math.prod(shape)
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, np.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(shape)


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
        for later in count(step):
            yield self._assembled(later, self._indices(later))

    def _decoded(self, step: int) -> Generator[Batch, None, int]:
        """Batches of images that are decoded unless they are in the cache; ends, with the next step, when all are."""
        num_workers = self.num_workers
        ring = torch.empty((PREFETCH * num_workers + 1, *self._shape), dtype=torch.uint8)
        with shared_memory_named():
            decoder = _Decoder(self._store, ring.share_memory_() if num_workers else ring)
        under_way: deque[tuple[np.ndarray, np.ndarray]] = deque()  # (B,) images of a batch, which of them are decoded

        def requests(first: int) -> Iterator[_Request]:
            for later in count(first):
                indices = self._indices(later)
                missing = self._cache.rows[indices] < 0
                under_way.append((indices, missing))
                yield later % len(ring), indices[missing]

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
        with contextlib.closing(answers_of(loader)) as answers:
            for classes in answers:
                if isinstance(classes, VdiffError):
                    raise classes
                (indices, missing), pixels = under_way.popleft(), ring[step % len(ring)].numpy()
                self._cache.keep(indices[missing], pixels, classes)
                yield self._assembled(step, indices, missing, pixels)
                step += 1
                if self._cache.complete:
                    break
        return step

    def _indices(self, step: int) -> np.ndarray:
        return self.plan.indices(step)[self._share]

    def _assembled(
        self, step: int, indices: np.ndarray, missing: np.ndarray | None = None, decoded: np.ndarray | None = None
    ) -> Batch:
        """A batch of images from the cache and, where they were `missing` in it, from `decoded`, in order."""
        cache, images = self._cache, iter(() if decoded is None else decoded)
        missing = np.zeros(len(indices), bool) if missing is None else missing
        pixels = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self.pin_memory)
        # copied by numpy: torch would wake its threads for each image, and these wait for cores that workers use
        places = pixels.numpy()
        flips = self.plan.flips(step)[self._share]
        for place, (row, is_new, mirrored) in enumerate(zip(cache.rows[indices], missing, flips, strict=True)):
            image = next(images) if is_new else cache.pixels[row]
            places[place] = image[..., ::-1] if mirrored else image
        if cache.classes is None:
            return Batch(pixels, None)
        classes = torch.from_numpy(cache.classes[indices])
        return Batch(pixels, classes.pin_memory() if self.pin_memory else classes)


class _Decoder(Dataset[np.ndarray | VdiffError]):
    """Decodes the images of a request into the first places of a slot of the `ring`; answers their classes (0: none).

    The memory of the ring, shared with workers, is used over and over: fresh memory for each batch would cost a good
    part of the time that decoding takes.
    """

    def __init__(self, store: ImageStore, ring: Tensor) -> None:
        self.store, self.ring = store, ring

    def __getitem__(self, request: _Request) -> np.ndarray | VdiffError:
        store, (channels, size, _) = self.store, self.ring.shape[2:]
        slot, indices = request
        pixels, classes = self.ring[slot].numpy(), np.zeros(len(indices), np.int64)
        try:
            for place, index in enumerate(indices.tolist()):
                pixels[place] = decode(store.encoded(size, index), channels, size, f"{store.path}: image {index}")
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
