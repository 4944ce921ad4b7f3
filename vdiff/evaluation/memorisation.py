"""The search of the whole dataset for the images nearest to samples, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vdiff.data.images import save_png
from vdiff.distributed import Processes
from vdiff.evaluation.intervals import of_median
from vdiff.evaluation.nearest import BANDS, COLUMNS, MAX_QUERIES, Search, merged, pairs_picture, search_vectors
from vdiff.evaluation.pieces import Arrays, WorkFolder
from vdiff.evaluation.reference import Images, chosen
from vdiff.evaluation.results import Metric, Row
from vdiff.evaluation.rows import small_file
from vdiff.reporting import Reporter


def with_nearest(
    rows: Sequence[Row], images: Images, work: WorkFolder, processes: Processes, reporter: Reporter
) -> list[Row]:
    """The rows with `nearest`, `nearest_data`, `closest` and their closest pairs: one pass through the data for all.

    Raises:
        VdiffError: an image cannot be read.
    """
    small = [work.read(small_file(number))["small"] for number in range(len(rows))]
    own = chosen(len(images), MAX_QUERIES, 1)
    parts = images.parts()
    names = [f"nearest-{k:02d}.npz" for k in range(len(parts))]
    missing = processes.share(work.missing(names))
    total = sum(stop - start for name in missing for start, stop in parts[names.index(name)])
    queries: NDArray[Any] | None = None
    with reporter.progress("nearest images", total, "images") as bar:
        done = 0

        def compute(name: str) -> Arrays:
            nonlocal done, queries
            if queries is None:
                queries = _queries(images, own, small)
            numbers = np.concatenate([own, np.full(len(queries) - len(own), -1)])
            search = Search(queries, numbers, processes.device)
            for first, pixels in images.batches(parts[names.index(name)]):
                search.look(first, search_vectors(pixels))
                done += len(pixels)
                bar.update(done)
            return {"distances": search.distances, "indices": search.indices.cpu().numpy()}

        work.do(names, compute)
    pieces = [work.read(name) for name in names]
    distances, indices = merged([(piece["distances"], piece["indices"]) for piece in pieces])
    of_data, start, found = of_median(distances[: len(own)]), len(own), []
    for row, pictures in zip(rows, small, strict=True):
        part = slice(start, start + len(pictures))
        start = part.stop
        far, where = distances[part], indices[part]
        order = np.argsort(far, kind="stable")[:COLUMNS]
        closest = tuple((int(k), int(where[k]), float(far[k])) for k in order)
        more = {"nearest": of_median(far), "nearest_data": of_data, "closest": Metric(float(far.min()))}
        found.append(replace(row, metrics={**row.metrics, **more}, closest=closest))
    return found


def save_pairs(rows: Sequence[Row], images: Images, work: WorkFolder, path: Path) -> None:
    """Write the picture of the closest pairs of the rows, of `BANDS` of them where there are more."""
    bands = []
    for number in chosen_rows(len(rows)):
        row, small = rows[number], work.read(small_file(number))["small"]
        pairs = [(torch.from_numpy(small[k]), images.image(index), far) for k, index, far in row.closest]
        steps = f"{row.num_steps} step{'s' if row.num_steps > 1 else ''}"
        bands.append((f"{Path(row.checkpoint).name}\n{row.sampler}, {steps}", pairs))
    save_png(pairs_picture(bands), path)


def chosen_rows(count: int) -> list[int]:
    """At most `BANDS` rows, evenly spread, the first and the last among them."""
    if count <= BANDS:
        return list(range(count))
    return [(count - 1) * k // (BANDS - 1) for k in range(BANDS)]


def _queries(images: Images, own: NDArray[np.int64], small: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """The vectors of some images of the data, then those of the rows' samples."""
    of_data = [search_vectors(image[None]) for image in images.some(own)]
    return np.concatenate([*of_data, *(search_vectors(torch.from_numpy(pictures)) for pictures in small)])
