"""The distance of small pictures of the samples from small pictures of the data: needs no other network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vdiff.evaluation.frechet import frechet_distance

SIDE = 8


def pixel_vectors(images: Tensor, side: int = SIDE) -> NDArray[np.float64]:
    """Each image as the vector of its mean colours in `side` × `side` equal parts (its pixels, where it has no more):
    (n, C, H, W) in [−1, 1] → (n, C·side²); what is beyond [−1, 1] is clipped."""
    images = images.clamp(-1, 1).double()
    if max(images.shape[-2:]) > side:
        images = F.adaptive_avg_pool2d(images, side)
    vectors: NDArray[np.float64] = images.flatten(1).cpu().numpy()
    return vectors


class PixelDistance:
    """The Fréchet distance of images to a reference, both as `pixel_vectors`.

    Good for comparing a student with its teacher; n is small against what the Fréchet distance between photographs
    would need.

    Args:
        reference: real images (n, C, H, W) in [−1, 1], n at least 2.
    """

    def __init__(self, reference: Tensor) -> None:
        self.reference = pixel_vectors(reference)

    def __call__(self, images: Tensor) -> float:
        """How far `images` (n, C, H, W) are."""
        return frechet_distance(pixel_vectors(images), self.reference)
