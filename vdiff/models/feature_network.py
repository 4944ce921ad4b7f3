"""A small network that maps images to feature vectors, and its file: a `torch.export` program with metadata."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.errors import OptionError, VdiffError
from vdiff.files import parse
from vdiff.models.codec import PIXEL_CODEC
from vdiff.models.program import PROGRAM, write_program
from vdiff.records import record_of
from vdiff.replacing import check_free

KINDS = ("classifier", "autoencoder")
MIN_SIZE, MAX_SIZE = 8, 256
LAST_SIDE = 4
FULL_SIDE = 64
"""The largest side after the first convolution; its stride reduces larger images."""
GROUPS = 8
SUFFIX = ".pt2"
FORMAT = 1
TOLERANCE = 1e-5


@dataclass(frozen=True)
class FeatureNetConfig:
    """The shape of a feature network.

    Attributes:
        kind: "classifier" or "autoencoder".
        image_size, channels: of the images, 8 to 256 pixels a side.
        dim: of a feature vector.
        num_classes: of a classifier; 0 for an autoencoder.
        width: channels at full resolution; doubled by each halving of the side, up to `max_width`.
    """

    kind: str
    image_size: int
    channels: int
    dim: int = 64
    num_classes: int = 0
    width: int = 32
    max_width: int = 256

    def __post_init__(self) -> None:
        if self.kind not in KINDS or (self.kind == "classifier") != (self.num_classes >= 2):
            raise ValueError(f"kind {self.kind!r} with {self.num_classes} classes; need one of {KINDS}, and >= 2 or 0")
        if not MIN_SIZE <= self.image_size <= MAX_SIZE:
            raise ValueError(f"images of {self.image_size} pixels; need {MIN_SIZE} to {MAX_SIZE}")
        if min(self.channels, self.dim) < 1 or self.width % GROUPS or self.max_width < self.width:
            raise ValueError(f"channels {self.channels}, dim {self.dim}, widths {self.width} to {self.max_width}")

    @property
    def stride(self) -> int:
        """The stride of the first convolution: 1 up to 64 pixels, then 2 or 4."""
        return 1 if self.image_size <= FULL_SIDE else 2 if self.image_size <= 2 * FULL_SIDE else 4

    @property
    def sides(self) -> list[int]:
        """The side after the first convolution and after each halving (rounded up), the last at most 4."""
        sides = [-(-self.image_size // self.stride)]
        while sides[-1] > LAST_SIDE:
            sides.append((sides[-1] + 1) // 2)
        return sides

    @property
    def widths(self) -> list[int]:
        """The channels at each of the `sides`."""
        return [min(self.width << k, self.max_width) for k in range(len(self.sides))]


def _block(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    """Convolution, normalisation over groups, SiLU: (n, inputs, s, s) → (n, outputs, ⌈s/stride⌉, ⌈s/stride⌉).

    The kernel is 3 × 3, or 9 × 9 for stride 4, so that it covers every pixel.
    """
    reach = 4 if stride == 4 else 1
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 2 * reach + 1, stride=stride, padding=reach, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.SiLU(),
    )


class FeatureNet(nn.Module):
    """(n, C, S, S) images in [−1, 1] → (n, dim) features.

    Blocks of convolutions halve the side until it is at most 4. A classifier then takes the mean over positions, as
    Inception does; an autoencoder keeps the positions, which its decoder needs. One linear layer follows, with an
    affine map that `standardise` sets. Images are clipped to [−1, 1], as when a picture is saved. No layer mixes
    images, so an image's features are the same in every batch.
    """

    def __init__(self, config: FeatureNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        blocks = [_block(config.channels, widths[0], stride=config.stride)]
        for inputs, outputs in pairwise(widths):
            blocks += [_block(inputs, outputs, stride=2), _block(outputs, outputs)]
        self.blocks = nn.Sequential(*blocks)
        places = 1 if config.kind == "classifier" else config.sides[-1] ** 2
        self.linear = nn.Linear(widths[-1] * places, config.dim)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.blocks(PIXEL_CODEC.clip(images))
        pooled = hidden.mean((2, 3)) if self.config.kind == "classifier" else hidden.flatten(1)
        features: Tensor = self.linear(pooled)
        return features

    def standardise(self, mean: Tensor, scale: Tensor) -> None:
        """Change the linear layer so that the output is (features − `mean`) / `scale`, with tensors (dim,) and ()."""
        weight, bias = self.linear.weight.data, self.linear.bias.data
        weight.div_(scale.to(weight))
        bias.sub_(mean.to(bias)).div_(scale.to(bias))


class FeatureClassifier(nn.Module):
    """(n, C, S, S) images → (n, num_classes) logits, computed from the `features`."""

    def __init__(self, config: FeatureNetConfig) -> None:
        super().__init__()
        self.features = FeatureNet(config)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.silu(self.features(images)))
        return logits


class FeatureAutoencoder(nn.Module):
    """(n, C, S, S) images → their reconstructions from the `features` alone."""

    def __init__(self, config: FeatureNetConfig) -> None:
        super().__init__()
        self.features = FeatureNet(config)
        self.config = config
        sides, widths = config.sides[::-1], config.widths[::-1]
        self.linear = nn.Linear(config.dim, widths[0] * sides[0] ** 2)
        self.blocks = nn.ModuleList(_block(a, b) for a, b in zip(widths, [*widths[1:], widths[-1]], strict=True))
        self.last = nn.Conv2d(widths[-1], config.channels * config.stride**2, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        sides, size = self.config.sides[::-1], self.config.image_size
        hidden = self.linear(F.silu(self.features(images))).unflatten(1, (-1, sides[0], sides[0]))
        for block, side in zip(self.blocks, [*sides[1:], sides[-1]], strict=True):
            hidden = block(hidden)
            if side != hidden.shape[-1]:
                hidden = F.interpolate(hidden, size=(side, side), mode="nearest")
        return F.pixel_shuffle(self.last(hidden), self.config.stride)[:, :, :size, :size]


@dataclass(frozen=True)
class FeatureMetadata:
    """The metadata in a feature network's file: JSON in the extra file `vdiff.json`.

    Attributes:
        features: the format's version; the key marks a program that computes features.
        kind: "classifier" or "autoencoder".
        image_size, channels: of its input images (n, channels, image_size, image_size) in [−1, 1].
        dim: of a feature vector.
        dataset, dataset_fingerprint, class_names: the training data.
        num_iters, batch_size, seed: of the training.
        metric, held_out, baseline, num_held_out: "accuracy" or "psnr", its value on held-out images, the value of
            guessing the most common class or the mean image, and the number of held-out images.
    """

    features: int
    kind: str
    image_size: int
    channels: int
    dim: int
    dataset: str
    dataset_fingerprint: str
    class_names: list[str]
    num_iters: int
    batch_size: int
    seed: int
    metric: str
    held_out: float
    baseline: float
    num_held_out: int
    vdiff_version: str


def check_out(path: Path, *, overwrite: bool) -> None:
    """Check before the training that the file may be written afterwards.

    Raises:
        OptionError: the name does not end in .pt2, or is a folder.
        VdiffError: the file exists, and `overwrite` is off or vdiff did not write it.
    """
    if path.suffix != SUFFIX:
        raise OptionError(f"--out {path}: the file is a torch.export program", f"give FILE{SUFFIX}")
    if path.is_dir():
        raise OptionError(f"--out {path} is a folder", f"give FILE{SUFFIX}")
    check_free(path, PROGRAM, overwrite=overwrite)


def write_features(network: FeatureNet, metadata: FeatureMetadata, path: Path) -> float:
    """Write the program, whole or not at all; return the largest difference of its features after reloading.

    The program takes images (n, C, S, S), float32 in [−1, 1], for any n.

    Raises:
        VdiffError: the features differ, or the file system refuses.
    """

    def compare(program: nn.Module) -> float:
        difference = 0.0
        for count in (3, 1):
            images = _probe(network, count)
            due, found = network(images), program(images)
            scale = due.abs().max().clamp(min=1)
            difference = max(difference, float((found - due).abs().max() / scale))
        if not difference <= TOLERANCE:
            raise VdiffError(
                f"the exported features differ by {difference:.1e}, more than {TOLERANCE:g}",
                "nothing was written; please report this",
            )
        return difference

    return write_program(network, (_probe(network, 2),), asdict(metadata), path, compare)


def _probe(network: FeatureNet, count: int) -> Tensor:
    """Random images, the same in every call."""
    size, channels = network.config.image_size, network.config.channels
    return torch.rand((count, channels, size, size), generator=torch.Generator().manual_seed(count)) * 2 - 1


def parse_metadata(text: str | bytes) -> FeatureMetadata | None:
    """The metadata in a program's extra file; None if it is empty or not of a feature network."""
    try:
        found = record_of(FeatureMetadata, parse(text or "null"), "the description", "")
    except (ValueError, VdiffError):
        return None
    return found if found.features == FORMAT else None
