"""The one conversion, against exact pixel arithmetic: orientation, transparency, bit depths, profiles, geometry."""

from __future__ import annotations

import dataclasses
import io
import random
import re
import struct
import sys
import zipfile
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageCms

from tests.cases import all_cases
from vdiff.data import colour, conversion, image_files
from vdiff.data.conversion import (
    CROPS,
    FORMATS,
    RESAMPLES,
    ConversionConfig,
    center_box,
    convert,
    decode,
    encode,
    pad_box,
    render,
)
from vdiff.data.image_files import UnreadableImageError, extensions

RGB = ConversionConfig(sizes=(8,), image_format="png")
GREY = ConversionConfig(sizes=(8,), image_format="png", channels=1)

LARGE = ConversionConfig(sizes=(64,))  # no JPEG of the tests below is decoded at a smaller scale for it


def file_bytes(image: PIL.Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(data: bytes, config: ConversionConfig = RGB) -> np.ndarray:
    return np.asarray(decode(data, config).image)


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
    picture = decode(file_bytes(stored, image_format, exif=exif), RGB)
    np.testing.assert_array_equal(np.asarray(picture.image), upright)
    assert picture.size == (9, 6)
    assert (image_format == "TIFF") or (("orientation" in picture.kinds) == (orientation > 1))


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
    picture = decode(file_bytes(PIL.Image.fromarray(values), image_format), GREY)
    np.testing.assert_array_equal(np.asarray(picture.image), np.round(values / 257).astype(np.uint8))
    assert picture.kinds == ("16-bit",)


def test_floating_point_is_scaled_by_its_convention_or_rejected() -> None:
    def tiff(values: list[float]) -> bytes:
        return file_bytes(PIL.Image.fromarray(np.array([values], np.float32)), "TIFF")

    np.testing.assert_array_equal(pixels(tiff([0, 0.5, 1]), GREY), [[0, 128, 255]])
    np.testing.assert_array_equal(pixels(tiff([0, 1.4, 255]), GREY), [[0, 1, 255]])
    for values in ([-1, 1], [0, 256], [0, float("nan")]):
        with pytest.raises(UnreadableImageError, match="unsupported values"):
            decode(tiff(values), GREY)


@pytest.mark.parametrize(("low", "high"), [(0, 4095), (1000, 5000), (-1024, 3071), (0, 255)])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_a_range_of_values_is_scaled_to_whole_levels(kind: type, low: int, high: int) -> None:
    """floor((255 (v − low) + (high − low)/2) / (high − low)) in whole numbers, clipped."""
    values = np.arange(65536).reshape(256, 256) + (min(low, 0) if kind is not np.uint16 else 0)
    data = file_bytes(PIL.Image.fromarray(values.astype(kind)), "TIFF")
    picture = decode(data, dataclasses.replace(GREY, value_range=(low, high)))
    wanted = np.clip((510 * (values - low) + (high - low)) // (2 * (high - low)), 0, 255)
    np.testing.assert_array_equal(np.asarray(picture.image), wanted)
    assert picture.kinds == ("float" if kind is np.float32 else "16-bit", "clipped")


def test_values_that_fill_little_of_the_range_are_counted() -> None:
    def kinds(values: list[float], kind: type = np.uint16, **options: object) -> tuple[str, ...]:
        config = dataclasses.replace(GREY, **options)  # type: ignore[arg-type]
        return decode(file_bytes(PIL.Image.fromarray(np.array([values], kind)), "TIFF"), config).kinds

    assert kinds([0, 16383]) == kinds([50000, 50010]) == ("16-bit", colour.NARROW)
    assert kinds([0, 16384]) == kinds([10, 1034], value_range=(0.0, 4095.0)) == ("16-bit",)
    assert kinds([0, 0.2], np.float32) == kinds([0, 60], np.float32) == ("float", colour.NARROW)
    with pytest.raises(UnreadableImageError, match="floating-point pixels from nan"):
        kinds([0, float("nan")], np.float32, value_range=(0.0, 1.0))


def test_colours_of_16_bits_are_counted_too_and_not_scaled() -> None:
    data = png_file(2, 16, 2, struct.pack(">6H", *[4095, 0, 17, 80, 900, 4000]))
    assert decode(data, RGB).kinds == (colour.NARROW,)
    with pytest.raises(UnreadableImageError, match=r"16-bit colours.*--range cannot scale them"):
        decode(data, dataclasses.replace(RGB, value_range=(0.0, 4095.0)))
    assert decode(file_bytes(PIL.Image.new("RGB", (2, 2))), RGB).kinds == ()


@pytest.mark.parametrize(
    ("found", "limits"),
    [
        ([], None),
        ([(5, 900, True), (0, 4000, True)], (0, 4095)),
        ([(5, 200, True)], (0, 255)),
        ([(0, 4096, True)], (0, 8191)),
        ([(0, 65535, True)], (0, 65535)),
        ([(-1000, 3000, True), (0, 10, True)], (-1000, 3000)),
        ([(0.5, 0.75, False), (0, float("nan"), False)], (0.5, 0.75)),
        ([(2, 2, False)], (2, 3)),
    ],
)
def test_the_common_range(found: list[tuple[float, float, bool]], limits: tuple[float, float] | None) -> None:
    assert colour.common_range(found) == limits


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
    picture = decode(file_bytes(cmyk_image(), "TIFF"), RGB)
    np.testing.assert_array_equal(np.asarray(picture.image), [[[0, 255, 255], [0, 0, 0], [255, 255, 255]]])
    assert picture.kinds == ("cmyk",)


def cmyk_image() -> PIL.Image.Image:
    image = PIL.Image.new("CMYK", (3, 1))
    for x, ink in enumerate([(255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0)]):
        image.putpixel((x, 0), ink)
    return image


def test_an_animation_gives_its_first_frame() -> None:
    red, blue = PIL.Image.new("RGB", (4, 4), (255, 0, 0)), PIL.Image.new("RGB", (4, 4), (0, 0, 255))
    picture = decode(file_bytes(red, "GIF", save_all=True, append_images=[blue]), RGB)
    assert np.asarray(picture.image).reshape(-1, 3).tolist() == [[255, 0, 0]] * 16
    assert "animation" in picture.kinds


def test_grey_to_colour_and_back() -> None:
    grey = PIL.Image.new("L", (1, 1), 77)
    assert decode(file_bytes(grey), RGB).kinds == ("grey",)
    assert decode(file_bytes(grey), GREY).kinds == ()
    assert decode(file_bytes(la_image()), GREY).kinds == ("alpha",)
    assert decode(file_bytes(PIL.Image.new("RGB", (1, 1))), GREY).kinds == ("colour",)
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
    if crop == "none":
        width = height = size
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
    "wrong", [{"channels": 2}, {"crop": "x"}, {"resample": "x"}, {"image_format": "gif"}, {"sizes": (8, 4)},
              {"sizes": ()}, {"sizes": (0,)}, {"sizes": (8, 16), "crop": "none"}, {"quality": 101}, {"quality": 0},
              {"crop_scale": 0.0}, {"crop_scale": 1.01}, {"crop_scale": float("nan")}, {"seed": -1}, {"min_size": -1},
              {"background": (0, 0)}, {"background": (0, 0, 256)}, {"background": (-1, 0, 0)}]
)  # fmt: skip
def test_a_wrong_configuration_names_the_value(wrong: dict[str, object]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"^{name} ") as caught:
        ConversionConfig(**wrong)  # type: ignore[arg-type]
    assert str(value) in str(caught.value)


# ---- formats


def test_a_picture_is_converted_like_its_file() -> None:
    exif = PIL.Image.Exif()
    exif[conversion.ORIENTATION_TAG] = 6
    rgba = PIL.Image.fromarray(np.dstack([noise(12, 20), np.arange(240, dtype=np.uint8).reshape(12, 20)]))
    data = file_bytes(rgba, exif=exif, icc_profile=rgb_profile(ADOBE_RGB, 2.2))
    with PIL.Image.open(io.BytesIO(data)) as opened:
        opened.load()
        before = opened.tobytes()
        assert convert(opened.copy(), RGB) == convert(data, RGB)
        assert convert(opened, RGB).kinds == ("orientation", "icc", "alpha")
        assert opened.tobytes() == before


def test_a_picture_that_is_an_open_file_stays_as_it_is() -> None:
    data = file_bytes(PIL.Image.fromarray(noise(100, 200)), "JPEG")
    with PIL.Image.open(io.BytesIO(data)) as opened:
        convert(opened, RGB)
        assert opened.size == (200, 100)


def test_an_empty_picture_is_too_small() -> None:
    for crop in CROPS:
        with pytest.raises(UnreadableImageError, match=re.escape("too small (0×5)")):
            convert(PIL.Image.new("RGB", (0, 5)), ConversionConfig(crop=crop))


def test_modes_that_only_pictures_have() -> None:
    alpha = np.array([[0, 102, 255]], np.uint8)
    palette = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putalpha(PIL.Image.fromarray(alpha))
    assert palette.mode == "PA"
    want = [[[255, 255, 255], [40 * 0.4 + 153, 50 * 0.4 + 153, 60 * 0.4 + 153], [70, 80, 90]]]
    np.testing.assert_array_equal(np.asarray(decode(palette, RGB).image), np.round(want))
    assert decode(palette, RGB).kinds == ("palette", "alpha")
    colours = PIL.Image.fromarray(np.dstack([noise(1, 3), alpha]))
    premultiplied = decode(colours.convert("RGBa"), RGB)
    difference = np.asarray(premultiplied.image, int) - np.asarray(decode(colours, RGB).image, int)
    assert np.abs(difference).max() <= 1
    assert premultiplied.kinds == ("alpha",)


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "shown"),
    [
        (1, bytes([0b01000000]), 1, 0),
        (2, bytes([0b01110000]), 3, 85),
        (4, bytes([0x5A]), 0xA, 85),
        (8, bytes([5, 200]), 200, 5),
        (16, struct.pack(">HH", 257 * 5, 2000), 2000, 5),
    ],
)
def test_the_transparent_grey_of_a_png_of_any_depth(depth: int, row: bytes, transparent: int, shown: int) -> None:
    data = png_file(2, depth, 0, row, (b"tRNS", struct.pack(">H", transparent)))
    got = pixels(data, ConversionConfig(background=(1, 2, 3)))
    np.testing.assert_array_equal(got, [[[shown] * 3, [1, 2, 3]]])


