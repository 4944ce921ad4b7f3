"""Maps of the plane as a picture: points coloured by the noise that they came from."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor

from vdiff.models.codec import from_uint8

SIDE, FINER = 168, 3
NOISE_EXTENT, DATA_EXTENT = 3.2, 1.2
FRAME, GREY = (214, 214, 220), (120, 120, 128)


def colours(noise: Tensor) -> list[tuple[int, int, int]]:
    """A colour for each point of noise (n, 2): its direction as the hue, paler towards the middle."""
    found = []
    for x, y in noise.tolist():
        hue, strength = math.atan2(y, x) / (2 * math.pi) % 1, min(1.0, math.hypot(x, y) / 1.5)
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.2 + 0.8 * strength, 0.9 - 0.15 * strength)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def panel(points: Tensor, inks: list[tuple[int, int, int]], extent: float) -> Tensor:
    """Points (n, 2) within ±`extent` as a picture (3, SIDE, SIDE) in [−1, 1]."""
    side, radius = SIDE * FINER, 1.1 * FINER
    picture = PIL.Image.new("RGB", (side, side), "white")
    draw = PIL.ImageDraw.Draw(picture)
    for (x, y), ink in zip(((points / extent + 1) * side / 2).tolist(), inks, strict=True):
        draw.ellipse((x - radius, side - y - radius, x + radius, side - y + radius), fill=ink)
    draw.rectangle((0, 0, side - 1, side - 1), outline=FRAME, width=FINER)
    small = picture.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    return from_uint8(torch.from_numpy(np.array(small)).permute(2, 0, 1))


def noise_panel(noise: Tensor) -> Tensor:
    """Where the colours come from."""
    return panel(noise, colours(noise), NOISE_EXTENT)


def map_panel(noise: Tensor, points: Tensor) -> Tensor:
    """Where noise was led, in its colours."""
    return panel(points, colours(noise), DATA_EXTENT)


def data_panel(points: Tensor) -> Tensor:
    """Points that came from no noise."""
    return panel(points, [GREY] * len(points), DATA_EXTENT)
