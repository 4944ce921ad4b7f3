"""The one conversion from any image file to the pixels of a dataset.

In this order: first frame; EXIF orientation applied; every mode made 8-bit (below); transparency composited on the
background; RGB or grey; crop; resize from the full-size picture; encode. Colour profiles are not applied.

| mode | becomes |
|---|---|
| 16-bit grey (also 32-bit integers within 0 … 65535) | round(v / 257), never clipped; outside 0 … 65535: rejected |
| floating point | values in [0, 1]: round(255 v); in [0, 255]: round(v); others: rejected, as no scale is known |
| 1-bit | 0 and 255 |
| palette | its colours, with their transparency |
| CMYK, YCbCr, Lab, HSV, premultiplied alpha | RGB as Pillow converts them |
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import PIL.Image
from PIL.Image import Image, Resampling, Transpose

ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class UnreadableImageError(Exception):
    """A file that gives no picture: `reason` is one of a few words to count by, `detail` what the decoder said."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason} ({detail})" if detail else reason)


@dataclass(frozen=True)
class ConversionConfig:
    """What the images of a dataset are made into.

    `background` is `(R, G, B)`; `quality` (1 … 100) is for jpeg alone. Choices: `CROPS`, `RESAMPLES`, `FORMATS`.
    """

    sizes: tuple[int, ...] = (64,)
    channels: int = 3
    crop: str = "center"
    resample: str = "lanczos"
    background: tuple[int, int, int] = (255, 255, 255)
    image_format: str = "jpeg"
    quality: int = 100

    def __post_init__(self) -> None:
        choices: list[tuple[str, object, list[str] | list[int]]] = [
            ("channels", self.channels, [1, 3]),
            ("crop", self.crop, list(CROPS)),
            ("resample", self.resample, list(RESAMPLES)),
            ("image_format", self.image_format, list(FORMATS)),
        ]
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} {value!r}; choose from {allowed}")
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes {self.sizes}; need distinct sizes >= 1 in ascending order")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality}; need 1 to 100")

    @property
    def mode(self) -> str:
        """Pillow's name for the pixels: RGB or L."""
        return "RGB" if self.channels == 3 else "L"


@dataclass(frozen=True)
class Converted:
    """The encoded image in each size, and the kinds of conversion it took (`alpha`, `16-bit`, `orientation`, …)."""

    images: dict[int, bytes]
    kinds: tuple[str, ...]


def convert(data: bytes, config: ConversionConfig) -> Converted:
    """The bytes of an image file to encoded images of all `config.sizes`, from one decoding.

    Raises:
        UnreadableImageError: `data` is no image, damaged, or beyond Pillow's decompression-bomb limit.
    """
    image, kinds = decode(data, config)
    fit = CROPS[config.crop]
    if fit.enlarges(image.size, config.sizes[-1]):
        kinds.append("enlarged")
    images = {}
    for size in config.sizes:
        images[size] = encode(fit.apply(image, size, config), config)
    return Converted(images, tuple(kinds))


def decode(data: bytes, config: ConversionConfig) -> tuple[Image, list[str]]:
    """The bytes of an image file to an upright 8-bit picture in `config.mode`, and the kinds of conversion it took."""
    if not data:
        raise UnreadableImageError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            with PIL.Image.open(io.BytesIO(data)) as image:
                return _to_mode(image, config)
        except UnreadableImageError:
            raise
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
            raise UnreadableImageError("too many pixels", f"more than {PIL.Image.MAX_IMAGE_PIXELS:,}") from None
        except PIL.UnidentifiedImageError:
            raise UnreadableImageError("not an image") from None
        except Exception as error:
            # decoders raise whatever a damaged file makes them stumble over: OSError, SyntaxError, struct.error, …
            raise UnreadableImageError("damaged", " ".join(str(error).split()) or type(error).__name__) from None


def _to_mode(image: Image, config: ConversionConfig) -> tuple[Image, list[str]]:
    kinds = []
    if getattr(image, "is_animated", False):  # only the formats that can be animated have the attribute
        kinds.append("animation")
    image.load()
    turn = ORIENTATIONS.get(_orientation(image))
    if turn is not None:
        kinds.append("orientation")
        # a copy: an open file would decode anew, and transposing keeps `info`, which says what is transparent
        image = image.transpose(turn)
    if image.mode in _KINDS_OF_MODES:
        kinds.append(_KINDS_OF_MODES[image.mode])
    opacity: Image | None = None
    if image.mode == "F" or image.mode.startswith("I"):
        image, opacity = _to_8_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        opacity, image = image.getchannel("A"), image.convert("RGB")
    if opacity is not None:
        if opacity.getextrema() != (255, 255):
            kinds.append("alpha")
        image = image.convert("RGB")
        image = PIL.Image.composite(image, PIL.Image.new("RGB", image.size, config.background), opacity)
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if image.mode != config.mode:
        kinds.append("grey" if image.mode == "L" else "colour")
    return image.convert(config.mode), kinds


