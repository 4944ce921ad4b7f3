"""Batches for training: the batch of an optimiser step is a pure function of seed and step.

`ImageBatches` reads the images of an LMDB in any order; `ShardBatches` reads tar shards from beginning to end.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import mmap
import shutil
import signal
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vdiff.data.audio import decode_sound
from vdiff.data.captions import CaptionSettings
from vdiff.data.datasets import AnyStore
from vdiff.data.shards import ShardStore
from vdiff.data.store import ImageStore, StoredImage
from vdiff.distributed import free_memory
from vdiff.errors import OptionError, VdiffError
from vdiff.reporting import Reporter, Silent

if TYPE_CHECKING:
    from vdiff.data.encoded import EncodedStore

SHARED_MEMORY = Path("/dev/shm")
# the first word of each random stream, so that they never share numbers
_ORDER, _FLIPS, _SHARDS, _WINDOWS, _CAPTIONS, _BUCKETS, _CROPS = range(7)
PREFETCH = 2  # batches per worker that are requested in advance
NUM_LANES = 16
WINDOW_IMAGES = 2048
_Request = tuple[int, np.ndarray]  # slot of the ring, indices
# this process decodes so few pixels before a worker process has started
ALONE_BYTES = 16 * 2**20
_PREPARE_AGAIN = "prepare the images again with prepare_data.py"


@dataclass(frozen=True)
class Batch:
    """The images of an optimiser step and their conditions.

    Move `images` to the device first and apply `from_uint8` there: bytes are a quarter of the traffic of float32.

    Attributes:
        images: (B, C, H, W) uint8 on the CPU, some mirrored by the plan, or sounds (B, C, L) int16; on the device
            `meta`, which holds no pixels, if `latents` are given.
        classes: (B,) int64; None without classes.
        captions: B texts, after `CaptionSettings.apply`; None in a dataset without captions.
        sizes: (B, 6) float32, `buckets.Fit.sizes` (a mirrored image has the crop of the original), with a random crop
            added; None in a dataset of squares without one.
        latents: mean and standard deviation (B, c, h, w) of the latents of the images; None if they are not encoded.
        embeddings: {name: tensor of B rows} of the captions; None if they are not encoded.
        conditions: the condition images, like `images`, mirrored and cropped with them; None in a dataset without.
    """

    images: Tensor
    classes: Tensor | None
    captions: list[str] | None = None
    sizes: Tensor | None = None
    latents: tuple[Tensor, Tensor] | None = None
    embeddings: dict[str, Tensor] | None = None
    conditions: Tensor | None = None


class Batches(Protocol):
    """Endless batches, each a function of seed and step."""

    def start_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of optimiser steps `step`, `step` + 1, … without end; closing the generator ends the workers."""


