"""Outputs of commands: one writer, whole after a kill, replaced only where vdiff wrote all that is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import PIL.Image
import pytest
from filelock import FileLock

from tests.commands import TINY, done, error, tree
from tests.toy import contents, write_dataset
from vdiff.errors import VdiffError
from vdiff.replacing import Kind, check_free, discard, is_free, locked, new_folder, start_folder, sweep_inside

THING = Kind("thing", lambda path: r"(old|new)\.txt" if path.is_file() or (path / "old.txt").exists() else "")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_appears_at_the_end_with_all_it_holds(tmp_path):
    path = tmp_path / "parent" / "data"
    with new_folder(path, THING) as folder:
        assert not path.exists()
        assert folder.parent == path.parent
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("a")
        assert folder.name.startswith(".")
    assert (path / "deep" / "a.txt").read_text() == "a"
    assert names(path.parent) == ["data"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "mine")])
@pytest.mark.parametrize("exists", [False, True])
def test_new_folder_vanishes_when_the_block_fails(tmp_path, error, exists):
    path = tmp_path / "data"
    if exists:
        path.mkdir()
        (path / "old.txt").write_text("old")

    def work() -> None:
        with new_folder(path, THING, overwrite=True) as folder:
            (folder / "a.txt").write_text("a")
            raise error

    with pytest.raises(type(error)) as caught:
        work()
    assert caught.value is error
    assert names(tmp_path) == (["data"] if exists else [])
    assert not exists or names(path) == ["old.txt"]


def test_new_folder_refuses_to_overwrite_unasked(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(VdiffError, match="data exists already; give another "), new_folder(path, THING):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["data"]
    with new_folder(path, THING, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["data"]


def test_new_folder_replaces_a_file_too(tmp_path):
    path = tmp_path / "data"
    path.write_text("a file")
    with new_folder(path, THING, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["data"]


@pytest.mark.parametrize("exists", [False, True])
def test_the_old_folder_is_there_until_the_new_one_can_take_its_place(tmp_path, monkeypatch, exists):
    """The last rename fails: the old data must be back under its name."""
    path = tmp_path / "data"
    if exists:
        path.mkdir()
        (path / "old.txt").write_text("old")
    real_replace = os.replace

    def fails_on_the_new(source, target):
        if str(source).endswith(".tmp") and Path(target) == path:
            raise OSError(5, "Input/output error")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", fails_on_the_new)
    with pytest.raises(VdiffError, match="Input/output error"), new_folder(path, THING, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(tmp_path) == (["data"] if exists else [])
    assert not exists or names(path) == ["old.txt"]


# The lock, and what a kill leaves


def test_one_writer_at_a_time_and_no_lock_is_left(tmp_path):
    path = tmp_path / "new" / "out"
    with locked(path):
        with pytest.raises(VdiffError, match=r"another process is writing .*out; wait for it"), locked(path):
            raise AssertionError("the block must not run")
        with locked(tmp_path / "new" / "other"), locked(path, mine=False):
            (path.parent / "file").touch()
    assert names(path.parent) == ["file"]
    (path.parent / "file").unlink()
    with locked(path):
        pass
    assert names(path.parent) == []  # which was there before
    with locked(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert names(tmp_path) == ["new"]


def test_an_interruption_while_the_lock_is_taken_leaves_none(tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        acquire(*_, **__)
        raise KeyboardInterrupt

    acquire = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "new" / "out"):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == []


def test_a_path_that_leads_elsewhere_has_the_lock_of_its_end(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    with locked(tmp_path / "real"):
        for path in (tmp_path / "link", Path("."), Path("../real")):
            with pytest.raises(VdiffError, match="another process"), locked(path):
                raise AssertionError("the block must not run")


@pytest.mark.parametrize("new", [False, True])
def test_what_a_kill_left_is_put_back_or_removed(tmp_path, new):
    """The old goes back where nothing took its place; files of other outputs and other programs stay."""
    kept = {
        ".out.txt",
        ".out.1.2.tmp",
        ".out.notes.old",
        ".out.settings.tmp",
        ".out.thesis_2.old",
        ".outer.7.tmp",
        ".other.7.old",
        "out.7.tmp",
        ".out.tmp",
    }
    left = {".out.7.tmp", f".out.{'a' * 32}.tmp", ".out.partial.7.tmp"}
    for name in kept | left:
        (tmp_path / name).write_text(name)
    (tmp_path / ".out.8.old").mkdir()
    (tmp_path / ".out.8.old" / "a").write_text("old")
    if new:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("new")
    with locked(tmp_path / "out", tmp_path / "out.partial"):
        pass
    assert set(names(tmp_path)) == kept | {"out"}
    assert (tmp_path / "out" / "a").read_text() == ("new" if new else "old")


def test_temporary_files_inside_go_where_the_folder_is_ours(tmp_path):
    names_of = {".old.txt.7.tmp", ".old.txt.tmp", ".mine.txt.7.tmp", "old.txt", ".old.txt"}
    for name in names_of:
        (tmp_path / name).touch()
    sweep_inside(tmp_path, THING)
    assert set(names(tmp_path)) == {".mine.txt.7.tmp", "old.txt", ".old.txt"}
    (tmp_path / "old.txt").rename(tmp_path / "else.txt")
    (tmp_path / ".old.txt.7.tmp").touch()
    sweep_inside(tmp_path, THING)
    assert ".old.txt.7.tmp" in names(tmp_path)


def test_a_folder_that_cannot_be_moved_is_emptied(tmp_path, monkeypatch):
    """The working folder, or where a disk is mounted; the file that says what it is goes last."""
    (tmp_path / "old.txt").touch()
    (tmp_path / "state").mkdir()
    monkeypatch.chdir(tmp_path)
    start_folder(Path("."), "old.txt", "new")
    assert contents(tmp_path) == {"old.txt": b"new"}
    assert Path("old.txt").read_text() == "new"


def test_a_folder_in_one_that_may_only_be_read_is_emptied(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").touch()
    (folder / "state").touch()
    before = folder.stat().st_ino
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    start_folder(folder, "old.txt", "new")
    assert contents(folder) == {"old.txt": b"new"}
    assert folder.stat().st_ino == before
    discard(folder, last="old.txt")
    assert contents(folder) == {}
    assert folder.stat().st_ino == before


def test_the_root_of_a_file_system_is_no_output():
    with pytest.raises(VdiffError, match="/ is the root of a file system; choose another place"), locked(Path("/")):
        pass


def test_deleting_takes_one_moment(tmp_path, monkeypatch):
    """Killed while files are deleted, none of them is in the way."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(tmp_path / "out")
    assert is_free(tmp_path / "out")
    with locked(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock"]


# What is foreign


def test_foreign_files_are_named(tmp_path):
    for name in ("old.txt", "a", "b", "c/d", "e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(VdiffError, match=r"also holds a, b, c/d and 1 more, which vdiff did not write; move them away"):
        check_free(tmp_path, THING, overwrite=True)
    for name in ("a", "b", "c/d"):
        (tmp_path / name).unlink()
    with pytest.raises(VdiffError, match=r"also holds e, which vdiff did not write; move that away, or choose another"):
        check_free(tmp_path, THING, overwrite=True)
    (tmp_path / "e").unlink()
    (tmp_path / "e").symlink_to(tmp_path)
    with pytest.raises(VdiffError, match="also holds e, which"):
        check_free(tmp_path, THING, overwrite=True)
    (tmp_path / "e").unlink()
    check_free(tmp_path, THING, overwrite=True)


SAMPLE = "sample.py --checkpoint checkpoints/original --num 2 --num_timesteps 1"
EVALUATE = "vdiff evaluate checkpoints/original --data data/toy --num 16 --num_timesteps 1 --cache cache"
FOLDERS = {
    "train": "train.py --config tiny.toml --out {}",
    "distill": "distill.py --config tiny.toml --base checkpoints/original --stages 1 --check_images 0 --out {}",
    "sample": f"{SAMPLE} --out {{}}",
    "lmdb": f"{SAMPLE} --format lmdb --out {{}}",
    "prepare": "prepare_data.py photos --size 4 --num_workers 0 --out {}",
    "ema": "vdiff ema checkpoints/original --decay 0.5 --out {}",
    "weights": "vdiff export weights checkpoints/original {}",
    "diffusers": "vdiff export diffusers checkpoints/original {}",
}
"""What writes a folder."""
FILES = {
    "out.zip": f"{SAMPLE} --out {{}}",
    "out.npz": f"{SAMPLE} --out {{}}",
    "out.json": f"{EVALUATE} --out {{}}",
    "out.html": "vdiff report --out {}",
    "out.pt2": "vdiff export torch checkpoints/original {}",
    "f.pt2": "vdiff features --data other/toy8 --out {}",
    "out.png": "vdiff data show data/toy --out {}",
}
"""What writes a file; `vdiff report` and `vdiff data show` replace what they wrote before without being told to."""


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its dataset, and a project of somebody's with files of names that vdiff uses, too."""
    folder = tmp_path_factory.mktemp("furnished")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        write_dataset(Path("data/toy"), count=20)
        Path("photos").mkdir()
        for k in range(20):
            PIL.Image.effect_noise((8, 8), 50).save(f"photos/{k}.png")
        done("prepare_data.py photos --size 8 --channels 1 --num_workers 0 --out other/toy8")
        Path("tiny.toml").write_text(TINY)
        done("train.py --config tiny.toml --data data/toy --ema_more 0.5")
        Path("proj").mkdir()
        for name in ("config.json", "index.json", "samples.json", "job.json", "average.json", "model_index.json"):
            Path("proj", name).write_text('{"editor": {"tab": 4}, "job": 1}')
        for name in ("run.toml", "README.md", "data.mdb", "thesis.txt", *FILES):
            Path("proj", name).write_text('title = "mine"\n')
        shutil.copytree("proj", "proj/vdiff")
    return folder


@pytest.fixture
def place(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `furnished`, the working folder."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_wrote_is_refused(place, name, overwrite):
    command, out = (FOLDERS[name], "proj") if name in FOLDERS else (FILES[name], f"proj/{name}")
    switch = " --overwrite" if overwrite and name not in ("out.html", "out.png") else ""
    before = tree(place)
    assert " that vdiff wrote; choose another" in error(f"{command.format(out)}{switch}", 1)
    after = {path: data for path, data in tree(place).items() if not path.startswith("cache")}
    assert after == before


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "diffusers"])
def test_only_what_vdiff_wrote_is_replaced(place, name):
    """With a file of somebody's in it the folder stays as it is; without, the command does it again."""
    line = FOLDERS[name].format("out")
    done(line)
    Path("out/thesis.txt").write_text("years")
    before = tree(place)
    assert error(f"{line} --overwrite", 1).startswith("out also holds thesis.txt, which vdiff did not write; move that")
    assert tree(place) == before
    Path("out/thesis.txt").unlink()
    with locked(Path("out")):
        assert error(f"{line} --overwrite", 1).startswith("another process is writing out; wait for it")
    assert tree(place) == {name: data for name, data in before.items() if name != "out/thesis.txt"}
    done(f"{line} --overwrite")
    assert tree(place).keys() - {"cache"} == before.keys() - {"out/thesis.txt"} or name in ("train", "distill")


@pytest.mark.parametrize("out", [".", "link"])
def test_a_student_is_replaced_where_it_is(place, monkeypatch, out):
    """In the working folder and behind a link, with what macOS and `vdiff report` put into it."""
    shutil.rmtree("proj")
    Path("work").mkdir()
    Path("link").symlink_to("work")
    monkeypatch.chdir(place / "work" if out == "." else place)
    line = f"{FOLDERS['distill'].format(out)} --data {place}/data/toy".replace("checkpoints", f"{place}/checkpoints")
    line = line.replace("tiny.toml", f"{place}/tiny.toml")
    done(line)
    done(f"vdiff report {out}")
    Path(out, ".DS_Store").touch()
    before = (place / "work" / "model.safetensors").read_bytes()
    assert Path(out, "report.html").exists()
    done(f"{line} --overwrite --seed 5")
    assert (place / "link").is_symlink()
    assert (place / "work" / "model.safetensors").read_bytes() != before
    assert {".DS_Store", "report.html"}.isdisjoint(tree(place / "work"))
    assert not list(place.glob(".*"))


def test_samples_go_where_a_link_points(place):
    Path("disk").mkdir()
    Path("link.lmdb").symlink_to("disk")
    done(f"{SAMPLE} --out link.lmdb")
    assert Path("link.lmdb").is_symlink()
    assert "data.mdb" in tree(place / "disk")
    assert not list(place.glob("*.partial"))


def test_a_dataset_goes_where_a_link_points(place):
    Path("disk").mkdir()
    Path("disk/empty").mkdir()
    Path("link").symlink_to("disk/empty")
    for switch in ("", " --overwrite"):
        done(f"{FOLDERS['prepare'].format('link')}{switch}")
        assert Path("link").is_symlink()
        assert "data.mdb" in tree(place / "disk" / "empty")
        assert [path.name for path in Path("disk").iterdir()] == ["empty"]


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("out.pt2", "f.pt2")])
def test_only_a_file_that_vdiff_wrote_is_replaced(place, name):
    line = FILES[name].format(name)
    switch = " --overwrite" if name not in ("out.html", "out.png") else ""
    done(line)
    assert not list(place.glob(".*"))
    done(f"{line}{switch}")
    with locked(Path(name)):
        assert error(f"{line}{switch}", 1).startswith(f"another process is writing {name}; wait for it")
    Path(name).write_text("mine")
    assert error(f"{line}{switch}", 1).startswith(f"{name} exists and is not a")
    assert Path(name).read_text() == "mine"
