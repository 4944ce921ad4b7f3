"""What people look at: a grid of the first images, and the path of x̂ as a strip and as an animation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from vdiff.data.images import captioned_grid, cell_scale, labelled_grid, make_grid, own_mark, save_png, to_pil
from vdiff.diffusion.prediction import Prediction
from vdiff.files import write_whole
from vdiff.models.codec import PIXEL_CODEC, from_uint8, to_uint8

MAX_GRID, MAX_COLUMNS, MAX_NAME = 64, 16, 24
MAX_ROWS, MAX_STRIP, MAX_FRAMES = 8, 12, 64
SECONDS, LAST_SECONDS, MIN_MILLISECONDS = 3.0, 1.5, 40


def num_shown(num: int, num_classes: int = 0) -> int:
    """How many of `num` images the grid shows: full rows of `num_classes`, if that makes sense, but 64 at the most."""
    if 1 < num_classes <= MAX_COLUMNS:
        return min(num, MAX_GRID // num_classes * num_classes)
    return min(num, MAX_GRID)


def grid_picture(images: Tensor, names: Sequence[str] = (), num_classes: int = 0) -> Tensor | PIL.Image.Image:
    """(N, C, H, W) in [−1, 1] as one picture; with the names of their classes, where they have any.

    Args:
        names: of the class of each image.
        num_classes: images take so many classes in turn, which then become columns; 0: in no such order.
    """
    columns = full_columns(len(images))
    if not names:
        return make_grid(images, columns=columns, scale=cell_scale(images))
    if num_classes == 1:
        return captioned_grid(_rows(images, columns), [""] * columns, title=names[0])
    if 1 < num_classes <= MAX_COLUMNS:
        columns = min(num_classes, len(images))
        return captioned_grid(_rows(images, columns), names[:columns])
    return labelled_grid(images, names, columns)


def path_picture(images: Tensor, title: str) -> PIL.Image.Image:
    """(N, C, H, W) images on the way from one to another under a title, read like a text: rows of 16 at the most."""
    rows = -(-len(images) // MAX_COLUMNS)
    columns = -(-len(images) // rows)
    return captioned_grid(_rows(images, columns), [""] * columns, title=title)


def _rows(images: Tensor, columns: int) -> list[list[Tensor]]:
    """The images in rows, the last one filled up with white."""
    cells = [*images, *[torch.ones_like(images[0])] * (-len(images) % columns)]
    return [cells[first : first + columns] for first in range(0, len(cells), columns)]


class TrajectoryRecorder:
    """What the model makes of the first images after each step: x̂ as it was predicted, at the end the image itself.

    It is an `on_state` of the sampling loop.

    Attributes:
        steps: those whose x̂ is kept: all, or 64 evenly chosen.
        frames: (n, C, H, W) uint8 at each of them.
    """

    def __init__(self, num_steps: int) -> None:
        self.steps = spread(num_steps, MAX_FRAMES)
        self.frames: list[Tensor] = []

    def __call__(self, step: int, z: Tensor, prediction: Prediction) -> None:
        """Keep x̂ of this step."""
        del z
        if step in self.steps:
            x = prediction.x[:MAX_ROWS].float()
            self.frames.append(to_uint8(PIXEL_CODEC.clip(x.nan_to_num())).cpu())

    def save(self, images: Tensor, strip: Path, animation: Path, names: Sequence[str] = ()) -> None:
        """Write both pictures; `images` (N, C, H, W) in [−1, 1] are what the last step made of x̂.

        Args:
            names: of the class of each image, which stand before the rows of the strip.
        """
        count = min(len(images), MAX_ROWS)
        frames = [from_uint8(frame[:count]) for frame in [*self.frames[:-1], to_uint8(images[:count])]]
        shown = spread(len(frames), MAX_STRIP)
        rows = [[frames[i][k] for i in shown] for k in range(count)]
        titles = [str(self.steps[i] + 1) for i in shown]
        short = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in names[:count]]
        save_png(captioned_grid(rows, titles, short or None, title="The predicted image after each step"), strip)
        columns, scale = full_columns(count), cell_scale(images)
        pictures = [to_pil(make_grid(frame, columns=columns, scale=scale)).convert("RGB") for frame in frames]
        milliseconds = max(int(1000 * SECONDS / len(pictures)), MIN_MILLISECONDS)
        durations = [milliseconds] * (len(pictures) - 1) + [int(1000 * LAST_SECONDS)]
        write_whole(
            animation,
            lambda temporary: pictures[0].save(
                temporary,
                format="WEBP",
                save_all=True,
                append_images=pictures[1:],
                duration=durations,
                lossless=True,
                loop=0,
                exif=own_mark(),
            ),
        )


def full_columns(count: int) -> int:
    """Columns of a nearly square grid; one more than that where all rows are then full."""
    columns = math.ceil(math.sqrt(count))
    return columns + 1 if count % columns and count % (columns + 1) == 0 else columns


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 … `count` − 1, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
