"""Several processes that draw one set of images: which of them this is, and how they wait for each other."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from vdiff.errors import VdiffError
from vdiff.models.device import pick_device

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long one process waits for the others: shares are equal in number, not in time."""
SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True)
class Processes:
    """This process among `count`; number 0 begins, finishes and speaks.

    Attributes:
        device: what this process computes on.
    """

    device: torch.device
    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks."""
        return self.number == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th of the items."""
        return items[self.number :: self.count]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when all processes do; what fails in one of them fails in all, in the same words.

        Raises:
            VdiffError: raised inside the block, here or elsewhere.
        """
        failure: VdiffError | None = None
        try:
            yield
        except VdiffError as error:
            failure = error
        if self.count > 1:
            failure = self._first_failure(failure)
        if failure is not None:
            raise failure

    def _first_failure(self, failure: VdiffError | None) -> VdiffError | None:
        from torch import distributed

        failed = torch.tensor([int(failure is not None)], device=self.device)
        work = distributed.all_reduce(failed, async_op=True)
        while not work.is_completed():  # waiting inside it would not hear a Ctrl-C
            time.sleep(SECONDS_BETWEEN_LOOKS)
        work.wait()
        if not failed.item():
            return None
        failures: list[tuple[type[VdiffError], str, str] | None] = [None] * self.count
        said = (type(failure), failure.cause, failure.hint) if failure else None
        distributed.all_gather_object(failures, said)
        kind, cause, hint = next(found for found in failures if found)
        return kind(cause, hint)


def join(device: str) -> Processes:
    """This process, with those that a launcher (torchrun, accelerate) started beside it.

    Args:
        device: auto, cpu, cuda or mps; several processes on CUDA take a GPU each.

    Raises:
        OptionError: this machine has no such device.
    """
    picked = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(picked)
    from accelerate import PartialState

    state = PartialState(cpu=picked.type == "cpu", timeout=PATIENCE)
    atexit.register(_leave)
    return Processes(state.device, state.process_index, state.num_processes)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
