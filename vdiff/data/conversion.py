"""The one conversion from any image file to the pixels of a dataset.

In this order: first frame; EXIF orientation applied; every mode made 8-bit; colour profile to sRGB; transparency
composited on the background; RGB or grey; crop; resize; encode. All sizes come from one decoding.

| file | becomes |
|---|---|
| 16-bit grey (also 32-bit integers within 0 … 65535) | round(v / 257), never clipped; outside 0 … 65535: rejected |
| the same and floating point with `value_range` (l, h) | round(255 (v − l)/(h − l)), clipped to 0 … 255 |
| 16 bits a channel, otherwise | the high byte, as Pillow reads it; with a `value_range` rejected |
| floating point | values in [0, 1]: round(255 v); in [0, 255]: round(v); others: rejected, as no scale is known |
| 1-bit | 0 and 255 |
| palette | its colours, with their transparency |
| CMYK, Lab | RGB by the profile; without one, as Pillow converts them |
| YCbCr, HSV, premultiplied alpha | RGB or RGB with alpha as Pillow converts them |
| ICC profile | sRGB, relative colorimetric with black-point compensation, before transparency is composited |
| sRGB profile | nothing: every colour stays within 2 levels |
| broken profile, or one for other channels | nothing, counted as `broken icc` |
| grey | 0.299 R + 0.587 G + 0.114 B of the sRGB colours, as Pillow's L rounds it |
| JPEG | decoded at 1/2, 1/4 or 1/8 where that leaves twice the pixels of the largest target (`draft_scale`) |
| HEIF | needs the package pillow-heif |

| crop | takes |
|---|---|
| center | the largest centred square |
| random_resized | a random part, a function of (seed, key) alone, as torchvision's RandomResizedCrop draws it |
| pad | everything, on a square of the background |
| stretch | everything, distorted to a square |
| none | everything; a picture that is not of the size already is rejected |

Boxes are whole pixels of the upright full-size picture, also where a JPEG is decoded smaller.

A condition image may have another size than its image, but the same shape: sides in proportion, to within a pixel. The
same part of it is kept, resized from its own pixels to the size of the image by the same filter, and placed like it.
A `value_range` is for images alone: grey conditions of more than 8 bits keep the full range.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
from PIL.Image import Image, Resampling, Transpose

from vdiff.data.buckets import Fit, Shape, bucket_shapes, fit
from vdiff.data.colour import NARROW, UnsupportedValuesError, extremes, to_8_bit_srgb
from vdiff.data.image_files import UnreadableImageError, is_image, open_file
from vdiff.data.store import PAGE_BYTES
from vdiff.text import cause_of

if TYPE_CHECKING:
    from vdiff.data.source import Sample

Box = tuple[int, int, int, int]  # left, top, right, bottom

ORIENTATION_TAG = 0x0112
# how many decoded pixels each pixel of the largest target gets from a JPEG that is decoded at less than its full size
DRAFT_MARGIN = 2
# width : height of random_resized, and how often it tries to fit a part into the picture
ASPECTS = (3 / 4, 4 / 3)
CROP_TRIES = 10


@dataclass(frozen=True)
class ConversionConfig:
    """The form of a dataset's images.

    `background` is `(R, G, B)`; `quality` (1 … 100) is for jpeg alone. Choices: `CROPS`, `RESAMPLES`, `FORMATS`.
    `crop_scale` in (0, 1] is the smallest part of the area that `random_resized` takes, and `seed` its randomness.
    Images whose shorter side (for pad the longer) has less than `min_size` pixels are rejected. `value_range`: the
    values of grey of more than 8 bits that become 0 and 255; `full`: all that there can be; `auto`: those of
    `colour.common_range`, by which `preparation` replaces it. `buckets` = (step, least, most): images keep their shape,
    nearly, with sides in multiples of `step` (`buckets.fit`), and areas of at most size².
    """

    sizes: tuple[int, ...] = (64,)
    channels: int = 3
    crop: str = "center"
    resample: str = "lanczos"
    background: tuple[int, int, int] = (255, 255, 255)
    image_format: str = "jpeg"
    quality: int = 100
    crop_scale: float = 0.25
    seed: int = 0
    min_size: int = 0
    value_range: str | tuple[float, float] = "full"
    buckets: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        limits, sizes = self.value_range, self.sizes
        rules = {
            "channels": (self.channels in (1, 3), "1 or 3"),
            "crop": (self.crop in CROPS, f"one of {list(CROPS)}"),
            "resample": (self.resample in RESAMPLES, f"one of {list(RESAMPLES)}"),
            "image_format": (self.image_format in FORMATS, f"one of {list(FORMATS)}"),
            "sizes": (
                sizes
                and list(sizes) == sorted(set(sizes))
                and sizes[0] >= 1
                and (self.crop != "none" or len(sizes) == 1),
                "distinct sizes of at least 1 in ascending order; one where crop is none",
            ),
            "background": (
                len(self.background) == 3 and all(0 <= level <= 255 for level in self.background),
                "three levels from 0 to 255",
            ),
            "quality": (1 <= self.quality <= 100, "1 to 100"),
            "crop_scale": (0 < self.crop_scale <= 1, "more than 0, at most 1"),
            "seed": (self.seed >= 0, "0 or more"),
            "min_size": (self.min_size >= 0, "0 or more"),
            "buckets": (
                self.buckets is None
                or (len(sizes) == 1 and self.crop == "center" and self.buckets[0] > 0 and self.shapes != ()),
                "a step and two sides that allow shapes of one size, cropped at the center",
            ),
            "value_range": (
                limits in ("full", "auto") if isinstance(limits, str) else -math.inf < limits[0] < limits[1] < math.inf,
                "full, auto or two finite numbers, the smaller first",
            ),
        }
        for name, (is_good, need) in rules.items():
            if not is_good:
                raise ValueError(f"{name} {getattr(self, name)!r}; need {need}")

    def to_dict(self) -> dict[str, Any]:
        """All settings; as in earlier versions where there are no buckets."""
        values = asdict(self)
        if self.buckets is None:
            del values["buckets"]
        return values

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(height, width) of the largest buckets."""
        return () if self.buckets is None else bucket_shapes(self.sizes[-1], *self.buckets)

    noun, items = "image", "images"

    @property
    def most_bytes(self) -> int:
        """More than the encoded files of an image take."""
        return sum(self.channels * size**2 + PAGE_BYTES for size in self.sizes)

    def meta_fields(self) -> dict[str, Any]:
        """Its part of a dataset's description."""
        return {
            "sizes": self.sizes,
            "channels": self.channels,
            "image_format": self.image_format,
            "quality": self.quality if self.image_format == "jpeg" else None,
            "crop": self.crop,
            "resample": self.resample,
            "background": "#{:02x}{:02x}{:02x}".format(*self.background),
            "value_range": "" if isinstance(self.value_range, str) else "{:g},{:g}".format(*self.value_range),
            "buckets": self.buckets or (),
        }

    def convert(self, sample: Sample, key: str) -> list[Converted]:
        """The image of a source; see the function `convert`."""
        return [convert(sample.data, self, key=key, condition=sample.condition)]

    @property
    def mode(self) -> str:
        """Pillow's name for the pixels: RGB or L."""
        return "RGB" if self.channels == 3 else "L"


