"""Reading safetensors from untrusted sources: sizes and shapes are checked first, then the checksum.

The metadata of vdiff's files hold two CRC-32: of the header, computed with zeros in their place, and of the tensors'
bytes. Files without them are read without this check.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vdiff.errors import VdiffError
from vdiff.files import CHECKSUM, check_regular, sha256_of

MAX_HEADER_BYTES = 100_000_000
"""The largest header that safetensors itself reads."""
NO_CHECKSUM = "0" * 16
CHECKSUM_FIELD = re.compile(rf'(?<="{CHECKSUM}":")[^"]{{16}}(?=")'.encode())
MAX_WEIGHTS_BYTES = 64 * 2**30


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a safetensors file, without reading its tensors.

    Raises:
        VdiffError: the file is missing, truncated, of another format, or too large for weights.
    """
    with reading(path):
        size = path.stat().st_size
        if size > MAX_WEIGHTS_BYTES:
            raise VdiffError(f"{path} has {size / 2**30:,.0f} GiB, too much for weights", "restore the file")
        check_tensors(path, header_only=True)
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a safetensors file.

    Raises:
        VdiffError: it is missing, or cannot be read.
    """
    with reading(path):
        return sha256_of(path)


def add_checksum(path: Path) -> None:
    """Replace `NO_CHECKSUM` in a safetensors file's metadata by the checksum, and sort the metadata.

    safetensors writes metadata in random order; sorting makes equal tensors give equal files.
    """
    with open(path, "r+b") as file:
        header = _read_header(file)
        values = json.loads(header)
        values["__metadata__"] = dict(sorted(values["__metadata__"].items()))
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode().ljust(len(header))
        found = f"{zlib.crc32(text):08x}{_crc32(file):08x}"
        file.seek(8)
        file.write(CHECKSUM_FIELD.sub(found.encode(), text, count=1))


def check_tensors(path: Path, *, header_only: bool = False) -> None:
    """Check a safetensors file against its checksum, if it has one.

    Raises:
        OSError: they differ, or the file cannot be read.
    """
    with open(path, "rb") as file:
        header = _read_header(file)
        if (said := CHECKSUM_FIELD.search(header)) is None:
            return
        found = f"{zlib.crc32(CHECKSUM_FIELD.sub(NO_CHECKSUM.encode(), header, count=1)):08x}"
        if not header_only:
            found += f"{_crc32(file):08x}"
        if not said[0].startswith(found.encode()):
            raise OSError("its bytes do not match its checksum")


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file that `read_shapes` has read, and `__start__`, where the numbers begin."""
    with open(path, "rb") as file:
        header = _read_header(file)
        return {**json.loads(header), "__start__": file.tell()}


def _read_header(file: BufferedReader | BufferedRandom) -> bytes:
    """The JSON header of a safetensors file; empty if it claims to be too long."""
    size = int.from_bytes(file.read(8), "little")
    return file.read(size) if size <= MAX_HEADER_BYTES else b""


def _crc32(file: BufferedReader | BufferedRandom) -> int:
    """CRC-32 of the rest of a file."""
    found, block = 0, memoryview(bytearray(2**20))
    while count := file.readinto(block):
        found = zlib.crc32(block[:count], found)
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of reading the safetensors file into one line."""
    advice = "restore the file, or train again"
    check_regular(path)
    try:
        yield
    except FileNotFoundError:
        raise VdiffError(f"{path} is missing", advice) from None
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: torch cannot map the file
        raise VdiffError(f"{path} cannot be read ({error}): truncated or damaged", advice) from None
