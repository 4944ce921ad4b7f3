"""Batches for training from tar shards: read in order, by any number of processes, and the same after a restart."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vdiff.data.batches import (
    PREFETCH,
    Batch,
    BatchPlan,
    answers_of,
    closed_at_exit,
    decode,
    leave_signals_to_the_parent,
    share_of,
    shared_memory_named,
    workers_with_room,
)
from vdiff.data.shard_store import ShardStore
from vdiff.errors import VdiffError
from vdiff.reporting import Reporter

NUM_LANES = 16
WINDOW_IMAGES = 2048
# the first word of each random stream; `batches` has 0 and 1
_SHARDS, _WINDOWS = 2, 3

Sample = tuple[str, dict[int, bytes], int | None]


class LaneOrder:
    """Which shards each lane reads, and in which order it hands out their images: pure functions of the seed.

    All lanes of all processes, G of them, share one endless sequence of shards: the permutation of epoch 0, of epoch 1,
    …; lane g reads the turns g, g + G, g + 2G, …. So each shard is read once an epoch by one of the lanes. The images
    of a lane, one after another, are shuffled within windows: position p is
    `permutation(seed, g, p // window)[p % window]` of its window.

    With fewer shards than lanes several lanes read a shard in the same round, each for another epoch: all images come
    equally often, but those that lie close together in a shard also come close together in time. Datasets that should
    mix well have several times more shards than lanes.
    """

    def __init__(self, counts: Sequence[int], *, num_lanes: int, window: int, seed: int) -> None:
        if not counts or min(counts) < 1 or num_lanes < 1 or window < 1 or seed < 0:
            raise ValueError(
                f"{len(counts)} shards, {num_lanes} lanes, window {window}, seed {seed}; need images, >= 1"
            )
        self.counts, self.num_lanes, self.window, self.seed = tuple(counts), num_lanes, window, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def shards(self, lane: int) -> Iterator[int]:
        """The numbers of the shards that `lane` reads, without end."""
        for turn in count(lane, self.num_lanes):
            epoch, place = divmod(turn, len(self.counts))
            if epoch != self._epoch:
                self._permutation = _generator(self.seed, _SHARDS, epoch).permutation(len(self.counts))
                self._epoch = epoch
            yield int(self._permutation[place])

    def parts(self, lane: int, position: int) -> Iterator[tuple[int, int]]:
        """(shard, images of it to skip) for all images of `lane` from `position` on, without end."""
        for shard in self.shards(lane):
            if position < self.counts[shard]:
                yield shard, position
            position = max(position - self.counts[shard], 0)

    def permutation(self, lane: int, window: int) -> np.ndarray:
        """(window,) int64: the order of window number `window` of `lane`."""
        return _generator(self.seed, _WINDOWS, lane, window).permutation(self.window)


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


class ShardBatches:
    """Endless batches from tar shards; process `rank` of `world_size` reads shards that no other reads in that epoch.

    Each process reads through 16 lanes (`LaneOrder`), batch n from lane n mod 16, so that the batches depend on seed,
    rank and world size but not on `num_workers`, of which the largest power of two is used (0 = in this process). A
    run that starts at step n passes over whole shards without reading them. Unlike those of `ImageBatches`, the parts
    of the processes together are not the batch of a single process.

    A process holds 16 · `window` encoded images: 0.1 GB at 64 pixels, about 1 GB at 256. Before its first 16 steps it
    reads as many.

    Raises:
        VdiffError: the dataset lacks `image_size`, or the batch cannot be shared equally.
    """

    def __init__(
        self,
        store: ShardStore,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        flip: bool,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        window: int = WINDOW_IMAGES,
        reporter: Reporter | None = None,
    ) -> None:
        store.check_size(image_size)
        share = share_of(batch_size, rank, world_size)
        self.plan = BatchPlan(length=len(store), batch_size=batch_size, seed=seed, flip=flip)
        counts = [shard.images for shard in store.shards]
        self.order = LaneOrder(counts, num_lanes=world_size * NUM_LANES, window=window, seed=seed)
        self.store, self.image_size, self.pin_memory = store, image_size, pin_memory
        self.rank, self.share = rank, share.stop - share.start
        batch_bytes = self.share * (store.meta.channels * image_size**2 + 8)
        num_workers = workers_with_room(num_workers, (PREFETCH * num_workers + 1) * batch_bytes * world_size, reporter)
        # a power of two divides the number of lanes, so that each lane stays with one worker
        self.num_workers = 1 << (min(num_workers, NUM_LANES).bit_length() - 1) if num_workers else 0

    def start_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of optimiser steps `step`, `step` + 1, … without end; closing the generator ends the workers.

        Raises:
            VdiffError: a shard or an image cannot be read.
        """
        return closed_at_exit(self._batches(step))

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        loader = DataLoader(
            _Lanes(self),
            batch_size=None,
            sampler=count(step),
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH if self.num_workers else None,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # a loader draws a seed, by default from the global generator
        )
        with shared_memory_named(), closing(answers_of(loader)) as answers:
            for answer in answers:
                if isinstance(answer, VdiffError):
                    raise answer
                yield Batch(*answer)

    def samples(self, lane: int, position: int) -> Generator[Sample, None, None]:
        """The images of a lane of this process in the order of training, from `position` on, without end."""
        lane += self.rank * NUM_LANES
        number, skip = divmod(position, self.order.window)
        with closing(self._in_sequence(lane, position - skip)) as sequence:
            while True:
                window = list(islice(sequence, self.order.window))
                for place in self.order.permutation(lane, number)[skip:].tolist():
                    yield window[place]
                window.clear()  # before the next one is read
                number, skip = number + 1, 0

    def _in_sequence(self, lane: int, position: int) -> Generator[Sample, None, None]:
        """The images of a lane as they lie in its shards, from `position` on, without end."""
        for shard, skip in self.order.parts(lane, position):
            with closing(self.store.samples(shard, (self.image_size,), skip)) as samples:
                yield from samples


class _Lanes(Dataset[tuple[Tensor, Tensor | None] | VdiffError]):
    """A step to its images and classes. A process that is asked for the next batch of a lane has it at hand."""

    def __init__(self, batches: ShardBatches) -> None:
        self.batches = batches
        self._lanes: dict[int, tuple[int, Generator[Sample, None, None]]] = {}

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor | None] | VdiffError:
        batches, size = self.batches, self.batches.image_size
        turn, lane = divmod(step, NUM_LANES)
        expected, samples = self._lanes.pop(lane, (-1, None))
        if samples is None or expected != step:
            samples = batches.samples(lane, turn * batches.share)
        meta, first = batches.store.meta, batches.rank * batches.share
        flips = batches.plan.flips(step)[first : first + batches.share].tolist()
        pixels = np.empty((batches.share, meta.channels, size, size), np.uint8)
        classes = np.zeros(batches.share, np.int64)
        try:
            for place, (key, encoded, label) in enumerate(islice(samples, batches.share)):
                image = decode(encoded[size], meta.channels, size, f"{batches.store.path}: image {key}")
                pixels[place] = image[:, :, ::-1] if flips[place] else image
                classes[place] = label or 0
        except VdiffError as error:
            return error  # raised in a worker, it would reach the user with a worker's traceback in its message
        self._lanes[lane] = (step + NUM_LANES, samples)
        return torch.from_numpy(pixels), torch.from_numpy(classes) if meta.class_names else None
