"""Killed at any moment, on a full disk, by a signal: the same command continues and ends with the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests import crashing
from tests.commands import ROOT, image_of, tree
from tests.crashing import OneWaits
from tests.programs import Forked
from tests.toy import Watcher
from vdiff.data import preparation, workers
from vdiff.data import store as store_module
from vdiff.data.conversion import ConversionConfig
from vdiff.data.disk_sources import Folder
from vdiff.data.listing import Item
from vdiff.data.preparation import Journal, Rejected, prepare
from vdiff.data.source import Sample
from vdiff.data.store import ImageStore, partial_folder
from vdiff.errors import Interrupted, VdiffError
from vdiff.projects import Project

CONFIG = ConversionConfig(sizes=(4, 8), image_format="png")
COUNT = 60


def photos(root: Path, count: int = COUNT, captions: bool = False) -> Path:
    """Images in three classes, by choice most of them with a caption, and some files that are none."""
    for index in range(count):
        path = root / "abc"[index * 3 // count] / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path)
        if index % 7 == 3:
            path.with_suffix(".bad.png").write_text("text")
        if captions and index % 5:
            path.with_suffix(".txt").write_text(f"photo {index}\n")
    return root


def start(folder: Path, out: Path, *point: str, **env: str) -> Forked:
    return Forked(partial(crashing.main, str(folder), str(out), *point), ROOT, env)


def finish(folder: Path, out: Path, *point: str, **env: str) -> int:
    process = start(folder, out, *point, **env)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (0, 9), stderr
    return process.returncode


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", captions=True)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs that are never cut short write: `lmdb` and `tars`."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(source, folder / "lmdb") == 0
    assert finish(source, folder / "tars.tar") == 0
    assert sorted(os.listdir(folder)) == ["lmdb", "tars"]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lmdb", "tars.tar"])
def test_killed_at_random_moments(source: Path, whole: Path, tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    out = tmp_path / kind
    folder = out.with_suffix("")
    kills, least, finished = 0, 15, 0
    while kills < least or not finished:
        process = start(source, out, SECONDS="0.01")
        _, stderr = process.communicate(timeout=rng.uniform(0.1, 0.9) if kills < least else 60)
        if process.returncode == -signal.SIGKILL:
            kills += 1
        else:
            assert process.returncode == 0, stderr
            assert os.listdir(tmp_path) == [folder.name]
        if folder.exists():  # it may have been killed after the end
            finished += 1
            assert tree(folder) == tree(whole / folder.name)
            shutil.rmtree(folder)


COMMON = ["before:begin", "after:begin", "after:listing", "before:listing", "before:place", "after:place"]
# a point → at which of its calls, the last one being among them
LMDB = {
    **dict.fromkeys([*COMMON, "before:remove"], (1,)),
    **dict.fromkeys(["before:record", "after:record"], (1, 3, 8)),
    **dict.fromkeys(["before:commit", "after:commit"], (1, 3, 9)),
    "before:rename": (1, 2, 3),
    "before:sync": (1, 2, 3, 4, 5, 6, 7, 13),
}
TARS = {
    **dict.fromkeys([*COMMON, "before:finish_shards"], (1,)),
    **dict.fromkeys(["before:record", "before:commit_shard", "after:commit_shard"], (1, 4)),
}

KEPT = {
    "lmdb": ["after:commit 3", "before:rename 2"],
    "tars.tar": ["before:commit_shard 4"],
}
"""The points of `make test`."""


@pytest.mark.parametrize(
    ("kind", "point", "number"),
    [
        pytest.param(kind, point, number, marks=[] if f"{point} {number}" in KEPT[kind] else pytest.mark.slow)
        for kind, points in (("lmdb", LMDB), ("tars.tar", TARS))
        for point, numbers in points.items()
        for number in numbers
    ],
)
def test_killed_at_every_step(source: Path, whole: Path, tmp_path: Path, kind: str, point: str, number: int) -> None:
    out = tmp_path / kind
    assert finish(source, out, point, str(number)) == 9
    if os.listdir(tmp_path) != [out.with_suffix("").name]:
        assert finish(source, out) == 0
    assert os.listdir(tmp_path) == [out.with_suffix("").name]
    assert tree(out.with_suffix("")) == tree(whole / out.with_suffix("").name)


def test_a_compressed_tar_is_unpacked_once(source: Path, whole: Path, tmp_path: Path) -> None:
    packed = tmp_path / "photos.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(source, "photos")
    assert finish(packed, tmp_path / "out", "after:commit", "3") == 9
    assert (tmp_path / "out.partial" / "unpacked.tar").exists()
    assert finish(packed, tmp_path / "out") == 0
    assert ImageStore(tmp_path / "out").meta.fingerprint == ImageStore(whole / "lmdb").meta.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["out", "photos.tar.gz"]


@contextmanager
def cut_short(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Iterator[None]:
    """Let the reading of the 31st image raise."""
    read, seen = Folder.read, []

    def counted(self: Folder, item: Item) -> Sample:
        seen.append(item)
        if len(seen) > 30:
            raise error
        return read(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", counted)
        yield


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [(KeyboardInterrupt(), 130, "interrupted"), (Interrupted("terminated", 143), 143, "terminated")],
)
def test_a_signal_keeps_what_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, word: str
) -> None:
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 8)
    with cut_short(monkeypatch, error), pytest.raises(Interrupted, match=f"{word}; 27 images are done") as caught:
        prepare(Folder(source), tmp_path / "out", CONFIG)
    assert caught.value.exit_code == code
    read: list[str] = []
    whole_read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, item: read.append(item.name) or whole_read(self, item))
    report = prepare(Folder(source), tmp_path / "out", CONFIG)
    assert (report.images, report.kept, report.rejected) == (COUNT, 24, 9)
    assert len(read) == COUNT + 9 - 27


def test_an_incomplete_dataset_is_refused_with_the_command_that_completes_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 8)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "data" / "out"
    typed = "python prepare_data.py photos --size 8"
    with cut_short(monkeypatch, KeyboardInterrupt()), pytest.raises(Interrupted):
        prepare(Folder(source), out, CONFIG, command=typed)
    for path in (out, partial_folder(out), partial_folder(out) / "dataset"):
        with pytest.raises(VdiffError, match=f"incomplete dataset: .*; complete it: {typed}"):
            ImageStore(path)
    with pytest.raises(VdiffError, match=f"incomplete dataset: .*; complete it: {typed}"):
        Project().dataset()


def test_other_settings_do_not_go_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 8)
    out = tmp_path / "out"
    with cut_short(monkeypatch, KeyboardInterrupt()), pytest.raises(Interrupted):
        prepare(Folder(source), out, CONFIG, command="first command")
    other = ConversionConfig(sizes=(4,), image_format="png")
    before = tree(partial_folder(out))
    with pytest.raises(VdiffError, match=r"unfinished preparation with conversion .*, not .*continue it: first com"):
        prepare(Folder(source), out, other)
    after = tree(partial_folder(out))
    assert {name: before[name] for name in before if name != "lock"} == {n: after[n] for n in after if n != "lock"}
    assert prepare(Folder(source), out, other, overwrite=True).kept == 0
    assert ImageStore(out).meta.sizes == (4,)


def test_overwrite_goes_on_too_and_the_old_dataset_lives_until_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 8)
    out = tmp_path / "out"
    prepare(Folder(source / "a"), out, CONFIG)
    old = tree(out)
    with cut_short(monkeypatch, KeyboardInterrupt()), pytest.raises(Interrupted):
        prepare(Folder(source), out, CONFIG, overwrite=True)
    assert tree(out) == old
    assert prepare(Folder(source), out, CONFIG, overwrite=True).kept == 24
    assert len(ImageStore(out)) == COUNT


def test_images_that_come_or_go_in_between(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was listed first is what counts: new files wait for the next preparation, missing ones are skipped."""
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 8)
    mine = shutil.copytree(source, tmp_path / "photos")
    with cut_short(monkeypatch, KeyboardInterrupt()), pytest.raises(Interrupted):
        prepare(Folder(mine), tmp_path / "out", CONFIG)
    shutil.copy(mine / "a" / "0000.png", mine / "a" / "0000-new.png")
    (mine / "c" / "0059.png").unlink()
    report = prepare(Folder(mine), tmp_path / "out", CONFIG)
    assert (report.images, report.skipped) == (COUNT - 1, {"not an image": 9, "unreadable": 1})


