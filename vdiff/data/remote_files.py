"""Files at paths and URLs, read once, from the beginning."""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from vdiff.data.store import PREPARE_AGAIN
from vdiff.errors import VdiffError
from vdiff.files import check_regular
from vdiff.network import failure
from vdiff.text import cause_of

COPY_AGAIN = f"copy the shard again, or {PREPARE_AGAIN}"
BUFFER_BYTES = 2**18
TIMEOUT_SECONDS = 60.0
RETRIES = 3
RETRY_SECONDS = 1.0
EXTRAS = {"http": "webdataset", "https": "webdataset", "s3": "s3", "gs": "gs", "gcs": "gs"}
"""vdiff's extra with the packages that `fsspec` needs for a scheme."""


def damaged(where: str | Path, reason: object) -> VdiffError:
    """The error for a file that was changed."""
    return VdiffError(f"{where} is damaged or truncated: {reason}", COPY_AGAIN)


def scheme_of(place: str) -> str:
    """`https`, `s3`, `pipe` …; empty for a path, even one with a drive letter."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", place)
    return match[1].lower() if match and (match[1].lower() == "pipe" or place[match.end() :].startswith("//")) else ""


def shown(place: str) -> str:
    """A URL without passwords; a path unchanged."""
    if not scheme_of(place):
        return place
    parts = urlsplit(place)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_place(place: str) -> None:
    """Raise VdiffError if `place` is a command (`pipe:`), which must never run, or is not a valid URL."""
    if scheme_of(place) == "pipe":
        raise VdiffError(f"{place} would run a command", "give a path or a URL; for a command's output, save it first")
    try:
        urlsplit(place)
    except ValueError as error:
        raise VdiffError(f"{place} is not a valid URL: {error}", "check the place given to --data") from None


@contextlib.contextmanager
def opened(place: str | Path, num_bytes: int | None = None) -> Iterator[Any]:
    """The file at a path or URL (text; a Path is always one on disk), to be read once from its beginning.

    Raises:
        VdiffError: it cannot be read, or is a command (`pipe:`).
    """
    try:
        if isinstance(place, str) and scheme_of(place):
            with contextlib.closing(RemoteFile(place, num_bytes)) as remote:
                yield remote
        else:
            check_regular(Path(place))
            with open(place, "rb") as file:
                yield file
    except tarfile.TarError as error:
        raise damaged(shown(str(place)), error) from None
    except OSError as error:
        raise VdiffError(
            f"cannot read {shown(str(place))}: {cause_of(error)}", "check the place given to --data"
        ) from None


class RemoteFile:
    """A file at a URL of any scheme that `fsspec` supports, read once from its beginning.

    A broken connection is opened again at the byte where it broke: over HTTP by a range request, or from the beginning
    if the server does not support ranges.

    Raises:
        VdiffError: the server refuses, its file has another length than `num_bytes` (None: any length), it still fails
            after `RETRIES` retries, or a package for the scheme is missing.
    """

    def __init__(self, url: str, num_bytes: int | None = None) -> None:
        check_place(url)
        self.url, self.num_bytes, self.position = url, num_bytes, 0
        self._is_http = scheme_of(url) in ("http", "https")
        self._file: Any = None
        if self._is_http and re.search(r"\s", urlsplit(url).netloc):
            raise self._refusal("a server's name has no spaces")
        try:
            import fsspec.core

            self._system, self._path = fsspec.core.url_to_fs(url, **(_http_options() if self._is_http else {}))
        except ImportError as error:
            extra = EXTRAS.get(scheme_of(url))
            hint = f"pip install 'vdiff[{extra}]'" if extra else str(error)
            raise VdiffError(f"{scheme_of(url)}:// addresses need a package that is not installed", hint) from None
        except Exception as error:  # unknown schemes, and errors of a scheme's library: no credentials, …
            raise self._refusal(str(error)) from None

    def check_server(self) -> None:
        """Raise VdiffError if an HTTP server does not answer within 10 s: a later failure is tried again for longer."""
        if self._is_http and (reason := failure(shown(self.url))):
            raise self._refusal(reason)

    def read(self, size: int = 2**20) -> bytes:
        """Up to `size` bytes; none at the end."""
        failures = 0
        while self.position != self.num_bytes:
            try:
                if self._file is None:
                    self._open()
                data: bytes = self._file.read(
                    size if self.num_bytes is None else min(size, self.num_bytes - self.position)
                )
                if data or self.num_bytes is None:
                    self.position += len(data)
                    return data
                raise ConnectionError
            except VdiffError:
                raise
            except Exception as error:  # each scheme's library raises its own types
                self.close()
                status = 404 if isinstance(error, FileNotFoundError) else getattr(error, "status", None)
                failures += 1
                is_final = isinstance(error, FileNotFoundError | PermissionError | ValueError) or (
                    isinstance(status, int) and status < 500 and status not in (408, 429)
                )
                if is_final or failures > RETRIES:
                    raise self._refusal(self._reason(error, status)) from None
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
        return b""

    def close(self) -> None:
        """Close the connection; the next read opens it again at the same position."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        """Open the file at `position`; `close` closes it, even if this fails."""
        if not self._is_http:
            file = self._file = self._system.open(self._path, "rb")
            self._check_length(getattr(file, "size", None))
            file.seek(self.position)
            return
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={self.position}-"} if self.position else {})
        # block_size 0: stream one response; size: without it fsspec asks the server first
        file = self._file = self._system.open(self._path, "rb", block_size=0, size=1, headers=headers)
        skipped = self.position if file.r.status == 206 else 0
        if file.r.content_length is not None:
            self._check_length(skipped + file.r.content_length)
        while skipped < self.position:  # the server does not support ranges
            if not (data := file.read(min(2**20, self.position - skipped))):
                raise ConnectionError
            skipped += len(data)

    def _check_length(self, num_bytes: int | None) -> None:
        if num_bytes is not None and self.num_bytes not in (None, num_bytes):
            raise damaged(shown(self.url), f"it has {num_bytes} bytes, not {self.num_bytes}")
        self.num_bytes = num_bytes if self.num_bytes is None else self.num_bytes

    def _reason(self, error: Exception, status: int | None) -> str:
        """The reason of an error, if possible in the same words for all libraries."""
        if self._is_http and status:
            return f"HTTP status {status}"
        if isinstance(error, FileNotFoundError):
            return "no such file"
        if not str(error) or type(error).__name__ == "ClientPayloadError":  # of aiohttp
            return f"the connection ended after {self.position} of {self.num_bytes} bytes"
        number = getattr(error, "errno", None)
        return os.strerror(number) if isinstance(number, int) and number > 0 else str(error)

    def _refusal(self, reason: str) -> VdiffError:
        # it may contain the address with a token
        reason = " ".join(reason.replace(self.url, shown(self.url)).split())
        return VdiffError(f"cannot read {shown(self.url)}: {reason}", "check the URL and the server, then continue")


def _http_options() -> dict[str, Any]:
    """Use the proxies of the environment; limit the time without data, not the time of a whole shard."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS)
    return {"client_kwargs": {"trust_env": True, "timeout": timeout}}