@dataclass(frozen=True)
class Converted:
    """The encoded image in each size, and the kinds of conversion it took (`alpha`, `16-bit`, `orientation`, …).

    `shape`: in buckets, what `buckets.Fit.sizes` are. `conditions`: the encoded condition image in each size.
    """

    images: dict[int, bytes]
    kinds: tuple[str, ...]
    shape: tuple[int, ...] = ()
    conditions: dict[int, bytes] = field(default_factory=dict)


def convert(
    data: bytes | Image, config: ConversionConfig, *, key: str = "", condition: bytes | None = None
) -> Converted:
    """Convert an image file's bytes, or a picture, to encoded images of all `config.sizes`.

    Args:
        key: its name.
        condition: the bytes of its condition image.

    Raises:
        UnreadableImageError: `data` is not an image, is damaged, exceeds Pillow's decompression-bomb limit, is of an
            unsupported kind, or has a size that `config` excludes; or the condition image is, or has another shape.
    """
    picture = decode(data, config, key=key)
    kinds = picture.kinds
    if found := _fit(*picture.size, config):
        image = _resize(picture, (found.shape[1], found.shape[0]), RESAMPLES[config.resample])
        return Converted({config.sizes[0]: encode(image, config)}, kinds, found.sizes)
    left, top, right, bottom = picture.box
    if CROPS[config.crop].decisive(right - left, bottom - top) < config.sizes[-1]:
        kinds = (*kinds, "enlarged")
    images = {size: encode(render(picture, size, config), config) for size in config.sizes}
    if condition is None:
        return Converted(images, kinds)
    shown = decode_condition(condition, picture.size, config)
    conditions = {size: encode(render_condition(shown, picture, size, config), config) for size in config.sizes}
    return Converted(images, kinds, conditions=conditions)


