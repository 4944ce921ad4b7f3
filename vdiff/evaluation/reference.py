"""The data that samples are compared with: streamed once, and what was found of it kept for the next evaluation."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from vdiff.data.batches import decode
from vdiff.data.datasets import AnyStore, open_dataset
from vdiff.data.store import DATA_FILE, ImageStore
from vdiff.distributed import Processes
from vdiff.errors import VdiffError
from vdiff.evaluation.features import Features
from vdiff.evaluation.moments import Moments, total
from vdiff.evaluation.pieces import Arrays, WorkFolder, key_of, read_arrays, write_arrays
from vdiff.evaluation.results import Reference
from vdiff.files import make_folder
from vdiff.reporting import Progress, Reporter

PARTS = 16
MAX_KEPT = 10_000
"""Vectors that pairs are made of, at most: for the kernel distance, for precision and recall."""
BATCH = 128
MAX_DECODERS = 8
FORMAT = 1


class Images:
    """A dataset at one size, in order, decoded by threads.

    Raises:
        VdiffError: no such dataset, an incomplete one, or one without images of this size.
    """

    def __init__(self, dataset: Path | str, image_size: int) -> None:
        self.store: AnyStore = open_dataset(dataset)
        self.store.check_size(image_size)
        self.image_size, self.channels = image_size, self.store.meta.channels
        if not len(self.store):
            raise VdiffError(f"{self.store.path} holds no images", "prepare it again")
        self.stretches = list(self.store.stretches())

    def __len__(self) -> int:
        return len(self.store)

    @property
    def identity(self) -> str:
        """What tells these images from others: their fingerprint, or where there is none, file, length and time."""
        fingerprint = self.store.meta.fingerprint
        if not fingerprint:
            place = Path(str(self.store.path)).resolve()
            file = place / DATA_FILE if isinstance(self.store, ImageStore) else place
            status = file.stat() if file.exists() else None
            times = [status.st_size, status.st_mtime_ns] if status else []
            fingerprint = key_of(["no fingerprint", str(place), len(self), *times])
        return key_of([fingerprint, self.image_size, self.channels, len(self)])

    def describe(self) -> Reference:
        """What results say of it."""
        meta = self.store.meta
        how = [meta.resample, f"crop {meta.crop}" if meta.crop else ""]
        quality = f" quality {meta.quality}" if meta.quality is not None else ""
        return Reference(
            name=str(self.store.path),
            fingerprint=meta.fingerprint,
            num_images=len(self),
            image_size=self.image_size,
            channels=self.channels,
            split=meta.shard or "all",
            resize=", ".join(part for part in how if part),
            format=f"{meta.image_format}{quality}",
        )

    def parts(self) -> list[Sequence[tuple[int, int]]]:
        """At most `PARTS` parts, each of some stretches; the same for any number of processes."""
        count = min(PARTS, len(self.stretches))
        edges = [len(self.stretches) * k // count for k in range(count + 1)]
        return [self.stretches[start:stop] for start, stop in pairwise(edges)]

    def batches(self, stretches: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
        """The number of the first image, and (B, C, H, W) uint8, of all images of some stretches.

        Raises:
            VdiffError: an image that is missing or damaged.
        """
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_DECODERS)) as pool:
            for start, stop in stretches:
                samples = iter(self.store.stretch(start, stop))
                while some := list(islice(samples, BATCH)):
                    yield start, torch.from_numpy(np.stack(list(pool.map(self._decoded, some))))
                    start += len(some)

    def image(self, index: int) -> Tensor:
        """(C, H, W) uint8."""
        (sample,) = self.store.stretch(index, index + 1)
        return torch.from_numpy(np.array(self._decoded(sample)))

    def some(self, indices: NDArray[np.int64]) -> Iterator[Tensor]:
        """Those images, in order, (C, H, W) uint8 each; the stretches that hold them are read once."""
        for start, stop in self.stretches:
            low, high = np.searchsorted(indices, [start, stop])
            if isinstance(self.store, ImageStore):
                yield from (self.image(int(index)) for index in indices[low:high])
            elif low < high:
                wanted = set(indices[low:high].tolist())
                for index, sample in enumerate(self.store.stretch(start, stop), start):
                    if index in wanted:
                        yield torch.from_numpy(np.array(self._decoded(sample)))

    def _decoded(self, sample: tuple[str, dict[int, bytes], int | None]) -> NDArray[np.uint8]:
        name, encoded, _ = sample
        return decode(encoded[self.image_size], self.channels, self.image_size, f"{self.store.path}: image {name}")


def chosen(count: int, most: int, stream: int = 0) -> NDArray[np.int64]:
    """At most `most` of 0 … count − 1, in order, each as likely as any; the same in every call."""
    if count <= most:
        return np.arange(count)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([count, most, stream])))
    return np.sort(generator.choice(count, most, replace=False))


@dataclass(frozen=True)
class Statistics:
    """What is known of the data by one kind of features.

    Attributes:
        moments: of all images.
        kept, indices: (r, d) float32 vectors of at most `MAX_KEPT` images, and the numbers of those images.
    """

    moments: Moments
    kept: NDArray[np.float32]
    indices: NDArray[np.int64]


def cache_folder() -> Path:
    """Where statistics are kept by default: `vdiff` in the user's folder for caches, or for temporary files."""
    home = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(home) if home else Path.home() / ".cache") / "vdiff"
    except RuntimeError:  # the user has no home
        return Path(tempfile.gettempdir()) / "vdiff"


