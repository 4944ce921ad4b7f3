"""Outputs of commands: one writer at a time, whole after a kill, replaced only where vdiff wrote all that is there."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vdiff.errors import VdiffError
from vdiff.files import fsync, make_folder, read_text, refusal, remove, write_text, writing

MARK = r"(?:\d+|[0-9a-f]{32})"
INNER = re.compile(rf"\.(.+?)(?:\.{MARK})?\.tmp")
"""Temporary files, with or without the number of their process; they become what the first group says."""
OF_SYSTEM = re.compile(r"(.*/)?(\.DS_Store|\._[^/]*|Thumbs\.db|desktop\.ini)")
"""Files that macOS and Windows make by themselves in a folder that is looked at."""
SHOWN = 3
"""Foreign files that an error names."""


@dataclass(frozen=True)
class Kind:
    """A kind of output, and how it is told from what other programs wrote.

    Attributes:
        name: as an error says it.
        find: what `files` calls; it may raise any error of reading.
    """

    name: str
    find: Callable[[Path], str]

    def files(self, path: Path) -> str:
        """A regular expression of the names in a folder (of a file, any text) that vdiff demonstrably wrote.

        Empty where it wrote nothing, or where that cannot be read.
        """
        try:
            return self.find(path)
        except (OSError, ValueError, SyntaxError, VdiffError, zipfile.BadZipFile):
            return ""


@contextlib.contextmanager
def locked(path: Path, *beside: Path, kind: Kind | None = None, mine: bool = True) -> Iterator[None]:
    """Keep other processes from writing `path`; first repair and remove what a killed one left there.

    The lock is a hidden neighbour of `path` and is removed at the end, as are parents that were made for it.

    Args:
        beside: what else the command writes.
        kind: of the folder `path`, if temporary files among its files are to be removed too.
        mine: off in all but one of the processes that write together.

    Raises:
        VdiffError: another process writes there, or the file system refuses.
    """
    if not mine:
        yield
        return
    from filelock import FileLock, Timeout

    whole = path.resolve()
    if not whole.name:
        raise VdiffError(f"{path} is the root of a file system", "choose another place")
    made = [parent for parent in whole.parents if not parent.exists()]
    place = whole.with_name(f".{whole.name}.lock")
    if not made and not os.access(whole.parent, os.W_OK):  # a mounted folder, say
        place = Path(tempfile.gettempdir()) / f"vdiff-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:16]}.lock"
    lock = FileLock(place)
    try:
        with contextlib.suppress(FileExistsError):
            whole.parent.mkdir(parents=True, exist_ok=True)
        place.touch()  # says it where that cannot be; a lock would wait
        while True:
            lock.acquire(blocking=False)
            descriptor = lock._context.lock_file_fd
            if descriptor is None or os.fstat(descriptor).st_nlink:
                break
            lock.release()  # its last owner removed the file at this very moment
    except Timeout:
        raise VdiffError(f"another process is writing {path}", "wait for it, or choose another place") from None
    except OSError as error:
        raise refusal(path, error) from None
    try:
        for each in (whole, *beside):
            _sweep(each)
        if kind is not None:
            sweep_inside(whole, kind)
        yield
    finally:
        with contextlib.suppress(OSError):
            place.unlink()
        lock.release()
        for parent in made:
            with contextlib.suppress(OSError):  # it is in use
                parent.rmdir()


def _sweep(path: Path) -> None:
    """Put back what a killed process moved away from `path`, and remove its temporary files and folders."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{MARK}\.(tmp|old)")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not name.fullmatch(left.name):
            continue
        with writing(left):
            if left.suffix == ".old" and is_free(path):
                if path.is_dir():
                    path.rmdir()
                os.replace(left, path)
            else:
                remove(left)


def sweep_inside(folder: Path, kind: Kind) -> None:
    """Remove the temporary files that a killed process left among the files of `folder`."""
    known = kind.files(folder) if folder.is_dir() else ""
    for name in _names(folder) if known else ():
        if INNER.fullmatch(Path(name).name) and re.fullmatch(known, _plain(name)):
            (folder / name).unlink(missing_ok=True)


def check_free(path: Path, kind: Kind, *, overwrite: bool, flag: str = "another --out") -> None:
    """See that `path` may be written: nothing is there, or what is there may be replaced, as vdiff wrote all of it.

    Raises:
        VdiffError: `path` exists, and `overwrite` is off, or it is or holds something that vdiff did not write.
    """
    if is_free(path):
        return
    known = check_ours(path, kind, flag=flag)
    if not overwrite:
        raise VdiffError(f"{path} exists already", f"give {flag} to keep both, or --overwrite to replace it")
    names = (name for name in _names(path) if not OF_SYSTEM.fullmatch(name))
    if foreign := sorted(name for name in names if not re.fullmatch(known, _plain(name))):
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise VdiffError(
            f"{path} also holds {', '.join(foreign[:SHOWN])}{more}, which vdiff did not write",
            f"move {'that' if len(foreign) == 1 else 'them'} away, or choose {flag}",
        )