def decode_condition(data: bytes, size: tuple[int, int], config: ConversionConfig) -> Image:
    """A condition image, upright, at its own size, in the mode and on the background of its image.

    Args:
        size: (width, height) of its image.

    Raises:
        UnreadableImageError: see `convert`.
    """
    whole = replace(config, crop="stretch", min_size=0, value_range="full", buckets=None)
    try:
        shown = decode(data, whole, is_drafted=False).image
    except UnreadableImageError as error:
        raise UnreadableImageError(f"condition {error.reason}", error.detail) from None
    if abs(shown.width * size[1] - shown.height * size[0]) > max(size):
        what = f"{shown.width}×{shown.height} for an image of {size[0]}×{size[1]}"
        raise UnreadableImageError("condition of another shape", what)
    return shown


def render_condition(shown: Image, picture: Picture, size: int, config: ConversionConfig) -> Image:
    """The part of a condition image that `render` keeps of its image, at the same place of the square."""
    (width, height), (left, top, right, bottom) = picture.size, picture.box
    place = CROPS[config.crop].place(right - left, bottom - top, size)
    across, down = shown.width / width, shown.height / height
    box = (left * across, top * down, min(right * across, shown.width), min(bottom * down, shown.height))
    resized = shown.resize((place[2] - place[0], place[3] - place[1]), RESAMPLES[config.resample], box=box)
    return _placed(resized, place, size, config)


@dataclass(frozen=True)
class Picture:
    """An upright picture in `config.mode`, decoded at 1/`scale` of its size in the file.

    `size` = (width, height) of the whole and `box` = the part to keep are in pixels of the full size. A column of the
    decoded picture holds `scale` columns of the file, the last one perhaps fewer; a flip or a turn moves that one to
    the front. So (x, y) lies at (x, y) / `scale` + `offset`.
    """

    image: Image
    size: tuple[int, int]
    box: Box
    scale: int = 1
    offset: tuple[float, float] = (0.0, 0.0)
    kinds: tuple[str, ...] = ()

    @property
    def decoded_box(self) -> tuple[float, float, float, float]:
        """`box` in pixels of `image`."""
        (dx, dy), s = self.offset, self.scale
        left, top, right, bottom = self.box
        return left / s + dx, top / s + dy, right / s + dx, bottom / s + dy


