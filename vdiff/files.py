"""Files and folders that appear whole or not at all, with checksums; reading of JSON from untrusted sources."""

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
"""How deep objects may be nested in a description; each teacher takes one level."""


def check_regular(path: Path) -> None:
    """Do nothing if `path` is a regular file, a folder or missing.

    Raises:
        VdiffError: it is a pipe, a socket or a device; reading one might never end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise VdiffError(f"{path} is a pipe, a socket or a device", "give a regular file")


def elsewhere(path: Path) -> str:
    """`did you mean ../photos?` for a missing path that exists with slashes for backslashes, or in a folder above."""
    above = [Path(*[".."] * k, path) for k in (1, 2, 3)] if not path.is_absolute() else []
    found = (other for other in (Path(str(path).replace("\\", "/")), path.expanduser(), *above) if other.exists())
    return next((f"did you mean {shell(other)}?" for other in found), "")


def read_text(path: Path) -> str:
    """The UTF-8 text in a file of at most 64 MiB.

    Raises:
        VdiffError: it is not a regular file.
        OSError, ValueError: it cannot be read, is too large, or is not UTF-8 text.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{size / 2**20:,.0f} MiB, more than the {MAX_TEXT_BYTES // 2**20} allowed")
    return path.read_text(encoding="utf-8")


def parse(text: str | bytes, loads: Callable[[Any], Any] = json.loads) -> Any:
    """The value of a JSON text (with `tomllib.loads`, of a TOML text); an object comes without its checksum.

    Raises:
        ValueError: it is not valid, is nested deeper than 200 levels, or does not match its checksum.
    """
    try:
        value = loads(text)
        is_too_deep = _depth(value) > MAX_DEPTH
    except RecursionError:
        is_too_deep = True
    if is_too_deep:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict) and CHECKSUM in value and value.pop(CHECKSUM) != checksum(value):
        raise ValueError(f"damaged, or edited without deleting its key {CHECKSUM!r}")
    return value


def _depth(value: Any) -> int:
    """How deep lists and objects are nested."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file from an untrusted source.

    Raises:
        VdiffError: the file is too large, not a JSON object, or nested too deeply; `advice` is its hint.
    """
    with explained(f"{path} cannot be read", advice, ValueError, OSError):
        values = parse(read_text(path))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return values


def refusal(path: Path, error: Exception) -> VdiffError:
    """The error of the file system, and what to do about it."""
    cause = getattr(error, "strerror", None) or error
    return VdiffError(f"cannot write {path}: {cause}", "free space, fix the permissions or choose another --out")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the file system in the block into the `refusal` of `path`, also those of safetensors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":  # --help imports no safetensors
            raise refusal(path, error) from None
        raise


def fsync(path: Path) -> None:
    """Sync a file or folder to disk; Windows cannot open folders, and does not need to."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], T]) -> T:
    """Let `write` fill a temporary file beside `path`, sync it and rename it to `path`; returns what `write` returns.

    A kill or a full disk at any moment leaves the old file or the new one, never a part of either.

    Raises:
        VdiffError: the file system refuses (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)  # as the umask wants; safetensors creates files with 0600
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
    """A JSON object with its checksum on the second line; without that line it is still valid JSON."""
    return json.dumps({CHECKSUM: checksum(values), **values}, indent=2, ensure_ascii=False) + "\n"


def checksum(values: Any) -> str:
    """CRC-32 of values that JSON can hold; the order of keys does not matter."""
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
    """Delete a file, or a folder with its contents; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
