"""Precision and recall: how many samples look like data, and how much of the data the samples reach."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.evaluation.intervals import of_share
from vdiff.evaluation.kernel import on_device, tiles
from vdiff.evaluation.results import Metric

NEIGHBOURS = 3
EQUAL = 1e-12
"""Squared distances below this part of the vectors' squared lengths are rounding: such vectors are equal."""


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖²: (n, d) and (m, d) float64 → (n, m); exactly 0 for equal vectors."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = lengths - 2 * (a @ b.T)
    return squares.masked_fill(squares < EQUAL * lengths, 0.0)


class Manifold:
    """Where vectors are dense: the balls around each of them that reach to its `neighbours`-th nearest other one.

    Args:
        vectors: (n, d), n > `neighbours`.
    """

    def __init__(
        self, vectors: NDArray[Any], device: torch.device | str = "cpu", *, neighbours: int = NEIGHBOURS
    ) -> None:
        self.centres = on_device(vectors, device)
        if len(self.centres) <= neighbours:
            raise ValueError(f"{len(self.centres)} vectors; need more than {neighbours}")
        radii = []
        for _, rows in tiles(self.centres, len(self.centres)):
            # the nearest of all is the vector itself
            radii.append(squared_distances(rows, self.centres).kthvalue(neighbours + 1).values)
        self.radii = torch.cat(radii)

    def holds(self, vectors: Tensor) -> int:
        """How many of the vectors lie in one of the balls."""
        found = 0
        for _, rows in tiles(vectors, len(self.centres)):
            found += int((squared_distances(rows, self.centres) <= self.radii).any(1).sum())
        return found


def precision_recall(samples: NDArray[Any], reference: Manifold) -> tuple[Metric, Metric]:
    """The share of samples in the manifold of the reference, and the share of the reference in that of the samples.

    Radii depend on the number of vectors: give as many samples as the reference has. The interval of precision is for
    other samples, that of recall for other images of the data; the other side is taken as it is (Wilson).
    Source: Kynkäänniemi et al. 2019, *Improved Precision and Recall Metric*, eq. 1 and 2.

    Args:
        samples: (n, d), n > `NEIGHBOURS`.
    """
    own = Manifold(samples, reference.centres.device)
    inside, reached = reference.holds(own.centres), own.holds(reference.centres)
    return of_share(inside, len(own.centres)), of_share(reached, len(reference.centres))
