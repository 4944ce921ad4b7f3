"""Precision and recall: how many samples look like data, and how much of the data the samples reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.evaluation.intervals import of_share
from vdiff.evaluation.kernel import on_device, products
from vdiff.evaluation.results import Metric

NEIGHBOURS = 3
EQUAL = 1e-12
"""Squared distances below this part of the vectors' squared lengths are rounding: such vectors are equal."""


def squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """‖a_i − b_j‖² of (n, d) and (m, d) float64, some rows at a time; exactly 0 for equal vectors.

    With them come the rows that they are, and as much memory for answers of yes and no (see `products`).
    """
    of_a, of_b = a.square().sum(1), b.square().sum(1)
    lengths, is_less = torch.empty(0), torch.empty(0)
    for part, squares in products(a, b):
        if len(lengths) < len(squares):
            lengths, is_less = torch.empty_like(squares), torch.empty_like(squares, dtype=torch.bool)
        both, answers = lengths[: len(squares)], is_less[: len(squares)]
        torch.add(of_a[part, None], of_b, out=both)
        squares.mul_(-2).add_(both)
        torch.lt(squares, both.mul_(EQUAL), out=answers)
        yield part, squares.masked_fill_(answers, 0.0), answers


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
        self.radii = torch.empty(len(self.centres), dtype=torch.float64, device=self.centres.device)
        for part, squares, _ in squared_distances(self.centres, self.centres):
            # the nearest of all is the vector itself
            self.radii[part] = squares.topk(neighbours + 1, largest=False).values[:, -1]

    def holds(self, vectors: Tensor) -> int:
        """How many of the vectors lie in one of the balls."""
        found = 0
        for _, squares, is_inside in squared_distances(vectors, self.centres):
            found += int(torch.le(squares, self.radii, out=is_inside).any(1).sum())
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
