"""The dataset to compare samples with: read once; its statistics are cached for later evaluations."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
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

from vdiff.data.batches import decode, decode_stored
from vdiff.data.captions import CaptionSettings
from vdiff.data.datasets import AnyStore, open_dataset
from vdiff.data.store import DATA_FILE, ImageStore, StoredImage
from vdiff.errors import VdiffError
from vdiff.evaluation.features import Features, ScaledFeatures
from vdiff.evaluation.metrics import Arrays, FrechetDistance, Moments, from_arrays, to_arrays, total
from vdiff.evaluation.results import Reference, Scale
from vdiff.evaluation.work import WorkFolder, key_of, read_arrays, write_arrays
from vdiff.files import make_folder
from vdiff.reporting import Progress, Reporter

PARTS = 16
MAX_KEPT = 10_000
"""At most this many vectors are used for the kernel distance, precision and recall."""
BATCH = 128
MAX_DECODERS = 8
FORMAT = 1
MOMENTS = ("counts", "means", "scatters")


class ReferenceImages:
    """A dataset in one size, in order, decoded by threads.

    Args:
        most: read about this many images of a larger dataset: the first ones of each stretch.

    Attributes:
        numbers: the numbers, in the dataset, of the images that are read.

    Raises:
        VdiffError: the dataset is missing or incomplete, or has no images of this size.
    """

    def __init__(self, dataset: Path | str, image_size: int, most: int | None = None) -> None:
        self.store: AnyStore = open_dataset(dataset)
        self.store.check_squares()
        self.store.check_size(image_size)
        self.image_size, self.channels = image_size, self.store.meta.channels
        if not len(self.store):
            raise VdiffError(f"{self.store.path} holds no {self.store.meta.noun}s", "prepare it again")
        self.part = 1 if most is None else -(-len(self.store) // most)
        self.stretches = [(start, start - (start - stop) // self.part) for start, stop in self.store.stretches()]
        self.numbers = np.concatenate([np.arange(start, stop) for start, stop in self.stretches])

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def identity(self) -> str:
        """The key of these images: the fingerprint, or if there is none, the file's path, length and time."""
        fingerprint = self.store.meta.fingerprint
        if not fingerprint:
            place = Path(str(self.store.path)).resolve()
            file = place / DATA_FILE if isinstance(self.store, ImageStore) else place
            status = file.stat() if file.exists() else None
            times = [status.st_size, status.st_mtime_ns] if status else []
            fingerprint = key_of(["no fingerprint", str(place), len(self.store), *times])
        part = [] if self.part == 1 else [self.part]
        return key_of([fingerprint, self.image_size, self.channels, len(self.store), *part])

    def describe(self) -> Reference:
        """The dataset's description in the results."""
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

    def parts(self, name: str) -> tuple[dict[str, int], list[list[tuple[int, int]]]]:
        """At most `PARTS` parts for `WorkFolder.compute`: names, sizes, and the stretches of each.

        The parts are the same for any number of processes.
        """
        count = min(PARTS, len(self.stretches))
        edges = [len(self.stretches) * k // count for k in range(count + 1)]
        parts = [self.stretches[start:stop] for start, stop in pairwise(edges)]
        return {f"{name}-{k:02d}.npz": sum(stop - start for start, stop in part) for k, part in enumerate(parts)}, parts

    def batches(self, stretches: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
        """The number of the first image and (B, C, H, W) uint8, for all images of some stretches.

        Raises:
            VdiffError: an image is missing or damaged.
        """
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_DECODERS)) as pool:
            for start, stop in stretches:
                samples = iter(self.store.stretch(start, stop))
                while some := list(islice(samples, BATCH)):
                    yield start, torch.from_numpy(np.stack(list(pool.map(self._decoded, some))))
                    start += len(some)

    def image(self, index: int) -> Tensor:
        """(C, H, W) uint8."""
        (image,) = self.some(np.array([index]))
        return image

    def some(self, indices: NDArray[np.int64]) -> Iterator[Tensor]:
        """The images with these numbers, in order, (C, H, W) uint8 each; every stretch is read at most once."""
        return (torch.from_numpy(np.array(self._decoded(sample))) for sample in self._stored(indices))

    def pairs(self, samples: range, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of which samples are drawn, in an order of the seed, in turn.

        Returns:
            images and condition images (B, C, H, W) uint8, and classes (B,) int64.
        """
        store, size = self.store, self.image_size
        assert isinstance(store, ImageStore), "only these have condition images"
        order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(self)]))).permutation(
            self.numbers
        )
        numbers = [int(order[k % len(order)]) for k in samples]

        def stacked(read: Callable[[int, int], bytes], what: str) -> Tensor:
            files = [(read(size, k), f"{store.path}: {what} {k}") for k in numbers]
            return torch.from_numpy(np.stack([decode(file, self.channels, size, where) for file, where in files]))

        classes = torch.tensor([store.label(k) or 0 for k in numbers])
        return stacked(store.encoded, "image"), stacked(store.condition, "condition of image"), classes

    def captions(self, count: int, seed: int) -> dict[int, str]:
        """The captions of `count` images by number, in random order; fewer if fewer images have one.

        The seed determines the order, and the caption of an image that has several.
        """
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(self)])))
        order = generator.permutation(self.numbers)
        if self.store.meta.num_captions == len(self.store):
            order = order[:count]
        read = np.sort(order)
        known = {int(k): sample.caption for k, sample in zip(read, self._stored(read), strict=True)}
        found = [k for k in order.tolist() if known[k]][:count]
        return {k: CaptionSettings().apply(known[k], generator) for k in found}

    def _stored(self, indices: NDArray[np.int64]) -> Iterator[StoredImage]:
        """The samples with these numbers, in order."""
        for start, stop in self.stretches:
            low, high = np.searchsorted(indices, [start, stop])
            if isinstance(self.store, ImageStore):
                for index in indices[low:high].tolist():
                    yield from self.store.stretch(index, index + 1)
            elif low < high:
                wanted = set(indices[low:high].tolist())
                samples = enumerate(self.store.stretch(start, stop), start)
                yield from (sample for index, sample in samples if index in wanted)

    def _decoded(self, sample: StoredImage) -> NDArray[Any]:
        where, meta = f"{self.store.path}: {self.store.meta.noun} {sample.name}", self.store.meta
        return decode_stored(self.store, sample.images[self.image_size], meta.shape(self.image_size)[1:], where)


def random_subset(count: int, most: int, stream: int = 0) -> NDArray[np.int64]:
    """At most `most` of 0 … count − 1, drawn uniformly, in order; the same in every call."""
    if count <= most:
        return np.arange(count)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([count, most, stream])))
    return np.sort(generator.choice(count, most, replace=False))


@dataclass(frozen=True)
class DataStats:
    """Statistics of a dataset for one kind of features.

    Attributes:
        moments: of all images.
        kept, indices: (r, d) float32 vectors of at most `MAX_KEPT` images, and the numbers of those images.
    """

    moments: Moments
    kept: NDArray[np.float32]
    indices: NDArray[np.int64]


def scale_of(data: DataStats, n: int, features: ScaledFeatures) -> Scale:
    """The scale of Fréchet distances of `n` samples, from the statistics of the data alone.

    The expected distance of k samples of the data to the remaining N − k is proportional to 1/k + 1/(N − k), as both
    have the same distribution. This gives the distance of n samples to all N.

    Args:
        features: those of the statistics.
    """
    total = data.moments.count
    k = min(n, total // 2, len(data.kept))
    vectors = data.kept[random_subset(len(data.kept), k, 2)].astype(np.float64)
    others = Moments.of(vectors)
    padded = np.pad(vectors.reshape(k, *features.grid), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
    blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    rest = FrechetDistance(data.moments - others)
    return Scale(
        same=rest(others) * (1 / n + 1 / total) / (1 / k + 1 / (total - k)),
        blurred=rest(Moments.of(blurred.reshape(k, -1))),
        mean_image=float(np.trace(data.moments.covariance)),
        noise=rest(features.noise()),
        noun=features.noun,
    )


def cache_folder() -> Path:
    """The default cache: `vdiff` in the user's cache folder, or in the temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(home) if home else Path.home() / ".cache") / "vdiff"
    except RuntimeError:  # the user has no home folder
        return Path(tempfile.gettempdir()) / "vdiff"


def data_stats(images: ReferenceImages, features: Features, cache: Path | None, work: WorkFolder) -> DataStats:
    """The statistics of a dataset: from the cache, or computed by all processes and cached.

    A killed computation continues: its parts are cached too.

    Args:
        cache: `cache_folder()` by default.
        work: its folder replaces a cache that cannot be written.

    Raises:
        VdiffError: an image cannot be read, or the disk refuses.
    """
    cache = cache or cache_folder()
    key = key_of([FORMAT, images.identity, features.fingerprint, features.dim, MAX_KEPT, PARTS])
    name, processes, reporter = f"reference-{key[:32]}.npz", work.processes, work.reporter
    with processes.together():
        found = _cached(cache / name, features.dim)
    if found is not None:
        return found
    with processes.together():
        path = _writable(cache, work.path, reporter) / name
    lock = FileLock(path.with_suffix(".lock"))
    try:
        with processes.together():
            if processes.is_main:
                _wait_for(lock, reporter)
        with processes.together():
            found = _cached(path, features.dim)  # another evaluation may have written it by now
        if found is None:
            _compute(
                path, images, features, WorkFolder(path.with_suffix(".partial"), key, processes, reporter, work.noun)
            )
            found = _cached(path, features.dim)
    finally:
        lock.release()
    if found is None:
        raise VdiffError(f"{path} cannot be read", "remove it, then run the command again")
    return found


def _writable(cache: Path, spare: Path, reporter: Reporter) -> Path:
    """The cache, or `spare` if it cannot be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        reporter.line(f"{cache} cannot be written ({error.strerror}): continuing without it")
        return make_folder(spare)


def _wait_for(lock: FileLock, reporter: Reporter) -> None:
    """Take the lock; wait while another evaluation of the same data holds it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        reporter.line("waiting for another evaluation of the same data")
        lock.acquire()
    except OSError as error:
        raise VdiffError(f"cannot write {lock.lock_file}: {error.strerror}", "give another --cache") from None


def _compute(path: Path, images: ReferenceImages, features: Features, work: WorkFolder) -> None:
    """Read all data, and write the statistics to `path`."""
    sizes, parts = images.parts("part")
    indices = images.numbers[random_subset(len(images), MAX_KEPT)]

    def compute(number: int, bar: Progress, done: int) -> Arrays:
        moments = Moments.none(features.dim)
        kept = [np.empty((0, features.dim), np.float32)]
        for first, pixels in images.batches(parts[number]):
            vectors = features(pixels)
            moments = moments + Moments.of(vectors)
            low, high = np.searchsorted(indices, [first, first + len(pixels)])
            kept.append(vectors[indices[low:high] - first].astype(np.float32))
            done += len(pixels)
            bar.update(done)
        return {**to_arrays([moments], MOMENTS), "kept": np.concatenate(kept)}

    work.compute("reference", sizes, compute)
    with work.processes.together():
        if work.processes.is_main:
            found = [work.read(name) for name in sizes]
            merged = total(from_arrays(Moments, each, MOMENTS)[0] for each in found)
            kept = np.concatenate([each["kept"] for each in found])
            write_arrays(path, {**to_arrays([merged], MOMENTS), "kept": kept, "indices": indices})
    work.remove()


def _cached(path: Path, dim: int) -> DataStats | None:
    """The statistics in the cache; None if there are none, or they do not fit."""
    arrays = read_arrays(path) or {}
    try:
        (moments,) = from_arrays(Moments, arrays, MOMENTS)
        found = DataStats(moments, arrays["kept"], arrays["indices"])
    except (KeyError, ValueError, TypeError):
        return None
    is_whole = moments.mean.shape == (dim,) and found.kept.shape == (len(found.indices), dim)
    return found if is_whole else None