def test_16_bit_colour_keeps_the_high_byte_and_its_transparent_colour() -> None:
    values = (0x1234, 0x22FF, 0x3200, 0x8000, 0x9000, 0xA0FF)
    data = png_file(2, 16, 2, struct.pack(">6H", *values), (b"tRNS", struct.pack(">3H", *values[:3])))
    np.testing.assert_array_equal(pixels(data, ConversionConfig(background=(1, 2, 3))), [[[1, 2, 3], [128, 144, 160]]])


def test_16_bit_grey_with_alpha() -> None:
    data = png_file(2, 16, 4, struct.pack(">4H", 0x12FF, 0xFFFF, 0x8000, 0x3300))
    np.testing.assert_array_equal(pixels(data, GREY), [[0x12, round((0x80 * 51 + 255 * 204) / 255)]])


def png_file(width: int, depth: int, colour_type: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, as Pillow would not write it."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def test_formats_that_run_other_programs_are_never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def run(*_args: object, **_options: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", run)
    eps = file_bytes(PIL.Image.new("RGB", (8, 8)), "EPS")
    assert eps.startswith(b"%!PS")
    with pytest.raises(UnreadableImageError, match=r"^not an image$"):
        convert(eps, RGB)
    # IPTC may hold a file of any other format, which Pillow opens without asking which
    field = b"\x1c\x03\x3c\0\x02\1\0" + b"\x1c\x03\x78\0\x01\1" + b"\x1c\x03\x14\0\x01\x08" + b"\x1c\x03\x1e\0\x01\x08"
    field += b"\x1c\x08\x0a" + struct.pack(">H", len(eps)) + eps
    with pytest.raises(UnreadableImageError, match=r"^not an image$"):
        convert(field, RGB)