def test_strict_goes_on_once_the_file_is_mended(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 8)
    mine = shutil.copytree(source, tmp_path / "photos")
    for bad in mine.rglob("*.bad.png"):
        bad.unlink()
    broken = mine / "b" / "0030.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:50])
    with pytest.raises(VdiffError, match=r"b/0030\.png: damaged .*fix it and run the same command again"):
        prepare(Folder(mine), tmp_path / "out", CONFIG, strict=True)
    broken.write_bytes(good)
    report = prepare(Folder(mine), tmp_path / "out", CONFIG, strict=True)
    assert (report.images, report.kept, report.rejected) == (COUNT, 24, 0)


def test_what_a_finished_run_left_behind_is_not_another_run(source: Path, tmp_path: Path) -> None:
    """Killed when the dataset was in its place already: the same command is done, another one meets a dataset."""
    assert finish(source, tmp_path / "out", "before:remove") == 9
    assert partial_folder(tmp_path / "out").exists()
    before = tree(tmp_path / "out")
    with pytest.raises(VdiffError, match="out exists already; give another "):
        prepare(Folder(source), tmp_path / "out", ConversionConfig(sizes=(4,)))
    assert finish(source, tmp_path / "out") == 0
    assert os.listdir(tmp_path) == ["out"]
    assert tree(tmp_path / "out") == before


