"""Distances between samples and data for the benchmarks of distillation, measured once and then remembered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.data.batches import decode
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.evaluation.features import FeatureDistance, LogMel, Pixels
from vdiff.evaluation.metrics import NEIGHBOURS, Manifold, on_device, squared_distances
from vdiff.models.checkpoint import load_checkpoint
from vdiff.models.codec import from_uint8
from vdiff.models.drawing import classes_in_turn, draw
from vdiff.models.speed import ready_to_draw
from vdiff.reporting import Reporter
from vdiff.training.dataset import open_images

SOLVERS = ("ddim", "dpmpp_2m")
BATCH = 128


def drawn(
    folder: Path, steps: int, sampler: str, count: int, seed: int, classes: Sequence[int] | None = None
) -> Tensor:
    """`count` samples of a model, of the same noise for every model: on the CPU.

    Args:
        classes: those that the images of a class-conditional model have in turn; None: all.
    """
    denoiser, config = load_checkpoint(folder, "cuda" if torch.cuda.is_available() else "cpu")
    denoiser = ready_to_draw(denoiser)
    parts = []
    for first in range(0, count, BATCH):
        indices = range(first, min(first + BATCH, count))
        images = draw(
            denoiser, SAMPLERS[sampler](), indices=indices, image_size=config.image_size, num_steps=steps,
            seed=1 + seed, conditions=partial(classes_in_turn, choices=classes),
        )  # fmt: skip
        parts.append(images.cpu())
    return torch.cat(parts)


def density_coverage(samples: NDArray[np.floating], reference: Manifold) -> tuple[float, float]:
    """How many of the reference's balls a sample lies in, on average, over k; and the share of balls that have one.

    Source: Naeem et al. 2020, *Reliable Fidelity and Diversity Metrics for Generative Models*, eqs. 3 and 4.
    """
    vectors = on_device(samples, reference.centres.device)
    inside, reached = 0, torch.zeros(len(reference.centres), dtype=torch.bool)
    for _, squares, _ in squared_distances(vectors, reference.centres):
        hits = squares <= reference.radii
        inside += int(hits.sum())
        reached |= hits.any(0)
    return inside / (NEIGHBOURS * len(vectors)), float(reached.double().mean())


def images_of(data: str, image_size: int) -> Tensor:
    """All images of a dataset, in [−1, 1]."""
    store = open_images(data, image_size).store
    assert store is not None
    size = store.meta.sizes[0]
    channels = store.meta.channels
    pixels = np.stack([decode(store.encoded(size, k), channels, size, f"image {k}") for k in range(len(store))])
    return from_uint8(torch.from_numpy(pixels))


class PixelDistance(FeatureDistance):
    """The distance of images (n, C, H, W) as `pixel_vectors`."""

    def __init__(self, reference: Tensor) -> None:
        super().__init__(Pixels(reference.shape[-1], reference.shape[1]), reference)


class SoundDistance(FeatureDistance):
    """The distance of sounds (n, C, L) as `log_mel_vectors`; see `LogMel`."""

    def __init__(self, reference: Tensor, rate: int, **options: float) -> None:
        super().__init__(LogMel(rate, reference.shape[1:], **options), reference)


@dataclass
class Distances:
    """Distances of `count` samples to the images of a dataset; a file remembers them."""

    path: Path
    reference: PixelDistance
    count: int
    reporter: Reporter
    known: dict[tuple[str, str, int, int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.known = {tuple(key): value for key, value in json.loads(self.path.read_text())}

    def of(self, what: str, folder: Path, steps: int, sampler: str = "ddim", seed: int = 0) -> float:
        """The distance of a model that is called `what` in the report."""
        key = (what, folder.as_posix(), steps, seed, self.count)
        if key not in self.known:
            self.known[key] = self.reference(drawn(folder, steps, sampler, self.count, seed))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps([[list(each), value] for each, value in self.known.items()]))
        self.reporter.line(f"{what}, {steps} steps, seed {seed}: {self.known[key]:.4f}")
        return self.known[key]
