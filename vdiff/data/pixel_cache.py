"""Decoded images kept in memory, so that only the first epoch decodes."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdiff.data.store import ImageStore

# so few pixels are decoded before a worker process has started
ALONE_BYTES = 16 * 2**20


def cache_limit() -> int:
    """A quarter of the memory that is available now, in bytes: how much of it decoded images may take."""
    found = []
    meminfo = Path("/proc/meminfo")  # free memory as sysconf counts it leaves out what the page cache would give back
    if meminfo.exists():
        found = [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
    if not found and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    group = Path("/sys/fs/cgroup/memory.max")  # a container's share of the machine
    if group.exists() and (text := group.read_text().strip()).isdigit():
        found.append(int(text))
    return min(found, default=2**30) // 4


class PixelCache:
    """Decoded images in the memory of this process, as they came: mirrored or not. What is in it stays.

    Only the trainer's process reads and writes it, so nothing is shared, locked, or copied to workers. A set that is
    too large has part of its images here, and as epochs show all alike, it does not matter which.
    """

    def __init__(self, store: ImageStore, image_shape: tuple[int, ...], limit_bytes: int) -> None:
        self.pixels = _room((min(len(store), limit_bytes // math.prod(image_shape)), *image_shape))
        self.mirrored = np.zeros(len(self.pixels), bool)
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

    def image(self, row: int, mirrored: bool) -> Tensor:
        """(C, H, W), mirrored or not as asked."""
        return self.pixels[row].flip(-1) if mirrored != self.mirrored[row] else self.pixels[row]

    def keep(self, indices: np.ndarray, flips: np.ndarray, pixels: Tensor, classes: np.ndarray) -> None:
        """Take in decoded images, mirrored where `flips` says so, as far as there is room, and all classes."""
        if self.classes is not None:
            self.classes[indices] = classes
        for place, (index, mirrored) in enumerate(zip(indices.tolist(), flips.tolist(), strict=True)):
            if self.used == len(self.pixels):
                break
            if self.rows[index] < 0:  # it may have been asked for twice before it came
                self.pixels[self.used], self.mirrored[self.used] = pixels[place], mirrored
                self.rows[index] = self.used
                self.used += 1


def _room(shape: tuple[int, ...]) -> Tensor:
    """An uint8 tensor whose memory is taken as it is written, where possible in large pages: far fewer page faults."""
    num_bytes = math.prod(shape)
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)