_KINDS_OF_MODES = {
    "1": "1-bit",
    "P": "palette",
    "PA": "palette",
    "CMYK": "cmyk",
    "F": "float",
    "I": "16-bit",
    "I;16": "16-bit",
    "I;16B": "16-bit",
    "I;16L": "16-bit",
    "I;16N": "16-bit",
}


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block makes no damaged picture
        return 1


def _to_8_bit(image: Image) -> tuple[Image, Image | None]:
    """Integer and floating-point grey to L, and the opacity where one grey value stands for transparency."""
    import numpy as np

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        # written so that NaN fails every comparison
        if low >= 0 and high <= 1:
            scaled = np.floor(values * 255.0 + 0.5)
        elif low >= 0 and high <= 255:
            scaled = np.floor(values + 0.5)
        else:
            raise UnreadableImageError("unsupported values", f"floating-point pixels from {low:g} to {high:g}")
    else:
        if low < 0 or high > 65535:
            raise UnreadableImageError("unsupported values", f"integer pixels from {low} to {high}")
        scaled = (values.astype(np.int64) + 128) // 257  # exactly round(v / 257): 257 is odd, so there are no ties
    grey = PIL.Image.fromarray(scaled.astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey, None
    return grey, PIL.Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Fit:
    """How a picture of any shape becomes a square: `apply` makes it, `enlarges` says whether that invents pixels."""

    apply: Callable[[Image, int, ConversionConfig], Image]
    enlarges: Callable[[tuple[int, int], int], bool]


def center_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The largest centred square (left, top, right, bottom); half pixels are rounded to the left and up."""
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short


def pad_box(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Where the whole picture lies, its long side `size`, its middle in the middle: (left, top, right, bottom)."""
    long = max(width, height)
    new_width, new_height = (max(1, (2 * side * size + long) // (2 * long)) for side in (width, height))
    left, top = (size - new_width) // 2, (size - new_height) // 2
    return left, top, left + new_width, top + new_height


def _center(image: Image, size: int, config: ConversionConfig) -> Image:
    # whole source pixels, cropped and resized in one go: the long side is never rounded, so nothing is distorted, and
    # nothing is blurred at scale 1
    return image.resize((size, size), RESAMPLES[config.resample], box=center_box(*image.size))


def _pad(image: Image, size: int, config: ConversionConfig) -> Image:
    left, top, right, bottom = pad_box(*image.size, size)
    ground = PIL.Image.new("RGB", (1, 1), config.background).convert(config.mode).resize((size, size))
    ground.paste(image.resize((right - left, bottom - top), RESAMPLES[config.resample]), (left, top))
    return ground


def _stretch(image: Image, size: int, config: ConversionConfig) -> Image:
    return image.resize((size, size), RESAMPLES[config.resample])


def encode(image: Image, config: ConversionConfig) -> bytes:
    """The picture as the bytes of a file in `config.image_format`."""
    buffer = io.BytesIO()
    FORMATS[config.image_format](image, buffer, config.quality)
    return buffer.getvalue()


def _jpeg(image: Image, buffer: io.BytesIO, quality: int) -> None:
    image.save(buffer, format="JPEG", quality=quality, subsampling=0)  # 4:4:4


def _png(image: Image, buffer: io.BytesIO, quality: int) -> None:
    del quality
    image.save(buffer, format="PNG")


def _webp(image: Image, buffer: io.BytesIO, quality: int) -> None:
    del quality
    image.save(buffer, format="WEBP", lossless=True)


CROPS = {
    "center": Fit(_center, lambda wh, size: min(wh) < size),
    "pad": Fit(_pad, lambda wh, size: max(wh) < size),
    "stretch": Fit(_stretch, lambda wh, size: min(wh) < size),
}
RESAMPLES = {"lanczos": Resampling.LANCZOS, "bicubic": Resampling.BICUBIC, "box": Resampling.BOX}
FORMATS: dict[str, Callable[[Image, io.BytesIO, int], None]] = {"jpeg": _jpeg, "png": _png, "webp": _webp}
