"""Training a feature network: a classifier where the images have classes, else a denoising autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.data.batches import Batch
from vdiff.data.datasets import AnyStore
from vdiff.data.images import from_uint8
from vdiff.errors import OptionError, VdiffError
from vdiff.evaluation.feature_network import MAX_SIZE, MIN_SIZE, Autoencoder, Classifier, FeatureNet, FeatureNetConfig
from vdiff.evaluation.feature_network_data import MAX_MEASURED, endless, in_order, split
from vdiff.reporting import Reporter

LR, WEIGHT_DECAY, CLIP_NORM = 2e-3, 0.01, 1.0
WARMUP = 0.05
LABEL_SMOOTHING = 0.05
MAX_NOISE = 0.3
"""Where the range of a pixel is 2: images are handed to an autoencoder with noise of a deviation from 0 to this."""
LEAST_SPREAD = 1e-6
_NOISE = 11  # the first word of the random stream; the split of the data has another


@dataclass(frozen=True)
class FeatureTraining:
    """How a feature network is trained.

    Attributes:
        kind: "classifier", "autoencoder", or "auto": a classifier if the images have two classes or more.
        dim: numbers in a vector of features.
        num_iters: optimiser updates.
        batch_size: images in an update.
        seed: of the first weights, of the order of the images, of the noise, and of which images are held out.
        num_workers: processes that decode images while not all are in memory.
    """

    kind: str = "auto"
    dim: int = 64
    num_iters: int = 1000
    batch_size: int = 64
    seed: int = 0
    num_workers: int = 0


@dataclass(frozen=True)
class HeldOut:
    """What a network does with images that it was not trained on.

    Attributes:
        metric: "accuracy", the part of the images whose class it finds, or "psnr", of reconstructions, in dB.
        value: for the network.
        baseline: for the commonest class, or for the mean image.
        num_images: measured.
    """

    metric: str
    value: float
    baseline: float
    num_images: int


def choose_kind(kind: str, store: AnyStore) -> str:
    """The kind that "auto" means for a dataset.

    Raises:
        OptionError: a classifier is asked for, and there are not two classes.
    """
    num_classes = len(store.meta.class_names)
    if kind == "classifier" and num_classes < 2:
        raise OptionError(
            f"--kind classifier: {store.path} has {num_classes or 'no'} class{'es' if not num_classes else ''}",
            "give --kind autoencoder, or prepare a dataset of two classes or more",
        )
    if kind == "auto":
        return "classifier" if num_classes >= 2 else "autoencoder"
    return kind


def network_config(store: AnyStore, image_size: int, training: FeatureTraining) -> FeatureNetConfig:
    """The network for a dataset.

    Raises:
        VdiffError: the images are too small or too large for it.
        OptionError: a classifier is asked for, and there are not two classes.
    """
    kind = choose_kind(training.kind, store)
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        raise VdiffError(
            f"{store.path} has images of {image_size} pixels; a feature network takes {MIN_SIZE} to {MAX_SIZE}",
            "evaluate on pixels, or prepare the images in such a size",
        )
    num_classes = len(store.meta.class_names) if kind == "classifier" else 0
    return FeatureNetConfig(kind, image_size, store.meta.channels, training.dim, num_classes)


def train_features(
    store: AnyStore,
    image_size: int,
    training: FeatureTraining,
    *,
    device: str | torch.device = "cpu",
    reporter: Reporter,
) -> tuple[FeatureNet, HeldOut]:
    """Train on nine tenths of the images, measure on the others; answer the part that makes features, on the CPU.

    AdamW, learning rate 2e-3 with a warm-up of 5 % and a cosine to 0, gradients clipped to a norm of 1. A classifier
    minimises the cross entropy (labels smoothed by 0.05); an autoencoder the mean squared error of the clean image,
    from a noisy one. Over the training images the features have a mean of 0 and variances that sum to `dim`, so the
    Fréchet distance of the data to any one of its mean vectors repeated is `dim`: a scale to read distances by. Equal
    seeds give equal networks on one machine.

    Raises:
        VdiffError: too few images, an image that cannot be read, images all alike, or a loss that is not finite.
        OptionError: a classifier is asked for, and there are not two classes.
    """
    config = network_config(store, image_size, training)
    train_part, held_out_part = split(store, training.seed)
    network = _initial(config, training.seed).to(device)
    batches = endless(
        train_part,
        image_size=image_size,
        batch_size=training.batch_size,
        seed=training.seed,
        num_workers=training.num_workers,
    )
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        closing(batches),
    ):
        _fit(network, batches, training, device, reporter)
        network.eval().requires_grad_(False)
        found = measure(network, in_order(held_out_part, image_size=image_size, batch_size=training.batch_size), device)
        features = network.features
        count = min(len(train_part), MAX_MEASURED)
        features.standardise(*_spread(features, batches, count, device))
    return features.cpu(), found


def _initial(config: FeatureNetConfig, seed: int) -> Classifier | Autoencoder:
    """The untrained network; the global random generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(config) if config.kind == "classifier" else Autoencoder(config)