class BatchPlan:
    """The images of each batch, and which of them are mirrored: pure functions of seed and step.

    Position p = step · batch_size + i of the endless stream is image `permutation(seed, p // n)[p % n]`: every epoch
    shows each of the n images once, and a batch can contain the end of one epoch and the start of the next. If `rows`
    are given, an epoch shows the n images `rows` instead. Flips depend on (seed, step, i), the change of a caption on
    (seed, p).
    """

    def __init__(self, *, length: int, batch_size: int, seed: int, flip: bool, rows: np.ndarray | None = None) -> None:
        length = length if rows is None else len(rows)
        if length < 1 or batch_size < 1 or seed < 0:
            raise ValueError(f"length {length}, batch_size {batch_size}, seed {seed}; need at least 1, 1 and 0")
        self.length, self.batch_size, self.seed, self.flip, self.rows = length, batch_size, seed, flip, rows

    def indices(self, step: int) -> np.ndarray:
        """(B,) int64: the images of batch `step`."""
        first, left = step * self.batch_size, self.batch_size
        parts = []
        while left:
            epoch, offset = divmod(first, self.length)
            part = self.permutation(epoch)[offset : offset + left]
            parts.append(part)
            first, left = first + len(part), left - len(part)
        places = np.concatenate(parts)
        return places if self.rows is None else self.rows[places]

    def flips(self, step: int) -> np.ndarray:
        """(B,) bool: which images of batch `step` are mirrored."""
        if not self.flip:
            return np.zeros(self.batch_size, bool)
        return _generator(self.seed, _FLIPS, step).integers(0, 2, self.batch_size).astype(bool)

    def caption(self, captions: str, settings: CaptionSettings, step: int, place: int) -> str:
        """The caption of image `place` of batch `step`, after `settings`."""
        return settings.apply(captions, _generator(self.seed, _CAPTIONS, step * self.batch_size + place))

    def crop(self, height: int, width: int, side: int, step: int, place: int) -> tuple[int, int]:
        """Top and left of the crop of `side` × `side` of image `place` of batch `step`, a function of (seed, p)."""
        rng = _generator(self.seed, _CROPS, step * self.batch_size + place)
        return int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))

    def permutation(self, epoch: int) -> np.ndarray:
        """(n,) int64: the order of epoch `epoch`."""
        return _permutation(self.length, self.seed, _ORDER, epoch)


class BucketPlan(BatchPlan):
    """A plan in which all images of a batch are of one bucket.

    Bucket b has n_b images in an epoch. Its images form an endless stream of permutations, cut into batches of B.
    Epoch e has the batches ⌊e n_b / B⌋ … ⌊(e + 1) n_b / B⌋ − 1 of each bucket, all shuffled. So every image is shown
    equally often, all batches have B images, and any batch can be computed without the others.
    """

    def __init__(self, buckets: Sequence[np.ndarray], *, batch_size: int, seed: int, flip: bool) -> None:
        super().__init__(length=sum(map(len, buckets)), batch_size=batch_size, seed=seed, flip=flip)
        self.buckets = buckets
        self._round = lru_cache(maxsize=2 * len(buckets))(self._order)

    def indices(self, step: int) -> np.ndarray:
        """(B,) int64: the images of batch `step`."""
        most = (step + len(self.buckets) + 1) * self.batch_size // self.length + 2
        epoch = bisect_right(range(1, most + 1), step, key=self._before)
        batches = self._batches(epoch)
        place = _permutation(len(batches), self.seed, _BUCKETS, epoch)[step - self._before(epoch)]
        bucket, number = batches[place]
        images = self.buckets[bucket]
        rounds, places = np.divmod(number * self.batch_size + np.arange(self.batch_size), len(images))
        return images[[self._round(bucket, k)[p] for k, p in zip(rounds.tolist(), places.tolist(), strict=True)]]

    def _order(self, bucket: int, number: int) -> np.ndarray:
        """The permutation of the images of a bucket in round `number`."""
        return _generator(self.seed, _ORDER, bucket, number).permutation(len(self.buckets[bucket]))

    def _before(self, epoch: int) -> int:
        """How many batches come before an epoch."""
        return sum(epoch * len(images) // self.batch_size for images in self.buckets)

    def _batches(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of its batch) of all batches of an epoch, in order of buckets."""
        return [
            (bucket, number)
            for bucket, images in enumerate(self.buckets)
            for number in range(epoch * len(images) // self.batch_size, (epoch + 1) * len(images) // self.batch_size)
        ]


def repeated_rows(store: AnyStore) -> np.ndarray | None:
    """The images of an epoch, each as often as it is shown, in ascending order; None: each is shown once."""
    if not store.meta.repeats or not isinstance(store, ImageStore):
        return None
    labels = [store.label(index) or 0 for index in range(len(store))]
    return np.repeat(np.arange(len(store)), np.array(store.meta.repeats)[labels])


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@lru_cache(maxsize=2)
def _permutation(length: int, *words: int) -> np.ndarray:
    return _generator(*words).permutation(length)


def decode(encoded: bytes, channels: int, size: int | tuple[int, int], where: str) -> np.ndarray:
    """The pixels of an image file: (C, height, width) uint8, read-only, C = `channels` = 1 or 3.

    `size` is the side of a square or (height, width). `where` names the file in errors.

    Raises:
        VdiffError: the file is no image, damaged, or of another size.
    """
    mode = "RGB" if channels == 3 else "L"
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            # convert would copy an image that already has the mode
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # decoders raise errors of many classes
        raise VdiffError(f"{where} cannot be decoded: {error}", _PREPARE_AGAIN) from None
    tall, wide = (size, size) if isinstance(size, int) else size
    if (width, height) != (wide, tall):
        raise VdiffError(f"{where} is {width}×{height}, not {wide}×{tall}", _PREPARE_AGAIN)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def decode_stored(store: AnyStore, encoded: bytes, sides: Sequence[int], where: str) -> np.ndarray:
    """A sample of a dataset: an image as by `decode`, or a sound (C, L) int16.

    Raises:
        VdiffError: it cannot be decoded, or has another size than `sides`.
    """
    meta = store.meta
    if meta.rate:
        return decode_sound(encoded, meta.channels, sides[0], meta.rate, where)
    return decode(encoded, meta.channels, (sides[0], sides[1]), where)


def answers_of(
    dataset: Dataset[Any], requests: Iterable[Any], num_workers: int, pin_memory: bool = False
) -> Generator[Any, None, None]:
    """`dataset[request]` for each request, by `num_workers` processes; closing the generator ends them.

    The processes are not left to the garbage collector, because the traceback of an error can keep them alive.

    Raises:
        VdiffError: the dataset returned one (workers return errors, as raising adds a traceback); shared memory is
            full.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # a loader draws a seed, by default from the global generator
        pin_memory=pin_memory,
    )
    with shared_memory_named():
        answers = iter(loader)
        try:
            for answer in answers:
                if isinstance(answer, VdiffError):
                    raise answer
                yield answer
        finally:
            if num_workers:
                answers._shutdown_workers()  # type: ignore[attr-defined]


