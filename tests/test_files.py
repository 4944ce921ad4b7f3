"""Files and folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import socket
import tomllib
from pathlib import Path

import pytest
import torch

from vdiff import files
from vdiff.errors import VdiffError
from vdiff.files import (
    check_regular,
    fsync,
    make_folder,
    parse,
    read_json,
    read_text,
    remove,
    write_text,
    write_whole,
)
from vdiff.models.checkpoint import write_tensors
from vdiff.replacing import Kind, new_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_whole_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new – ü")
    assert path.read_bytes() == "new – ü".encode()
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_mode_that_the_umask_leaves(tmp_path, umask):
    """Whatever made them: safetensors writes a file of 0600 and renames it."""

    def private(temporary: Path) -> None:
        (tmp_path / "other").touch(0o600)
        (tmp_path / "other").replace(temporary)

    before = os.umask(umask)
    try:
        write_whole(tmp_path / "private", private)
        write_text(tmp_path / "text", "")
        write_tensors(tmp_path / "weights", {"a": torch.zeros(1)}, {})
        with new_folder(tmp_path / "folder", Kind("thing", str)) as folder:
            write_text(folder / "text", "")
    finally:
        os.umask(before)
    found = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files = dict.fromkeys(["private", "text", "weights", "folder/text"], 0o666 & ~umask)
    assert found == {**files, "folder": 0o777 & ~umask}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("mine"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails_halfway(temporary: Path) -> None:
        assert temporary.parent == tmp_path
        assert temporary != path
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise error

    expected = VdiffError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_whole(path, fails_halfway)
    if expected is VdiffError:
        assert str(caught.value).startswith(f"cannot write {path}: No space left on device; free space")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_bytes_are_durable_before_the_name_is_and_the_name_before_the_return(tmp_path, monkeypatch):
    order = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), real_replace(a, b)))
    write_text(tmp_path / "a.txt", "new")
    assert len(order) == 3
    assert order[0].endswith(".tmp")
    assert order[1:] == ["replace", str(tmp_path)]


def test_a_missing_parent_or_a_folder_in_the_way_is_said(tmp_path):
    with pytest.raises(VdiffError, match=r"cannot write .*: No such file or directory"):
        write_text(tmp_path / "missing" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(VdiffError, match=r"cannot write .*folder"):
        write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


def test_a_refusal_while_making_folders_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for attempt in (make_folder, lambda path: new_folder(path, Kind("thing", str)).__enter__()):
        with pytest.raises(VdiffError, match=r"cannot write .*file") as caught:
            attempt(tmp_path / "file" / "data")
        assert "\n" not in str(caught.value)
    with pytest.raises(VdiffError, match="cannot write"):
        make_folder(tmp_path / "file")


def test_make_folder_makes_parents_and_minds_nothing_that_is_there(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(tmp_path / "a" / "b").is_dir()


def test_remove_takes_files_folders_links_and_nothing(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for name in ("link", "file", "folder", "missing"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert names(kept) == ["a.txt"]


def test_folders_need_no_sync_on_windows(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(files.os, "open", lambda path, *_: opened.append(path))
    monkeypatch.setattr(files.os, "name", "nt")
    fsync(tmp_path)
    assert opened == []


def test_pipes_sockets_and_devices_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "link", "socket", "/dev/null"):
            with pytest.raises(VdiffError, match=f"{name} is a pipe, a socket or a device; give a regular file"):
                check_regular(Path(name))
            with pytest.raises(VdiffError, match="pipe, a socket"):
                read_text(Path(name))
    for name in (".", "missing", "nul\0"):
        check_regular(Path(name))


def test_a_text_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="1,048,576 MiB, more than the 64"):
        read_text(path)
    with pytest.raises(VdiffError, match=r"a.json cannot be read: 1,048,576 MiB, more than the 64 .*; restore it"):
        read_json(path, "restore it")


@pytest.mark.parametrize("depth", [201, 50_000])
@pytest.mark.parametrize(
    ("loads", "start", "inner", "after"), [(json.loads, "", "[", "]"), (tomllib.loads, "a = ", "{a = ", "}")]
)
def test_what_is_nested_too_deep_is_refused(loads, start, inner, after, depth):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(f"{start}{inner * depth}1{after * depth}", loads)
    assert parse("[1]") == [1]
