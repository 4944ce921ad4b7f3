"""Members and samples of tar files that may be damaged or malicious.

WebDataset's reader cannot do this: it reads each member whole, even skipped ones, trusts the sizes in headers, and
accepts a tar that was cut between two members as complete.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from types import ModuleType
from typing import IO, Any, Self

from vdiff.data.audio import EXTENSIONS as SOUNDS
from vdiff.data.image_files import MAX_FILE_BYTES
from vdiff.data.remote_files import BUFFER_BYTES
from vdiff.errors import VdiffError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NAME_TYPES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
MAX_NAME_BYTES = 2**20


def require_webdataset() -> ModuleType:
    """The library webdataset. Raises VdiffError: it is not installed."""
    try:
        import webdataset
    except ImportError:
        raise VdiffError("tar shards need the package webdataset", "pip install webdataset") from None
    module: ModuleType = webdataset
    return module


class _Header(tarfile.TarInfo):
    """A header with a size that is checked before reading."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in a block."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in NAME_TYPES and header.size > MAX_NAME_BYTES):
            raise tarfile.ReadError(f"a header claims that {header.size:,} bytes follow")
        return header


def is_tar(file: IO[bytes]) -> bool:
    """Whether a file begins with the header of a tar."""
    try:
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def members(file: IO[bytes], mode: str = "r:") -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """All members of a tar, each with the archive to read it from.

    Args:
        mode: `r:`, or `r|` if the file cannot be read twice.

    Raises:
        TarError: the tar is damaged: a wrong header, an impossible size, or (`r:`) a missing end.
    """
    with _tar_errors(tarfile.open, fileobj=file, mode=mode, bufsize=BUFFER_BYTES, tarinfo=_Header) as tar:
        while (member := _tar_errors(tar.next)) is not None:
            tar.members.clear()  # otherwise every header stays in memory
            if member.size < 0 or tar.offset <= member.offset:  # otherwise an endless loop
                raise tarfile.ReadError(f"the size of {member.name} is {member.size:,}")
            yield tar, member
        if mode == "r:":
            # tarfile treats a cut or wrong header as the end of the tar; the real end is a block of zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends in the middle")


def _tar_errors(read: Callable[..., Any], **arguments: Any) -> Any:
    """The result of `read`; any error that a damaged header causes in tarfile becomes a TarError."""
    try:
        return read(**arguments)
    except (tarfile.TarError, OSError, VdiffError):
        raise
    except Exception as error:
        raise tarfile.ReadError(" ".join(f"{type(error).__name__}: {error}".split())) from None


def read_samples(
    file: IO[bytes],
    wanted: Callable[[str], bool],
    *,
    noun: str = "image",
    mode: str = "r:",
    skip: int = 0,
) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, {suffix: content}) of the samples of a tar that have an image (`noun`: or a sound), from number `skip` on.

    As in WebDataset, a sample is a run of members with names that are equal up to the first dot of the base name. Only
    members with `wanted` suffixes are read, other contents are None; of skipped samples only headers are read.
    """
    from webdataset.tariterators import base_plus_ext

    files = (
        (*base_plus_ext(member.name), tar, member)
        for tar, member in members(file, mode)
        if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name)
    )
    number = 0
    for key, group in groupby((each for each in files if each[0] is not None), key=lambda each: each[0]):
        contents = {
            suffix.lower(): _content(tar, member) if number >= skip and wanted(suffix.lower()) else None
            for _, suffix, tar, member in group
        }
        if any(map(is_sound if noun == "sound" else is_image, contents)):
            if number >= skip:
                yield key, contents
            number += 1


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.issparse() or member.size > MAX_FILE_BYTES:
        raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, or holes")
    content = tar.extractfile(member)
    assert content is not None
    return content.read()


def is_image(suffix: str) -> bool:
    """Whether a member with this suffix is an image."""
    return suffix.rpartition(".")[2] in IMAGE_EXTENSIONS


def is_sound(suffix: str) -> bool:
    """Whether a member with this suffix is a sound."""
    return f".{suffix.rpartition('.')[2]}" in SOUNDS
