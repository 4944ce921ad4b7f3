"""Memorisation: distances from samples to the nearest image of the data, and from images to the nearest other image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.data.images import captioned_grid, save_png
from vdiff.evaluation.features import as_unit, mean_colours
from vdiff.evaluation.metrics import Arrays, median_metric, on_device, squared_distances
from vdiff.evaluation.reference import ReferenceImages, random_subset
from vdiff.evaluation.results import EvalRow, Metric
from vdiff.evaluation.work import WorkFolder
from vdiff.models.codec import PIXEL_CODEC, from_uint8, to_uint8
from vdiff.reporting import Progress
from vdiff.text import plural

MAX_QUERIES = 1_000
"""At most this many samples, and images of the data, are searched for their nearest images."""
SEARCH_SIDE, SHOWN_SIDE = 32, 64
"""Images are compared at up to 32 × 32 pixels, and shown at up to 64 × 64."""
COLUMNS, BANDS = 8, 6


def thumbnails(images: Tensor) -> Tensor:
    """(n, C, H, W) in [−1, 1], as uint8 of at most `SHOWN_SIDE` pixels a side."""
    return to_uint8(PIXEL_CODEC.clip(mean_colours(images.float(), SHOWN_SIDE)))


def search_vectors(images: Tensor) -> NDArray[np.float32]:
    """(n, C, H, W) uint8 → (n, D) float32: pixels in [−1, 1], or the mean colours of 32 × 32 parts."""
    x = as_unit(thumbnails(as_unit(images)))  # the same rounding for data and samples
    vectors: NDArray[np.float32] = mean_colours(x, SEARCH_SIDE).flatten(1).cpu().numpy()
    return vectors


class NearestSearch:
    """The nearest vector to each query, among vectors that arrive in batches.

    Args:
        queries: (q, d).
        own: (q,) the number of a query that is one of the vectors, so that it does not find itself; −1: it is not.
    """

    def __init__(
        self, queries: NDArray[Any], own: NDArray[np.int64] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.queries = on_device(queries, device)
        place = self.queries.device
        self.own = torch.as_tensor(np.full(len(queries), -1) if own is None else own, device=place)
        self.squares = torch.full((len(queries),), math.inf, dtype=torch.float64, device=place)
        self.indices = torch.full((len(queries),), -1, dtype=torch.int64, device=place)

    def add(self, first: int, vectors: NDArray[Any]) -> None:
        """Search (n, d) vectors with the numbers `first` …; of equally near vectors the first is kept."""
        found = on_device(vectors, self.queries.device)
        numbers = torch.arange(first, first + len(found), device=found.device)
        for part, squares, _ in squared_distances(self.queries, found):
            squares.masked_fill_(numbers == self.own[part, None], math.inf)
            least, places = squares.min(1)
            is_nearer = least < self.squares[part]
            self.squares[part] = torch.where(is_nearer, least, self.squares[part])
            self.indices[part] = torch.where(is_nearer, numbers[places], self.indices[part])

    @property
    def distances(self) -> NDArray[np.float64]:
        """(q,) root mean square differences between a query and its nearest vector: √(‖a − b‖²/d)."""
        found: NDArray[np.float64] = (self.squares / self.queries.shape[1]).sqrt().cpu().numpy()
        return found


def merged(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(distances, indices) over all parts, from those of the same queries in each part, in order."""
    distances, indices = (np.stack(each) for each in zip(*parts, strict=True))
    best, columns = distances.argmin(0), np.arange(distances.shape[1])
    return distances[best, columns], indices[best, columns]


def add_nearest(
    rows: Sequence[EvalRow], thumbs: Sequence[NDArray[np.uint8]], images: ReferenceImages, work: WorkFolder
) -> list[EvalRow]:
    """The rows with `nearest`, `nearest_data`, `closest` and the closest pairs, in one pass through the data.

    Args:
        thumbs: the `thumbnails` of each row's samples.

    Raises:
        VdiffError: an image cannot be read.
    """
    own = images.numbers[random_subset(len(images), MAX_QUERIES, 1)]
    sizes, parts = images.parts("nearest")
    queries: NDArray[Any] | None = None

    def compute(number: int, bar: Progress, done: int) -> Arrays:
        nonlocal queries
        if queries is None:
            of_data = [search_vectors(image[None]) for image in images.some(own)]
            queries = np.concatenate([*of_data, *(search_vectors(torch.from_numpy(each)) for each in thumbs)])
        numbers = np.concatenate([own, np.full(len(queries) - len(own), -1)])
        search = NearestSearch(queries, numbers, work.processes.device)
        for first, pixels in images.batches(parts[number]):
            search.add(first, search_vectors(pixels))
            done += len(pixels)
            bar.update(done)
        return {"distances": search.distances, "indices": search.indices.cpu().numpy()}

    work.compute("nearest images", sizes, compute)
    found = [work.read(name) for name in sizes]
    distances, indices = merged([(each["distances"], each["indices"]) for each in found])
    of_data, start, result = median_metric(distances[: len(own)]), len(own), []
    for row, pictures in zip(rows, thumbs, strict=True):
        part = slice(start, start + len(pictures))
        start = part.stop
        far, where = distances[part], indices[part]
        order = np.argsort(far, kind="stable")[:COLUMNS]
        closest = tuple((int(k), int(where[k]), float(far[k])) for k in order)
        more = {"nearest": median_metric(far), "nearest_data": of_data, "closest": Metric(float(far.min()))}
        result.append(replace(row, metrics={**row.metrics, **more}, closest=closest))
    return result


def save_pairs(
    rows: Sequence[EvalRow], thumbs: Sequence[NDArray[np.uint8]], images: ReferenceImages, path: Path
) -> None:
    """Save a picture of each row's samples closest to the data, and below each sample its nearest image.

    At most `BANDS` rows are shown: evenly spread, with the first and the last.
    """
    shown = range(len(rows)) if len(rows) <= BANDS else [(len(rows) - 1) * k // (BANDS - 1) for k in range(BANDS)]
    columns = max(len(rows[k].closest) for k in shown)
    lines, titles = [], []
    for number in shown:
        row, samples = rows[number], thumbs[number]
        pairs = [(torch.from_numpy(samples[k]), images.image(index)) for k, index, _ in row.closest]
        filler = [from_uint8(torch.full_like(pairs[-1][0], 255))] * (columns - len(pairs))
        lines.append([*(from_uint8(sample) for sample, _ in pairs), *filler])
        lines.append([*(as_unit(thumbnails(as_unit(image[None])))[0] for _, image in pairs), *filler])
        steps = plural(row.num_steps, "step")
        titles.append(f"{Path(row.checkpoint).name}\n{row.sampler}, {steps}")
        titles.append(f"nearest data\n{row.closest[0][2]:.3f} to {row.closest[-1][2]:.3f}")
    heading = "The samples closest to an image of the data, and that image"
    save_png(captioned_grid(lines, [""] * columns, titles, heading), path)