def decode(data: bytes | Image, config: ConversionConfig, *, key: str = "", is_drafted: bool = True) -> Picture:
    """Convert an image file's bytes, or a picture, to the upright 8-bit picture for all sizes.

    Args:
        is_drafted: whether a JPEG may be decoded smaller.

    Raises:
        UnreadableImageError: see `convert`.
    """
    try:
        with _opened(data) as image:
            full = image.size
            scale = _draft(image, config, key) if isinstance(data, bytes) and is_drafted else 1
            return _upright(image, config, key, full, scale)
    except UnreadableImageError:
        raise
    except UnsupportedValuesError as error:
        raise UnreadableImageError("unsupported values", str(error)) from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise UnreadableImageError("too many pixels", f"more than {PIL.Image.MAX_IMAGE_PIXELS:,}") from None
    except PIL.UnidentifiedImageError:
        if isinstance(data, bytes) and is_image(data):
            raise UnreadableImageError("damaged", "nothing readable after its first bytes") from None
        raise UnreadableImageError("not an image") from None
    except Exception as error:
        # decoders raise many types for damaged files: OSError, SyntaxError, struct.error, …
        raise UnreadableImageError("damaged", cause_of(error)) from None


@contextmanager
def _opened(data: bytes | Image) -> Iterator[Image]:
    """The picture, or the image in a file's bytes; in the block, too many pixels are an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        with nullcontext(data) if isinstance(data, Image) else open_file(data) as image:
            yield image


def _upright(image: Image, config: ConversionConfig, key: str, full: tuple[int, int], scale: int) -> Picture:
    """Decode, turn upright, compute the crop, convert the colours; `full` = the stored size if scale > 1."""
    # only the formats that can be animated have the attribute
    kinds = ["animation"] if getattr(image, "is_animated", False) else []
    colours_of_16_bits = image.mode in ("RGB", "RGBA", "LA") and ";16" in str(getattr(image, "tile", ""))
    image.load()
    if scale == 1:
        full = image.size  # read here, as Pillow turns a TIFF while loading it
    offset = (0.0, 0.0)
    turn = ORIENTATIONS.get(_orientation(image))
    if turn is not None:
        kinds.append("orientation")
        # a copy: an open file would be decoded again, and transposing keeps `info`, which holds the transparent colour
        image = image.transpose(turn.method)
        full = turn.size(full)
        left, top = (decoded - side / scale for decoded, side in zip(image.size, full, strict=True))
        offset = (left * turn.flips_x, top * turn.flips_y)
    _check_size(*full, config)
    found = _fit(*full, config)
    box = found.box if found else CROPS[config.crop].box(*full, config, key)
    limits = None if isinstance(config.value_range, str) else config.value_range
    if colours_of_16_bits:
        colours = np.asarray(image)[..., : 3 if image.mode != "LA" else 1]
        kinds += [NARROW] if int(colours.max()) - int(colours.min()) < 64 else []
        if limits:
            raise UnsupportedValuesError("16-bit colours: only their upper 8 bits are read, --range cannot scale them")
    image, colour_kinds = to_8_bit_srgb(image, config.mode, config.background, limits)
    return Picture(image, full, box, scale, offset, (*kinds, *colour_kinds))


def value_extremes(data: bytes | Image) -> tuple[float, float, bool] | None:
    """`colour.extremes` of an image file or a picture; None also if it cannot be read."""
    try:
        with _opened(data) as image:
            return extremes(image)
    except Exception:  # the conversion reports the error
        return None


def _check_size(width: int, height: int, config: ConversionConfig) -> None:
    if CROPS[config.crop].decisive(width, height) < config.min_size or not width or not height:
        raise UnreadableImageError("too small", f"{width}×{height}")
    size = config.sizes[0]
    if config.buckets and not _fit(width, height, config):
        raise UnreadableImageError("too small", f"{width}×{height} fits no bucket")
    if config.crop == "none" and (width, height) != (size, size):
        raise UnreadableImageError(f"not {size}×{size}", f"{width}×{height}")


def _fit(width: int, height: int, config: ConversionConfig) -> Fit | None:
    """The bucket of an image; None: there are no buckets, or it is too small for them."""
    return fit(width, height, config.sizes[0], *config.buckets) if config.buckets else None


def _draft(image: Image, config: ConversionConfig, key: str) -> int:
    """Have a JPEG decoded at 1/scale of its size, and return that scale; 1 for other formats."""
    if image.format not in ("JPEG", "MPO") or config.buckets:
        return 1
    width, height = image.size
    turn = ORIENTATIONS.get(_orientation(image))
    box = CROPS[config.crop].box(*(turn.size(image.size) if turn else image.size), config, key)
    scale = draft_scale(box, config)
    if scale == 1 or scale > min(width, height):
        return 1
    return scale if image.draft(None, (width // scale, height // scale)) else 1


def draft_scale(box: Box, config: ConversionConfig) -> int:
    """The largest s of 8, 4, 2 for which the decisive side of `box` ≥ s · `DRAFT_MARGIN` · the largest target, or 1."""
    if config.crop == "none" or config.resample == "box":
        # box weights a pixel by 0 or 1: on a coarser grid its edges would move
        return 1
    left, top, right, bottom = box
    decisive = CROPS[config.crop].decisive(right - left, bottom - top)
    return next((scale for scale in (8, 4, 2) if decisive >= scale * DRAFT_MARGIN * config.sizes[-1]), 1)


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a picture with a damaged EXIF block is still readable
        return 1


class Turn(NamedTuple):
    """How stored rows and columns become upright; `flips_x`: the first upright column is the last stored line."""

    method: Transpose
    flips_x: bool = False
    flips_y: bool = False
    swaps: bool = False

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Upright (width, height)."""
        return (stored[1], stored[0]) if self.swaps else stored