def test_extensions_are_those_that_can_be_read() -> None:
    got = extensions()
    assert got >= {
        ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif",
        ".hif", ".mpo", ".apng", ".pfm", ".ppm", ".qoi", ".jp2", ".tga", ".psd",
    }  # fmt: skip
    assert not got & {".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".iim"}
    assert not got & {"", ".txt", ".json", ".csv", ".palm"}
    assert all(extension == extension.lower() and extension.startswith(".") for extension in got)
    pytest.importorskip("pillow_heif").register_heif_opener()
    assert extensions() == got  # whether a HEIF was read before or not


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["HEIF", "AVIF", "WEBP", "JPEG"])
def test_lossy_formats_are_turned_once(image_format: str, orientation: int) -> None:
    if image_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    yy, xx = np.mgrid[:48, :80]
    upright = np.stack([3 * xx, 5 * yy, (xx + yy) // 2], -1).astype(np.uint8)
    exif = PIL.Image.Exif()
    exif[conversion.ORIENTATION_TAG] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    picture = decode(file_bytes(stored, image_format, exif=exif.tobytes(), quality=95), LARGE)
    assert picture.size == (80, 48)
    difference = np.abs(np.asarray(picture.image).astype(int) - upright)
    assert difference.max() <= 12  # a wrong turn is off by 240


def test_heif_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_files._register_heif.cache_clear()
    try:
        for brands in (b"heic\0\0\0\0mif1", b"mif1\0\0\0\0heic", b"hevc\0\0\0\0msf1", b"heix\0\0\0\0heix"):
            with pytest.raises(UnreadableImageError) as caught:
                convert(struct.pack(">I", 20) + b"ftyp" + brands + bytes(100), RGB)
            assert (caught.value.reason, caught.value.detail) == ("needs pillow-heif", "pip install pillow-heif")
        avif = file_bytes(PIL.Image.new("RGB", (8, 8), (9, 9, 9)), "AVIF")
        assert np.abs(pixels(avif).astype(int) - 9).max() <= 2
        with pytest.raises(UnreadableImageError, match="not an image"):
            convert(struct.pack(">I", 20) + b"ftypisom\0\0\0\0mp42" + bytes(100), RGB)
    finally:
        image_files._register_heif.cache_clear()


def test_damaged_exif_makes_no_damaged_picture() -> None:
    source = PIL.Image.fromarray(noise(8, 8))
    for exif in (b"Exif\0\0II*\0", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 30):
        assert decode(file_bytes(source, "PNG", exif=exif), RGB).kinds == ()
        assert decode(file_bytes(source, "JPEG", exif=exif), RGB).kinds == ()


# ---- colour profiles

# columns: the XYZ (D50) of pure red, green and blue
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
COLOURS = np.random.default_rng(5).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def profile(colour_space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile, version 2.1, of these tags."""
    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    tags = {b"wtpt": white, **tags}
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI", at + len(body), b"none", 0x02100000) + kind + colour_space + connection
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + table + body


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = {b"rgb"[i : i + 1] + b"XYZ": b"XYZ \0\0\0\0" + fixed(*primaries[:, i]) for i in range(3)}
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))})


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: linear light in [0, 1] to levels."""
    x = np.clip(linear, 0, 1)
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def in_srgb(colours: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    return srgb_levels((colours / 255.0) ** gamma @ (np.linalg.inv(SRGB) @ primaries).T)


@pytest.mark.parametrize(
    ("primaries", "gamma"),
    [(ADOBE_RGB, 2.19921875), (SRGB[:, ::-1], 1.0), (SRGB, 1.0), (SRGB, 1.80078125), (ADOBE_RGB[:, [1, 2, 0]], 1.5)],
)
def test_colour_profiles_give_the_computed_srgb(primaries: np.ndarray, gamma: float) -> None:
    want = in_srgb(COLOURS, primaries, gamma)
    icc = rgb_profile(primaries, gamma)
    for image_format in ("PNG", "TIFF"):
        picture = decode(file_bytes(PIL.Image.fromarray(COLOURS), image_format, icc_profile=icc), RGB)
        assert picture.kinds == ("icc",)
        assert np.abs(np.asarray(picture.image) - want).max() <= 1.5
        grey = pixels(file_bytes(PIL.Image.fromarray(COLOURS), image_format, icc_profile=icc), GREY)
        np.testing.assert_array_equal(grey, np.asarray(picture.image.convert("L")))


def test_white_stays_white_whatever_the_white_of_the_profile() -> None:
    icc = rgb_profile(SRGB, 1.0)
    assert icc.count(fixed(0.9642, 1, 0.8249)) == 2  # the head's and the medium's
    at = icc.rindex(fixed(0.9642, 1, 0.8249))
    bluish = icc[:at] + fixed(0.9505, 1, 1.0891) + icc[at + 12 :]
    picture = decode(file_bytes(PIL.Image.fromarray(COLOURS), icc_profile=bluish), RGB)
    assert np.abs(np.asarray(picture.image) - in_srgb(COLOURS, SRGB, 1.0)).max() <= 1.5


def test_transparency_is_composited_after_the_profile() -> None:
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    icc = rgb_profile(ADOBE_RGB, 1.0)
    config = ConversionConfig(background=(0, 128, 255))
    data = file_bytes(PIL.Image.fromarray(np.dstack([COLOURS, alpha])), icc_profile=icc)
    share = alpha[..., None] / 255
    want = in_srgb(COLOURS, ADOBE_RGB, 1.0) * share + np.array([0, 128, 255]) * (1 - share)
    picture = decode(data, config)
    assert picture.kinds == ("icc", "alpha")
    assert np.abs(np.asarray(picture.image) - want).max() <= 2


def test_the_profile_of_a_palette() -> None:
    palette = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16), mode="L").convert("P")
    palette.putpalette(COLOURS.tobytes())
    picture = decode(file_bytes(palette, icc_profile=rgb_profile(ADOBE_RGB, 1.0)), RGB)
    assert picture.kinds == ("palette", "icc")
    assert np.abs(np.asarray(picture.image) - in_srgb(COLOURS, ADOBE_RGB, 1.0)).max() <= 1.5


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(mode: str) -> None:
    levels = np.arange(256).reshape(16, 16)
    image = PIL.Image.fromarray(levels.astype(np.uint8))
    if mode == "I;16":
        image = PIL.Image.fromarray((levels * 257).astype(np.uint16))
    elif mode == "LA":
        image.putalpha(255)
    data = file_bytes(image, icc_profile=grey_profile(1.0))
    want = srgb_levels(levels / 255)
    assert np.abs(pixels(data, GREY) - want).max() <= 1.5
    assert np.abs(pixels(data, RGB) - want[..., None]).max() <= 1.5
    kinds = decode(data, GREY).kinds
    assert "icc" in kinds
    assert not {"grey", "colour", "alpha"} & set(kinds)


def test_cmyk_profile() -> None:
    """A printer whose black ink darkens lightness evenly, and whose other inks are black already."""
    identity = bytes(range(256))
    corners = b"".join(bytes([0 if any(ink) else 255, 128, 128]) for ink in np.ndindex(2, 2, 2, 2))
    lut = (
        b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + identity * 4 + corners + identity * 3
    )
    paper = b"XYZ \0\0\0\0" + fixed(0.80, 0.84, 0.64)  # yellowish, yet its white is to be white
    icc = profile(b"CMYK", {b"wtpt": paper, b"A2B0": lut}, b"Lab ", b"prtr")
    image = PIL.Image.new("CMYK", (256, 1))
    for ink in range(256):
        image.putpixel((ink, 0), (0, 0, 0, ink))
    f = (100 * (1 - np.arange(256) / 255) + 16) / 116
    want = srgb_levels(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)))
    picture = decode(file_bytes(image, "TIFF", icc_profile=icc), RGB)
    assert picture.kinds == ("cmyk", "icc")
    assert np.abs(np.asarray(picture.image)[0] - want[:, None]).max() <= 2
    assert np.abs(np.asarray(picture.image)[0] - np.arange(255, -1, -1)[:, None]).max() > 4  # else nothing was shown


