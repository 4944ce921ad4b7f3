"""The one conversion, against exact pixel arithmetic: orientation, transparency, bit depths, geometry."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdiff.data import conversion
from vdiff.data.conversion import (
    CROPS,
    FORMATS,
    RESAMPLES,
    ConversionConfig,
    UnreadableImageError,
    center_box,
    convert,
    decode,
    encode,
    pad_box,
)

RGB = ConversionConfig(sizes=(8,), image_format="png")
GREY = ConversionConfig(sizes=(8,), image_format="png", channels=1)


def file_bytes(image: PIL.Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(data: bytes, config: ConversionConfig = RGB) -> np.ndarray:
    return np.asarray(decode(data, config)[0])


# what a viewer must do with the stored rows and columns, by the EXIF standard
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
STORED = {**UPRIGHT, 6: UPRIGHT[8], 8: UPRIGHT[6]}  # the others undo themselves


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_every_orientation_shows_the_same_picture(orientation: int, image_format: str) -> None:
    upright = noise(6, 9)
    exif = PIL.Image.Exif()
    exif[conversion.ORIENTATION_TAG] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    image, kinds = decode(file_bytes(stored, image_format, exif=exif), RGB)
    np.testing.assert_array_equal(np.asarray(image), upright)
    assert (image_format == "TIFF") or (("orientation" in kinds) == (orientation > 1))


def test_orientation_of_a_transparent_palette_is_applied_too() -> None:
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    exif = PIL.Image.Exif()
    exif[conversion.ORIENTATION_TAG] = 2
    got = pixels(file_bytes(palette, transparency=1, exif=exif))
    np.testing.assert_array_equal(got, [[[255, 255, 255], [255, 0, 0]]])


def test_alpha_is_composited_exactly_for_every_value_and_opacity() -> None:
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([value, value, value, alpha], -1).astype(np.uint8)
    config = ConversionConfig(background=(17, 0, 255))
    got = pixels(file_bytes(PIL.Image.fromarray(rgba)), config)
    for channel, background in enumerate((17, 0, 255)):
        want = np.floor((value * alpha + background * (255 - alpha)) / 255 + 0.5)
        np.testing.assert_array_equal(got[..., channel], want)


def test_grey_with_alpha() -> None:
    got = pixels(file_bytes(la_image()), GREY)
    np.testing.assert_array_equal(got, [[100, round((100 * 51 + 255 * 204) / 255)]])


def la_image() -> PIL.Image.Image:
    grey = PIL.Image.new("L", (2, 1), 100)
    alpha = PIL.Image.new("L", (2, 1), 255)
    alpha.putpixel((1, 0), 51)
    return PIL.Image.merge("LA", (grey, alpha))


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_one_transparent_colour_shows_the_background(mode: str) -> None:
    image = PIL.Image.new(mode, (2, 1), {"L": 7, "RGB": (7, 7, 7), "I;16": 7 * 257}[mode])
    image.putpixel((1, 0), {"L": 200, "RGB": (200, 200, 200), "I;16": 200 * 257}[mode])
    transparent = {"L": 7, "RGB": (7, 7, 7), "I;16": 7 * 257}[mode]
    data = file_bytes(image, transparency=transparent) if mode != "I;16" else grey16_png(image, 7 * 257)
    got = pixels(data, ConversionConfig(background=(1, 2, 3)))
    np.testing.assert_array_equal(got, [[[1, 2, 3], [200, 200, 200]]])


def grey16_png(image: PIL.Image.Image, transparent: int) -> bytes:
    """Pillow writes no tRNS for 16-bit grey, so put one in before the pixels."""
    data = file_bytes(image)
    body = b"tRNS" + struct.pack(">H", transparent)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(image_format: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image, kinds = decode(file_bytes(PIL.Image.fromarray(values), image_format), GREY)
    np.testing.assert_array_equal(np.asarray(image), np.round(values / 257).astype(np.uint8))
    assert kinds == ["16-bit"]


def test_floating_point_is_scaled_by_its_convention_or_rejected() -> None:
    def tiff(values: list[float]) -> bytes:
        return file_bytes(PIL.Image.fromarray(np.array([values], np.float32)), "TIFF")

    np.testing.assert_array_equal(pixels(tiff([0, 0.5, 1]), GREY), [[0, 128, 255]])
    np.testing.assert_array_equal(pixels(tiff([0, 1.4, 255]), GREY), [[0, 1, 255]])
    for values in ([-1, 1], [0, 256], [0, float("nan")]):
        with pytest.raises(UnreadableImageError, match="unsupported values"):
            decode(tiff(values), GREY)


def test_32_bit_integers_outside_16_bits_are_rejected() -> None:
    for low in (-1, 65536):
        data = file_bytes(PIL.Image.fromarray(np.array([[0, low]], np.int32)), "TIFF")
        with pytest.raises(UnreadableImageError, match="integer pixels"):
            decode(data, GREY)


def test_1_bit_is_black_and_white() -> None:
    image = PIL.Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(file_bytes(image), GREY), [[0, 255]])


def test_cmyk_primaries() -> None:
    got, kinds = decode(file_bytes(cmyk_image(), "TIFF"), RGB)
    np.testing.assert_array_equal(np.asarray(got), [[[0, 255, 255], [0, 0, 0], [255, 255, 255]]])
    assert kinds == ["cmyk"]


def cmyk_image() -> PIL.Image.Image:
    image = PIL.Image.new("CMYK", (3, 1))
    for x, ink in enumerate([(255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0)]):
        image.putpixel((x, 0), ink)
    return image


def test_an_animation_gives_its_first_frame() -> None:
    red, blue = PIL.Image.new("RGB", (4, 4), (255, 0, 0)), PIL.Image.new("RGB", (4, 4), (0, 0, 255))
    image, kinds = decode(file_bytes(red, "GIF", save_all=True, append_images=[blue]), RGB)
    assert np.asarray(image).reshape(-1, 3).tolist() == [[255, 0, 0]] * 16
    assert "animation" in kinds


def test_grey_to_colour_and_back() -> None:
    grey = PIL.Image.new("L", (1, 1), 77)
    assert decode(file_bytes(grey), RGB)[1] == ["grey"]
    assert pixels(file_bytes(grey)).tolist() == [[[77, 77, 77]]]
    assert pixels(file_bytes(PIL.Image.new("RGB", (1, 1), (255, 0, 0))), GREY).tolist() == [[round(255 * 0.299)]]


def test_files_that_give_no_picture() -> None:
    whole = file_bytes(PIL.Image.fromarray(noise(64, 64)), "JPEG")
    for data, reason in [(b"", "empty file"), (b"hello", "not an image"), (whole[: len(whole) // 2], "damaged")]:
        with pytest.raises(UnreadableImageError) as caught:
            convert(data, RGB)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "limit", [30, 50]
)  # beyond twice the limit Pillow raises, between once and twice it only warns
def test_decompression_bombs_are_rejected(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    data = file_bytes(PIL.Image.new("L", (8, 8)))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        convert(data, RGB)


side = st.integers(1, 300)


@given(side, side)
def test_the_center_box_is_the_largest_centred_square(width: int, height: int) -> None:
    left, top, right, bottom = center_box(width, height)
    assert right - left == bottom - top == min(width, height)
    assert 0 <= left <= width - right <= left + 1
    assert 0 <= top <= height - bottom <= top + 1


@given(side, side, st.integers(1, 128))
def test_the_pad_box_keeps_the_shape_to_half_a_pixel(width: int, height: int, size: int) -> None:
    left, top, right, bottom = pad_box(width, height, size)
    scale = size / max(width, height)
    assert max(right - left, bottom - top) == size
    for length, exact in ((right - left, width * scale), (bottom - top, height * scale)):
        assert length == 1 or abs(length - exact) <= 0.5 + 1e-9
        assert length >= 1
    assert 0 <= left <= size - right <= left + 1
    assert 0 <= top <= size - bottom <= top + 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.sampled_from(sorted(CROPS)))
def test_every_crop_gives_squares_and_keeps_flat_colour(width: int, height: int, size: int, crop: str) -> None:
    config = ConversionConfig(sizes=(size,), crop=crop, background=(10, 20, 30), image_format="png")
    image = PIL.Image.new("RGB", (width, height), (10, 20, 30))
    (encoded,) = convert(file_bytes(image), config).images.values()
    np.testing.assert_array_equal(pixels(encoded), np.full((size, size, 3), (10, 20, 30), np.uint8))


@pytest.mark.parametrize("shape", [(10, 10), (10, 15), (16, 10)])
@pytest.mark.parametrize("resample", sorted(RESAMPLES))
def test_pixels_at_scale_1_are_the_middle_of_the_source(shape: tuple[int, int], resample: str) -> None:
    source = noise(*shape)
    config = ConversionConfig(sizes=(10,), resample=resample, image_format="png")
    top, left = (shape[0] - 10) // 2, (shape[1] - 10) // 2
    got = pixels(convert(file_bytes(PIL.Image.fromarray(source)), config).images[10])
    np.testing.assert_array_equal(got, source[top : top + 10, left : left + 10])


def test_box_halving_is_the_mean_of_four_and_sizes_do_not_depend_on_each_other() -> None:
    source = noise(12, 16)
    data = file_bytes(PIL.Image.fromarray(source))
    config = ConversionConfig(sizes=(3, 6), resample="box", image_format="png")
    images = convert(data, config).images
    blocks = source[:, 2:14].reshape(6, 2, 6, 2, 3).mean((1, 3))
    assert np.abs(pixels(images[6]).astype(float) - blocks).max() <= 1  # Pillow rounds after each direction
    assert images[3] == convert(data, ConversionConfig(sizes=(3,), resample="box", image_format="png")).images[3]


def test_resizing_then_cropping_is_the_same() -> None:
    """The classic recipe, on a shape where its rounding of the long side is exact."""
    picture = PIL.Image.fromarray(noise(100, 160))
    classic = picture.resize((80, 50), PIL.Image.Resampling.LANCZOS).crop((15, 0, 65, 50))
    config = ConversionConfig(sizes=(50,), image_format="png")
    np.testing.assert_array_equal(pixels(convert(file_bytes(picture), config).images[50]), np.asarray(classic))


def test_pad_shows_everything_on_the_background() -> None:
    source = noise(4, 8)
    config = ConversionConfig(sizes=(8,), crop="pad", background=(9, 8, 7), image_format="png")
    got = pixels(convert(file_bytes(PIL.Image.fromarray(source)), config).images[8])
    np.testing.assert_array_equal(got[2:6], source)
    assert (got[[0, 1, 6, 7]] == (9, 8, 7)).all()


def test_stretch_distorts() -> None:
    halves = np.zeros((4, 8, 3), np.uint8)
    halves[:, 4:] = 255
    config = ConversionConfig(sizes=(4,), crop="stretch", resample="box", image_format="png")
    got = pixels(convert(file_bytes(PIL.Image.fromarray(halves)), config).images[4])
    assert got[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("crop", "enlarged"),
    [("center", [False, True, True]), ("pad", [False, False, True]), ("stretch", [False, True, True])],
)
def test_enlarging_is_counted(crop: str, enlarged: list[bool]) -> None:
    image = file_bytes(PIL.Image.new("RGB", (10, 5)))
    for size, expected in zip((5, 7, 11), enlarged, strict=True):
        kinds = convert(image, ConversionConfig(sizes=(size,), crop=crop)).kinds
        assert ("enlarged" in kinds) == expected


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_format", sorted(FORMATS))
def test_every_format_gives_back_what_it_promises(image_format: str, channels: int) -> None:
    source = noise(32, 32)
    config = ConversionConfig(sizes=(32,), channels=channels, image_format=image_format)
    picture = PIL.Image.fromarray(source).convert(config.mode)
    encoded = encode(picture, config)
    assert PIL.Image.open(io.BytesIO(encoded)).format == image_format.upper()
    difference = np.abs(pixels(encoded, config).astype(int) - np.asarray(picture).astype(int)).max()
    assert difference <= (4 if image_format == "jpeg" else 0)  # 4:4:4 at quality 100; with halved chroma it is over 50


def test_lower_quality_is_smaller() -> None:
    picture = PIL.Image.fromarray(noise(32, 32))
    high, low = (len(encode(picture, ConversionConfig(quality=quality))) for quality in (100, 50))
    assert low < high / 2


@pytest.mark.parametrize(
    "wrong", [{"channels": 2}, {"crop": "none"}, {"resample": "x"}, {"image_format": "gif"}, {"sizes": (8, 4)},
              {"sizes": ()}, {"sizes": (0,)}, {"quality": 101}]
)  # fmt: skip
def test_a_wrong_configuration_names_the_value(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConversionConfig(**wrong)  # type: ignore[arg-type]