def render(picture: Picture, size: int, config: ConversionConfig) -> Image:
    """The picture's box as a `size` × `size` square, in `config.mode`."""
    left, top, right, bottom = picture.box
    place = CROPS[config.crop].place(right - left, bottom - top, size)
    resized = _resize(picture, (place[2] - place[0], place[3] - place[1]), RESAMPLES[config.resample])
    return _placed(resized, place, size, config)


def _placed(resized: Image, place: Box, size: int, config: ConversionConfig) -> Image:
    """A resized picture at its place of the square, on the background."""
    if resized.size == (size, size):
        return resized
    ground = PIL.Image.new("RGB", (1, 1), config.background).convert(config.mode).resize((size, size))
    ground.paste(resized, place[:2])
    return ground


def _resize(picture: Picture, size: tuple[int, int], resample: Resampling) -> Image:
    """Crop and resize in one operation, without intermediate rounding, and without blur at scale 1.

    A decoded column at the edge that covers a fraction f < 1 of `scale` columns must count f, but resizing counts 1.
    With its weight w in a new pixel y and its colour p: y′ = (y − (1 − f) w p) / (1 − (1 − f) w). Rows likewise.
    """
    image, box = picture.image, picture.decoded_box
    resized = image.resize(size, resample, box=box)
    excess = [decoded - side / picture.scale for decoded, side in zip(image.size, picture.size, strict=True)]
    if not any(excess):
        return resized
    pixels = np.atleast_3d(np.asarray(resized, np.float32))
    for axis, share in enumerate(excess):
        if not share:
            continue
        at = 0 if picture.offset[axis] else image.size[axis] - 1
        impulse = PIL.Image.new("F", (image.size[axis], 1))
        impulse.putpixel((at, 0), share)
        weights = np.asarray(impulse.resize((size[axis], 1), resample, box=(box[axis], 0, box[axis + 2], 1)))
        if axis == 0:
            line = image.crop((at, 0, at + 1, image.height)).resize((1, size[1]), resample, box=(0, box[1], 1, box[3]))
        else:
            line = image.crop((0, at, image.width, at + 1)).resize((size[0], 1), resample, box=(box[0], 0, box[2], 1))
        weights = weights.reshape((1, -1, 1) if axis == 0 else (-1, 1, 1))
        pixels = (pixels - weights * np.asarray(line, np.float32).reshape(*line.size[::-1], -1)) / (1 - weights)
    levels = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return PIL.Image.fromarray(levels if image.mode == "RGB" else levels[..., 0])