def closed_at_exit(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """`batches`, closed at exit if still open; else the interpreter waits forever for workers that ignore SIGTERM."""

    def close() -> None:
        if (found := reference()) is not None:
            found.close()

    reference = weakref.ref(batches, lambda _: atexit.unregister(close))
    atexit.register(close)
    return batches


@contextlib.contextmanager
def shared_memory_named() -> Iterator[None]:
    """Turn torch's error about full shared memory into one line."""
    try:
        yield
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise VdiffError("shared memory is full", "give --num_workers 0, or docker run a larger --shm-size") from None


def cache_limit() -> int:
    """The memory for decoded images in bytes: a quarter of what is available now."""
    return free_memory(torch.device("cpu")) // 4


class PixelCache:
    """Decoded images in the memory of this process. Nothing is ever removed.

    Only the trainer's process reads and writes the cache, so nothing is shared, locked, or copied to workers. If the
    dataset is too large, the cache has a part of its images. Which ones does not matter: epochs show all equally often.
    """

    def __init__(self, store: ImageStore, image_shape: tuple[int, ...], limit_bytes: int) -> None:
        dtype = dtype_of(store)
        num_rows = min(len(store), limit_bytes // (math.prod(image_shape) * dtype.itemsize))
        self.pixels = _room((num_rows, *image_shape), dtype)
        self.rows = np.full(len(store), -1)  # row of each image of the dataset in `pixels`; −1: none
        self.classes = np.zeros(len(store), np.int64) if store.meta.class_names else None
        self.used = 0

    @property
    def complete(self) -> bool:
        """Whether the cache has every image of the dataset."""
        return self.used == len(self.rows)

    @property
    def is_small(self) -> bool:
        """Whether the cache fills before workers would start."""
        return len(self.pixels) == len(self.rows) and self.pixels.nbytes <= ALONE_BYTES

    def keep(self, indices: np.ndarray, pixels: np.ndarray, classes: np.ndarray) -> None:
        """Store decoded images while there is room, and all classes."""
        if self.classes is not None:
            self.classes[indices] = classes
        for index, image in zip(indices.tolist(), pixels, strict=False):
            if self.used == len(self.pixels):
                break
            if self.rows[index] < 0:  # it can be requested twice before it is decoded
                self.pixels[self.used], self.rows[index] = image, self.used
                self.used += 1


def dtype_of(store: AnyStore) -> np.dtype[Any]:
    """The type of decoded samples: bytes of images, 16 bits of sounds."""
    return np.dtype(np.int16 if store.meta.rate else np.uint8)


def _room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array with memory that is allocated on writing, in large pages if possible: far fewer page faults."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class _StoredBatches:
    """The common part of `ImageBatches` and `ShardBatches`, which describe the options."""

    def __init__(
        self,
        store: AnyStore,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        flip: bool,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        captions: CaptionSettings | None = None,
        crop: int = 0,
        reporter: Reporter | None = None,
    ) -> None:
        store.check_size(image_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes; need 0 <= rank < world_size")
        if batch_size % world_size:
            what = f"a batch of {batch_size} cannot be shared equally by {world_size} processes"
            raise VdiffError(what, f"give --batch_size a multiple of {world_size}")
        size = batch_size // world_size
        rows = repeated_rows(store)
        self.plan = BatchPlan(length=len(store), batch_size=batch_size, seed=seed, flip=flip, rows=rows)
        self.shapes: np.ndarray | None = None  # (n, 6) of all images
        if store.meta.buckets and isinstance(store, ImageStore):
            self.shapes = np.array([store.shape(index) for index in range(len(store))])
            rows = np.arange(len(store)) if rows is None else rows
            shapes = self.shapes[rows, -2:]
            buckets = [rows[(shapes == shape).all(1)] for shape in np.unique(shapes, axis=0)]
            self.plan = BucketPlan(buckets, batch_size=batch_size, seed=seed, flip=flip)
        self.share = slice(rank * size, (rank + 1) * size)  # this process's part of each global batch
        self.channels = store.meta.channels
        # a condition image is stored as further channels of its image, so both are mirrored and cropped as one
        channels, *sides = store.meta.shape(image_size)
        self.shape = (size, channels * (1 + store.meta.has_conditions), *sides)
        self.dtype = dtype_of(store)
        if flip and store.meta.rate:
            raise OptionError(f"--flip True: {store.path} has sounds, which are not reversed", "give --flip False")
        self.num_workers, self.rank, self.world_size, self.pin_memory = num_workers, rank, world_size, pin_memory
        self.crop = crop
        self.captions = (captions or CaptionSettings()) if store.meta.num_captions else None
        self._reporter, self._noun = reporter or Silent(), store.meta.noun

    def start_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of optimiser steps `step`, `step` + 1, … without end; closing the generator ends the workers.

        Raises:
            VdiffError: (from the generator) a shard or an image is missing, damaged or of another size.
        """
        return closed_at_exit(self._batches(step))

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        raise NotImplementedError

    def changed(self, image: np.ndarray, mirrored: bool, step: int, place: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Image (C, H, W) `place` of this process's share, mirrored and then cropped; top and left of the crop."""
        image = image[..., ::-1] if mirrored else image
        if not self.crop:
            return image, (0, 0)
        height, width = image.shape[1:]
        top, left = self.plan.crop(height, width, self.crop, step, self.share.start + place)
        return image[:, top : top + self.crop, left : left + self.crop], (top, left)

    def crop_sizes(self, sizes: Tensor | None, corners: list[tuple[int, int]], shape: Sequence[int]) -> Tensor | None:
        """The sizes (B, 6) of cropped images of `shape` (H, W), whose own sizes are `sizes`; None: as they are."""
        if not self.crop:
            return sizes
        height, width = shape
        whole = torch.tensor([height, width, 0, 0, 0, 0], dtype=torch.float32).expand(len(corners), 6)
        sizes = whole.clone() if sizes is None else sizes.clone()
        sizes[:, 2:4] += torch.tensor(corners)
        sizes[:, 4:] = self.crop
        return sizes

    def _keep_workers_with_room(self) -> None:
        """Use no workers, and say so, if shared memory has too little room for their images."""
        # a loader requests so many batches in advance, and one more before it returns the first
        num_bytes = (PREFETCH * self.num_workers + 1) * math.prod(self.shape) * self.dtype.itemsize * self.world_size
        if self.num_workers and SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < num_bytes:
            self.num_workers = 0
            self._reporter.line(
                f"shared memory: {free / 2**20:.0f} of {num_bytes / 2**20:.0f} MiB free, so this process decodes "
                f"{self._noun}s, as with --num_workers 0; docker: --shm-size"
            )


class ImageBatches(_StoredBatches):
    """Endless batches from a dataset; process `rank` of `world_size` gets its equal part of each global batch.

    Images are decoded when they are first needed, by `num_workers` processes (0 = in this one), and kept in up to
    `cache_bytes` of memory (default: a quarter of what is available, divided among the `world_size` processes; 0 =
    none). The workers end when every image is in memory. Neither option changes a bit of a batch or uses the global
    random generators. `pin_memory` puts images and classes into page-locked memory, for copies to a GPU. If shared
    memory has no room for the images of workers, this process decodes, and `reporter` gets a line.

    Raises:
        VdiffError: the dataset lacks `image_size`, or the batch cannot be shared equally.
    """

    def __init__(self, store: ImageStore, *, cache_bytes: int | None = None, **options: Any) -> None:
        super().__init__(store, **options)
        self._store = store
        limit = cache_limit() // self.world_size if cache_bytes is None else cache_bytes
        self._cache = PixelCache(store, self.shape[1:], limit)
        if self._cache.is_small:
            self.num_workers = 0
        self._keep_workers_with_room()

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        if not self._cache.complete:
            step = yield from self._decoded(step)
        for later in count(step):
            yield self._assembled(later, self._indices(later))

    def _decoded(self, step: int) -> Generator[Batch, None, int]:
        """Batches until the cache has every image; images that it lacks are decoded. Returns the next step."""
        room = np.empty((PREFETCH * self.num_workers + 1, *self.shape), self.dtype)
        ring = torch.from_numpy(room)
        with shared_memory_named():
            decoder = _Decoder(self._store, ring.share_memory_() if self.num_workers else ring)
        under_way: deque[tuple[np.ndarray, np.ndarray]] = deque()  # (B,) images of a batch, which of them are decoded

        def requests(first: int) -> Iterator[_Request]:
            for later in count(first):
                indices = self._indices(later)
                missing = self._cache.rows[indices] < 0
                under_way.append((indices, missing))
                yield later % len(ring), indices[missing]

        with contextlib.closing(answers_of(decoder, requests(step), self.num_workers)) as answers:
            for classes in answers:
                (indices, missing), pixels = under_way.popleft(), ring[step % len(ring)].numpy()
                self._cache.keep(indices[missing], pixels, classes)
                yield self._assembled(step, indices, missing, pixels)
                step += 1
                if self._cache.complete:
                    break
        return step

    def _indices(self, step: int) -> np.ndarray:
        return self.plan.indices(step)[self.share]

    def _assembled(
        self, step: int, indices: np.ndarray, missing: np.ndarray | None = None, decoded: np.ndarray | None = None
    ) -> Batch:
        """A batch of images from the cache; those that were `missing` in it come from `decoded`, in order."""
        cache, images = self._cache, iter(() if decoded is None else decoded)
        missing = np.zeros(len(indices), bool) if missing is None else missing
        captions, sizes, stored = self._described(step, indices)
        shape = (*stored[:2], self.crop, self.crop) if self.crop else stored
        dtype = torch.int16 if self._store.meta.rate else torch.uint8
        pixels = torch.empty(shape, dtype=dtype, pin_memory=self.pin_memory)
        # numpy copies: torch would wake its threads for each image, which wait for cores that workers use
        places = pixels.numpy()
        flips, corners = self.plan.flips(step)[self.share], []
        for place, (row, is_new, mirrored) in enumerate(zip(cache.rows[indices], missing, flips, strict=True)):
            image = next(images) if is_new else cache.pixels[row]
            image = image.reshape(-1)[: math.prod(stored[1:])].reshape(stored[1:])
            places[place], corner = self.changed(image, bool(mirrored), step, place)
            corners.append(corner)
        sizes = self.crop_sizes(sizes, corners, stored[2:])
        conditions = pixels[:, self.channels :] if self._store.meta.has_conditions else None
        pixels, classes = pixels[:, : self.channels], None
        if cache.classes is not None:
            classes = torch.from_numpy(cache.classes[indices])
            classes = classes.pin_memory() if self.pin_memory else classes
        return Batch(pixels, classes, captions, sizes, conditions=conditions)

    def _described(self, step: int, indices: np.ndarray) -> tuple[list[str] | None, Tensor | None, tuple[int, ...]]:
        """The captions and sizes of a batch, and the shape of its pixels."""
        captions = None
        if self.captions is not None:
            texts = map(self._store.caption, indices.tolist())
            captions = [
                self.plan.caption(text, self.captions, step, place)
                for place, text in enumerate(texts, self.share.start)
            ]
        if self.shapes is None:
            return captions, None, self.shape
        shapes = self.shapes[indices]
        return captions, torch.from_numpy(shapes).float(), (*self.shape[:2], *shapes[0, -2:].tolist())


class _Decoder(Dataset[np.ndarray | VdiffError]):
    """Decodes the images of a request into the first places of a slot of `ring`; returns their classes (0: none).

    The ring is shared with workers and reused, because new memory for each batch would take much of the time of
    decoding.
    """

    def __init__(self, store: ImageStore, ring: Tensor) -> None:
        self.store, self.ring = store, ring

    def __getitem__(self, request: _Request) -> np.ndarray | VdiffError:
        store, size, channels = self.store, self.ring.shape[-1], self.store.meta.channels
        whole = store.meta.shape(size)[1:]
        slot, indices = request
        pixels, classes = self.ring[slot].numpy(), np.zeros(len(indices), np.int64)
        try:
            for place, index in enumerate(indices.tolist()):
                where = f"{store.path}: {store.meta.noun} {index}"
                image = decode_stored(store, store.encoded(size, index), store.shape(index)[-2:] or whole, where)
                if store.meta.has_conditions:
                    where = f"{store.path}: condition of image {index}"
                    image = np.concatenate([image, decode(store.condition(size, index), channels, size, where)])
                # an image of a bucket takes the first bytes of the place, which has room for size × size pixels
                pixels[place].reshape(-1)[: image.size] = image.reshape(-1)
                classes[place] = store.label(index) or 0
        except VdiffError as error:
            return error
        return classes


def _as_it_is(answer: Any) -> Any:
    """Arrays stay arrays: tensors would be sent through additional shared memory."""
    return answer


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals to the process group: the trainer finishes its step, and then ends the workers."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class LaneOrder:
    """The shards that each lane reads, and the order of their images: pure functions of the seed.

    All lanes of all processes, G of them, share one endless sequence of shards: the permutation of epoch 0, of epoch 1,
    …; lane g reads the turns g, g + G, g + 2G, …. So one of the lanes reads each shard once per epoch. The images of a
    lane are shuffled within windows: position p is `permutation(seed, g, p // window)[p % window]` of its window.

    With fewer shards than lanes, several lanes read a shard at the same time, each for another epoch. All images come
    equally often, but neighbours in a shard also come close together in time. For good mixing a dataset needs several
    times more shards than lanes.
    """

    def __init__(self, counts: Sequence[int], *, num_lanes: int, window: int, seed: int) -> None:
        if not counts or min(counts) < 1 or num_lanes < 1 or window < 1 or seed < 0:
            raise ValueError(f"{len(counts)} shards, {num_lanes} lanes, window {window}, seed {seed}; need at least 1")
        self.counts, self.num_lanes, self.window, self.seed = tuple(counts), num_lanes, window, seed

    def shards(self, lane: int) -> Iterator[int]:
        """The numbers of the shards that `lane` reads, without end."""
        for turn in count(lane, self.num_lanes):
            epoch, place = divmod(turn, len(self.counts))
            yield int(_permutation(len(self.counts), self.seed, _SHARDS, epoch)[place])

    def parts(self, lane: int, position: int) -> Iterator[tuple[int, int]]:
        """(shard, images of it to skip) for all images of `lane` from `position` on, without end."""
        for shard in self.shards(lane):
            if position < self.counts[shard]:
                yield shard, position
            position = max(position - self.counts[shard], 0)

    def permutation(self, lane: int, window: int) -> np.ndarray:
        """(window,) int64: the order of window number `window` of `lane`."""
        return _generator(self.seed, _WINDOWS, lane, window).permutation(self.window)


class ShardBatches(_StoredBatches):
    """Endless batches from tar shards; process `rank` of `world_size` reads shards that no other reads in that epoch.

    Each process has 16 lanes (`LaneOrder`), and batch n comes from lane n mod 16. So the batches depend on seed, rank
    and world size, but not on `num_workers`, which is rounded down to a power of two (0 = in this process). A run that
    starts at step n skips whole shards without reading them. Unlike in `ImageBatches`, the parts of the processes
    together are not the batch of a single process.

    A process holds 16 · `window` encoded images: 0.1 GB at 64 pixels, about 1 GB at 256. It reads as many before its
    first 16 steps.

    Raises:
        VdiffError: the dataset lacks `image_size`, or the batch cannot be shared equally.
    """

    def __init__(self, store: ShardStore, *, window: int = WINDOW_IMAGES, **options: Any) -> None:
        super().__init__(store, **options)
        self.store = store
        counts = [shard.images for shard in store.shards]
        self.order = LaneOrder(counts, num_lanes=self.world_size * NUM_LANES, window=window, seed=self.plan.seed)
        self._keep_workers_with_room()
        # a power of two divides the number of lanes, so that each lane stays with one worker
        self.num_workers = 1 << (min(self.num_workers, NUM_LANES).bit_length() - 1) if self.num_workers else 0

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        with contextlib.closing(answers_of(_Lanes(self), count(step), self.num_workers, self.pin_memory)) as answers:
            yield from (Batch(*answer) for answer in answers)

    def samples(self, lane: int, position: int) -> Generator[StoredImage, None, None]:
        """The images of a lane of this process in the order of training, from `position` on, without end."""
        lane += self.rank * NUM_LANES
        number, skip = divmod(position, self.order.window)
        with contextlib.closing(self._in_sequence(lane, position - skip)) as sequence:
            while True:
                window = list(islice(sequence, self.order.window))
                for place in self.order.permutation(lane, number)[skip:].tolist():
                    yield window[place]
                window.clear()  # before the next one is read
                number, skip = number + 1, 0

    def _in_sequence(self, lane: int, position: int) -> Generator[StoredImage, None, None]:
        """The images of a lane in the order of its shards, from `position` on, without end."""
        for shard, skip in self.order.parts(lane, position):
            with contextlib.closing(self.store.samples(shard, self.shape[-1:], skip)) as samples:
                yield from samples


_Answer = tuple[Tensor, Tensor | None, list[str] | None, Tensor | None]


class _Lanes(Dataset[_Answer | VdiffError]):
    """Step → the fields of its `Batch`. Open lanes are kept, so the next batch of a lane needs no search."""

    def __init__(self, batches: ShardBatches) -> None:
        self.batches = batches
        self._lanes: dict[int, tuple[int, Generator[StoredImage, None, None]]] = {}

    def __getitem__(self, step: int) -> _Answer | VdiffError:
        batches, (share, *shape), meta = self.batches, self.batches.shape, self.batches.store.meta
        turn, lane = divmod(step, NUM_LANES)
        expected, samples = self._lanes.pop(lane, (-1, None))
        if samples is None or expected != step:
            samples = batches.samples(lane, turn * share)
        plan = batches.plan
        flips = plan.flips(step)[batches.share].tolist()
        cropped = (shape[0], batches.crop, batches.crop) if batches.crop else shape
        pixels = np.empty((share, *cropped), batches.dtype)
        classes, captions, corners = np.zeros(share, np.int64), [""] * share, []
        try:
            for place, (key, encoded, label, caption, *_) in enumerate(islice(samples, share)):
                where = f"{batches.store.path}: {meta.noun} {key}"
                image = decode_stored(batches.store, encoded[shape[-1]], shape[1:], where)
                pixels[place], corner = batches.changed(image, flips[place], step, place)
                corners.append(corner)
                classes[place] = label or 0
                if batches.captions is not None:
                    captions[place] = plan.caption(caption, batches.captions, step, batches.share.start + place)
        except VdiffError as error:
            return error
        self._lanes[lane] = (step + NUM_LANES, samples)
        return (
            torch.from_numpy(pixels),
            torch.from_numpy(classes) if meta.class_names else None,
            None if batches.captions is None else captions,
            batches.crop_sizes(None, corners, shape[1:]),
        )


class EncodedBatches(ImageBatches):
    """The batches of `ImageBatches`, with latents and embeddings of `vdiff data encode` instead of pixels.

    Shuffled captions and captions with a prefix are not encoded, so their batches have no embeddings.

    Raises:
        VdiffError: `flip` needs mirrored images that are not encoded, the images are to be cropped, or are encoded at
            another size.
    """

    def __init__(
        self, store: ImageStore, encoded: EncodedStore, *, image_size: int, flip: bool, **options: Any
    ) -> None:
        if options.get("crop"):
            raise VdiffError(f"{encoded.folder} has whole images", "remove the folder, or give --random_crop 0")
        if flip and not encoded.key.flip:
            hint = "give --flip False, or encode again: vdiff data encode --flip --overwrite"
            raise VdiffError(f"{encoded.folder} has no mirrored images", hint)
        if image_size != encoded.key.image_size:
            what = f"{encoded.folder} has images of {encoded.key.image_size} pixels, not {image_size}"
            raise VdiffError(what, "encode the dataset again with --image_size")
        super().__init__(store, image_size=image_size, flip=flip, **{**options, "cache_bytes": 0, "num_workers": 0})
        self._encoded = encoded

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        for later in count(step):
            indices = self._indices(later)
            flips = self.plan.flips(later)[self.share]
            captions, sizes, shape = self._described(later, indices)
            classes = None
            if self._store.meta.class_names:
                classes = torch.tensor([self._store.label(index) or 0 for index in indices.tolist()])
            known = captions is not None and self._encoded.has(captions)
            yield Batch(
                torch.empty(shape, dtype=torch.uint8, device="meta"),
                classes,
                captions,
                sizes,
                self._encoded.latents(indices.tolist(), flips.tolist()),
                self._encoded.embeddings(captions) if known and captions is not None else None,
            )


def open_batches(store: AnyStore, **options: Any) -> Batches:
    """The batches of a dataset; both kinds of dataset have the options of `ImageBatches`."""
    return ImageBatches(store, **options) if isinstance(store, ImageStore) else ShardBatches(store, **options)
