"""Pictures inside of the page: as `data:` addresses, so that it needs no file beside it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from vdiff.errors import VdiffError

LOSSLESS_PIXELS = 2**19
"""Pictures up to this size stay as they are; larger ones lose what the eye hardly sees."""
QUALITY = 88
MAX_SIDE = 4096
AGAIN = "move it away: the command that wrote it writes it again"


@dataclass(frozen=True)
class Inlined:
    """A picture as an address that holds it, and its size in pixels."""

    address: str
    width: int
    height: int


def read_picture(path: Path) -> PIL.Image.Image:
    """A picture file, decoded.

    Raises:
        VdiffError: it cannot be read.
    """
    try:
        with PIL.Image.open(path) as picture:
            picture.load()
            return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise VdiffError(f"{path} is no picture that can be read: {error}", AGAIN) from None


def inlined(picture: PIL.Image.Image) -> Inlined:
    """The picture as WebP: bit for bit where it is small, else at a quality of 88 and of at most 4096 pixels a side."""
    buffer, is_small = io.BytesIO(), picture.width * picture.height <= LOSSLESS_PIXELS
    if max(picture.size) > MAX_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE), PIL.Image.Resampling.LANCZOS)
    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    picture.convert(mode).save(buffer, format="WEBP", lossless=is_small, quality=100 if is_small else QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Inlined(f"data:image/webp;base64,{data}", picture.width, picture.height)


def strips(picture: PIL.Image.Image, rows: int) -> list[PIL.Image.Image]:
    """A picture of square images cut into `rows`, a gap between the images of a row; none where it cannot be."""
    side, rest = divmod(picture.height, rows)
    if rest or not side or picture.width % side:
        return []
    return [_strip(picture.crop((0, k * side, picture.width, (k + 1) * side))) for k in range(rows)]


def _strip(row: PIL.Image.Image) -> PIL.Image.Image:
    side = row.height
    count, step = row.width // side, side + max(1, side // 16)
    strip = PIL.Image.new("RGBA", (count * step - step + side, side))
    for k in range(count):
        strip.paste(row.crop((k * side, 0, (k + 1) * side, side)), (k * step, 0))
    return strip
