"""What tar shards are read through: samples in a tar, and files at paths and URLs."""

from __future__ import annotations

import contextlib
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse, InvalidURL
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Self
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from vdiff.data.image_files import MAX_FILE_BYTES
from vdiff.data.store import PREPARE_AGAIN
from vdiff.errors import VdiffError
from vdiff.files import check_regular

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
COPY_AGAIN = f"copy the shard again, or {PREPARE_AGAIN}"
BUFFER_BYTES = 2**18
NAME_TYPES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
MAX_NAME_BYTES = 2**20
TIMEOUT_SECONDS = 60.0
RETRIES = 3
RETRY_SECONDS = 1.0


def require_webdataset() -> ModuleType:
    """The library webdataset.

    Raises:
        VdiffError: it is not installed.
    """
    try:
        import webdataset
    except ImportError:
        raise VdiffError("tar shards need the package webdataset", "pip install webdataset") from None
    module: ModuleType = webdataset
    return module


class _Header(tarfile.TarInfo):
    """A header whose size is looked at before anything of that size is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in a block."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in NAME_TYPES and header.size > MAX_NAME_BYTES):
            raise tarfile.ReadError(f"a header says that {header.size:,} bytes follow")
        return header


def is_tar(file: IO[bytes]) -> bool:
    """Whether a file begins with the header of a tar."""
    try:
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def members(file: IO[bytes], mode: str = "r:") -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """All members of a tar of somebody who may not be trusted, each with the archive that it can be read from.

    Args:
        mode: `r:`, or `r|` where the file cannot be read twice.

    Raises:
        TarError: damaged: a header that is wrong, a size that cannot be, or (`r:`) an end that is missing.
    """
    with _said(tarfile.open, fileobj=file, mode=mode, bufsize=BUFFER_BYTES, tarinfo=_Header) as tar:
        while (member := _said(tar.next)) is not None:
            tar.members.clear()  # or every header stays in memory
            if member.size < 0 or tar.offset <= member.offset:  # it would be read again without end
                raise tarfile.ReadError(f"the size of {member.name} is {member.size:,}")
            yield tar, member
        if mode == "r:":
            # tarfile takes a header that is cut or wrong for the end of the tar; that is zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends in the middle")


def _said(read: Callable[..., Any], **arguments: Any) -> Any:
    """The result of `read`; whatever damaged headers make tarfile stumble over becomes a TarError."""
    try:
        return read(**arguments)
    except (tarfile.TarError, OSError, VdiffError):
        raise
    except Exception as error:
        raise tarfile.ReadError(" ".join(f"{type(error).__name__}: {error}".split())) from None


def read_samples(
    file: IO[bytes], wanted: Callable[[str], bool], *, mode: str = "r:", skip: int = 0
) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, {suffix: content}) of the samples of a tar that have an image, from number `skip` on.

    As in WebDataset, a sample is a run of members whose names are equal up to the first dot of the base name. Only
    what is `wanted` by its suffix is read, other contents are None; skipped samples are passed over by their headers.
    """
    from webdataset.tariterators import base_plus_ext

    number = 0
    key: str | None = None
    contents: dict[str, bytes | None] = {}
    for tar, member in chain(members(file, mode), [(None, None)]):
        prefix, suffix = (None, "") if member is None else base_plus_ext(member.name)
        if member is not None and (prefix is None or not member.isreg() or re.match(r"__[^/]*__($|/)", member.name)):
            continue
        if prefix != key:
            if key is not None and any(is_image(suffix) for suffix in contents):
                if number >= skip:
                    yield key, contents
                number += 1
            key, contents = prefix, {}
        if member is None or tar is None:
            return
        suffix = suffix.lower()
        if number >= skip and wanted(suffix):
            if member.issparse() or member.size > MAX_FILE_BYTES:
                raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, or holes")
            content = tar.extractfile(member)
            assert content is not None
            contents[suffix] = content.read()
        else:
            contents[suffix] = None


def is_image(suffix: str) -> bool:
    """Whether a member with this suffix is an image."""
    return suffix.rpartition(".")[2] in IMAGE_EXTENSIONS


def damaged(where: str | Path, reason: object) -> VdiffError:
    """The error of a shard that is not what it was."""
    return VdiffError(f"{where} is damaged or truncated: {reason}", COPY_AGAIN)


