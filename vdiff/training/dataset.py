"""A run's dataset: its size, shape and classes, and its batches; opening it does not load torch."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vdiff.data.buckets import BETWEEN_SIDES
from vdiff.data.captions import CaptionSettings, fingerprint_of
from vdiff.data.datasets import AnyStore, open_at_size
from vdiff.errors import VdiffError
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import PIXEL_CODEC, WAVEFORM, Codec
from vdiff.models.condition import IMAGE, Signature
from vdiff.projects import Project
from vdiff.reporting import Reporter
from vdiff.training.config import LoopConfig

if TYPE_CHECKING:
    from vdiff.data.batches import Batch, Batches
    from vdiff.data.encoded import EncodedStore
    from vdiff.training.engine import Engine

TENSORS = "tensors"
"""Recorded by a checkpoint instead of a dataset's path, if the run was trained on tensors."""


@dataclass(frozen=True)
class TrainingData:
    """The images of a run, or samples of another `shape` (empty: square images).

    Without a `store`, images are only assumed, to estimate the cost of a preset, or the method needs none
    (`none_needed`), but perhaps `prompts`. Batches have what is `encoded` of the images instead of pixels, and random
    squares of `crop` pixels a side (0: whole images). With a `rate`, samples per second, these are sounds.
    """

    image_size: int
    channels: int
    class_names: list[str] = field(default_factory=list)
    store: AnyStore | None = None
    none_needed: bool = False
    shape: tuple[int, ...] = ()
    encoded: EncodedStore | None = None
    prompts: tuple[str, ...] = ()
    latents: tuple[int, ...] = ()
    crop: int = 0
    rate: int = 0

    def __post_init__(self) -> None:
        if not self.shape:
            sides = 1 if self.rate else 2
            object.__setattr__(self, "shape", (self.channels, *[self.image_size] * sides))

    @property
    def codec(self) -> Codec:
        """What its samples are."""
        return WAVEFORM if self.rate else PIXEL_CODEC

    def __str__(self) -> str:
        """Its name and the shape of its samples."""
        channels, *sizes = self.shape
        at = f" at {self.rate:,} Hz" if self.rate else ""
        return f"{self.name}: {'×'.join(map(str, sizes))}×{channels}{at}"

    @property
    def name(self) -> str:
        """The dataset's path, as the checkpoint records it."""
        if self.store is None:
            return f"no {self.codec.noun}s" if self.none_needed else "assumed"
        return self.store.path if isinstance(self.store.path, str) else self.store.path.as_posix()

    @property
    def has_conditions(self) -> bool:
        """Whether every image has a condition image."""
        return self.store is not None and self.store.meta.has_conditions

    @property
    def smallest_side(self) -> int:
        """The smallest height or width of its images."""
        shapes = self.store.meta.counts.get("buckets", {}) if self.store else {}
        sides = [int(side) for name in shapes for side in name.split(BETWEEN_SIDES)]
        return min(sides, default=self.image_size)

    @property
    def num_images(self) -> int:
        """The number of images; 0: unknown."""
        return 0 if self.store is None else len(self.store)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the dataset's content, or of the prompts."""
        if self.prompts:
            return fingerprint_of(self.prompts)
        return self.store.meta.fingerprint if self.store else ""

    def batches(self, config: LoopConfig, engine: Engine, reporter: Reporter | None = None) -> Batches:
        """This process's share of the batches, in the seed's order."""
        from vdiff.data.batches import EncodedBatches, open_batches

        share = engine.part(config.batch_size)
        if self.prompts:
            return PromptsOnly(self, config.captions, config.seed, config.batch_size, share)
        if self.none_needed:
            return ClassesOnly(self.shape, len(self.class_names), config.seed, config.batch_size, share)
        assert self.store is not None, "images that are only assumed cannot be read"
        make: Callable[..., Batches] = open_batches
        if self.encoded is not None:
            make = partial(EncodedBatches, encoded=self.encoded)
        return make(
            self.store,
            image_size=self.image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            flip=config.flip,
            num_workers=config.num_workers,
            rank=engine.rank,
            world_size=engine.world_size,
            pin_memory=engine.device.type == "cuda",
            captions=config.captions,
            crop=self.crop,
            reporter=reporter,
        )


@dataclass(frozen=True)
class ClassesOnly:
    """Batches for a method that needs no images: black images, with classes drawn from (seed, step)."""

    shape: tuple[int, ...]
    num_classes: int
    seed: int
    batch_size: int
    share: slice

    def start_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of optimiser steps `step`, `step` + 1, … without end."""
        import torch

        from vdiff.data.batches import Batch

        images = torch.zeros((self.share.stop - self.share.start, *self.shape), dtype=torch.uint8)
        while True:
            generator = np.random.default_rng([self.seed, step])
            classes = generator.integers(0, max(self.num_classes, 1), self.batch_size)[self.share]
            yield Batch(images, torch.from_numpy(classes) if self.num_classes else None)
            step += 1


@dataclass(frozen=True)
class PromptsOnly:
    """Batches of prompts for a method that needs no images; an epoch has each prompt once. Latents are zeros."""

    data: TrainingData
    captions: CaptionSettings
    seed: int
    batch_size: int
    share: slice

    def start_at(self, step: int) -> Generator[Batch, None, None]:
        """The batches of optimiser steps `step`, `step` + 1, … without end."""
        import torch

        from vdiff.data.batches import Batch, BatchPlan

        prompts, count = self.data.prompts, self.share.stop - self.share.start
        plan = BatchPlan(length=len(prompts), batch_size=self.batch_size, seed=self.seed, flip=False)
        images = torch.empty((count, *self.data.shape), dtype=torch.uint8, device="meta")
        zeros = torch.zeros(count, *self.data.latents)
        while True:
            places = range(self.share.start, self.share.stop)
            chosen = [prompts[number] for number in plan.indices(step)[self.share]]
            texts = [plan.caption(text, self.captions, step, place) for text, place in zip(chosen, places, strict=True)]
            yield Batch(images, None, texts, None, (zeros, zeros))
            step += 1


def check_conditions(images: TrainingData, takes: Signature) -> None:
    """Refuse images without condition images for a network that takes them.

    Raises:
        VdiffError: as said.
    """
    if IMAGE in takes.names and not images.has_conditions:
        raise no_conditions(images.name)


def no_conditions(what: str) -> VdiffError:
    """The error for data without condition images."""
    hint = "give a dataset of pairs: prepare_data.py IMAGES --condition FOLDER"
    return VdiffError(f"{what}: the network needs a condition image with each image, and there are none", hint)


def no_images(teacher: CheckpointConfig) -> TrainingData:
    """No images, but the teacher's shape and classes."""
    shape = teacher.shape
    rate = teacher.sample_rate
    return TrainingData(shape[-1], shape[0], list(teacher.class_names), none_needed=True, shape=shape, rate=rate)


def open_images(
    path: str, image_size: int | None, project: Project | None = None, *, buckets: bool = False
) -> TrainingData:
    """The dataset at `path` (empty: the only one of `project` or under `data/`), in one of its sizes.

    Args:
        buckets: the network takes images of many shapes.

    Raises:
        VdiffError: the dataset is missing, or there are several to choose from.
        OptionError: it lacks the chosen size, or has several sizes and none was chosen.
    """
    store, size = open_at_size(path or (project or Project()).dataset(), image_size, buckets=buckets)
    return TrainingData(size, store.meta.channels, list(store.meta.class_names), store, rate=store.meta.rate)