def check_ours(path: Path, kind: Kind, *, flag: str = "another --out") -> str:
    """The regular expression of what vdiff wrote at `path`. Raises VdiffError: what is there is not of this kind."""
    known = kind.files(path)
    if not known:
        article = "an" if kind.name[0] in "aeioO" else "a"
        raise VdiffError(f"{path} exists and is not {article} {kind.name} that vdiff wrote", f"choose {flag}")
    return known


def is_free(path: Path) -> bool:
    """Whether nothing is at `path`, or a folder without files other than the temporary ones of a killed process."""
    if not path.is_dir():
        return not os.path.lexists(path)
    return all(INNER.fullmatch(Path(name).name) for name in _names(path))


def _names(path: Path) -> Iterator[str]:
    """The files in a folder and below it (links are not followed), relative to it."""
    for each in path.rglob("*"):
        if each.is_symlink() or not each.is_dir():
            yield each.relative_to(path).as_posix()


def _plain(name: str) -> str:
    """`samples/.0000007.png.123.tmp` → `samples/0000007.png`."""
    return "/".join(found[1] if (found := INNER.fullmatch(part)) else part for part in name.split("/"))


def holds_keys(path: Path, *keys: str) -> bool:
    """Whether a JSON object with all these keys lies at `path`."""
    try:
        values = json.loads(read_text(path))  # also where it was edited, and its checksum is another
    except (OSError, ValueError, VdiffError, RecursionError):
        return False
    return isinstance(values, dict) and values.keys() >= set(keys)


@contextlib.contextmanager
def new_folder(path: Path, kind: Kind, *, overwrite: bool = False, flag: str = "another --out") -> Iterator[Path]:
    """A temporary neighbour of `path` that becomes `path` when the block ends well and vanishes when it does not.

    Raises:
        VdiffError: see `locked` and `check_free`.
    """
    with locked(path):
        check_free(path, kind, overwrite=overwrite, flag=flag)
        with _replacement(path) as folder:
            yield folder


def start_folder(path: Path, name: str, text: str) -> None:
    """Put a folder that holds the file `name` alone in the place of what is at `path`, which is locked."""
    if not is_free(path) and not _is_fixed(path):
        with _replacement(path) as folder:
            write_text(folder / name, text)
        return
    if is_free(path):
        _sweep(make_folder(path) / name)
    else:
        for each in path.iterdir():
            if each.name != name:  # which says until the end what the folder is
                remove(each)
    write_text(path / name, text)


def _is_fixed(path: Path) -> bool:
    """Whether a folder cannot be moved: a mounted disk, the working folder, or inside a read-only folder."""
    whole = path.resolve()
    return path.is_mount() or Path.cwd().is_relative_to(whole) or not os.access(whole.parent, os.W_OK)


def _named(path: Path) -> Path:
    """Where a link points, and a path with a name."""
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """A hidden, empty folder beside `path` that takes its place when the block ends well."""
    path = _named(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    make_folder(temporary)
    try:
        yield temporary
        with writing(path):
            take_place(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)


def take_place(new: Path, path: Path) -> None:
    """Make a file or folder durable and move it over `path`, which is locked: that is moved aside, then deleted.

    Killed in between, the next `locked` puts the old back, or deletes it where the new is in its place.
    """
    for file in new.rglob("*") if new.is_dir() else [new]:
        if file.is_file():
            fsync(file)
    path = _named(path)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.is_dir() and is_free(path):
        path.rmdir()
    elif os.path.lexists(path) and (new.is_dir() or path.is_dir()):
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    fsync(path.parent)
    discard(old, path)


def discard(old: Path, path: Path | None = None, *, last: str = "") -> None:
    """Delete a file or folder: it vanishes at once, and the next `locked` of `path` deletes what a kill leaves.

    With `last`, a folder that a link points to or that cannot be moved is emptied instead; `last` goes last.
    """
    if last and old.is_dir() and (old.is_symlink() or _is_fixed(old)):
        for each in sorted(old.iterdir(), key=lambda each: each.name == last):
            remove(each)
    elif os.path.lexists(old):
        path = path or old
        trash = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        os.replace(old, trash)
        remove(trash)
