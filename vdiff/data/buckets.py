"""Aspect-ratio buckets: a dataset has images of many shapes, which are cropped a little and never enlarged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

BETWEEN_SIDES = "×"
Shape = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True)
class Fit:
    """The crop of an image for the bucket `shape`: `box` = (left, top, right, bottom) is resized to `shape`.

    `sizes` = (height and width of the image, top and left of the crop in pixels of the resized image, height and width
    of the bucket): the six numbers of Stable Diffusion XL's `time_ids`.
    """

    shape: Shape
    box: tuple[int, int, int, int]
    sizes: tuple[int, int, int, int, int, int]


@cache
def bucket_shapes(size: int, step: int, least: int, most: int) -> tuple[Shape, ...]:
    """All buckets: sides are multiples of `step` in least … most; each width has the largest height of area ≤ size²."""
    first, last = -(-least // step) * step, most // step * step
    heights = {width: min(size * size // width // step * step, last) for width in range(first, last + 1, step)}
    pairs = [(height, width) for width, height in heights.items() if height >= first]
    square = size // step * step
    both = {*pairs, *((width, height) for height, width in pairs), *([(square, square)] if square >= first else [])}
    return tuple(sorted(both))


def fit(width: int, height: int, size: int, step: int, least: int, most: int) -> Fit | None:
    """The crop for the bucket with the nearest aspect ratio; None: the image is too small for any bucket.

    An image that is smaller than this bucket is not enlarged: its bucket has the sides of the image, rounded down to
    multiples of `step`.
    """

    def distance(shape: Shape) -> tuple[float, int]:
        return abs(math.log(width * shape[0]) - math.log(height * shape[1])), -shape[0] * shape[1]

    shapes = bucket_shapes(size, step, least, most)
    if not shapes or not width or not height:
        return None
    tall, wide = min(shapes, key=distance)
    if tall > height or wide > width:
        tall, wide = (min(side, most) // step * step for side in (height, width))
        while tall * wide > size * size:  # a long, narrow image: the longer side is cropped
            tall, wide = (tall - step, wide) if tall > wide else (tall, wide - step)
        if min(tall, wide) < max(least, step):
            return None
    if width * tall > height * wide:
        box_height, box_width = height, (2 * height * wide + tall) // (2 * tall)
    else:
        box_height, box_width = (2 * width * tall + wide) // (2 * wide), width
    left, top = (width - box_width) // 2, (height - box_height) // 2
    crop = round(top * tall / box_height), round(left * wide / box_width)
    return Fit((tall, wide), (left, top, left + box_width, top + box_height), (height, width, *crop, tall, wide))


def name_of(height: int, width: int) -> str:
    """`832×1216`."""
    return f"{height}{BETWEEN_SIDES}{width}"
