"""Any mode that Pillow reads to 8-bit sRGB colours or greys, without transparency.

Order: everything 8-bit, transparency set aside, colour profile applied, transparency composited on the background, RGB
or grey: Pillow's L of the sRGB colours, (19595 R + 38470 G + 7471 B + 2¹⁵) // 2¹⁶ ≈ 0.299 R + 0.587 G + 0.114 B.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import PIL.Image
from PIL import ImageCms
from PIL.Image import Image
from PIL.ImageFile import ImageFile

# levels (of 0 … 255) by which a profile may differ from sRGB and still be one: profiles of sRGB from different makers
# round its curve differently
SAME_LEVELS = 2


class UnsupportedValuesError(Exception):
    """Numbers whose scale nobody can know."""


def to_8_bit_srgb(image: Image, mode: str, background: tuple[int, int, int]) -> tuple[Image, list[str]]:
    """A loaded picture in `mode` (RGB or L), and the kinds of conversion it took.

    Raises:
        UnsupportedValuesError: numbers whose scale nobody can know.
    """
    kinds = [KINDS_OF_MODES[image.mode]] if image.mode in KINDS_OF_MODES else []
    profile = image.info.get("icc_profile")
    image, opacity = _split(image)
    grey = image.mode == "L"
    if profile:
        image, kind = _apply_profile(image, profile)
        kinds += [kind] if kind else []
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if opacity is not None and opacity.getextrema() != (255, 255):
        kinds.append("alpha")
        image = image.convert("RGB")
        image = PIL.Image.composite(image, PIL.Image.new("RGB", image.size, background), opacity)
    if grey != (mode == "L"):
        kinds.append("grey" if grey else "colour")
    return image if image.mode == mode else image.convert(mode), kinds


KINDS_OF_MODES = {
    "1": "1-bit",
    "P": "palette",
    "PA": "palette",
    "CMYK": "cmyk",
    "LAB": "lab",
    "F": "float",
    "I": "16-bit",
    "I;16": "16-bit",
    "I;16B": "16-bit",
    "I;16L": "16-bit",
    "I;16N": "16-bit",
}


def scale_transparency(image: ImageFile) -> None:
    """Make the transparent colour of an opened, not yet decoded PNG 8-bit.

    Pillow does so with its samples of 2, 4 and 16 bits, but leaves this one as the file says it.
    """
    transparent = image.info.get("transparency")
    depth = image.tile[0].args if image.tile else ""
    if depth in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[depth]
    elif depth == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in transparent)


def _split(image: Image) -> tuple[Image, Image | None]:
    """The picture in L, RGB, CMYK or LAB, and its opacity as L, if it has any."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _to_8_bit(image)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data and image.mode not in ("CMYK", "LAB"):
        image = image.convert("LA" if grey else "RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if grey else "RGB"), None


def _to_8_bit(image: Image) -> tuple[Image, Image | None]:
    """Integer and floating-point grey to L, and the opacity where one grey value stands for transparency."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        # written so that NaN fails every comparison
        if low >= 0 and high <= 1:
            scaled = np.floor(values * 255.0 + 0.5)
        elif low >= 0 and high <= 255:
            scaled = np.floor(values + 0.5)
        else:
            raise UnsupportedValuesError(f"floating-point pixels from {low:g} to {high:g}")
    else:
        if low < 0 or high > 65535:
            raise UnsupportedValuesError(f"integer pixels from {low} to {high}")
        scaled = (values.astype(np.int64) + 128) // 257  # exactly round(v / 257): 257 is odd, so there are no ties
    grey = PIL.Image.fromarray(scaled.astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey, None
    return grey, PIL.Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))


def _apply_profile(image: Image, profile: bytes) -> tuple[Image, str]:
    """The picture in sRGB, and `icc`, `broken icc` or, where nothing was to be done, nothing."""
    try:
        transform = srgb_transform(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return image, "broken icc"
    return (image, "") if transform is None else (transform(image), "icc")


# a data set holds pictures of a few cameras: building the transform takes longer than applying it to a small picture
@lru_cache(maxsize=32)
def srgb_transform(profile: bytes, mode: str) -> Callable[[Image], Image] | None:
    """Pixels of `mode` (L, RGB, CMYK or LAB) with that ICC profile → sRGB: relative colorimetric, black on black.

    L becomes L, the others RGB. None if the profile is sRGB itself: every colour of a 16 × 16 × 16 grid, or every grey,
    stays within `SAME_LEVELS`.

    Raises:
        PyCMSError, OSError: no profile, or one for another kind of pixels.
    """
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        # greys go through a table made once, for which littlecms need not take the shortcuts that spoil dark ones
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if mode == "L" else 0),
    )
    if mode not in ("L", "RGB"):
        return partial(_transformed, transform=transform)
    if mode == "L":
        greys = np.arange(256, dtype=np.uint8)
        table = np.asarray(_transformed(PIL.Image.fromarray(greys[None]), transform).convert("L"))[0]
        return None if _close(greys, table) else lambda image: image.point(table.tolist())
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
    if _close(grid, np.asarray(_transformed(PIL.Image.fromarray(grid), transform))):
        return None
    return partial(_transformed, transform=transform)


def _close(before: np.ndarray, after: np.ndarray) -> bool:
    return int(np.abs(before.astype(int) - after.astype(int)).max()) <= SAME_LEVELS


def _transformed(image: Image, transform: ImageCms.ImageCmsTransform) -> Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None  # only a transform in place gives none
    return result