def scan(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """The samples of a tar on disk, as `read_samples` gives them."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            yield from read_samples(file, wanted)
    except tarfile.TarError as error:
        raise damaged(path, error) from None
    except OSError as error:
        raise VdiffError(f"cannot read {path}: {error.strerror or error}", "check the path given to --data") from None


def scheme_of(place: str) -> str:
    """`https`, `s3`, `pipe` …; empty for a path, also for one that begins with a drive letter."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", place)
    return match[1].lower() if match and (match[1].lower() == "pipe" or place[match.end() :].startswith("//")) else ""


def shown(place: str) -> str:
    """A URL without the passwords that it may hold; a path as it is."""
    if not scheme_of(place):
        return place
    parts = urlsplit(place)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_place(place: str) -> None:
    """Raise VdiffError if `place` is a command (`pipe:`), which a dataset's name must never run, or no URL."""
    if scheme_of(place) == "pipe":
        raise VdiffError(f"{place} would run a command", "give a path or a URL; for a command's output, save it first")
    try:
        urlsplit(place)
    except ValueError as error:
        raise VdiffError(f"{place} is no URL: {error}", "check the place given to --data") from None


class HttpFile:
    """A file at an http(s) URL, read once from its beginning; a connection that breaks is opened again where it broke.

    Raises:
        VdiffError: the server refuses, sends a file of another length than `num_bytes` (None: whatever it says), or
            fails `RETRIES` times after one another.
    """

    def __init__(self, url: str, num_bytes: int | None = None) -> None:
        self.url, self.num_bytes, self.position = url, num_bytes, 0
        self._response: HTTPResponse | None = None

    def __enter__(self) -> HttpFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(self, size: int = 2**20) -> bytes:
        """Up to `size` bytes; none at the end."""
        failures = 0
        while self.position != self.num_bytes:
            try:
                if self._response is None:
                    self._response = self._open()
                data = self._response.read(
                    size if self.num_bytes is None else min(size, self.num_bytes - self.position)
                )
                if data or self.num_bytes is None:
                    self.position += len(data)
                    return data
                raise ConnectionError(f"the connection ended after {self.position} of {self.num_bytes} bytes")
            except (OSError, HTTPException) as error:
                self.close()
                status = error.code if isinstance(error, HTTPError) else None
                failures += 1
                is_final = isinstance(error, InvalidURL) or (status and status < 500 and status not in (408, 429))
                if is_final or failures > RETRIES:
                    reason = f"HTTP status {status}" if status else str(getattr(error, "reason", error)) or repr(error)
                    cause = f"cannot read {shown(self.url)}: {' '.join(reason.split())}"
                    raise VdiffError(cause, "check the URL and the server, then go on") from None
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
        return b""

    def close(self) -> None:
        """Hang up."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _open(self) -> HTTPResponse:
        """The answer, from `position` on."""
        request = Request(self.url, headers={"Range": f"bytes={self.position}-"} if self.position else {})
        try:
            response: HTTPResponse = urlopen(request, timeout=TIMEOUT_SECONDS)
        except HTTPError as error:
            error.close()
            raise
        with contextlib.ExitStack() as stack:
            stack.callback(response.close)
            skipped = self.position if response.status == 206 else 0
            if response.length is not None:
                num_bytes = skipped + response.length
                if self.num_bytes not in (None, num_bytes):
                    raise damaged(shown(self.url), f"it has {num_bytes} bytes, not {self.num_bytes}")
                self.num_bytes = num_bytes
            while skipped < self.position:  # the server cannot begin in the middle
                data = response.read(min(2**20, self.position - skipped))
                if not data:
                    raise ConnectionError(f"the connection ended before byte {self.position}")
                skipped += len(data)
            stack.pop_all()
        return response


@contextlib.contextmanager
def opened(place: str, num_bytes: int | None = None) -> Iterator[Any]:
    """The file at a path or URL, to be read once from its beginning.

    Raises:
        VdiffError: it cannot be read; it is a command (`pipe:`).
    """
    scheme = scheme_of(place)
    if scheme:
        check_place(place)
    else:
        check_regular(Path(place))
    try:
        if scheme in ("http", "https"):
            with HttpFile(place, num_bytes) as remote:
                yield remote
        elif scheme:
            with _gopen(place) as stream:
                yield stream
        else:
            with open(place, "rb") as file:
                yield file
    except tarfile.TarError as error:
        raise damaged(shown(place), error) from None
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise VdiffError(f"cannot read {shown(place)}: {reason}", "check the place given to --data") from None


def _gopen(url: str) -> Any:
    """A stream from wherever webdataset has a tool for."""
    require_webdataset()
    from webdataset.gopen import gopen

    try:
        return gopen(url, "rb")
    except (ValueError, ImportError) as error:
        raise VdiffError(f"cannot read {shown(url)}: {error}", "give an http(s) URL or a path") from None
