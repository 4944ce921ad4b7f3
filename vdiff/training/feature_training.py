"""Training a feature network: a classifier if the images have classes, else a denoising autoencoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import vdiff
from vdiff.data.batches import Batch, decode, open_batches
from vdiff.data.datasets import AnyStore
from vdiff.data.shards import ShardStore
from vdiff.data.store import ImageStore, StoredImage
from vdiff.errors import OptionError, VdiffError
from vdiff.models.codec import from_uint8
from vdiff.models.feature_network import (
    FORMAT,
    MAX_SIZE,
    MIN_SIZE,
    FeatureAutoencoder,
    FeatureClassifier,
    FeatureMetadata,
    FeatureNet,
    FeatureNetConfig,
)
from vdiff.reporting import Reporter
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine, build_engine
from vdiff.training.loop import metrics_in_memory
from vdiff.training.meter import StepResult
from vdiff.training.optimisation import build_optimizer
from vdiff.training.step import OptimizerStep

HELD_OUT = 10
"""One in this many images is held out."""
MAX_MEASURED = 10_000
WINDOW_IMAGES = 512
LR, WEIGHT_DECAY = 2e-3, 0.01
WARMUP = 0.05
LABEL_SMOOTHING = 0.05
MAX_NOISE = 0.3
"""Largest standard deviation of the noise on an autoencoder's inputs, which are in [−1, 1]."""
LEAST_SPREAD = 1e-6
# the first words of the random streams, different from those of batches and shards
_SPLIT, _NOISE = 10, 11


# The data: nine tenths to train on, one tenth held out


class StorePart(ImageStore):
    """A subset of an LMDB dataset, numbered from 0."""

    def __init__(self, whole: ImageStore, indices: NDArray[np.int64]) -> None:
        self.path, self.meta, self.whole, self.indices = whole.path, whole.meta, whole, indices
        self._file = None

    def __len__(self) -> int:
        return len(self.indices)

    def encoded(self, size: int, index: int) -> bytes:
        """The bytes of the image file `index` at `size`."""
        return self.whole.encoded(size, int(self.indices[index]))

    def label(self, index: int) -> int | None:
        """The class of image `index`; None in a dataset without classes."""
        return self.whole.label(int(self.indices[index]))

    def caption(self, index: int) -> str:
        """The captions of image `index`, one a line; "" if it has none."""
        return self.whole.caption(int(self.indices[index]))


class ShardPart(ShardStore):
    """A subset of each tar shard of a dataset."""

    def __init__(self, whole: ShardStore, places: Sequence[NDArray[np.int64]]) -> None:
        self.__dict__ = copy.copy(whole.__dict__)
        self.whole, self.numbers = whole, [number for number, inside in enumerate(places) if len(inside)]
        self.places = [places[number] for number in self.numbers]
        self.shards = tuple(replace(whole.shards[number], images=len(places[number])) for number in self.numbers)
        self._length = sum(map(len, self.places))

    def samples(self, number: int, sizes: Sequence[int], skip: int = 0) -> Generator[StoredImage, None, None]:
        """The images of shard `number` in order, without the first `skip`."""
        if skip >= len(self.places[number]):
            return
        first, wanted = int(self.places[number][skip]), set(self.places[number][skip:].tolist())
        with closing(self.whole.samples(self.numbers[number], sizes, first)) as samples:
            yield from (sample for place, sample in enumerate(samples, first) if place in wanted)


def split(store: AnyStore, seed: int) -> tuple[AnyStore, AnyStore]:
    """The images to train on, and a tenth held out, drawn from the seed (in tar shards, a tenth of each shard).

    Raises:
        VdiffError: there are too few images to hold one out.
    """

    def held_out(count: int, stretch: int) -> NDArray[np.bool_]:
        return np.random.default_rng([seed, _SPLIT, stretch]).permutation(count) < count // HELD_OUT

    train: AnyStore
    held: AnyStore
    if isinstance(store, ShardStore):
        masks = [held_out(shard.images, k) for k, shard in enumerate(store.shards)]
        train, held = (ShardPart(store, [np.flatnonzero(m == is_held) for m in masks]) for is_held in (False, True))
    else:
        mask = held_out(len(store), 0)
        train, held = (StorePart(store, np.flatnonzero(mask == is_held)) for is_held in (False, True))
    if not len(held):
        raise VdiffError(
            f"{store.path} holds {len(store)} images, too few to hold any out",
            f"prepare a dataset of at least {HELD_OUT} images",
        )
    return train, held


