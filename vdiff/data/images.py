"""Conversion between tensors and pictures: [−1, 1] ⇄ uint8, PNG files, grids with captions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import PIL.ExifTags
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import Tensor

from vdiff.data.labels import MARK
from vdiff.files import write_whole
from vdiff.models.codec import to_uint8
from vdiff.replacing import Kind

CELL_PIXELS = 72
MAX_GRID, MAX_COLUMNS, MAX_PROMPT_ROWS = 64, 16, 8
GAP = 4
SPACING = 4
MARGIN = 16
TITLE_SIZE = 16
INK = (28, 28, 32)
SOFT_INK = (96, 96, 104)


def to_pil(image: Tensor) -> PIL.Image.Image:
    """A (C, H, W) tensor in [−1, 1], C = 1 or 3, as an L or RGB picture."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image of shape {tuple(image.shape)}; need (1, H, W) or (3, H, W)")
    pixels = to_uint8(image.detach().cpu()).permute(1, 2, 0)
    return PIL.Image.fromarray((pixels[..., 0] if image.shape[0] == 1 else pixels).contiguous().numpy())


def own_mark() -> bytes:
    """EXIF that marks vdiff's pictures, which prepare_data.py ignores."""
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Software] = MARK.decode().removesuffix("\0")
    return exif.tobytes()


def save_png(image: Tensor | PIL.Image.Image, path: Path) -> None:
    """Write one picture, or one (C, H, W) tensor in [−1, 1], as a PNG file with `own_mark`: whole or not at all."""
    picture = to_pil(image) if isinstance(image, Tensor) else image
    write_whole(path, lambda temporary: picture.save(temporary, format="PNG", exif=own_mark()))


def _is_picture(path: Path) -> str:
    with PIL.Image.open(path) as picture:
        return "picture" if MARK in picture.getexif().tobytes() else ""


PICTURE = Kind("picture", _is_picture)


