"""Files and folders that appear whole or not at all, with checksums; descriptions of somebody not to be trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vdiff.errors import VdiffError, explained, shell

T = TypeVar("T")
CHECKSUM = "vdiff_crc32"
"""The key of the checksum in files that have one."""
MAX_TEXT_BYTES = 64 * 2**20
MAX_DEPTH = 200
"""Objects within objects in a description; a teacher takes one, and no ladder has so many stages."""


def check_regular(path: Path) -> None:
    """Do nothing if `path` is a regular file, a folder or missing.

    Raises:
        VdiffError: it is a pipe, a socket or a device, which one might wait for without end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise VdiffError(f"{path} is a pipe, a socket or a device", "give a regular file")


def elsewhere(path: Path) -> str:
    """`did you mean ../photos?` for a path where nothing is: with slashes for backslashes, or in a folder above."""
    above = [Path(*[".."] * k, path) for k in (1, 2, 3)] if not path.is_absolute() else []
    found = (other for other in (Path(str(path).replace("\\", "/")), path.expanduser(), *above) if other.exists())
    return next((f"did you mean {shell(other)}?" for other in found), "")


def read_text(path: Path) -> str:
    """The UTF-8 text in a file of at most 64 MiB.

    Raises:
        VdiffError: it is no regular file.
        OSError, ValueError: it cannot be read, is too large, or no text.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{size / 2**20:,.0f} MiB, more than the {MAX_TEXT_BYTES // 2**20} that may be")
    return path.read_text(encoding="utf-8")


def parse(text: str | bytes, loads: Callable[[Any], Any] = json.loads) -> Any:
    """The value that a JSON text describes (with `tomllib.loads` a TOML text); of an object without its checksum.

    Raises:
        ValueError: it is none, nested deeper than 200 levels, or not what its checksum says.
    """
    try:
        value = loads(text)
        is_too_deep = _depth(value) > MAX_DEPTH
    except RecursionError:
        is_too_deep = True
    if is_too_deep:
        raise ValueError("it is nested too deep")
    if isinstance(value, dict) and CHECKSUM in value and value.pop(CHECKSUM) != checksum(value):
        raise ValueError(f"damaged, or edited without deleting its key {CHECKSUM!r}")
    return value


def _depth(value: Any) -> int:
    """How deep lists and objects lie in each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file of somebody who may not be trusted.

    Raises:
        VdiffError: it is too large, no JSON object, or objects lie too deep in objects; `advice` says what to do.
    """
    with explained(f"{path} cannot be read", advice, ValueError, OSError):
        values = parse(read_text(path))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return values


def refusal(path: Path, error: OSError) -> VdiffError:
    """The file system's refusal, and what to do about it."""
    return VdiffError(
        f"cannot write {path}: {error.strerror or error}", "free space, fix the permissions or choose another --out"
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise the file system's errors in the block as the `refusal` of `path`."""
    try:
        yield
    except OSError as error:
        raise refusal(path, error) from None


def fsync(path: Path) -> None:
    """Make the bytes of a file or the names in a folder durable; Windows cannot open folders and needs no such call."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], T]) -> T:
    """Let `write` fill a temporary neighbour of `path`, make it durable, then rename it over `path`; its answer.

    A kill or a full disk at any moment leaves the old file or the new one, never a part of either.

    Raises:
        VdiffError: the file system refuses (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask leaves; safetensors writes a file of 0600
            answer = write(temporary)
            temporary.chmod(mode)
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        return answer
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, whole or not at all."""
    write_text(path, json_text(values))


def json_text(values: Mapping[str, Any]) -> str:
    """A JSON object with its checksum on the second line: without that line it is still JSON."""
    return json.dumps({CHECKSUM: checksum(values), **values}, indent=2, ensure_ascii=False) + "\n"


def checksum(values: Any) -> str:
    """CRC-32 of values that JSON can hold, whatever the order of their keys."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a regular file.

    Raises:
        VdiffError: it is a pipe, a socket or a device.
        OSError: it cannot be read.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> Path:
    """Create `path` and its parents if missing. Raises VdiffError: a file is in the way, or the file system refuses."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