def center_box(width: int, height: int) -> Box:
    """The largest centred square; half pixels are rounded to the left and up."""
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short


def random_box(width: int, height: int, smallest: float, rng: random.Random) -> Box:
    """A random part, as torchvision's RandomResizedCrop draws it.

    Area ~ U(smallest, 1) of the whole; log(width / height) ~ U(log 3/4, log 4/3); drawn up to `CROP_TRIES` times until
    it fits. Otherwise the largest centred part with width / height in that range.
    """
    low, high = (math.log(aspect) for aspect in ASPECTS)
    for _ in range(CROP_TRIES):
        # only random(), which is the same in every version of Python
        area = width * height * (smallest + (1 - smallest) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        new_width, new_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < new_width <= width and 0 < new_height <= height:
            top = int(rng.random() * (height - new_height + 1))
            left = int(rng.random() * (width - new_width + 1))
            break
    else:
        new_width = min(width, round(height * ASPECTS[1]))
        new_height = min(height, round(width / ASPECTS[0]))
        left, top = (width - new_width) // 2, (height - new_height) // 2
    return left, top, left + new_width, top + new_height


def pad_box(width: int, height: int, size: int) -> Box:
    """The place of the whole picture in the square: centred, with the long side `size`."""
    long = max(width, height)
    new_width, new_height = (max(1, (2 * side * size + long) // (2 * long)) for side in (width, height))
    left, top = (size - new_width) // 2, (size - new_height) // 2
    return left, top, left + new_width, top + new_height


@dataclass(frozen=True)
class Crop:
    """How a picture of any shape becomes a square.

    `box` = the part that is kept, for (width, height, config, key), in whole pixels of the full-size picture; `place` =
    where it goes, for (width, height, size); `decisive` = the side, of two, that must be large enough.
    """

    box: Callable[[int, int, ConversionConfig, str], Box] = lambda width, height, _config, _key: (0, 0, width, height)
    decisive: Callable[[int, int], int] = min
    place: Callable[[int, int, int], Box] = lambda _width, _height, size: (0, 0, size, size)


def encode(image: Image, config: ConversionConfig) -> bytes:
    """The picture as the bytes of a file in `config.image_format`."""
    buffer = io.BytesIO()
    quality = {"quality": config.quality} if config.image_format == "jpeg" else {}
    image.save(buffer, config.image_format.upper(), **FORMATS[config.image_format], **quality)
    return buffer.getvalue()


CROPS = {
    "center": Crop(lambda width, height, _config, _key: center_box(width, height)),
    "random_resized": Crop(
        # seeded by text: the same numbers in every process; file names may not be UTF-8
        lambda width, height, config, key: random_box(
            width, height, config.crop_scale, random.Random(f"{config.seed}/{key}".encode("utf-8", "surrogateescape"))
        )
    ),
    "pad": Crop(decisive=max, place=pad_box),
    "stretch": Crop(),
    "none": Crop(),
}
RESAMPLES = {"lanczos": Resampling.LANCZOS, "bicubic": Resampling.BICUBIC, "box": Resampling.BOX}
FORMATS: dict[str, dict[str, Any]] = {"jpeg": {"subsampling": 0}, "png": {}, "webp": {"lossless": True}}
"""Pillow's options for saving; subsampling 0 is 4:4:4."""
ORIENTATIONS = {
    2: Turn(Transpose.FLIP_LEFT_RIGHT, flips_x=True),
    3: Turn(Transpose.ROTATE_180, flips_x=True, flips_y=True),
    4: Turn(Transpose.FLIP_TOP_BOTTOM, flips_y=True),
    5: Turn(Transpose.TRANSPOSE, swaps=True),
    6: Turn(Transpose.ROTATE_270, flips_x=True, swaps=True),
    7: Turn(Transpose.TRANSVERSE, flips_x=True, flips_y=True, swaps=True),
    8: Turn(Transpose.ROTATE_90, flips_y=True, swaps=True),
}