def test_one_at_a_time(source: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out")
    with journal.lock(), pytest.raises(VdiffError, match=r"another process is writing .*out; wait for it"):
        prepare(Folder(source), tmp_path / "out", CONFIG)
    assert prepare(Folder(source), tmp_path / "out", CONFIG).images == COUNT


def test_a_folder_of_that_name_that_is_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    letters = tmp_path / "out.partial"
    letters.mkdir()
    (letters / "dear.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(VdiffError, match=r"out\.partial exists and is not a preparation that vdiff wrote"):
            prepare(Folder(source), tmp_path / "out", CONFIG, overwrite=overwrite)
    assert os.listdir(letters) == ["dear.txt"]


def test_names_that_are_no_text_and_newlines_in_the_list_of_rejected_files(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out")
    with journal.lock():
        journal.begin({}, "", overwrite=False)
        journal.restore(0)
        for name in ("é\n", "\udcff", '"'):
            journal.add_rejected(Rejected(name, "damaged"))
        journal.record(1)
    lines = (journal.dataset / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["é\n", "\udcff", '"']


def test_too_little_space_is_said_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: usage._replace(free=30_000))
    with pytest.raises(VdiffError, match=r"about 0\.\d MB are needed, 0\.0 MB are free for .*; free space") as caught:
        prepare(Folder(source), tmp_path / "out", CONFIG)
    assert "smaller --size" in str(caught.value)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: usage._replace(free=120_000))
    assert prepare(Folder(source), tmp_path / "out", CONFIG).num_bytes < 120_000


SCRIPT = """
set -e
mount -t tmpfs -o size=$5 tmpfs "$1"
"$3" -m tests.crashing "$2" "$1/out" && exit 7
ls "$1"
mount -o remount,size=20m "$1"
"$3" -m tests.crashing "$2" "$1/out"
cp -r "$1/out" "$4"
ls "$1"
"""


@pytest.mark.parametrize(("size", "reason"), [("68k", "database or disk is full"), ("100k", "No space left on device")])
def test_a_full_disk(source: Path, whole: Path, tmp_path: Path, size: str, reason: str) -> None:
    (tmp_path / "disk").mkdir()
    unshare = shutil.which("unshare")
    able = (
        unshare
        and not subprocess.run(
            [unshare, "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")],
            capture_output=True,
        ).returncode
    )
    if not able:
        pytest.skip("mounting a small file system is not allowed here")
    words = [str(tmp_path / "disk"), str(source), sys.executable, str(tmp_path / "copy"), size]
    done = subprocess.run(
        [str(unshare), "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", *words],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_SPACE_CHECK": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out.partial", "out"]
    error = done.stderr.splitlines()[-1]
    assert "VdiffError: cannot write" in error
    assert f"{reason}; free space or choose another --out" in error
    assert tree(tmp_path / "copy") == tree(whole / "lmdb")


def test_a_slow_image_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the second image of 400 waits, all but those of its chunk are converted; then all come in order."""
    monkeypatch.setattr(workers, "SECONDS_ALONE", 0)
    for name in ("photos", "notes"):
        (tmp_path / name).mkdir()
    colours = [(index % 200, index // 200, 0) for index in range(400)]
    for index, colour in enumerate(colours):
        PIL.Image.new("RGB", (8, 8), colour).save(tmp_path / "photos" / f"{index:03d}.png")
    source = OneWaits(tmp_path / "photos", tmp_path / "notes", 400 - preparation.CHUNK_ITEMS)
    report = prepare(source, tmp_path / "out", CONFIG, num_workers=2)
    assert (report.images, report.skipped) == (400, {})
    store = ImageStore(tmp_path / "out")
    assert [image_of(store, 8, index).getpixel((0, 0)) for index in range(400)] == colours


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_range_for_all_images_that_a_run_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """12 bits in the second image make 12 bits of all; a run that was cut short does not look at all again."""
    monkeypatch.setattr(store_module, "BATCH_IMAGES", 1)
    folder, out, greys = tmp_path / "ct", tmp_path / "out", []
    folder.mkdir()
    for k, most in enumerate([900, 4000, 1000]):
        greys.append(np.linspace(0, most, 64).reshape(8, 8).astype(np.uint16))
        PIL.Image.fromarray(greys[-1]).save(folder / f"{k}.png")
    PIL.Image.new("L", (8, 8), 77).save(folder / "3.png")
    config = ConversionConfig(sizes=(8,), channels=1, image_format="png", value_range="auto")
    read, seen = Folder.read, []

    def cut(self: Folder, item: Item) -> Sample:
        seen.append(item)
        if len(seen) == 6:  # after a look at four and the conversion of one
            raise KeyboardInterrupt
        return read(self, item)

    monkeypatch.setattr(Folder, "read", cut)
    with pytest.raises(Interrupted):
        prepare(Folder(folder), out, config)
    monkeypatch.setattr(Folder, "read", read)
    monkeypatch.setattr(preparation, "value_extremes", None)
    with pytest.raises(VdiffError, match="unfinished preparation with conversion"):
        prepare(Folder(folder), out, dataclasses.replace(config, value_range=(0.0, 4095.0)))
    prepare(Folder(folder), out, config, num_workers=num_workers)
    store = ImageStore(out)
    assert store.meta.value_range == "0,4095"
    for k, grey in enumerate(greys):
        wanted = (510 * grey.astype(int) + 4095) // 8190
        np.testing.assert_array_equal(np.asarray(image_of(store, 8, k)), wanted)
    assert set(np.asarray(image_of(store, 8, 3)).flat) == {77}
    said = tmp_path / "said"
    prepare(Folder(folder), said, dataclasses.replace(config, value_range=(0.0, 4095.0)))
    assert ImageStore(said).meta == store.meta
    watcher = Watcher()
    prepare(Folder(folder), tmp_path / "dark", dataclasses.replace(config, value_range="full"), reporter=watcher)
    assert [line.partition(";")[0] for line in watcher.lines] == [
        "3 images fill less than a quarter of the range of values, so they are dark or flat"
    ]
