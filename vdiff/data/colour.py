"""Conversion of any Pillow mode to 8-bit sRGB colour or grey, without transparency.

Order: convert to 8 bits, separate transparency, apply the colour profile, composite on the background, convert to RGB
or grey. Grey is Pillow's L of sRGB, (19595 R + 38470 G + 7471 B + 2¹⁵) // 2¹⁶ ≈ 0.299 R + 0.587 G + 0.114 B.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import lru_cache, partial

import numpy as np
import PIL.Image
from PIL import ImageCms
from PIL.Image import Image
from PIL.ImageFile import ImageFile

# a profile within this many levels (of 0 … 255) of sRGB counts as sRGB, as vendors round its curve differently
SAME_LEVELS = 2


# a kind of conversion: the values use so little of the range that the picture is dark or flat
NARROW = "in under a quarter of the range"


class UnsupportedValuesError(Exception):
    """Pixel values of unknown scale."""


def to_8_bit_srgb(
    image: Image, mode: str, background: tuple[int, int, int], value_range: tuple[float, float] | None = None
) -> tuple[Image, list[str]]:
    """A loaded picture in `mode` (RGB or L), and the kinds of conversion that were needed.

    `value_range`: the values of integer and floating-point grey that become 0 and 255; None: the type's full range.

    Raises:
        UnsupportedValuesError: the scale of the values is unknown.
    """
    kinds = [KINDS_OF_MODES[image.mode]] if image.mode in KINDS_OF_MODES else []
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image, opacity, more = _to_8_bit(image, value_range)
        kinds += more
    else:
        image, opacity = _split(image)
    grey = image.mode == "L"
    if profile:
        try:
            transform = srgb_transform(profile, image.mode)
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            kinds.append("broken icc")
        else:
            kinds += ["icc"] if transform else []
            image = transform(image) if transform else image
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
    **dict.fromkeys(("P", "PA"), "palette"),
    "CMYK": "cmyk",
    "LAB": "lab",
    "F": "float",
    **dict.fromkeys(("I", "I;16", "I;16B", "I;16L", "I;16N"), "16-bit"),
}


def scale_transparency(image: ImageFile) -> None:
    """Convert the transparent colour of an opened, not yet decoded PNG to 8 bits.

    Pillow converts samples of 2, 4 and 16 bits, but not this colour.
    """
    transparent = image.info.get("transparency")
    depth = image.tile[0].args if image.tile else ""
    if depth in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[depth]
    elif depth == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in transparent)


def _split(image: Image) -> tuple[Image, Image | None]:
    """The picture in L, RGB, CMYK or LAB, and its opacity as L, if it has any."""
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data and image.mode not in ("CMYK", "LAB"):
        image = image.convert("LA" if grey else "RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if grey else "RGB"), None


def _to_8_bit(image: Image, value_range: tuple[float, float] | None) -> tuple[Image, Image | None, list[str]]:
    """Integer and floating-point grey to L: round(255 (v − low)/(high − low)), clipped to 0 … 255.

    Also returns the opacity, if one grey value means transparent, and the kinds of conversion.
    """
    values = np.asarray(image)
    least, most = values.min(), values.max()
    low, high = value_range or ((0, 65535) if image.mode != "F" else (0, 1) if most <= 1 else (0, 255))
    # written so that NaN fails every comparison
    if not (np.isfinite(least) and np.isfinite(most) if value_range else low <= least and most <= high):
        what = "floating-point" if image.mode == "F" else "integer"
        raise UnsupportedValuesError(f"{what} pixels from {least:g} to {most:g}")
    exact = values if image.mode == "F" and value_range is None else values.astype(np.float64)
    scaled = np.floor(np.clip((exact - low) * (255 / (high - low)), 0, 255) + 0.5)
    kinds = ["clipped"] if least < low or most > high else []
    kinds += [NARROW] if 4 * (float(most) - float(least)) < high - low else []
    grey = PIL.Image.fromarray(scaled.astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey, None, kinds
    return grey, PIL.Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)), kinds


def extremes(image: Image) -> tuple[float, float, bool] | None:
    """The least and largest value of integer or floating-point grey, and whether it is integer; None: other modes."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    return float(values.min()), float(values.max()), image.mode != "F"


def common_range(found: Iterable[tuple[float, float, bool]]) -> tuple[float, float] | None:
    """The values that become 0 and 255 in all pictures, from the `extremes` of each; None: there are none.

    Integers from 0 on: 0 … 2^b − 1 with the fewest bits b ≥ 8 that hold the largest; others: the least … the largest.
    """
    finite = [each for each in found if np.isfinite(each[0]) and np.isfinite(each[1])]
    if not finite:
        return None
    low, high = min(least for least, _, _ in finite), max(most for _, most, _ in finite)
    if low >= 0 and all(is_integer for _, _, is_integer in finite):
        return 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
    return low, high if high > low else low + 1


# cached, as building the transform takes longer than applying it to a small picture, and profiles repeat
@lru_cache(maxsize=32)
def srgb_transform(profile: bytes, mode: str) -> Callable[[Image], Image] | None:
    """Pixels of `mode` (L, RGB, CMYK or LAB) with that ICC profile → sRGB: relative colorimetric, black on black.

    L becomes L, the others RGB. None if the profile is sRGB itself: every colour of a 16 × 16 × 16 grid, or every grey,
    stays within `SAME_LEVELS`.

    Raises:
        PyCMSError, OSError: not a profile, or a profile for other pixels.
    """
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        # greys use a table made once, as littlecms' shortcuts distort dark greys
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
    assert result is not None  # None only for a transform in place
    return result
