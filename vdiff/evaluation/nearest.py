"""Memorisation: how far samples are from the nearest image of the data, beside how far data are from other data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vdiff.data.images import captioned_grid, from_uint8, to_uint8
from vdiff.evaluation.features import as_unit
from vdiff.evaluation.kernel import on_device
from vdiff.evaluation.manifolds import squared_distances

MAX_QUERIES = 1_000
"""Samples, and images of the data, whose nearest images are looked for, at most."""
SEARCH_SIDE, SHOWN_SIDE = 32, 64
"""Images are compared at 32 × 32 at most, and shown at 64 × 64."""
COLUMNS, BANDS = 8, 6


def thumbnails(images: Tensor) -> Tensor:
    """(n, C, H, W) in [−1, 1], as uint8 of at most `SHOWN_SIDE` pixels a side."""
    if max(images.shape[-2:]) > SHOWN_SIDE:
        images = F.adaptive_avg_pool2d(images.float(), SHOWN_SIDE)
    return to_uint8(images.clamp(-1, 1))


def search_vectors(images: Tensor) -> NDArray[np.float32]:
    """(n, C, H, W) uint8 → (n, D) float32: pixels in [−1, 1], or the mean colours of 32 × 32 parts."""
    x = as_unit(thumbnails(as_unit(images)))  # samples and data lose the same by it
    if max(x.shape[-2:]) > SEARCH_SIDE:
        x = F.adaptive_avg_pool2d(x, SEARCH_SIDE)
    vectors: NDArray[np.float32] = x.flatten(1).cpu().numpy()
    return vectors


class Search:
    """The nearest of many vectors that come in batches, for each of some queries.

    Args:
        queries: (q, d).
        own: (q,) the number that a query has itself among the vectors, where it must not be found; −1: it is none.
    """

    def __init__(
        self, queries: NDArray[Any], own: NDArray[np.int64] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.queries = on_device(queries, device)
        place = self.queries.device
        self.own = torch.as_tensor(np.full(len(queries), -1) if own is None else own, device=place)
        self.squares = torch.full((len(queries),), math.inf, dtype=torch.float64, device=place)
        self.indices = torch.full((len(queries),), -1, dtype=torch.int64, device=place)

    def look(self, first: int, vectors: NDArray[Any]) -> None:
        """Look among (n, d) vectors with the numbers `first` …; of equals the first found is kept."""
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
        """(q,) root mean square differences of the entries of a query and its nearest vector: √(‖a − b‖²/d)."""
        found: NDArray[np.float64] = (self.squares / self.queries.shape[1]).sqrt().cpu().numpy()
        return found


def merged(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The (distances, indices) of searches of the same queries in several parts, in the order of the parts."""
    distances = np.stack([distance for distance, _ in parts])
    indices = np.stack([index for _, index in parts])
    best = distances.argmin(0)
    columns = np.arange(distances.shape[1])
    return distances[best, columns], indices[best, columns]


def pairs_picture(bands: Sequence[tuple[str, Sequence[tuple[Tensor, Tensor, float]]]]) -> PIL.Image.Image:
    """For each band (title, [(sample, nearest image, distance), …]) two rows: samples, and below them the nearest.

    Images are (C, H, W) uint8.
    """
    columns = max(len(pairs) for _, pairs in bands)
    rows, titles = [], []
    for title, pairs in bands:
        filler = [from_uint8(torch.full_like(pairs[-1][0], 255))] * (columns - len(pairs))
        rows.append([*(from_uint8(sample) for sample, _, _ in pairs), *filler])
        rows.append([*(as_unit(thumbnails(as_unit(image[None])))[0] for _, image, _ in pairs), *filler])
        distances = [distance for _, _, distance in pairs]
        titles += [title, f"nearest data\n{distances[0]:.3f} to {distances[-1]:.3f}"]
    heading = "The samples closest to an image of the data, and that image"
    return captioned_grid(rows, [""] * columns, titles, heading)