def test_srgb_profiles_change_nothing() -> None:
    curve = np.arange(1024) / 1023
    curve = np.where(curve <= 0.04045, curve / 12.92, ((curve + 0.055) / 1.055) ** 2.4)
    table = b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *np.round(curve * 65535).astype(int))
    tags = {b"rgb"[i : i + 1] + b"XYZ": b"XYZ \0\0\0\0" + fixed(*SRGB[:, i]) for i in range(3)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), table)
    for icc in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), profile(b"RGB ", tags)):
        picture = decode(file_bytes(PIL.Image.fromarray(COLOURS), icc_profile=icc), RGB)
        assert picture.kinds == ()
        np.testing.assert_array_equal(np.asarray(picture.image), COLOURS)


@pytest.mark.parametrize("icc", [b"hello", b"\0" * 200, rgb_profile(SRGB, 1.0)[:150], grey_profile(1.0)])
def test_a_broken_profile_is_ignored_and_counted(icc: bytes) -> None:
    for _ in range(2):
        picture = decode(file_bytes(PIL.Image.fromarray(COLOURS), icc_profile=icc), RGB)
        assert picture.kinds == ("broken icc",)
        np.testing.assert_array_equal(np.asarray(picture.image), COLOURS)


def test_a_colour_profile_on_a_grey_picture_is_ignored() -> None:
    grey = PIL.Image.new("L", (2, 2), 100)
    picture = decode(file_bytes(grey, icc_profile=rgb_profile(SRGB, 1.0)), GREY)
    assert picture.kinds == ("broken icc",)
    assert np.asarray(picture.image).tolist() == [[100, 100], [100, 100]]


