"""The samples of one row: drawn in batches, and reduced to statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.distributed import memory_errors_named
from vdiff.errors import VdiffError
from vdiff.evaluation.clip import ClipScore
from vdiff.evaluation.features import Features
from vdiff.evaluation.metrics import Arrays, ClassStats, Moments, to_arrays
from vdiff.evaluation.nearest import MAX_QUERIES, thumbnails
from vdiff.evaluation.plan import EvalPlan, RowSpec, takes_image, takes_prompts
from vdiff.evaluation.reference import MAX_KEPT, MOMENTS, ReferenceImages
from vdiff.evaluation.sounds import log_spectral_distance
from vdiff.models.checkpoint import (
    ADAPTER,
    WEIGHTS,
    load_adapted,
    load_checkpoint,
    read_config,
    read_tensors,
    weights_path,
)
from vdiff.models.checks import without_limits
from vdiff.models.codec import LATENTS, PIXEL_CODEC, from_uint8
from vdiff.models.condition import CLASSES, IMAGE, Condition
from vdiff.models.drawing import classes_in_turn, draw_from, squared_errors
from vdiff.models.prompting import Prompting, has_surroundings
from vdiff.models.speed import FastNetwork, ready_to_draw
from vdiff.records import STATE
from vdiff.reporting import Progress

PIECE_IMAGES, SLOW_IMAGES = 256, 32
"""The fewest images of a piece, except the last, and of a latent model; a kill loses at most one piece."""
BATCH_SIZE, SLOW_BATCH_SIZE = 64, 4
"""Images drawn at once, and of a latent model."""
CLASS_STATS = ("answer_counts", "answer_sums", "answer_negentropies")
RAW = "raw."


@dataclass(frozen=True)
class SampleBlocks:
    """The division of n samples into blocks of equal size (± 1), for the intervals, and of blocks into pieces of work.

    Neither depends on the batch size or the number of processes.
    """

    n: int
    dim: int
    are_slow: bool = False

    @property
    def num_blocks(self) -> int:
        """The number of blocks: fewer for features of many dimensions, as their moments take more memory."""
        most = 50 if self.dim <= 256 else 20 if self.dim <= 1024 else 10
        return min(most, self.n // 2)

    def block(self, number: int) -> range:
        """The samples of a block."""
        return range(self.n * number // self.num_blocks, self.n * (number + 1) // self.num_blocks)

    def pieces(self) -> list[range]:
        """The blocks in each piece."""
        least = SLOW_IMAGES if self.are_slow else PIECE_IMAGES
        of_each = max(1, -(-least * self.num_blocks // self.n))
        return [range(k, min(k + of_each, self.num_blocks)) for k in range(0, self.num_blocks, of_each)]

    def samples(self, piece: range) -> range:
        """The samples of a piece."""
        return range(self.block(piece[0]).start, self.block(piece[-1]).stop)


class Generator:
    """Generates the samples of one row; loads the model at the first call.

    Args:
        reference: the data, for the condition images of models that draw from such.
    """

    def __init__(self, row: RowSpec, plan: EvalPlan, device: torch.device, reference: ReferenceImages) -> None:
        self.row, self.plan, self.device, self.reference = row, plan, device, reference
        self.config = read_config(row.checkpoint)
        self.prompting: Prompting | None = None
        self.network: FastNetwork | None = None

    @property
    def evaluations(self) -> int:
        """Network evaluations so far, counted per image."""
        return self.network.evaluations if self.network else 0

    def batches(self, samples: range) -> list[range]:
        """The samples, divided into batches."""
        size = self.plan.batch_size or (SLOW_BATCH_SIZE if self.config.codec == LATENTS.name else BATCH_SIZE)
        return [range(k, min(k + size, samples.stop)) for k in range(samples.start, samples.stop, size)]

    def draw(self, indices: range, bar: Progress, done: int) -> Tensor:
        """Samples `indices`: (B, C, H, W) float32 in [−1, 1].

        Raises:
            VdiffError: the model cannot be read, or draws images that are not finite.
        """
        if self.network is None:
            self._load()
        row, plan, shape = self.row, self.plan, self.config.shape
        with memory_errors_named():
            found = draw_from(
                self.denoiser,
                SAMPLERS[row.sampler](**without_limits(self.config, row.sampler, {})),
                noise=ImageNoise(seed=plan.seed, indices=indices, shape=shape, device=self.device),
                condition=self._condition(indices),
                num_steps=row.num_steps,
                guidance=plan.guidance_of(self.config),
                grid=row.grid,
                on_step=lambda step: bar.update(done, f"step {step}/{row.num_steps}"),
            )
            return self.prompting.decode(found) if self.prompting else self.config.space.clip(found)

    def truth(self, indices: range) -> Tensor | None:
        """The images of the data whose condition images samples were drawn from, in [−1, 1]; None: from no such."""
        return from_uint8(self.reference.pairs(indices, self.plan.seed)[0]) if takes_image(self.config) else None

    def prompts(self, indices: range) -> list[str]:
        """The prompts of samples, in turn."""
        return [self.plan.prompts[k % len(self.plan.prompts)] for k in indices]

    def _condition(self, indices: range) -> Condition:
        """The prompts or classes of samples, each in turn, or the condition images and classes of the data."""
        if takes_image(self.config):
            _, images, classes = self.reference.pairs(indices, self.plan.seed)
            return self.denoiser.condition(**{IMAGE: from_uint8(images), CLASSES: classes})
        if self.prompting is None or not takes_prompts(self.config):
            return classes_in_turn(self.denoiser, indices)
        names = self.config.signature.names
        return self.prompting.condition(names, self.prompts(indices), self.plan.negative_prompt)

    def _load(self) -> None:
        components = self.plan.components if has_surroundings(self.config) else None
        denoiser, _ = load_checkpoint(self.row.checkpoint, self.device, components=components)
        if has_surroundings(self.config):
            self.prompting = Prompting.read(self.config, self.device, components=components, vae=self.plan.vae)
        path = weights_file(self.row)
        if path.name not in (WEIGHTS, ADAPTER):
            tensors = read_tensors(path).items()
            raw = {name.removeprefix(RAW): tensor for name, tensor in tensors if name.startswith(RAW)}
            if (described := read_config(self.row.checkpoint)).adapter:
                denoiser = load_adapted(described, path, raw).to(self.device).eval()
            elif raw.keys() != denoiser.state_dict().keys():
                raise VdiffError(f"{path} does not fit the checkpoint", "leave --raw out, or resume the training")
            else:
                denoiser.load_state_dict(raw)
        self.denoiser = ready_to_draw(denoiser, precision=self.plan.precision)
        assert isinstance(self.denoiser.network, FastNetwork)
        self.network = self.denoiser.network


def weights_file(row: RowSpec) -> Path:
    """The weights of a row; for `raw` those without EMA, from the training state.

    Raises:
        VdiffError: there are no such weights.
    """
    if not row.raw or read_config(row.checkpoint).weights == "raw":
        return weights_path(row.checkpoint)
    path = row.checkpoint / STATE
    if not path.exists():
        raise VdiffError(f"{row.checkpoint} has no raw weights: {STATE} is missing", "leave --raw out")
    return path


def sample_stats(
    generator: Generator,
    blocks: SampleBlocks,
    piece: range,
    features: Features,
    of_teacher: Tensor | None,
    clip: ClipScore | None,
    bar: Progress,
    done: int,
) -> Arrays:
    """The statistics of the samples of a piece: moments by block, some vectors, thumbnails, errors, scores, times.

    Args:
        clip: scores pictures and prompts.
        of_teacher: the teacher's images of the first samples of the piece.
    """
    began, samples = time.monotonic(), blocks.samples(piece)
    before, drawing = generator.evaluations, 0.0
    moments = [Moments.none(features.dim) for _ in piece]
    classes: dict[int, list[ClassStats]] = {}
    kept, thumbs, errors = [np.empty((0, features.dim), np.float32)], [], [np.empty(0)]
    scores, truth_errors, spectral = [np.empty(0)], [np.empty(0)], [np.empty(0)]
    space = generator.config.space
    for batch in generator.batches(samples):
        start = time.monotonic()
        images = generator.draw(batch, bar, done + batch.start - samples.start)
        drawing += time.monotonic() - start
        pixels = space.store(images).to(generator.device)
        vectors, logits = features.with_logits(pixels)
        for k, number in enumerate(piece):
            block = blocks.block(number)
            first, last = max(batch.start, block.start), min(batch.stop, block.stop)
            if first < last:
                part = slice(first - batch.start, last - batch.start)
                moments[k] = moments[k] + Moments.of(vectors[part])
                if logits is not None:
                    classes.setdefault(k, []).append(ClassStats.of(logits[part]))
        kept.append(vectors[: max(0, MAX_KEPT - batch.start)].astype(np.float32))
        thumbs.append(thumbnails(space.pictures(images[: max(0, MAX_QUERIES - batch.start)])))
        if of_teacher is not None:
            first = batch.start - samples.start
            theirs = of_teacher[first : first + len(batch)]
            errors.append(squared_errors(images, theirs, PIXEL_CODEC).numpy())
            if space.is_sound and len(theirs):
                spectral.append(
                    log_spectral_distance(images[: len(theirs)], theirs, generator.config.sample_rate).numpy()
                )
        if (truth := generator.truth(batch)) is not None:
            truth_errors.append(squared_errors(images, truth, PIXEL_CODEC).numpy())
        if clip is not None and takes_prompts(generator.config):
            scores.append(clip(pixels, generator.prompts(batch)))
        bar.update(done + batch.stop - samples.start)
    return {
        **to_arrays(moments, MOMENTS),
        **(to_arrays([reduce(ClassStats.__add__, each) for each in classes.values()], CLASS_STATS) if classes else {}),
        "kept": np.concatenate(kept),
        "small": torch.cat(thumbs).numpy(),
        "errors": np.concatenate(errors),
        "truth_errors": np.concatenate(truth_errors),
        "spectral": np.concatenate(spectral),
        "scores": np.concatenate(scores),
        "evaluations": np.array(generator.evaluations - before),
        "drawing": np.array(drawing),
        "seconds": np.array(time.monotonic() - began),
    }
