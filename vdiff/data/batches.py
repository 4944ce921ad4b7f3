"""Batches for training: the batch of an optimiser step is a pure function of seed and step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vdiff.data.images import from_uint8
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError

# the first word of each random stream, so that order and flips never share numbers
_ORDER, _FLIPS = 0, 1


@dataclass(frozen=True)
class Batch:
    """`images`: (B, C, H, W) float32 in [−1, 1] on the CPU; `classes`: (B,) int64, or None in a set without classes."""

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


class ImageBatches:
    """Endless batches from a dataset; process `rank` of `world_size` gets its equal part of each global batch.

    A set of up to `cache_bytes` is decoded once into one uint8 tensor; a larger one is decoded on the way, by
    `num_workers` processes (0 = in this one). Both give the same batches, bit for bit, and neither touches the global
    random generators. `pin_memory` puts images and classes into page-locked memory, for copies to a GPU.

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
        cache_bytes: int = 256 * 2**20,
        pin_memory: bool = False,
    ) -> None:
        store.check_size(image_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes; need 0 <= rank < world_size")
        if batch_size % world_size:
            raise VdiffError(
                f"a batch of {batch_size} cannot be shared equally by {world_size} processes",
                f"give --batch_size a multiple of {world_size}",
            )
        self.plan = BatchPlan(length=len(store), batch_size=batch_size, seed=seed, flip=flip)
        self.decoder = _Decoder(store, image_size)
        self.num_workers, self.pin_memory = num_workers, pin_memory
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self._cached = len(store) * store.meta.channels * image_size**2 <= cache_bytes
        self._all: tuple[Tensor, Tensor | None] | None = None

    def start_at(self, step: int) -> Iterator[Batch]:
        """The batches of optimiser steps `step`, `step` + 1, … without end."""
        for pixels, classes, flips in self._cache(step) if self._cached else self._stream(step):
            images = from_uint8(torch.where(flips[:, None, None, None], pixels.flip(-1), pixels))
            if self.pin_memory:
                images, classes = images.pin_memory(), None if classes is None else classes.pin_memory()
            yield Batch(images, classes)

    def _cache(self, step: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        if self._all is None:
            # one image at a time into the finished tensor: no second copy of the set in memory
            pixels, classes = self.decoder.empty(self.plan.length)
            for index in range(self.plan.length):
                self.decoder.decode_into(pixels, classes, index, index)
            self._all = (pixels, classes)
        pixels, classes = self._all
        while True:
            indices = torch.from_numpy(self.plan.indices(step)[self._share])
            flips = torch.from_numpy(self.plan.flips(step)[self._share])
            yield pixels[indices], None if classes is None else classes[indices], flips
            step += 1

    def _stream(self, step: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        loader = DataLoader(
            self.decoder,
            batch_size=None,
            sampler=_Requests(self.plan, self._share, step),
            num_workers=self.num_workers,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # a loader draws a seed, by default from the global generator
        )
        yield from loader


class _Requests:
    """The endless list of what the workers are to decode: (indices, flips) of each step."""

    def __init__(self, plan: BatchPlan, share: slice, step: int) -> None:
        self.plan, self.share, self.step = plan, share, step

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = self.step
        while True:
            yield self.plan.indices(step)[self.share], self.plan.flips(step)[self.share]
            step += 1


class _Decoder(Dataset[tuple[Tensor, Tensor | None, Tensor]]):
    """A request (indices, flips) to uint8 pixels (B, C, H, W), classes (B,) and the flips as a tensor."""

    def __init__(self, store: ImageStore, image_size: int) -> None:
        self.store, self.image_size = store, image_size

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor | None, Tensor]:
        indices, flips = request
        pixels, classes = self.empty(len(indices))
        for place, index in enumerate(indices.tolist()):
            self.decode_into(pixels, classes, place, index)
        return pixels, classes, torch.from_numpy(flips)

    def empty(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Room for `length` images and, in a set with classes, their classes."""
        pixels = torch.empty((length, self.store.meta.channels, self.image_size, self.image_size), dtype=torch.uint8)
        return pixels, torch.empty(length, dtype=torch.int64) if self.store.meta.class_names else None

    def decode_into(self, pixels: Tensor, classes: Tensor | None, place: int, index: int) -> None:
        """Put image `index` of the store at `place`."""
        size = self.image_size
        image = self.store.image(size, index)
        if image.size != (size, size):
            raise VdiffError(
                f"{self.store.path}: image {index} is {image.width}×{image.height}, not {size}×{size}",
                "prepare the images again with prepare_data.py",
            )
        array = np.array(image)
        pixels[place] = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
        if classes is not None:
            classes[place] = self.store.label(index) or 0


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group lets the trainer finish its step; its end is the end of the workers too."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