def test_lab_is_converted_and_its_profile_may_be_given() -> None:
    lab = PIL.Image.new("LAB", (101, 1))
    for lightness in range(101):
        lab.putpixel((lightness, 0), (round(lightness * 2.55), 128, 128))
    f = (np.round(np.arange(101) * 2.55) / 2.55 + 16) / 116
    want = srgb_levels(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)))
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for options, kinds in (({}, ("lab",)), ({"icc_profile": icc}, ("lab", "icc"))):
        picture = decode(file_bytes(lab, "TIFF", **options), RGB)
        assert picture.kinds == kinds
        assert np.abs(np.asarray(picture.image)[0] - want[:, None]).max() <= 2


def test_a_profile_is_read_once() -> None:
    colour.srgb_transform.cache_clear()
    data = file_bytes(PIL.Image.fromarray(COLOURS), icc_profile=rgb_profile(ADOBE_RGB, 2.2))
    for _ in range(3):
        convert(data, RGB)
    assert (colour.srgb_transform.cache_info().misses, colour.srgb_transform.cache_info().hits) == (1, 2)
    assert colour.srgb_transform.cache_info().maxsize is not None


# ---- which part, and from how large a picture


@pytest.mark.parametrize(
    ("crop", "wh", "min_size", "ok"),
    [
        ("center", (20, 10), 10, True),
        ("center", (20, 10), 11, False),
        ("center", (10, 20), 11, False),
        ("stretch", (20, 10), 11, False),
        ("random_resized", (20, 10), 11, False),
        ("pad", (20, 10), 20, True),
        ("pad", (10, 20), 21, False),
    ],
)
def test_small_images_are_rejected(crop: str, wh: tuple[int, int], min_size: int, ok: bool) -> None:
    config = ConversionConfig(sizes=(4,), crop=crop, min_size=min_size)
    data = file_bytes(PIL.Image.new("RGB", wh), "JPEG")
    if ok:
        convert(data, config)
        return
    with pytest.raises(UnreadableImageError) as caught:
        convert(data, config)
    assert (caught.value.reason, caught.value.detail) == ("too small", f"{wh[0]}×{wh[1]}")


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF", "PNG"])
def test_sizes_are_those_of_the_upright_full_picture(image_format: str) -> None:
    exif = PIL.Image.Exif()
    exif[conversion.ORIENTATION_TAG] = 6
    data = file_bytes(PIL.Image.new("RGB", (333, 222)), image_format, exif=exif)
    with pytest.raises(UnreadableImageError, match="^" + re.escape("too small (222×333)")):
        convert(data, ConversionConfig(sizes=(8,), min_size=223))


