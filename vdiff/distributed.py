"""The device of a command, and this process among those that a launcher started."""

from __future__ import annotations

import atexit
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from vdiff.errors import OptionError, VdiffError, suggestion

T = TypeVar("T")
CGROUPS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Controller, "" in version 2 → the files of the limit and of what is used, and the cached files in `memory.stat`."""
PATIENCE = timedelta(days=1)
"""How long one process waits for the others: shares have equal numbers of items, but take different times."""
SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True)
class Processes:
    """This process among `world_size`.

    Attributes:
        device: the device of this process.
        rank: its number, 0 … `world_size` − 1.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items: every `world_size`-th."""
        return items[self.rank :: self.world_size]

    def part(self, batch_size: int) -> slice:
        """This process's contiguous part of a batch."""
        size = batch_size // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end of the block for all processes; a `VdiffError` in one of them is raised in all.

        Raises:
            VdiffError: raised inside the block, here or elsewhere.
        """
        failure: VdiffError | None = None
        try:
            yield
        except VdiffError as error:
            failure = error
        if self.world_size > 1:
            failure = self._first_failure(failure)
        if failure is not None:
            raise failure

    def _first_failure(self, failure: VdiffError | None) -> VdiffError | None:
        from torch import distributed

        failed = torch.tensor([int(failure is not None)], device=self.device)
        work = distributed.all_reduce(failed, async_op=True)
        while not work.is_completed():  # a blocking wait would ignore Ctrl-C
            time.sleep(SECONDS_BETWEEN_LOOKS)
        work.wait()
        if not failed.item():
            return None
        failures: list[tuple[type[VdiffError], str, str] | None] = [None] * self.world_size
        said = (type(failure), failure.cause, failure.hint) if failure else None
        distributed.all_gather_object(failures, said)
        kind, cause, hint = next(found for found in failures if found)
        return kind(cause, hint)


def join(device: str) -> Processes:
    """This process, and the others that a launcher (torchrun, accelerate) started.

    Args:
        device: auto, cpu, cuda or mps; on CUDA each process takes its own GPU.

    Raises:
        OptionError: this machine has no such device.
    """
    picked = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(picked)
    from accelerate import PartialState

    state = PartialState(cpu=picked.type == "cpu", timeout=PATIENCE)
    leave_at_exit()
    return Processes(state.device, state.process_index, state.num_processes)


def leave_at_exit() -> None:
    """Close the process group when this process ends; torch warns otherwise."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `mps`; `auto` takes the first of cuda, mps and cpu that this machine has.

    Raises:
        OptionError: this machine has no such device.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in has.items() if is_there))
    if name not in has:
        raise OptionError(f"unknown device {name!r}", suggestion(str(name), ["auto", *has]))
    if not has[name]:
        raise OptionError(f"--device {name}: this machine has no {name} device", "give --device auto")
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Free bytes on a device; in a container, at most what its limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(min(psutil.virtual_memory().available, left_in_cgroups()))


def left_in_cgroups(root: Path = Path("/")) -> float:
    """Bytes that the limits on this process's cgroups, of version 1 or 2, still leave; inf without a limit.

    A limit of a parent group counts, too. Cached files count as free, as the kernel drops them when memory is short.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    left = math.inf
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        names, top = CGROUPS["memory" if controllers else ""], root / "sys/fs/cgroup"
        top = top / "memory" if controllers else top
        group = top / path.lstrip("/")  # in a container it may be missing: then the container's group is at the top
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such group, or "max": no limit
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left = min(left, max(0, limit - used + int(statistics.get(names[2], 0))))
            if folder == top:
                break
    return left


@contextmanager
def memory_errors_named(remedy: str = "give a smaller --batch_size, or --precision bf16") -> Iterator[None]:
    """Turn an out-of-memory error into one line that names settings which need less memory.

    Raises:
        VdiffError: memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which …"
        capacity = re.search(r"total capacity of ([\d.]+ \w+)", str(error))
        raise VdiffError(f"out of GPU memory{f' (it has {capacity[1]})' if capacity else ''}", remedy) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise VdiffError("out of memory", remedy) from None