def in_order(part: AnyStore, *, image_size: int, batch_size: int, limit: int = MAX_MEASURED) -> Iterator[Batch]:
    """The images of a part in order, in batches, once: all, or about `limit` spread over the part."""
    samples: Iterator[StoredImage]
    if isinstance(part, ShardStore):
        each = -(-limit // len(part.shards))  # the first images of each shard, as tars are read from the beginning
        samples = chain.from_iterable(islice(part.samples(k, (image_size,)), each) for k in range(len(part.shards)))
    else:
        count = min(len(part), limit)
        indices = [k * len(part) // count for k in range(count)]
        samples = (StoredImage(str(k), {image_size: part.encoded(image_size, k)}, part.label(k)) for k in indices)
    while some := list(islice(samples, batch_size)):
        channels, path = part.meta.channels, part.path
        images = [decode(x.images[image_size], channels, image_size, f"{path}: image {x.name}") for x in some]
        labels = torch.tensor([x.label or 0 for x in some]) if part.meta.class_names else None
        yield Batch(torch.from_numpy(np.stack(images)), labels)


# The training


@dataclass(frozen=True)
class FeatureTraining:
    """How a feature network is trained.

    Attributes:
        kind: "classifier", "autoencoder", or "auto": a classifier if the images have two classes or more.
        dim: length of a feature vector.
        num_iters: optimiser updates.
        batch_size: images per update.
        seed: of the initial weights, the order of the images, the noise, and the choice of held-out images.
        num_workers: processes that decode images until all are in memory.
    """

    kind: str = "auto"
    dim: int = 64
    num_iters: int = 1000
    batch_size: int = 64
    seed: int = 0
    num_workers: int = 0


def network_config(store: AnyStore, image_size: int, training: FeatureTraining) -> FeatureNetConfig:
    """The network for a dataset.

    Raises:
        VdiffError: the images are too small or too large.
        OptionError: a classifier is asked for, and there are not two classes.
    """
    if store.meta.rate:
        raise VdiffError(f"{store.path} holds sounds, and feature networks are for images", "leave --features out")
    num_classes, kind = len(store.meta.class_names), training.kind
    if kind == "classifier" and num_classes < 2:
        raise OptionError(
            f"--kind classifier: {store.path} has {num_classes or 'no'} class{'es' if not num_classes else ''}",
            "give --kind autoencoder, or prepare a dataset of two classes or more",
        )
    if kind == "auto":
        kind = "classifier" if num_classes >= 2 else "autoencoder"
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        raise VdiffError(
            f"{store.path} has images of {image_size} pixels; a feature network needs {MIN_SIZE} to {MAX_SIZE}",
            "evaluate on pixels, or prepare the images in another size",
        )
    num_classes = num_classes if kind == "classifier" else 0
    return FeatureNetConfig(kind, image_size, store.meta.channels, training.dim, num_classes)


def train_features(
    store: AnyStore, image_size: int, training: FeatureTraining, *, device: str = "auto", reporter: Reporter
) -> tuple[FeatureNet, FeatureMetadata]:
    """Train on nine tenths of the images, measure on the others; return the feature network, on the CPU, and its
    metadata.

    AdamW, learning rate 2e-3 with a warm-up of 5 % and a cosine to 0, gradients clipped to a norm of 1. A classifier
    minimises the cross entropy (labels smoothed by 0.05), an autoencoder the mean squared error of the clean image
    reconstructed from a noisy one. Over the training images the features have mean 0, and their variances sum to
    `dim`. So the Fréchet distance of the data to their own mean vector is `dim`: a scale for distances. On one
    machine, equal seeds give equal networks.

    Raises:
        VdiffError: there are too few images, an image cannot be read, all images are equal, or the loss is not finite.
        OptionError: a classifier is asked for, and there are not two classes.
    """
    shape = network_config(store, image_size, training)
    train_part, held_out_part = split(store, training.seed)
    num_iters, batch_size, seed = training.num_iters, training.batch_size, training.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureClassifier(shape) if shape.kind == "classifier" else FeatureAutoencoder(shape)
    options = {"image_size": image_size, "batch_size": batch_size, "seed": seed, "num_workers": training.num_workers}
    window = {"window": WINDOW_IMAGES} if isinstance(train_part, ShardStore) else {}
    batches = open_batches(train_part, flip=False, **options, **window)
    config = LoopConfig(
        num_iters=num_iters,
        batch_size=batch_size,
        seed=seed,
        lr=LR,
        lr_schedule="cosine",
        warmup_iters=max(1, round(WARMUP * num_iters)),
        weight_decay=WEIGHT_DECAY,
        log_interval=max(1, num_iters // 100),
        device=device,
        precision="fp32",
    )
    engine = build_engine(config)
    network = network.to(engine.device)
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with exact:
        with reporter.progress("features", num_iters, "updates") as bar:
            for metrics in metrics_in_memory(FeatureStep(network, config, engine), batches):
                done, loss = int(metrics["update"]), metrics["loss"]
                if not math.isfinite(loss):
                    raise VdiffError(f"the loss is {loss} at update {done}", FeatureStep.remedy)
                bar.update(done, f"loss {loss:.4f}")
        network.eval().requires_grad_(False)
        held_out = in_order(held_out_part, image_size=image_size, batch_size=batch_size)
        metric, value, baseline, num_held_out = measure(network, held_out, engine.device)
        features = network.features
        with closing(batches.start_at(num_iters)) as more:
            features.standardise(*_spread(features, more, min(len(train_part), MAX_MEASURED), engine.device))
    return features.cpu(), FeatureMetadata(
        features=FORMAT,
        kind=shape.kind,
        image_size=image_size,
        channels=shape.channels,
        dim=shape.dim,
        dataset=store.meta.name,
        dataset_fingerprint=store.meta.fingerprint,
        class_names=list(store.meta.class_names) if shape.num_classes else [],
        num_iters=num_iters,
        batch_size=batch_size,
        seed=seed,
        metric=metric,
        held_out=value,
        baseline=baseline,
        num_held_out=num_held_out,
        vdiff_version=vdiff.__version__,
    )


class FeatureStep(OptimizerStep):
    """(n, batch) → `StepResult`: update n of a feature network by `loss_of`."""

    remedy = "try another --seed"

    def __init__(self, network: nn.Module, config: LoopConfig, engine: Engine) -> None:
        super().__init__(config, engine, build_optimizer(network, config))
        self.network = network

    def __call__(self, step: int, batch: Batch) -> StepResult:
        loss = loss_of(self.network, batch, seed=self.config.seed, step=step, device=self.engine.device)
        loss.backward()
        norm = self.engine.clip(list(self.network.parameters()), self.config.clip_norm)
        is_bad = ~torch.isfinite(norm)
        self.descend(step, is_bad)
        losses = loss.detach().expand(len(batch.images))
        no_times = torch.zeros_like(losses)
        return StepResult(losses, no_times, no_times, norm, is_bad)


def loss_of(network: nn.Module, batch: Batch, *, seed: int, step: int, device: str | torch.device) -> Tensor:
    """The cross entropy of a classifier, or an autoencoder's mean squared error of the clean image from a noisy one.

    The noise of an image has a standard deviation that is uniform in [0, `MAX_NOISE`), drawn from (seed, step).
    """
    if isinstance(network, FeatureClassifier):
        assert batch.classes is not None, "a dataset of classes has one for each image"
        logits = network(from_uint8(batch.images.to(device)))
        return F.cross_entropy(logits, batch.classes.to(device), label_smoothing=LABEL_SMOOTHING)
    clean = from_uint8(batch.images)
    words = np.random.SeedSequence([seed, _NOISE, step]).generate_state(1)
    generator = torch.Generator().manual_seed(int(words[0]))
    deviation = MAX_NOISE * torch.rand(len(clean), 1, 1, 1, generator=generator)
    noisy = clean + deviation * torch.randn(clean.shape, generator=generator)
    return F.mse_loss(network(noisy.to(device)), clean.to(device))


@torch.no_grad()
def measure(
    network: nn.Module, batches: Iterator[Batch], device: str | torch.device = "cpu"
) -> tuple[str, float, float, int]:
    """The quality on held-out images: the metric ("accuracy" of a classifier, "psnr" of an autoencoder), its value, the
    value of guessing the most common class or the mean image, and the number of images.

    The PSNR is 10 log₁₀(4 / mean squared error) of pixels in [−1, 1], over all images together.
    """
    count, right, error, squares = 0, 0, 0.0, 0.0
    classes: list[Tensor] = []
    total: Tensor | float = 0.0
    for batch in batches:
        images = from_uint8(batch.images.to(device))
        answer = network(images)
        count += len(images)
        if isinstance(network, FeatureClassifier):
            assert batch.classes is not None
            right += int((answer.argmax(1).cpu() == batch.classes).sum())
            classes.append(batch.classes)
        else:
            error += float((answer - images).double().square().flatten(1).mean(1).sum())
            total = total + images.double().sum(0)
            squares += float(images.double().square().flatten(1).mean(1).sum())
    if isinstance(network, FeatureClassifier):
        return "accuracy", right / count, int(torch.cat(classes).bincount().max()) / count, count
    variance = squares / count - float((torch.as_tensor(total) / count).square().mean())
    return "psnr", _psnr(error / count), _psnr(variance), count


def _psnr(mean_square: float) -> float:
    """10 log₁₀(4 / mean square), at most 120 dB."""
    return 10 * math.log10(4 / max(mean_square, 4e-12))


@torch.no_grad()
def _spread(
    features: FeatureNet, batches: Iterator[Batch], count: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """The mean vector of at least `count` images, and the root of the mean of the variances."""
    seen, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    first: Tensor | None = None
    while seen < count:
        vectors = features(from_uint8(next(batches).images.to(device))).double().cpu()
        first = vectors[0] if first is None else first
        shifted = vectors - first
        total, squares, seen = total + shifted.sum(0), squares + shifted.square().sum(0), seen + len(vectors)
    assert first is not None
    mean = total / seen
    scale = (squares / seen - mean.square()).mean().clamp(min=0).sqrt()
    if not float(scale) > LEAST_SPREAD:
        raise VdiffError("the features of all images are equal", "check that the images differ")
    return first + mean, scale