def test_without_a_crop_pixels_are_untouched_or_the_picture_is_rejected() -> None:
    source = noise(32, 32)
    config = ConversionConfig(sizes=(32,), crop="none", image_format="png")
    data = file_bytes(PIL.Image.fromarray(source))
    np.testing.assert_array_equal(pixels(convert(data, config).images[32]), source)
    for wh in ((32, 33), (33, 32), (64, 64), (31, 31)):
        with pytest.raises(UnreadableImageError) as caught:
            convert(file_bytes(PIL.Image.new("RGB", wh), "JPEG"), config)
        assert (caught.value.reason, caught.value.detail) == ("not 32×32", f"{wh[0]}×{wh[1]}")


long_side = st.integers(1, 5000)


@given(long_side, long_side, st.floats(0.01, 1), st.integers(0, 10**6), st.text())
def test_random_boxes_lie_in_the_picture_and_follow_from_seed_and_key(
    width: int, height: int, scale: float, seed: int, key: str
) -> None:
    config = ConversionConfig(crop="random_resized", crop_scale=scale, seed=seed)
    left, top, right, bottom = box = CROPS["random_resized"].box(width, height, config, key)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert box == CROPS["random_resized"].box(width, height, config, key)
    if min(width, height) > 100 and 3 / 4 < width / height < 4 / 3:
        assert (right - left + 1) * (bottom - top + 1) >= scale * width * height
        assert 3 / 4 * 0.97 < (right - left) / (bottom - top) < 4 / 3 * 1.03


def test_random_boxes_are_the_same_for_ever() -> None:
    """Another release must not crop an old dataset anew."""
    config = ConversionConfig(crop="random_resized", crop_scale=0.25, seed=7)
    box = CROPS["random_resized"].box
    assert [box(640, 480, config, key) for key in ("cats/1.jpg", "cats/2.jpg", "")] == GOLDEN_BOXES
    assert box(640, 480, dataclasses.replace(config, seed=8), "cats/1.jpg") != GOLDEN_BOXES[0]


GOLDEN_BOXES = [(33, 82, 496, 443), (44, 78, 521, 467), (98, 21, 618, 452)]


@pytest.mark.parametrize("wh", [(640, 480), (480, 641), (1000, 30), (7, 500), (1, 1), (1, 9), (33, 33)])
def test_random_boxes_are_drawn_like_torchvisions(monkeypatch: pytest.MonkeyPatch, wh: tuple[int, int]) -> None:
    """The same numbers, fed to both."""
    import torch
    from torchvision.transforms import RandomResizedCrop, transforms

    rng = random.Random(0)

    def empty(_count: int) -> object:
        drawn = SimpleNamespace()
        drawn.uniform_ = lambda low, high: SimpleNamespace(item=lambda: float(low) + float(high - low) * rng.random())
        return drawn

    def randint(_low: int, high: int, size: tuple[int]) -> object:
        assert size == (1,)
        return SimpleNamespace(item=lambda: int(rng.random() * high))

    def tensor(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def exp(drawn: SimpleNamespace) -> torch.Tensor:
        return tensor(drawn.item()).exp()

    stub = SimpleNamespace(empty=empty, randint=randint, exp=exp, log=torch.log, tensor=tensor)
    monkeypatch.setattr(transforms, "torch", stub)
    image = PIL.Image.new("L", wh)
    for seed in range(300):
        smallest = (0.05, 0.25, 1.0)[seed % 3]
        rng.seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, [smallest, 1.0], [3 / 4, 4 / 3])
        got = conversion.random_box(*wh, smallest, random.Random(seed))
        assert got == (left, top, left + width, top + height)


def test_the_same_random_part_in_every_size() -> None:
    source = PIL.Image.fromarray(noise(90, 120))
    config = ConversionConfig(sizes=(16, 32), crop="random_resized", image_format="png")
    box = CROPS["random_resized"].box(120, 90, config, "a/b.png")
    images = convert(file_bytes(source), config, key="a/b.png").images
    for size in (16, 32):
        want = source.resize((size, size), PIL.Image.Resampling.LANCZOS, box=box)
        np.testing.assert_array_equal(pixels(images[size]), np.asarray(want))
    assert convert(file_bytes(source), config, key="a/c.png").images != images


# ---- JPEG at a smaller scale


