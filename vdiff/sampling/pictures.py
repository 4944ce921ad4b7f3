"""Pictures: interpolations between two images, and the trajectory of x̂ as a strip and as an animation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
from torch import Tensor

from vdiff.data.images import (
    MAX_COLUMNS,
    captioned_grid,
    cell_scale,
    full_columns,
    in_rows,
    make_grid,
    own_mark,
    save_png,
    to_pil,
)
from vdiff.diffusion.prediction import Prediction
from vdiff.files import write_whole
from vdiff.models.codec import PIXEL_CODEC, from_uint8, to_uint8

MAX_NAME = 24
MAX_ROWS, MAX_STRIP, MAX_FRAMES = 8, 12, 64
SECONDS, LAST_SECONDS, MIN_MILLISECONDS = 3.0, 1.5, 40


def path_picture(images: Tensor, title: str) -> PIL.Image.Image:
    """Interpolated images (N, C, H, W) under a title, in reading order, in rows of at most 16."""
    rows = -(-len(images) // MAX_COLUMNS)
    columns = -(-len(images) // rows)
    return captioned_grid(in_rows(images, columns), [""] * columns, title=title)


class TrajectoryRecorder:
    """The trajectory of the first images: the predicted x̂ after each step, and finally the image.

    It is a callback `on_state` of the sampling loop.

    Attributes:
        steps: the kept steps: all, or 64 evenly spaced ones.
        frames: (n, C, H, W) uint8 at each of them.
        decode: makes pictures of latents.
    """

    def __init__(self, num_steps: int, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        self.decode = decode
        self.steps = spread(num_steps, MAX_FRAMES)
        self.frames: list[Tensor] = []

    def __call__(self, step: int, z: Tensor, prediction: Prediction) -> None:
        """Store x̂ of this step."""
        del z
        if step in self.steps:
            x = prediction.x[:MAX_ROWS].float()
            x = self.decode(x) if self.decode else x
            self.frames.append(to_uint8(PIXEL_CODEC.clip(x.nan_to_num())).cpu())

    def save(self, images: Tensor, strip: Path, animation: Path, names: Sequence[str] = ()) -> None:
        """Write both pictures; `images` (N, C, H, W) in [−1, 1] are the final images.

        Args:
            names: of the class of each image, shown before the rows of the strip.
        """
        count = min(len(images), MAX_ROWS)
        frames = [from_uint8(frame[:count]) for frame in [*self.frames[:-1], to_uint8(images[:count])]]
        shown = spread(len(frames), MAX_STRIP)
        rows = [[frames[i][k] for i in shown] for k in range(count)]
        titles = [str(self.steps[i] + 1) for i in shown]
        short = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in names[:count]]
        save_png(captioned_grid(rows, titles, short or None, title="The prediction after each step"), strip)
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


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 … `count` − 1, evenly spaced, including the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
