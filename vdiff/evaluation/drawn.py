"""The samples of one row, piece by piece: what is kept of each piece instead of its images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.data.images import to_uint8
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.distributed import memory_errors_named
from vdiff.errors import VdiffError
from vdiff.evaluation.features import Classifier, Features
from vdiff.evaluation.moments import Moments
from vdiff.evaluation.nearest import MAX_QUERIES, thumbnails
from vdiff.evaluation.pieces import Arrays
from vdiff.evaluation.plan import Request
from vdiff.evaluation.reference import MAX_KEPT, arrays_of
from vdiff.evaluation.score import Answers
from vdiff.models.checkpoint import load_checkpoint, read_tensors
from vdiff.models.drawing import draw, squared_errors
from vdiff.models.speed import FastNetwork, ready_to_draw
from vdiff.reporting import Progress

MAX_PAIRED = 256
"""Samples that are compared with a teacher's of the same noise, at most."""
PIECE_IMAGES = 256
"""Images of a piece, at least, but for the last: what is drawn again after a kill is at most as much."""
STATE, RAW = "state/state.safetensors", "raw."


@dataclass(frozen=True)
class Division:
    """n samples in blocks of equal size (± 1), by which figures get their intervals, and blocks in pieces of work.

    Neither depends on the batch size or the number of processes.
    """

    n: int
    dim: int

    @property
    def num_blocks(self) -> int:
        """Fewer where each takes much memory."""
        most = 50 if self.dim <= 256 else 20 if self.dim <= 1024 else 10
        return min(most, self.n // 2)

    def block(self, number: int) -> range:
        """The samples of a block."""
        return range(self.n * number // self.num_blocks, self.n * (number + 1) // self.num_blocks)

    def pieces(self) -> list[range]:
        """The blocks of each piece."""
        of_each = max(1, -(-PIECE_IMAGES * self.num_blocks // self.n))
        return [range(k, min(k + of_each, self.num_blocks)) for k in range(0, self.num_blocks, of_each)]

    def samples(self, piece: range) -> range:
        """The samples of a piece."""
        return range(self.block(piece[0]).start, self.block(piece[-1]).stop)


class Artist:
    """Draws the images of one request; the model is loaded when the first is due."""

    def __init__(
        self, request: Request, *, seed: int, guidance: float, batch_size: int, device: torch.device, precision: str
    ) -> None:
        self.request, self.seed, self.guidance = request, seed, guidance
        self.batch_size, self.device, self.precision = batch_size, device, precision
        self._ready = False

    def batches(self, samples: range) -> list[range]:
        """What is drawn at once."""
        return [
            range(first, min(first + self.batch_size, samples.stop))
            for first in range(samples.start, samples.stop, self.batch_size)
        ]

    def draw(self, indices: range, bar: Progress, done: int) -> Tensor:
        """Images number `indices`: (B, C, H, W) float32 in [−1, 1].

        Raises:
            VdiffError: the model cannot be read, or draws no finite image.
        """
        self._load()
        steps = self.request.num_steps
        with memory_errors_named():
            return draw(
                self.denoiser,
                SAMPLERS[self.request.sampler](),
                indices=indices,
                image_size=self.config.image_size,
                num_steps=steps,
                seed=self.seed,
                guidance=self.guidance,
                grid=self.request.grid,
                on_step=lambda step: bar.update(done, f"step {step}/{steps}"),
            ).clamp(-1, 1)

    @property
    def evaluations(self) -> int:
        """Network evaluations so far, counted by images."""
        if not self._ready:
            return 0
        network = self.denoiser.network
        assert isinstance(network, FastNetwork)
        return network.evaluations

    def _load(self) -> None:
        if self._ready:
            return
        folder = self.request.checkpoint
        denoiser, self.config = load_checkpoint(folder, self.device)
        if self.request.raw and self.config.weights != "raw":
            denoiser.load_state_dict(raw_weights(folder, set(denoiser.state_dict())))
        self.denoiser = ready_to_draw(denoiser, precision=self.precision)
        self._ready = True


def raw_weights(folder: Any, names: set[str]) -> dict[str, Tensor]:
    """The weights without average that an unfinished or base training keeps beside its checkpoint.

    Raises:
        VdiffError: there are none.
    """
    path = folder / STATE
    if not path.exists():
        raise VdiffError(f"{folder} keeps no raw weights: there is no {STATE}", "leave --raw out")
    found = {name.removeprefix(RAW): tensor for name, tensor in read_tensors(path).items() if name.startswith(RAW)}
    if set(found) != names:
        raise VdiffError(f"{path} does not fit the checkpoint", "leave --raw out, or resume the training")
    return found


def draw_piece(
    artist: Artist,
    division: Division,
    piece: range,
    features: Features,
    theirs: Tensor | None,
    bar: Progress,
    done: int,
) -> Arrays:
    """What is kept of the samples of a piece: moments by block, some vectors, small pictures, sums, times.

    Args:
        theirs: the teacher's images of the first samples of the piece.
    """
    began, samples = time.monotonic(), division.samples(piece)
    before, drawing = artist.evaluations, 0.0
    moments = [Moments.none(features.dim) for _ in piece]
    answers: list[Answers | None] = [None for _ in piece]
    kept, small, errors = [np.empty((0, features.dim), np.float32)], [], [np.empty(0)]
    for batch in artist.batches(samples):
        start = time.monotonic()
        images = artist.draw(batch, bar, done + batch.start - samples.start)
        drawing += time.monotonic() - start
        pixels = to_uint8(images)
        logits = None
        if isinstance(features, Classifier):
            vectors, logits = features.with_logits(pixels.to(artist.device))
        else:
            vectors = features(pixels.to(artist.device))
        for k, number in enumerate(piece):
            inside = _overlap(batch, division.block(number))
            if len(inside):
                part = slice(inside.start - batch.start, inside.stop - batch.start)
                moments[k] = moments[k] + Moments.of(vectors[part])
                if logits is not None:
                    found, known = Answers.of(logits[part]), answers[k]
                    answers[k] = found if known is None else known + found
        kept.append(vectors[: max(0, MAX_KEPT - batch.start)].astype(np.float32))
        small.append(thumbnails(images[: max(0, MAX_QUERIES - batch.start)]))
        if theirs is not None:
            first = batch.start - samples.start
            errors.append(squared_errors(images, theirs[first : first + len(batch)]).numpy())
        bar.update(done + batch.stop - samples.start)
    arrays: dict[str, NDArray[Any]] = {
        **arrays_of(moments),
        "kept": np.concatenate(kept),
        "small": torch.cat(small).numpy(),
        "errors": np.concatenate(errors),
        "evaluations": np.array(artist.evaluations - before),
        "drawing": np.array(drawing),
        "seconds": np.array(time.monotonic() - began),
    }
    known_answers = [each for each in answers if each is not None]
    if known_answers:
        arrays["answer_counts"] = np.array([each.count for each in known_answers])
        arrays["answer_sums"] = np.stack([each.sums for each in known_answers])
        arrays["answer_negentropies"] = np.array([each.negentropy for each in known_answers])
    return arrays


def answers_in(arrays: Arrays) -> list[Answers]:
    """The classifier's answers in a piece, by block; none where it has none."""
    if "answer_counts" not in arrays:
        return []
    names = ("answer_counts", "answer_sums", "answer_negentropies")
    return [
        Answers(int(count), sums, float(negentropy))
        for count, sums, negentropy in zip(*(arrays[name] for name in names), strict=True)
    ]


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), max(max(a.start, b.start), min(a.stop, b.stop)))