@pytest.mark.parametrize(
    ("crop", "wh", "sizes", "scale"),
    [
        ("center", (1024, 1024), (256,), 2),
        ("center", (1024, 1023), (256,), 1),
        ("center", (1024, 1024), (64,), 8),
        ("center", (1024, 1024), (32, 64), 8),
        ("center", (1024, 1024), (32, 65), 4),
        ("center", (4000, 511), (64,), 2),
        ("stretch", (4000, 511), (64,), 2),
        ("pad", (1024, 300), (64,), 8),
        ("pad", (1024, 7), (64,), 1),  # no 1/8 of 7 rows
        ("none", (512, 512), (512,), 1),
    ],
)
def test_the_scale_leaves_twice_the_target(crop: str, wh: tuple[int, int], sizes: tuple[int, ...], scale: int) -> None:
    picture = decode(file_bytes(PIL.Image.new("RGB", wh), "JPEG"), ConversionConfig(sizes=sizes, crop=crop))
    assert picture.scale == scale
    assert picture.size == wh
    assert picture.image.size == (-(-wh[0] // scale), -(-wh[1] // scale))


def test_the_scale_of_a_random_part_leaves_its_own_sides_twice_the_target() -> None:
    config = ConversionConfig(sizes=(40,), crop="random_resized", crop_scale=0.05)
    data = file_bytes(PIL.Image.new("RGB", (900, 700)), "JPEG")
    seen = set()
    for key in map(str, range(40)):
        picture = decode(data, config, key=key)
        left, top, right, bottom = picture.box
        short = min(right - left, bottom - top)
        assert picture.scale == max(scale for scale in (1, 2, 4, 8) if scale == 1 or short / scale >= 80)
        seen.add(picture.scale)
    assert seen == {1, 2, 4, 8}


def test_the_scale_of_a_turned_picture_follows_from_its_upright_box() -> None:
    exif = PIL.Image.Exif()
    exif[conversion.ORIENTATION_TAG] = 6
    data = file_bytes(PIL.Image.new("RGB", (1200, 300)), "JPEG", exif=exif)
    config = ConversionConfig(sizes=(20,), crop="random_resized", crop_scale=0.02)
    for key in map(str, range(40)):
        picture = decode(data, config, key=key)
        assert picture.box == CROPS["random_resized"].box(300, 1200, config, key)
        assert picture.scale == conversion.draft_scale(picture.box, config)


def test_box_is_never_resized_from_a_smaller_scale() -> None:
    data = file_bytes(PIL.Image.new("RGB", (640, 640)), "JPEG")
    assert decode(data, ConversionConfig(sizes=(8,), resample="box")).scale == 1
    assert decode(data, ConversionConfig(sizes=(8,), resample="bicubic")).scale == 8


@settings(max_examples=80, deadline=None)
@given(st.integers(32, 120), st.integers(32, 120), st.integers(1, 8), st.sampled_from(["L", "RGB"]))
def test_boxes_of_smaller_scales_are_where_the_full_boxes_are(
    width: int, height: int, orientation: int, mode: str
) -> None:
    """Follow the centre of every upright pixel back to the file, and from there to the decoded picture."""
    exif = PIL.Image.Exif()
    exif[conversion.ORIENTATION_TAG] = orientation
    data = file_bytes(PIL.Image.new(mode, (width, height)), "JPEG", exif=exif)
    picture = decode(data, ConversionConfig(sizes=(2,), crop="stretch"))
    s = picture.scale
    assert s > 1

    def centres(width: int, height: int) -> np.ndarray:
        yy, xx = np.mgrid[:height, :width] + 0.5
        return UPRIGHT[orientation](np.stack([xx, yy], -1))

    full, decoded = centres(width, height), centres(-(-width // s), -(-height // s))
    assert picture.size == full.shape[1::-1]
    assert picture.image.size == decoded.shape[1::-1]
    right, down = decoded[0, 1] - decoded[0, 0], decoded[1, 0] - decoded[0, 0]
    for x, y in ((0, 0), (picture.size[0] - 1, 0), (0, picture.size[1] - 1)):
        box = dataclasses.replace(picture, box=(x, y, x + 1, y + 1)).decoded_box
        u, v = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        np.testing.assert_array_equal(decoded[0, 0] + (u - 0.5) * right + (v - 0.5) * down, full[y, x] / s)
    box = picture.decoded_box
    assert min(box) >= 0
    assert box[2] <= picture.image.width
    assert box[3] <= picture.image.height


@cache
def natural(height: int, width: int, seed: int) -> PIL.Image.Image:
    """Colours whose spectrum falls as 1/f, under six discs with edges a few pixels wide."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    phases = rng.normal(size=(2, 3, *frequency.shape))
    light, red, blue = np.fft.irfft2((phases[0] + 1j * phases[1]) / frequency, s=(height, width))
    values = np.stack([light + 0.3 * red, light - 0.1 * red + 0.1 * blue, light - 0.3 * blue], -1) / light.std()
    yy, xx = np.mgrid[:height, :width]
    for _ in range(6):
        y, x, radius = rng.uniform((0, 0, 0.05), (height, width, 0.3)) * (1, 1, min(height, width))
        disc = 0.5 - 0.5 * np.tanh((np.hypot(yy - y, xx - x) - radius) / 2)
        values += disc[..., None] * rng.normal(size=3) * 1.5
    return PIL.Image.fromarray(np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8))


def psnr(a: PIL.Image.Image, b: PIL.Image.Image) -> float:
    """10 log₁₀(255² / mean squared difference), in dB."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    return float(10 * np.log10(255**2 / max(np.square(difference).mean(), 1e-9)))


def check_scale(data: bytes, config: ConversionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded at a smaller scale and in full, the same to 45 dB; to 44 dB where that leaves hardly 2 pixels for one."""
    picture = decode(data, config, key="k")
    assert picture.scale > 1
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "draft_scale", lambda _box, _config: 1)
        whole = decode(data, config, key="k")
    assert (whole.scale, whole.size, whole.box) == (1, picture.size, picture.box)
    left, top, right, bottom = picture.box
    decoded = CROPS[config.crop].decisive(right - left, bottom - top) / picture.scale
    for size in config.sizes:
        bound = 45 if decoded >= 2.1 * size else 44
        assert psnr(render(picture, size, config), render(whole, size, config)) >= bound


SCALED_CROPS = ["center", "pad", "stretch", "random_resized"]


@pytest.mark.parametrize(
    ("crop", "wh", "resample", "options"),
    all_cases(
        lambda i, j, k, n: (i + j + 2 * k + 3 * n) % 4 == 0,  # each crop with each shape once
        SCALED_CROPS,
        [(801, 600), (769, 1023), (1031, 517)],
        ["lanczos", "bicubic"],
        [{"subsampling": 0}, {"subsampling": 2, "progressive": True}],
    ),
)
def test_a_smaller_scale_gives_the_same_picture(
    crop: str, wh: tuple[int, int], resample: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = file_bytes(natural(*wh[::-1], seed=sum(wh)), "JPEG", quality=90, **options)
    for sizes in ((20, 30), (47, 62), (64,), (93, 110)):
        config = ConversionConfig(sizes=sizes, crop=crop, resample=resample, crop_scale=0.5)
        check_scale(data, config, monkeypatch)


@pytest.mark.parametrize(("orientation", "crop"), all_cases(lambda i, j: (i + j) % 4 == 0, range(1, 9), SCALED_CROPS))
def test_a_smaller_scale_of_a_turned_picture(crop: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = PIL.Image.Exif()
    exif[conversion.ORIENTATION_TAG] = orientation
    data = file_bytes(natural(521, 633, seed=3), "JPEG", quality=92, exif=exif)
    for sizes in ((15, 30), (61,), (100,)):
        config = ConversionConfig(sizes=sizes, crop=crop, crop_scale=0.7)
        check_scale(data, config, monkeypatch)


@pytest.mark.parametrize("mode", ["L", "CMYK", "MPO"])
def test_a_smaller_scale_of_other_jpegs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = natural(521, 633, seed=4)
    if mode == "MPO":
        data = file_bytes(picture, "MPO", save_all=True, append_images=[picture.rotate(180)])
    else:
        data = file_bytes(picture.convert(mode), "JPEG", quality=92)
    for channels in (1, 3):
        for size in (30, 61, 100):
            check_scale(data, ConversionConfig(sizes=(size,), channels=channels), monkeypatch)


@pytest.mark.parametrize("wh", [(701, 697), (705, 713), (704, 704)])
def test_a_smaller_scale_of_pictures_with_hard_borders(wh: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last, partial column shows must not count as if it were whole."""
    values = np.full((wh[1], wh[0], 3), 230, np.uint8)
    values[8:-3, 5:-2] = (40, 90, 200)
    data = file_bytes(PIL.Image.fromarray(values).resize(wh), "JPEG", quality=95, subsampling=0)
    for orientation in (1, 3, 6):
        exif = PIL.Image.Exif()
        exif[conversion.ORIENTATION_TAG] = orientation
        turned = file_bytes(PIL.Image.open(io.BytesIO(data)), "JPEG", quality="keep", exif=exif)
        for size in (11, 15, 20, 32):
            check_scale(turned, ConversionConfig(sizes=(size,), crop="stretch"), monkeypatch)


EMOJI = Path(__file__).parent.parent.parent / "shared" / "data" / "noto-emoji-64.zip"


@pytest.mark.skipif(not EMOJI.is_file(), reason=f"needs {EMOJI.name} in shared/data beside the repository")
def test_a_smaller_scale_of_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(EMOJI) as archive:
        names = [name for name in sorted(archive.namelist()) if name.endswith(".png")]
        for name in names[::150]:
            small = PIL.Image.open(io.BytesIO(archive.read(name))).convert("RGBA")
            ground = PIL.Image.new("RGBA", small.size, "white")
            ground.alpha_composite(small)
            drawing = ground.convert("RGB").resize((701, 697), PIL.Image.Resampling.BICUBIC)
            data = file_bytes(drawing, "JPEG", quality=90)
            for size in (15, 40, 85, 170):
                check_scale(data, ConversionConfig(sizes=(size,)), monkeypatch)


def test_a_truncated_jpeg_is_damaged_at_any_scale() -> None:
    whole = file_bytes(natural(400, 400, seed=1), "JPEG", quality=90)
    for size in (16, 300):
        for part in (0.3, 0.6, 0.9, 0.99):
            with pytest.raises(UnreadableImageError, match=r"^damaged"):
                convert(whole[: int(part * len(whole))], ConversionConfig(sizes=(size,)))
