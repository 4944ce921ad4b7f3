"""A folder of awkward files, prepared once: the exact pixels that come out of each, or the reason why none do."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from tests.commands import image_of
from vdiff.data.conversion import ConversionConfig
from vdiff.data.disk_sources import Folder
from vdiff.data.preparation import prepare
from vdiff.data.store import ImageStore

CONFIG = ConversionConfig(sizes=(4, 8), image_format="png", background=(255, 0, 128))
BACKGROUND = np.array(CONFIG.background)

yy, xx = np.mgrid[:8, :8]
PICTURE = np.stack([30 * xx, 30 * yy, 15 * (xx + yy)], -1).astype(np.uint8)
GREY = (16 * xx + 2 * yy).astype(np.uint8)
OPACITY = (36 * yy).astype(np.uint8)
STRIP = PICTURE.reshape(1, 64, 3)
WIDE = np.pad(PICTURE, ((0, 0), (2, 2), (0, 0)))


def grey(values: np.ndarray) -> np.ndarray:
    """Grey levels as colours."""
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def over(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Composited on the background, rounded."""
    share = np.asarray(opacity, float)[..., None]
    return np.floor((colours * share + BACKGROUND * (255 - share)) / 255 + 0.5)


def file_bytes(values: np.ndarray | PIL.Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    """The picture as a file."""
    image = values if isinstance(values, PIL.Image.Image) else PIL.Image.fromarray(values)
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def png_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def png_file(values: np.ndarray, depth: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of (height, width, channels) samples of 8 or 16 bits."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return png_chunks((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def interlaced() -> bytes:
    """Adam7, which Pillow reads but does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for y, x, down, right in passes for row in PICTURE[y::down, x::right])
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 1)
    return png_chunks((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def palette() -> PIL.Image.Image:
    """The picture as 64 indices."""
    image = PIL.Image.new("P", (8, 8))
    image.putdata(range(64))
    image.putpalette(PICTURE.tobytes())
    return image


def turned(orientation: int, image_format: str, **options: object) -> bytes:
    """The picture stored so that this EXIF orientation makes it upright."""
    # what was done to the upright picture, written with transpositions and flips of rows and columns alone
    stored = PICTURE.transpose(1, 0, 2) if orientation >= 5 else PICTURE
    stored = stored[:, ::-1] if orientation in (2, 3, 7, 8) else stored
    stored = stored[::-1] if orientation in (3, 4, 6, 7) else stored
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return file_bytes(np.ascontiguousarray(stored), image_format, exif=exif, **options)


def resized_part(values: np.ndarray, at: int, scale: float) -> np.ndarray:
    """The whole resized, then the square that begins at column `at` of the original."""
    height, width = (round(side * scale) for side in values.shape[:2])
    whole = PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.LANCZOS)
    return np.asarray(whole)[:, round(at * scale) :][:, :height]


def transparent_palette() -> bytes:
    return file_bytes(palette(), transparency=bytes(OPACITY.ravel().tolist()))


def frames(image_format: str, **options: object) -> bytes:
    """The picture, and another one after it."""
    other = PIL.Image.fromarray(255 - PICTURE)
    return file_bytes(PICTURE, image_format, save_all=True, append_images=[other], **options)


def gif_with_transparency() -> bytes:
    return file_bytes(palette(), "GIF", transparency=9)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def linear_profile() -> bytes:
    """The primaries of sRGB, but levels proportional to light."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).profile
    primaries = [srgb.red_colorant[0], srgb.green_colorant[0], srgb.blue_colorant[0]]
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
        tags[name] = b"XYZ \0\0\0\0" + fixed(*xyz)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv\0\0\0\0" + bytes(4))
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI", at + len(body), b"none", 0x02100000) + b"mntrRGB XYZ "
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + table + body


def linear_in_srgb() -> np.ndarray:
    light = PICTURE / 255
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def heif() -> bytes:
    import pillow_heif

    pillow_heif.register_heif_opener()
    return file_bytes(PICTURE, "HEIF", quality=-1, chroma=444)


def cmyk() -> PIL.Image.Image:
    """No black: red = 255 − cyan."""
    return PIL.Image.fromarray(np.dstack([255 - PICTURE, np.zeros((8, 8), np.uint8)]), mode="CMYK")


def png_bomb() -> bytes:
    """A few bytes that claim to be 40 GB of pixels."""
    header = struct.pack(">IIBBBBB", 120_000, 120_000, 8, 2, 0, 0, 0)
    return png_chunks((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def wrong_sum(data: bytes) -> bytes:
    """One bit of the pixels' check sum flipped."""
    at = data.index(b"IEND") - 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def float_tiff(low: float, high: float) -> bytes:
    return file_bytes((low + (high - low) * GREY.astype(np.float32) / 255).astype(np.float32), "TIFF")


def noise(seed: int = 0) -> np.ndarray:
    """A picture that no format makes much smaller, so that half of the file is half of the picture."""
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def unreadable(path: Path) -> None:
    path.write_bytes(file_bytes(PICTURE))
    path.chmod(0)


def folder_with_a_picture(path: Path) -> None:
    path.mkdir()
    (path / "inside.png").write_bytes(file_bytes(PICTURE))
    (path / "loop").symlink_to("..")


def in_place() -> bytes:
    raise AssertionError("MADE_IN_PLACE makes this file")


@dataclass(frozen=True)
class Good:
    """A file and the 8 × 8 pixels it gives, each within `tolerance` levels; the 4 × 4 are `small`, or those resized."""

    make: Callable[[], bytes]
    pixels: np.ndarray = field(default_factory=lambda: PICTURE)
    small: np.ndarray | None = None
    tolerance: float = 0


@dataclass(frozen=True)
class Bad:
    """A file and why it gives no picture; `detail` must occur in what was said about it."""

    make: Callable[[], bytes]
    reason: str
    detail: str = ""


# fmt: off
CORPUS: dict[str, Good | Bad] = {
    # formats
    "plain.png": Good(lambda: file_bytes(PICTURE)),
    "plain.bmp": Good(lambda: file_bytes(PICTURE, "BMP")),
    "plain.tga": Good(lambda: file_bytes(PICTURE, "TGA")),
    "plain.ppm": Good(lambda: file_bytes(PICTURE, "PPM")),
    "plain.tif": Good(lambda: file_bytes(PICTURE, "TIFF")),
    "plain.webp": Good(lambda: file_bytes(PICTURE, "WEBP", lossless=True)),
    "plain.jp2": Good(lambda: file_bytes(PICTURE, "JPEG2000")),
    "plain.qoi": Good(lambda: file_bytes(PICTURE, "QOI")),
    "plain.jpg": Good(lambda: file_bytes(PICTURE, "JPEG", quality=100, subsampling=0), tolerance=3),
    "plain.jfif": Good(lambda: file_bytes(PICTURE, "JPEG", quality=100, subsampling=0), tolerance=3),
    "progressive.jpg": Good(lambda: file_bytes(PICTURE, "JPEG", quality=100, subsampling=0, progressive=True),
                            tolerance=3),
    "plain.avif": Good(lambda: file_bytes(PICTURE, "AVIF", quality=100, subsampling="4:4:4"), tolerance=3),
    "plain.heic": Good(heif, tolerance=3),
    "two.mpo": Good(lambda: frames("MPO", quality=100, subsampling=0), tolerance=3),
    "lzw.tif": Good(lambda: file_bytes(PICTURE, "TIFF", compression="tiff_lzw")),
    "interlaced.png": Good(interlaced),
    # depths and modes
    "grey.png": Good(lambda: file_bytes(GREY), grey(GREY)),
    "grey.jpg": Good(lambda: file_bytes(GREY, "JPEG", quality=100), grey(GREY), tolerance=1),
    "one_bit.png": Good(lambda: file_bytes(PIL.Image.fromarray(GREY > 60)), grey(np.where(GREY > 60, 255, 0))),
    "one_bit.tif": Good(lambda: file_bytes(PIL.Image.fromarray(GREY > 60), "TIFF", compression="group4"),
                        grey(np.where(GREY > 60, 255, 0))),
    "deep_grey.png": Good(lambda: file_bytes(GREY.astype(np.uint16) * 257 + 100), grey(GREY)),
    "deep_grey.tif": Good(lambda: file_bytes((GREY * 257.0 - 100 * (GREY > 0)).astype(np.uint16), "TIFF"), grey(GREY)),
    "deep_grey_big_endian.tif": Good(
        lambda: file_bytes(PIL.Image.frombytes("I;16B", (8, 8), (GREY.astype(">u2") * 257).tobytes()), "TIFF"),
        grey(GREY)),
    "deep_colour.png": Good(lambda: png_file(PICTURE.astype(int) * 256 + 255, 16, 2)),
    "deep_grey_alpha.png": Good(lambda: png_file(np.dstack([GREY, OPACITY]).astype(int) * 257, 16, 4),
                                over(grey(GREY), OPACITY)),
    "float_to_1.tif": Good(lambda: float_tiff(0, 1), grey(GREY)),
    "float_to_255.tif": Good(lambda: file_bytes(GREY.astype(np.float32) + 0.25, "TIFF"), grey(GREY)),
    "cmyk.jpg": Good(lambda: file_bytes(cmyk(), "JPEG", quality=100, subsampling=0), tolerance=3),
    "cmyk.tif": Good(lambda: file_bytes(cmyk(), "TIFF")),
    "palette.png": Good(lambda: file_bytes(palette())),
    "palette.gif": Good(lambda: file_bytes(palette(), "GIF")),
    # transparency
    "alpha.png": Good(lambda: file_bytes(np.dstack([PICTURE, OPACITY])), over(PICTURE, OPACITY)),
    "alpha.webp": Good(lambda: file_bytes(np.dstack([PICTURE, OPACITY]), "WEBP", lossless=True, exact=True),
                       over(PICTURE, OPACITY)),
    "grey_alpha.png": Good(lambda: png_file(np.dstack([GREY, OPACITY]), 8, 4), over(grey(GREY), OPACITY)),
    "palette_alpha.png": Good(transparent_palette, over(PICTURE, OPACITY)),
    "palette_alpha.gif": Good(gif_with_transparency, over(PICTURE, np.where(np.arange(64) == 9, 0, 255).reshape(8, 8))),
    "grey_key.png": Good(lambda: file_bytes(GREY, transparency=54),
                         over(grey(GREY), np.where(GREY == 54, 0, 255))),
    "colour_key.png": Good(lambda: file_bytes(PICTURE, transparency=(60, 90, 75)),
                           over(PICTURE, np.where((PICTURE == (60, 90, 75)).all(-1), 0, 255))),
    # first frame
    "animated.gif": Good(lambda: file_bytes(palette(), "GIF", save_all=True, append_images=[palette().rotate(90)])),
    "animated.webp": Good(lambda: frames("WEBP", lossless=True)),
    "animated.png": Good(lambda: frames("PNG")),
    "animated.apng": Good(lambda: frames("PNG")),
    "pages.tif": Good(lambda: frames("TIFF")),
    # orientation
    **{f"orientation_{n}.png": Good(lambda n=n: turned(n, "PNG")) for n in range(1, 9)},
    **{f"orientation_{n}.tif": Good(lambda n=n: turned(n, "TIFF")) for n in range(1, 9)},
    **{f"orientation_{n}.jpg": Good(lambda n=n: turned(n, "JPEG", quality=100, subsampling=0),
                                    tolerance=3) for n in range(1, 9)},
    "damaged_exif.jpg": Good(lambda: file_bytes(PICTURE, "JPEG", quality=100, subsampling=0,
                                                exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 30),
                             tolerance=3),
    # colour profiles
    "linear.png": Good(lambda: file_bytes(PICTURE, icc_profile=linear_profile()), linear_in_srgb(), tolerance=1.5),
    "broken_profile.png": Good(lambda: file_bytes(PICTURE, icc_profile=linear_profile()[:200])),
    # shapes; a strip is one pixel of its middle, and what is around it, as if it were resized before it is cropped
    "strip.png": Good(lambda: file_bytes(STRIP), *(resized_part(STRIP, 31, n) for n in (8, 4))),
    "pole.png": Good(lambda: file_bytes(STRIP.transpose(1, 0, 2)),
                     *(resized_part(STRIP, 31, n).transpose(1, 0, 2) for n in (8, 4))),
    "wide.png": Good(lambda: file_bytes(WIDE), small=resized_part(WIDE, 2, 0.5)),
    # names
    "really_a_png.jpg": Good(lambda: file_bytes(PICTURE)),
    "really_a_jpeg.png": Good(lambda: file_bytes(PICTURE, "JPEG", quality=100, subsampling=0), tolerance=3),
    "grün 图 🎨.png": Good(lambda: file_bytes(PICTURE)),
    "new\nline.png": Good(lambda: file_bytes(PICTURE)),
    "CAPITALS.PNG": Good(lambda: file_bytes(PICTURE)),
    "link.png": Good(in_place),
    "folder.png/inside.png": Good(in_place),
    # no picture
    "empty.png": Bad(lambda: b"", "empty file"),
    "text.png": Bad(lambda: b"this is not a picture\n" * 20, "not an image"),
    "web_page.jpg": Bad(lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
    "drawing.png": Bad(lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "document.jpg": Bad(lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "not an image"),
    "program.png": Bad(lambda: file_bytes(PICTURE, "EPS"), "not an image"),
    "film.png": Bad(lambda: struct.pack(">I", 20) + b"ftypisom\0\0\0\0mp42" + bytes(100), "not an image"),
    "half.heic": Bad(lambda: half(heif()), "damaged"),
    "zeros.png": Bad(lambda: bytes(1000), "not an image"),
    "head_only.png": Bad(lambda: file_bytes(noise())[:8], "damaged", "after its first bytes"),
    "half.png": Bad(lambda: half(file_bytes(noise())), "damaged", "runcated"),
    "half.jpg": Bad(lambda: half(file_bytes(noise(), "JPEG")), "damaged", "truncated"),
    "half_progressive.jpg": Bad(lambda: half(file_bytes(noise(), "JPEG", progressive=True)), "damaged", "truncated"),
    "half.gif": Bad(lambda: half(file_bytes(PIL.Image.fromarray(noise()).quantize(), "GIF")), "damaged"),
    "half.webp": Bad(lambda: half(file_bytes(noise(), "WEBP", lossless=True)), "damaged"),
    "half.bmp": Bad(lambda: half(file_bytes(noise(), "BMP")), "damaged", "truncated"),
    "half.tif": Bad(lambda: half(file_bytes(noise(), "TIFF", compression="tiff_lzw")), "damaged"),
    "half.avif": Bad(lambda: half(file_bytes(noise(), "AVIF")), "damaged"),
    "padded_with_zeros.jpg": Bad(lambda: half(file_bytes(noise(), "JPEG")) + bytes(4000), "damaged"),
    "wrong_sum.png": Bad(lambda: wrong_sum(file_bytes(noise())), "damaged"),
    "bomb.png": Bad(png_bomb, "too many pixels"),
    "float_to_9000.tif": Bad(lambda: float_tiff(0, 9000), "unsupported values", "floating-point pixels from 0 to"),
    "negative.tif": Bad(lambda: file_bytes(GREY.astype(np.int32) - 1, "TIFF"), "unsupported values", "-1"),
    "broken_link.png": Bad(in_place, "unreadable", "No such file"),
    "loop_a.png": Bad(in_place, "unreadable", "symbolic links"),
    "loop_b.png": Bad(in_place, "unreadable", "symbolic links"),
    "pipe.png": Bad(in_place, "unreadable", "not a regular file"),
    **({} if os.geteuid() == 0 else {"forbidden.png": Bad(in_place, "unreadable", "Permission denied")}),
}
# fmt: on
MADE_IN_PLACE: dict[str, Callable[[Path], None]] = {
    "link.png": link_to("plain.png"),
    "folder.png/inside.png": lambda path: folder_with_a_picture(path.parent),
    "broken_link.png": link_to("nowhere.png"),
    "loop_a.png": link_to("loop_b.png"),
    "loop_b.png": link_to("loop_a.png"),
    "pipe.png": os.mkfifo,
    "forbidden.png": unreadable,
}
GOOD = {name: entry for name, entry in CORPUS.items() if isinstance(entry, Good)}
BAD = {name: entry for name, entry in CORPUS.items() if isinstance(entry, Bad)}


@dataclass(frozen=True)
class Outcome:
    """The dataset, where each file's images are in it, and what is written about the files that are not."""

    store: ImageStore
    index: dict[str, int]
    rejected: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    pytest.importorskip("pillow_heif")
    folder, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("dataset") / "out"
    for name, entry in CORPUS.items():
        if name in MADE_IN_PLACE:
            MADE_IN_PLACE[name](folder / name)
        else:
            (folder / name).write_bytes(entry.make())
    prepare(Folder(folder), out, CONFIG)
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = {line["path"]: line for line in map(json.loads, lines)}
    assert len(rejected) == len(lines)
    names = sorted(GOOD, key=lambda name: PurePosixPath(name).parts)
    return Outcome(ImageStore(out), {name: index for index, name in enumerate(names)}, rejected)


def test_every_file_is_either_in_the_dataset_or_in_the_list_of_rejected(outcome: Outcome) -> None:
    assert set(outcome.rejected) == set(BAD)
    assert len(outcome.store) == len(GOOD)
    assert len(CORPUS) >= 40


@pytest.mark.parametrize("name", GOOD)
def test_good_files_give_these_pixels(outcome: Outcome, name: str) -> None:
    want = GOOD[name].pixels
    got = np.asarray(image_of(outcome.store, 8, outcome.index[name]), float)
    assert np.abs(got - want).max() <= GOOD[name].tolerance
    small = GOOD[name].small
    if small is None:
        small = resized_part(np.round(want).astype(np.uint8), 0, 0.5)
    got = np.asarray(image_of(outcome.store, 4, outcome.index[name]), float)
    assert np.abs(got - small).max() <= GOOD[name].tolerance


@pytest.mark.parametrize("name", BAD)
def test_bad_files_say_why(outcome: Outcome, name: str) -> None:
    line = outcome.rejected[name]
    assert line["reason"] == BAD[name].reason
    assert BAD[name].detail in line["detail"]
    assert "\n" not in line["detail"]
