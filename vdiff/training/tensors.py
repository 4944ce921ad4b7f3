"""Training on tensors in memory, or on any iterable of tensors."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from vdiff.data.batches import Batch, Batches, BatchPlan
from vdiff.errors import VdiffError
from vdiff.reporting import Reporter
from vdiff.training.config import LoopConfig
from vdiff.training.dataset import TENSORS, TrainingData
from vdiff.training.engine import Engine


@dataclass(frozen=True)
class TensorBatches:
    """Endless batches of `batch_size` samples from `data`.

    A tensor (N, *shape) is a dataset; its samples come in the seed's order. Any other iterable, such as a list of
    batches or a `DataLoader`, is read repeatedly in its own order. Its items are samples (*shape) or batches
    (B, *shape) of any size, uint8 or real, alone (or in a list of one) or as pairs (samples, classes). A resumed run
    skips what it has seen: it ends with the same bits if the iterable returns the same items each time.

    Attributes:
        shape: of a sample.
        share: this process's samples of each batch.
    """

    data: Iterable[Any]
    shape: tuple[int, ...]
    batch_size: int
    seed: int
    share: slice

    def start_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of optimiser steps `step`, `step` + 1, … without end.

        Raises:
            VdiffError: an item is not a tensor of this shape, or the data have run out.
        """
        if isinstance(self.data, Tensor):
            samples, _ = self._rows(self.data)
            plan = BatchPlan(length=len(samples), batch_size=self.batch_size, seed=self.seed, flip=False)
            while True:
                yield Batch(samples[torch.from_numpy(plan.indices(step)[self.share])], None)
                step += 1
        number, count = 0, 0
        waiting: list[tuple[Tensor, Tensor | None]] = []
        for rows, classes in self._items():
            if waiting and waiting[0][0].dtype != rows.dtype:
                raise VdiffError("the data hold both uint8 and real numbers", "give all items one type")
            if waiting and (waiting[0][1] is None) != (classes is None):
                raise VdiffError("the data hold samples with and without classes", "give all items classes, or none")
            waiting.append((rows, classes))
            count += len(rows)
            if count < self.batch_size:
                continue
            samples = torch.cat([each for each, _ in waiting])
            labels = None if classes is None else torch.cat([each for _, each in waiting if each is not None])
            while count >= self.batch_size:
                if number >= step:
                    mine = None if labels is None else labels[: self.batch_size][self.share]
                    yield Batch(samples[: self.batch_size][self.share], mine)
                samples, labels = samples[self.batch_size :], None if labels is None else labels[self.batch_size :]
                number, count = number + 1, len(samples)
            waiting = [(samples, labels)]

    def _items(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Samples and classes of every item, repeatedly."""
        while True:
            count = 0
            for count, item in enumerate(self.data, 1):  # noqa: B007
                yield self._rows(item)
            if not count:
                raise VdiffError("the data have run out", "give a list or a DataLoader, which can be read again")

    def _rows(self, item: Any) -> tuple[Tensor, Tensor | None]:
        parts = item if isinstance(item, tuple | list) and len(item) in (1, 2) else [item]
        x, classes = parts if len(parts) == 2 else (parts[0], None)
        if not isinstance(x, Tensor) or tuple(x.shape[-len(self.shape) :]) != self.shape:
            found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            shape = ", ".join(map(str, self.shape))
            raise VdiffError(f"the data hold {found}", f"give tensors ({shape}) or (B, {shape})")
        rows = x.reshape(-1, *self.shape)
        labels = None if classes is None else torch.as_tensor(classes).reshape(-1).long()
        if labels is not None and len(labels) != len(rows):
            raise VdiffError(
                f"the data hold {len(rows)} samples with {len(labels)} classes", "give each sample its class"
            )
        return (rows if x.dtype == torch.uint8 else rows.float()), labels


@dataclass(frozen=True, kw_only=True)
class TensorData(TrainingData):
    """Samples of `shape` from an iterable of tensors, see `TensorBatches`; checkpoints record no path for them."""

    tensors: Iterable[Any]

    @property
    def name(self) -> str:
        """The text that a checkpoint records instead of a path."""
        return TENSORS

    @property
    def num_images(self) -> int:
        """The number of samples in a tensor; 0 for other iterables, whose length is unknown."""
        return len(self.tensors) if isinstance(self.tensors, Tensor) else 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of a tensor's shape, type and bytes; empty for other iterables, which may differ each time."""
        if not isinstance(self.tensors, Tensor):
            return ""
        values = self.tensors.detach().cpu().contiguous()
        digest = sha256(f"{tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def batches(self, config: LoopConfig, engine: Engine, reporter: Reporter | None = None) -> Batches:
        """This process's share of the batches."""
        del reporter
        share = engine.part(config.batch_size)
        return TensorBatches(self.tensors, self.shape, config.batch_size, config.seed, share)