def statistics(
    images: Images, features: Features, *, cache: Path, spare: Path, processes: Processes, reporter: Reporter
) -> Statistics:
    """Those of a dataset: from the cache if they are there, else computed, by all processes, and put there.

    What a killed process found lies in the cache too, part by part.

    Args:
        spare: a folder that is used instead of a cache that cannot be written.

    Raises:
        VdiffError: an image cannot be read, or the disk refuses.
    """
    key = key_of([FORMAT, images.identity, features.fingerprint, features.dim, MAX_KEPT, PARTS])
    name = f"reference-{key[:32]}.npz"
    with processes.together():
        found = _cached(cache / name, features.dim)
    if found is not None:
        return found
    with processes.together():
        path = _writable(cache, spare, reporter) / name
    lock = FileLock(path.with_suffix(".lock"))
    try:
        with processes.together():
            if processes.is_main:
                _wait_for(lock, reporter)
        with processes.together():
            found = _cached(path, features.dim)  # another evaluation may have put it there by now
        if found is None:
            _compute(path, key, images, features, processes, reporter)
            found = _cached(path, features.dim)
    finally:
        lock.release()
    if found is None:
        raise VdiffError(f"{path} cannot be read", "remove it, then give the command again")
    return found


def _writable(cache: Path, spare: Path, reporter: Reporter) -> Path:
    """The cache, or `spare` where it cannot be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        reporter.line(f"{cache} cannot be written ({error.strerror}): going on without it")
        return make_folder(spare)


def _wait_for(lock: FileLock, reporter: Reporter) -> None:
    """Take the lock, when another evaluation of the same data is done with them."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        reporter.line("waiting for another evaluation that reads the same data")
        lock.acquire()
    except OSError as error:
        raise VdiffError(f"cannot write {lock.lock_file}: {error.strerror}", "give another --cache") from None


def _compute(
    path: Path, key: str, images: Images, features: Features, processes: Processes, reporter: Reporter
) -> None:
    """Read all the data, and put what was found in `path`."""
    work = WorkFolder(path.with_suffix(".partial"), key, processes)
    parts, indices = images.parts(), chosen(len(images), MAX_KEPT)
    names = [f"part-{k:02d}.npz" for k in range(len(parts))]
    mine = list(processes.share(work.missing(names)))
    number = sum(stop - start for name in mine for start, stop in parts[names.index(name)])
    with reporter.progress("reference", number, "images") as bar:
        counter = _Counter(bar)
        work.do(names, lambda name: _part(images, features, parts[names.index(name)], indices, counter))
    with processes.together():
        if processes.is_main:
            pieces = [work.read(name) for name in names]
            merged = total(moments_in(piece)[0] for piece in pieces)
            kept = np.concatenate([piece["kept"] for piece in pieces])
            write_arrays(path, {**arrays_of([merged]), "kept": kept, "indices": indices})
            work.remove()


def arrays_of(moments: Sequence[Moments]) -> dict[str, NDArray[Any]]:
    """Some moments as arrays."""
    return {
        "counts": np.array([each.count for each in moments]),
        "means": np.stack([each.mean for each in moments]),
        "scatters": np.stack([each.scatter for each in moments]),
    }


def moments_in(arrays: Arrays) -> list[Moments]:
    """The inverse of `arrays_of`."""
    names = ("counts", "means", "scatters")
    return [
        Moments(int(count), mean, scatter)
        for count, mean, scatter in zip(*(arrays[name] for name in names), strict=True)
    ]


class _Counter:
    """Counts what was done in all parts."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.done = bar, 0

    def add(self, number: int) -> None:
        self.done += number
        self.bar.update(self.done)


def _part(
    images: Images, features: Features, stretches: Sequence[tuple[int, int]], indices: NDArray[np.int64], done: _Counter
) -> dict[str, NDArray[Any]]:
    moments = Moments.none(features.dim)
    kept = [np.empty((0, features.dim), np.float32)]
    for first, pixels in images.batches(stretches):
        vectors = features(pixels)
        moments = moments + Moments.of(vectors)
        low, high = np.searchsorted(indices, [first, first + len(pixels)])
        kept.append(vectors[indices[low:high] - first].astype(np.float32))
        done.add(len(pixels))
    return {**arrays_of([moments]), "kept": np.concatenate(kept)}


def _cached(path: Path, dim: int) -> Statistics | None:
    """What lies in the cache; None if there is nothing, or something else."""
    arrays = read_arrays(path)
    try:
        (moments,) = moments_in(arrays or {})
        found = Statistics(moments, (arrays or {})["kept"], (arrays or {})["indices"])
    except (KeyError, ValueError, TypeError):
        return None
    is_whole = moments.dim == dim and found.kept.shape == (len(found.indices), dim)
    return found if is_whole else None