def _fit(
    network: Classifier | Autoencoder,
    batches: Iterator[Batch],
    training: FeatureTraining,
    device: str | torch.device,
    reporter: Reporter,
) -> None:
    """All updates."""
    loss_of: Callable[[Batch, int], Tensor] = (
        _Classifying(network, device) if isinstance(network, Classifier) else _Denoising(network, device, training.seed)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    every = max(1, training.num_iters // 100)
    with reporter.progress("features", training.num_iters, "updates") as bar:
        for step in range(training.num_iters):
            for group in optimizer.param_groups:
                group["lr"] = LR * _lr_factor(step, training.num_iters)
            loss = loss_of(next(batches), step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
            optimizer.step()
            if (step + 1) % every == 0 or step + 1 == training.num_iters:
                shown = float(loss.detach())
                if not math.isfinite(shown):
                    raise VdiffError(f"the loss is {shown} at update {step + 1}", "try another --seed")
                bar.update(step + 1, f"loss {shown:.4f}")


def _lr_factor(step: int, num_iters: int) -> float:
    """Warm-up, then half a cosine down to 0."""
    warmup = max(1, round(WARMUP * num_iters))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / num_iters))


class _Classifying:
    """Batch → cross entropy."""

    def __init__(self, network: Classifier, device: str | torch.device) -> None:
        self.network, self.device = network, device

    def __call__(self, batch: Batch, step: int) -> Tensor:
        del step
        assert batch.classes is not None, "a dataset of classes has one for each image"
        logits = self.network(from_uint8(batch.images.to(self.device)))
        return F.cross_entropy(logits, batch.classes.to(self.device), label_smoothing=LABEL_SMOOTHING)


class _Denoising:
    """Batch → mean squared error of the clean image, drawn again from a noisy one."""

    def __init__(self, network: Autoencoder, device: str | torch.device, seed: int) -> None:
        self.network, self.device, self.seed = network, device, seed

    def __call__(self, batch: Batch, step: int) -> Tensor:
        clean = from_uint8(batch.images)
        words = np.random.SeedSequence([self.seed, _NOISE, step]).generate_state(1)
        generator = torch.Generator().manual_seed(int(words[0]))
        deviation = MAX_NOISE * torch.rand(len(clean), 1, 1, 1, generator=generator)
        noisy = clean + deviation * torch.randn(clean.shape, generator=generator)
        return F.mse_loss(self.network(noisy.to(self.device)), clean.to(self.device))


@torch.no_grad()
def measure(network: nn.Module, batches: Iterator[Batch], device: str | torch.device = "cpu") -> HeldOut:
    """How well a trained classifier or autoencoder does on images that it has not seen.

    The PSNR is 10 log₁₀(4 / mean squared error): of pixels in [−1, 1], over all images together.
    """
    count, right, error = 0, 0, 0.0
    classes: list[Tensor] = []
    total: Tensor | float = 0.0
    squares = 0.0
    for batch in batches:
        images = from_uint8(batch.images.to(device))
        answer = network(images)
        count += len(images)
        if isinstance(network, Classifier):
            assert batch.classes is not None
            right += int((answer.argmax(1).cpu() == batch.classes).sum())
            classes.append(batch.classes)
        else:
            error += float((answer - images).double().square().flatten(1).mean(1).sum())
            total = total + images.double().sum(0)
            squares += float(images.double().square().flatten(1).mean(1).sum())
    if isinstance(network, Classifier):
        commonest = int(torch.cat(classes).bincount().max())
        return HeldOut("accuracy", right / count, commonest / count, count)
    assert isinstance(total, Tensor)
    variance = squares / count - float((total / count).square().mean())
    return HeldOut("psnr", _psnr(error / count), _psnr(variance), count)


def _psnr(mean_square: float) -> float:
    """10 log₁₀(4 / mean square), at most 120 dB."""
    return 10 * math.log10(4 / max(mean_square, 4e-12))


@torch.no_grad()
def _spread(
    features: FeatureNet, batches: Iterator[Batch], count: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """The mean vector of at least `count` images, and the root of the mean of the variances.

    Raises:
        VdiffError: all images have the same features.
    """
    seen, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    first: Tensor | None = None
    while seen < count:
        images = next(batches).images
        vectors = features(from_uint8(images.to(device))).double().cpu()
        first = vectors[0] if first is None else first
        total, squares, seen = (
            total + (vectors - first).sum(0),
            squares + (vectors - first).square().sum(0),
            seen + len(images),
        )
    assert first is not None
    mean = total / seen
    scale = (squares / seen - mean.square()).mean().clamp(min=0).sqrt()
    if not float(scale) > LEAST_SPREAD:
        raise VdiffError("the features of all images are equal: nothing can be told apart by them", "check the images")
    return first + mean, scale