def cell_scale(images: Tensor) -> int:
    """The factor that enlarges (…, H, W) images for display, to 72 pixels or a little more."""
    return max(1, -(-CELL_PIXELS // min(images.shape[-2:])))


def make_grid(images: Tensor, columns: int, padding: int = 2, scale: int = 1) -> Tensor:
    """(N, C, H, W) in [−1, 1] as one (C, H′, W′) picture of `columns` images a row, on white.

    Each pixel becomes a square of `scale` × `scale`.
    """
    from torchvision.utils import make_grid as torchvision_grid

    images = images.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    grid: Tensor = torchvision_grid(images.detach().float().cpu(), nrow=columns, padding=padding, pad_value=1.0)
    return grid if images.shape[1] == 3 else grid[:1]  # torchvision repeats a grey channel three times


def labelled_grid(
    images: Tensor, labels: Sequence[str], columns: int, scale: int | None = None, title: str = ""
) -> PIL.Image.Image:
    """(N, C, H, W) images in [−1, 1] on white, `columns` a row, each with a label below it, shortened to its width.

    Images are enlarged `scale` times without smoothing; by default just enough for cells of 72 pixels.

    Raises:
        ValueError: the numbers of labels and images differ.
    """
    if len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    factor = scale or cell_scale(images)
    height, width = (factor * side for side in images.shape[-2:])
    text = PIL.ImageFont.load_default(size=max(10, min(16, width // 7)))
    line = int(text.getbbox("Ag")[3]) + SPACING
    rows = -(-len(images) // columns)
    big = PIL.ImageFont.load_default(size=TITLE_SIZE)
    head = int(big.getbbox(title)[3]) + 14 if title else 0
    table_w = columns * (width + GAP) - GAP
    size = (
        2 * MARGIN + max(table_w, int(big.getlength(title))),
        2 * MARGIN + head + rows * (height + line + GAP) - GAP,
    )
    picture = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(picture)
    draw.text((size[0] / 2, MARGIN), title, fill=INK, font=big, anchor="ma")
    left = (size[0] - table_w) // 2
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = left + k % columns * (width + GAP), MARGIN + head + k // columns * (height + line + GAP)
        picture.paste(to_pil(image).resize((width, height), PIL.Image.Resampling.NEAREST), (x, y))
        words = label
        while len(words) > 2 and draw.textlength(words, font=text) > width:
            words = words.rstrip("…")[:-1].rstrip() + "…"
        draw.text((x + width / 2, y + height + 1), words, fill=SOFT_INK, font=text, anchor="ma")
    return picture


def captioned_grid(
    rows: Sequence[Sequence[Tensor]],
    column_titles: Sequence[str],
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
    scale: int | None = None,
) -> PIL.Image.Image:
    """A table of (C, H, W) images in [−1, 1] on white, with titles (`\\n` begins a new line) above and to the left.

    Images are enlarged `scale` times without smoothing; by default just enough for cells of 72 pixels.

    Raises:
        ValueError: the rows differ in length, or the number of titles is wrong.
    """
    if not rows or not rows[0]:
        raise ValueError("no images; need at least one row of one image")
    columns = len(rows[0])
    if any(len(row) != columns for row in rows) or len(column_titles) != columns:
        raise ValueError(f"rows of {[len(row) for row in rows]} images under {len(column_titles)} column titles")
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"{len(row_titles)} row titles for {len(rows)} rows")

    height, width = rows[0][0].shape[-2:]
    factor = scale or cell_scale(rows[0][0])
    cell_w, cell_h = width * factor, height * factor
    text = PIL.ImageFont.load_default(size=max(12, min(18, cell_w // 6)))
    big = PIL.ImageFont.load_default(size=TITLE_SIZE)
    canvas = PIL.ImageDraw.Draw(PIL.Image.new("RGB", (1, 1)))

    def measure(words: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont) -> tuple[int, int]:
        # heights of lines, not of glyphs, so that words with and without ascenders share a baseline
        width = canvas.multiline_textbbox((0, 0), words, font=font, spacing=SPACING)[2]
        line = canvas.textbbox((0, 0), "A", font=font)[3] + SPACING
        return int(width + 1), int(line * len(words.split("\n")))

    titles = [measure(words, text) for words in column_titles]
    step = max(cell_w, *(w + 8 for (w, _), words in zip(titles, column_titles, strict=True) if words), 0) + GAP
    head = max((h for (_, h), words in zip(titles, column_titles, strict=True) if words), default=0)
    head += 8 if head else 0
    left = MARGIN + (max(measure(words, text)[0] for words in row_titles) + 12 if row_titles else 0)
    top = MARGIN + (measure(title, big)[1] + 14 if title else 0)
    table_w = columns * step - GAP
    total_w = max(left + table_w, MARGIN + (measure(title, big)[0] if title else 0)) + MARGIN
    left += (total_w - MARGIN - left - table_w) // 2  # a title wider than the table: centre the table below it
    total_h = top + head + len(rows) * (cell_h + GAP) - GAP + MARGIN

    picture = PIL.Image.new("RGB", (total_w, total_h), "white")
    draw = PIL.ImageDraw.Draw(picture)
    if title:
        draw.multiline_text(
            (total_w / 2, MARGIN), title, fill=INK, font=big, anchor="ma", align="center", spacing=SPACING
        )
    for column, words in enumerate(column_titles):
        # titles of one line and of several lines share the last baseline
        x, y = left + column * step + (step - GAP) / 2, top + head - 8 - titles[column][1]
        draw.multiline_text((x, y), words, fill=INK, font=text, anchor="ma", align="center", spacing=SPACING)
    for row, images in enumerate(rows):
        y = top + head + row * (cell_h + GAP)
        if row_titles:
            words = row_titles[row]
            draw.multiline_text(
                (left - 12, y + (cell_h - measure(words, text)[1]) / 2),
                words, fill=SOFT_INK, font=text, anchor="ra", align="right", spacing=SPACING,
            )  # fmt: skip
        for column, image in enumerate(images):
            cell = to_pil(image).resize((cell_w, cell_h), PIL.Image.Resampling.NEAREST)
            picture.paste(cell, (left + column * step + (step - GAP - cell_w) // 2, y))
    return picture


def num_shown(num: int, num_classes: int = 0) -> int:
    """The number of images in the grid: full rows of `num_classes`, if possible, and at most 64."""
    if 1 < num_classes <= MAX_COLUMNS:
        return min(num, MAX_GRID // num_classes * num_classes)
    return min(num, MAX_GRID)


def grid_picture(
    images: Tensor, names: Sequence[str] = (), num_classes: int = 0, *, title: str = ""
) -> PIL.Image.Image:
    """(N, C, H, W) in [−1, 1] as one picture, with the names of their classes, if any.

    Args:
        names: of the class of each image.
        num_classes: images take this many classes in turn, which become columns; 0: in no such order.
        title: the text above the grid.
    """
    columns = full_columns(len(images))
    if len(names) and not 1 <= num_classes <= MAX_COLUMNS:
        return labelled_grid(images, names, columns, title=title)
    if num_classes == 1 and len(names):
        title = f"{title}: {names[0]}" if title else names[0]
    is_by_class = len(names) > 0 and num_classes > 1
    columns = min(num_classes, len(images)) if is_by_class else columns
    return captioned_grid(in_rows(images, columns), names[:columns] if is_by_class else [""] * columns, title=title)


def prompt_picture(images: Tensor, prompts: Sequence[str], title: str) -> PIL.Image.Image:
    """Images (N, C, H, W) that have the prompts in turn, under a title: a row of images for each prompt.

    One prompt is part of the title. Where every image has a prompt of its own and they are many, each has it below.
    """
    shown = [_wrapped(prompt) for prompt in prompts[: len(images)]]
    if len(shown) == 1:
        return grid_picture(images, title=f"{title}\n{shown[0]}")
    if len(shown) == len(images) > MAX_PROMPT_ROWS:
        return labelled_grid(images, prompts[: len(images)], full_columns(len(images)), title=title)
    columns = -(-len(images) // len(shown))
    blank = torch.ones_like(images[0])
    rows = [[*images[k :: len(shown)], *[blank] * columns][:columns] for k in range(len(shown))]
    return captioned_grid(rows, [""] * columns, shown, title=title)


def _wrapped(prompt: str) -> str:
    """A prompt in at most 4 lines of 40 letters."""
    return "\n".join(textwrap.wrap(prompt, 40, max_lines=4, placeholder=" …")) or "(no prompt)"


def in_rows(images: Tensor, columns: int) -> list[list[Tensor]]:
    """The images in rows, the last one filled up with white."""
    cells = [*images, *[torch.ones_like(images[0])] * (-len(images) % columns)]
    return [cells[first : first + columns] for first in range(0, len(cells), columns)]


def full_columns(count: int) -> int:
    """Columns of a nearly square grid; one more if this fills all rows."""
    columns = math.ceil(math.sqrt(count))
    return columns + 1 if count % columns and count % (columns + 1) == 0 else columns
