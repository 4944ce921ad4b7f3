"""Outputs of commands: one writer at a time, whole after a kill, replaced only if vdiff wrote all of it."""

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
from typing import TYPE_CHECKING

from vdiff.errors import VdiffError
from vdiff.files import fsync, make_folder, read_text, refusal, remove, write_text, writing

if TYPE_CHECKING:
    from filelock import FileLock

MARK = r"(?:\d+|[0-9a-f]{32})"
INNER = re.compile(rf"\.(.+?)(?:\.{MARK})?\.tmp")
"""Temporary files, with or without a process number; the first group is the final name."""
OF_SYSTEM = re.compile(r"(.*/)?(\.DS_Store|\._[^/]*|Thumbs\.db|desktop\.ini)")
"""Files that macOS and Windows create when a folder is viewed."""
SHOWN = 3
"""How many foreign files an error names."""


@dataclass(frozen=True)
class Kind:
    """A kind of output, and how to recognise that vdiff wrote it.

    Attributes:
        name: in an error.
        find: the function behind `files`; it may raise any error of reading.
    """

    name: str
    find: Callable[[Path], str]

    def files(self, path: Path) -> str:
        """A regular expression of the file names in a folder that vdiff wrote for certain (for a file: any text).

        Empty if vdiff wrote nothing, or if that cannot be read.
        """
        try:
            return self.find(path)
        except (OSError, ValueError, SyntaxError, VdiffError, zipfile.BadZipFile):
            return ""


@contextlib.contextmanager
def locked(path: Path, *beside: Path, kind: Kind | None = None, mine: bool = True) -> Iterator[None]:
    """Lock `path` against other writers, after repairing it and removing what a killed process left.

    The lock is a hidden file beside `path`. It is removed at the end, with parent folders made for it.

    Args:
        beside: other outputs of the command.
        kind: of the folder `path`; with it, temporary files inside the folder are removed too.

    Raises:
        mine: whether this process locks; of processes that write together, only one does.
    """
    if not mine:
        yield
        return
    from filelock import FileLock

    whole = path.resolve()
    if not whole.name:
        raise VdiffError(f"{path} is the root of a file system", "choose another place")
    made = [parent for parent in whole.parents if not parent.exists()]
    place = whole.with_name(f".{whole.name}.lock")
    if not made and not os.access(whole.parent, os.W_OK):  # for example a mounted folder
        place = Path(tempfile.gettempdir()) / f"vdiff-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:16]}.lock"
    lock = FileLock(place)
    try:
        _acquire(lock, path)
        for each in (whole, *beside):
            _sweep(each)
        if kind is not None:
            sweep_inside(whole, kind)
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                place.unlink()
            lock.release()
        for parent in made:
            with contextlib.suppress(OSError):  # it is in use
                parent.rmdir()


def _acquire(lock: FileLock, path: Path) -> None:
    """Take the lock of `path`, see `locked`."""
    from filelock import Timeout

    try:
        with contextlib.suppress(FileExistsError):
            path.resolve().parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).touch()  # fails at once if it cannot be written; a lock would wait
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
    """Check that `path` may be written: it is free, or vdiff wrote everything there and `overwrite` is on.

    Raises:
        VdiffError: `path` exists and `overwrite` is off, or vdiff did not write all of it.
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
    """The regular expression of the files that vdiff wrote at `path`. Raises VdiffError: `path` is not of this kind."""
    known = kind.files(path)
    if not known:
        article = "an" if kind.name[0] in "aeioO" else "a"
        raise VdiffError(f"{path} exists and is not {article} {kind.name} that vdiff wrote", f"choose {flag}")
    return known


def is_free(path: Path) -> bool:
    """Whether `path` is missing, or a folder without files except temporary ones of a killed process."""
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
        values = json.loads(read_text(path))  # also if it was edited and the checksum does not match
    except (OSError, ValueError, VdiffError, RecursionError):
        return False
    return isinstance(values, dict) and values.keys() >= set(keys)


@contextlib.contextmanager
def new_folder(path: Path, kind: Kind, *, overwrite: bool = False, flag: str = "another --out") -> Iterator[Path]:
    """A temporary folder beside `path`: renamed to `path` if the block succeeds, removed if it fails.

    Raises:
        VdiffError: see `locked` and `check_free`.
    """
    with locked(path):
        check_free(path, kind, overwrite=overwrite, flag=flag)
        with _replacement(path) as folder:
            yield folder


def start_folder(path: Path, name: str, text: str) -> None:
    """Replace what is at `path`, which is locked, by a folder that holds only the file `name`."""
    if not is_free(path) and not _is_fixed(path):
        with _replacement(path) as folder:
            write_text(folder / name, text)
        return
    if is_free(path):
        _sweep(make_folder(path) / name)
    else:
        for each in path.iterdir():
            if each.name != name:  # it identifies the folder until the end
                remove(each)
    write_text(path / name, text)


def _is_fixed(path: Path) -> bool:
    """Whether a folder cannot be moved: it is a mounted disk, the working folder, or in a read-only folder."""
    whole = path.resolve()
    return path.is_mount() or Path.cwd().is_relative_to(whole) or not os.access(whole.parent, os.W_OK)


def _named(path: Path) -> Path:
    """The target of a link, as a path with a name."""
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """A hidden, empty folder beside `path` that replaces `path` if the block succeeds."""
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
    """Sync a file or folder and move it to `path`, which is locked; the old `path` is moved aside, then deleted.

    After a kill in between, the next `locked` puts the old one back, or deletes it if the new one is in place.
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
    """Delete a file or folder: it vanishes at once; after a kill, the next `locked` of `path` deletes the rest.

    With `last`, a linked folder or one that cannot be moved is emptied instead; the file `last` is deleted last.
    """
    if last and old.is_dir() and (old.is_symlink() or _is_fixed(old)):
        for each in sorted(old.iterdir(), key=lambda each: each.name == last):
            remove(each)
    elif os.path.lexists(old):
        path = path or old
        trash = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        os.replace(old, trash)
        remove(trash)
