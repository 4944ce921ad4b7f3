"""Image files: which formats are opened, by content, and how to recognise them by name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import PIL.Image
from PIL.ImageFile import ImageFile

from vdiff.data.colour import scale_transparency

# formats that Pillow passes to another program (Ghostscript runs files as programs), cannot decode by itself, or that
# contain a file of any format
UNTRUSTED_FORMATS = frozenset(["BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"])
# recognised by content, but Pillow's readers do not register these names, or only with pillow-heif
MORE_EXTENSIONS = frozenset([".apng", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".mpo"])
HEIF_BRANDS = frozenset(
    [b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevm", b"hevs", b"hevx", b"mif1", b"mif2", b"msf1"]
)
# the first bytes of image files, to recognise damaged ones
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
AVIF = (b"ftypavif", b"ftypavis")
MAX_FILE_BYTES = 2**30
"""Larger files are not read, as every worker would hold one in memory."""


class UnreadableImageError(Exception):
    """A file without a readable picture: `reason` is one of a few phrases, `detail` the decoder's message."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason} ({detail})" if detail else reason)


def check_bytes(num_bytes: int) -> None:
    """Raise UnreadableImageError if a file of this many bytes is too large."""
    if num_bytes > MAX_FILE_BYTES:
        raise UnreadableImageError("too large", f"{num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def open_file(data: bytes) -> ImageFile:
    """A file's bytes as a Pillow image that is not decoded yet; its name does not matter."""
    if not data:
        raise UnreadableImageError("empty file")
    if is_heif(data) and not _register_heif():
        raise UnreadableImageError("needs pillow-heif", "pip install pillow-heif")
    image = PIL.Image.open(io.BytesIO(data), formats=_formats())
    if image.format == "PNG":
        scale_transparency(image)
        with PIL.Image.open(io.BytesIO(data), formats=["PNG"]) as twin:  # unusable after verify
            twin.verify()  # the checksums, which decoding ignores
    if image.format in ("JPEG", "MPO") and data.endswith(b"\0\0") and _lacks_its_end(data):
        # the result of a broken download into a preallocated file; libjpeg would decode the zeros as grey
        raise UnreadableImageError("damaged", "zeros instead of its end")
    return image


def _lacks_its_end(jpeg: bytes) -> bool:
    """Whether no end marker follows the start of the pixels; within them, 0xFF is never followed by 0xD9."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != 0xDA:  # skip the header with its thumbnail
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return jpeg.find(b"\xff\xd9", at) < 0


def is_heif(data: bytes) -> bool:
    """Whether a file is HEIF by its brands, and not AVIF, which shares some brands but is read by Pillow itself."""
    if data[4:8] != b"ftyp":
        return False
    header = data[: int.from_bytes(data[:4])]
    brands = {header[8:12], *(header[at : at + 4] for at in range(16, len(header), 4))}
    return not HEIF_BRANDS.isdisjoint(brands) and brands.isdisjoint([b"avif", b"avis"])


@cache
def _register_heif() -> bool:
    """Whether this process can read HEIF."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _formats() -> tuple[str, ...]:
    PIL.Image.init()
    return tuple(name for name in PIL.Image.ID if name not in UNTRUSTED_FORMATS)


@contextmanager
def unreadable_if_refused() -> Iterator[None]:
    """Turn a refusal of the file system into an UnreadableImageError."""
    try:
        yield
    except OSError as error:
        raise UnreadableImageError("unreadable", error.strerror or str(error)) from None


def extensions() -> frozenset[str]:
    """The lower-case extensions, with the dot, of all files that can be images; the same in every process."""
    readable = set(_formats()) - {"HEIF"}
    registered = PIL.Image.registered_extensions()
    return MORE_EXTENSIONS.union(extension for extension, name in registered.items() if name in readable)


def is_image(data: bytes) -> bool:
    """Whether the first bytes are those of an image file, even if the file is damaged."""
    return data.startswith(SIGNATURES) or data[4:12] in AVIF or is_heif(data)
