"""A small network whose answer to an image is a vector: what `vdiff features` trains on the user's own images."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("classifier", "autoencoder")
MIN_SIZE, MAX_SIZE = 8, 256
LAST_SIDE = 4
FULL_SIDE = 64
"""The largest side that the first convolution keeps: larger images are brought down to it by its stride."""
GROUPS = 8


@dataclass(frozen=True)
class FeatureNetConfig:
    """Which network.

    Attributes:
        kind: "classifier" or "autoencoder": what it is trained to be.
        image_size, channels: of the images, 8 to 256 pixels of a side.
        dim: numbers in a vector of features.
        num_classes: of a classifier.
        width: channels at full resolution; twice as many after each halving, up to `max_width`.
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
        """Of the first convolution: 1 up to 64 pixels, then 2 or 4."""
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

    The kernel is 3 × 3, or 9 × 9 where the stride is 4, so that it misses no pixel.
    """
    reach = 4 if stride == 4 else 1
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 2 * reach + 1, stride=stride, padding=reach, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.SiLU(),
    )


class FeatureNet(nn.Module):
    """(n, C, S, S) images in [−1, 1] → (n, dim) features.

    Blocks of convolutions halve the side until it is at most 4. A classifier then takes the mean over places, as
    Inception does; an autoencoder keeps them, since pictures are drawn again from its vector. One linear layer follows
    and an affine map that `standardise` sets. What is beyond [−1, 1] is clipped, as when a picture is saved. Nothing in
    it mixes images, so an image's features are the same in every batch.
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
        hidden = self.blocks(images.clamp(-1, 1))
        pooled = hidden.mean((2, 3)) if self.config.kind == "classifier" else hidden.flatten(1)
        features: Tensor = self.linear(pooled)
        return features

    def standardise(self, mean: Tensor, scale: Tensor) -> None:
        """From now on answer (features − `mean`) / `scale`: (dim,) and () tensors, folded into the linear layer."""
        weight, bias = self.linear.weight.data, self.linear.bias.data
        weight.div_(scale.to(weight))
        bias.sub_(mean.to(bias)).div_(scale.to(bias))


class Classifier(nn.Module):
    """(n, C, S, S) images → (n, num_classes) logits, by way of the `features`."""

    def __init__(self, config: FeatureNetConfig) -> None:
        super().__init__()
        self.features = FeatureNet(config)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.silu(self.features(images)))
        return logits


class Autoencoder(nn.Module):
    """(n, C, S, S) images → the same images drawn again from their `features` alone."""

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
        drawn = F.pixel_shuffle(self.last(hidden), self.config.stride)
        return drawn[:, :, :size, :size]
