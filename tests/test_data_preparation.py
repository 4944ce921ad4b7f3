"""From files to a dataset: order, classes, rejects, workers, and nothing half-written."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import numpy as np
import PIL.Image
import pytest

from tests.commands import ROOT, image_of
from vdiff.data import preparation, workers
from vdiff.data.conversion import ConversionConfig
from vdiff.data.disk_sources import Folder, Zip
from vdiff.data.image_files import extensions
from vdiff.data.listing import Listing, ListingWriter
from vdiff.data.preparation import Report, prepare
from vdiff.data.sources import Digits, build_listing, open_source
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError

CONFIG = ConversionConfig(sizes=(8,), image_format="png")
EMOJI = Path(__file__).parent.parent.parent / "shared" / "data" / "noto-emoji-64.zip"


def picture(seed: int, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, format=image_format)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def records(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def seeds(path: Path) -> list[int]:
    """Which `picture(seed)` stands at each index."""
    store = ImageStore(path)
    known = {picture(seed): seed for seed in range(40)}
    return [known[store.encoded(8, index)] for index in range(len(store))]


@contextmanager
def arrange(names: Iterable[str]) -> Iterator[Listing]:
    with TemporaryDirectory() as folder, ListingWriter(Path(folder) / "listing", extensions()) as writer:
        for name in names:
            writer.add_file(name)
        with closing(writer.finish()) as listing:
            yield listing


@pytest.mark.parametrize(
    ("names", "order", "labels"),
    [
        (["b.png", "a.png"], ["a.png", "b.png"], None),
        (["dog/1.png", "cat/2.png", "cat/1.png"], ["cat/1.png", "cat/2.png", "dog/1.png"], [0, 0, 1]),
        (["dog/x/1.png", "cat/y/z/2.png"], ["cat/y/z/2.png", "dog/x/1.png"], [0, 1]),
        (["all/dog/1.png", "all/cat/2.png", "all/README.md"], ["all/cat/2.png", "all/dog/1.png"], [0, 1]),
        (["all/a.png", "all/b.png"], ["all/a.png", "all/b.png"], None),
        (["cat/1.png", "2.png"], ["2.png", "cat/1.png"], None),
        (["a-b/1.png", "a/2.png"], ["a/2.png", "a-b/1.png"], [0, 1]),  # by folder, not by character
        ([".a/1.png", "__MACOSX/b/1.png", "c/.hidden.png", "2.PNG"], ["2.PNG"], None),
        ([], [], None),
    ],
)
def test_order_and_classes(names: list[str], order: list[str], labels: list[int] | None) -> None:
    with arrange(names) as listing, arrange(reversed(names)) as again:
        assert [item.name for item in listing.items()] == order
        assert [item.label for item in listing.items()] == (labels or [None] * len(order))
        assert bool(listing.class_names) == (labels is not None)
        assert list(again.items()) == list(listing.items())
        assert again.fingerprint == listing.fingerprint


def test_ignored_files_are_counted_by_extension() -> None:
    with arrange(["a.txt", "b/c.TXT", "README", "d.png"]) as listing:
        assert listing.ignored == {".txt": 2, "no extension": 1}


def test_folder_and_zip_give_the_same_records(tmp_path: Path) -> None:
    files = {"top/b/2.png": picture(2), "top/a/1.JPG": picture(1, "JPEG"), "top/a/0.WebP": picture(0, "WEBP")}
    prepare(Folder(write(tmp_path / "x", files)), tmp_path / "one", CONFIG)
    prepare(Zip(write_zip(tmp_path / "x.zip", files)), tmp_path / "two", CONFIG)
    assert records(tmp_path / "one") == records(tmp_path / "two")
    store = ImageStore(tmp_path / "one")
    assert store.meta.class_names == ("a", "b")
    assert [store.label(index) for index in range(3)] == [0, 0, 1]
    assert store.encoded(8, 2) == picture(2)


BAD = {"02.png": b"", "04.jpg": picture(4, "JPEG")[:-100], "05.png": b"some text"}


def mixed(root: Path) -> Folder:
    return Folder(write(root, {f"{seed:02d}.png": picture(seed) for seed in range(30)} | BAD | {"notes.txt": b"x"}))


def test_bad_files_leave_no_holes_and_are_listed(tmp_path: Path) -> None:
    source = mixed(tmp_path / "x")
    (tmp_path / "x" / "04.png").unlink()
    report = prepare(source, tmp_path / "out", CONFIG)
    assert seeds(tmp_path / "out") == [0, 1, 3, *range(6, 30)]
    assert report.skipped == {"empty file": 1, "damaged": 1, "not an image": 1}
    lines = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["02.png", "04.jpg", "05.png"]
    assert "truncated" in json.loads(lines[1])["detail"].lower()
    counts = ImageStore(tmp_path / "out").meta.counts
    skipped = {"damaged": 1, "empty file": 1, "not an image": 1}
    assert counts == {"images": 27, "skipped": skipped, "ignored": {".txt": 1}, "converted": {}}
    assert report.images_per_second > 0


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    source = mixed(tmp_path / "x")
    prepare(source, tmp_path / "alone", CONFIG)
    monkeypatch.setattr(workers, "SECONDS_ALONE", 0)
    monkeypatch.setattr(preparation, "CHUNK_ITEMS", 3)
    pools = []
    whole = workers.ProcessPoolExecutor
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *a, **k: pools.append(a) or whole(*a, **k))
    prepare(source, tmp_path / "pool", CONFIG, num_workers=num_workers)
    assert pools == [(num_workers,)]
    assert records(tmp_path / "alone") == records(tmp_path / "pool")
    assert (tmp_path / "alone/data.mdb").read_bytes() == (tmp_path / "pool/data.mdb").read_bytes()
    assert (tmp_path / "alone/rejected.jsonl").read_bytes() == (tmp_path / "pool/rejected.jsonl").read_bytes()


def test_the_pool_reads_only_a_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    class Now:
        """A pool that works at once."""

        def __init__(self, *_: object, initargs: tuple[type[int], object], **__: object) -> None:
            self.function = initargs[0]

        def submit(self, _: object, chunk: list[str]) -> workers.Future[list[int]]:
            future: workers.Future[list[int]] = workers.Future()
            future.set_result([self.function(item) for item in chunk])
            return future

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Now)
    taken = []

    def items() -> Iterator[str]:
        for number in range(100):
            taken.append(number)
            yield str(number)

    monkeypatch.setattr(workers, "SECONDS_ALONE", 0)
    results = workers.ordered_map(int, items(), 2, num_bytes=lambda _: 10**9)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) <= 10 + workers.CHUNKS_AHEAD[0] * 2 + 1
    assert list(results) == list(range(10, 100))


def end_in_a_worker(number: int) -> None:
    if number:
        os._exit(1)


def test_a_killed_worker_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECONDS_ALONE", 0)
    with pytest.raises(VdiffError, match=r"worker process was killed.*--num_workers"):
        list(workers.ordered_map(end_in_a_worker, [0, 1], 1))


def work_long(path: Path) -> Path:
    path.with_suffix(".begun").touch()
    time.sleep(20 if path.name == "long" else 0)
    path.touch()
    return path


def test_who_leaves_early_does_not_wait_for_workers(tmp_path: Path) -> None:
    results = workers.ordered_map(work_long, [tmp_path / "short", tmp_path / "long"], 2)
    with closing(results):
        assert next(results) == tmp_path / "short"
        while not (tmp_path / "long.begun").exists():
            time.sleep(0.01)
    assert not (tmp_path / "long").exists()
    assert multiprocessing.active_children() == []


def process_id(_: int) -> int:
    return os.getpid()


def test_work_of_unknown_length_is_left_to_the_workers() -> None:
    assert os.getpid() not in list(workers.ordered_map(process_id, range(4), 1))


def test_a_script_that_its_workers_cannot_import_says_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from vdiff.data.workers import ordered_map\nlist(ordered_map(abs, [1, 2], 1))\n")
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "vdiff.errors.VdiffError: the worker processes ended during their start, for the reason above; a script that "
        'asks for workers needs `if __name__ == "__main__":`, since each worker imports it'
    )


def test_strict_stops_at_the_first_bad_file_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(VdiffError, match=r"02\.png: empty file; .*--strict"):
        prepare(mixed(tmp_path / "x"), tmp_path / "out", CONFIG, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(VdiffError, match=r"none of 3 images .*02\.png: empty file"):
        prepare(Folder(write(tmp_path / "x", BAD)), tmp_path / "out", CONFIG)
    with pytest.raises(VdiffError, match=r"no images in .*; it holds 1 \.txt"):
        prepare(Folder(write(tmp_path / "y", {"a.txt": b""})), tmp_path / "out", CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_an_existing_dataset_survives_refusal_and_failure(tmp_path: Path) -> None:
    source = mixed(tmp_path / "x")
    prepare(source, tmp_path / "out", CONFIG)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(VdiffError, match="exists already; give another "):
        prepare(source, tmp_path / "out", CONFIG)
    with pytest.raises(VdiffError, match=r"02\.png"):
        prepare(source, tmp_path / "out", CONFIG, overwrite=True, strict=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    for bad in BAD:
        (tmp_path / "x" / bad).unlink()
    report = prepare(source, tmp_path / "out", CONFIG, overwrite=True)
    assert (report.images, report.skipped) == (28, {})  # BAD had taken the places of two good ones
    assert not (tmp_path / "out" / "rejected.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x"]


def test_overwrite_replaces_datasets_only(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", {"a/0.png": picture(0)})
    for source in (Folder(photos), Folder(photos / "a")):
        with pytest.raises(VdiffError, match="the images lie in the output folder"):
            prepare(source, photos, CONFIG, overwrite=True)
    letters = write(tmp_path / "letters", {"dear.txt": b"x"})
    with pytest.raises(VdiffError, match="exists and is not a dataset that vdiff wrote"):
        prepare(Folder(photos), letters, CONFIG, overwrite=True)
    assert (letters / "dear.txt").exists()


def test_damaged_and_encrypted_zips(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"0.png": picture(0), "1.png": picture(1)})
    data = bytearray(path.read_bytes())
    data[data.index(picture(1)) + 60] ^= 1  # the checksum of the second member is wrong now
    path.write_bytes(data)
    report = prepare(Zip(path), tmp_path / "out", CONFIG)
    assert (report.images, report.skipped) == (1, {"unreadable": 1})
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the first member claims to be encrypted
    path.write_bytes(data)
    with pytest.raises(VdiffError, match=r"0\.png: encrypted"):
        prepare(Zip(path), tmp_path / "out2", CONFIG)
    path.write_bytes(b"PK\x05\x06" + bytes(30))
    with pytest.raises(VdiffError):
        prepare(open_source(path), tmp_path / "out3", CONFIG)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "far", {"1.png": picture(1)})
    write(tmp_path / "x" / "a", {"0.png": picture(0)})
    try:
        (tmp_path / "x" / "b").symlink_to(tmp_path / "far")
        (tmp_path / "x" / "c").symlink_to(tmp_path / "x")
    except OSError:
        pytest.skip("no links on this system")
    with closing(build_listing(Folder(tmp_path / "x"), tmp_path / "listing")) as listing:
        assert [item.name for item in listing.items()] == ["a/0.png", "b/1.png"]


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    report = prepare(Digits(), tmp_path / "digits", ConversionConfig(sizes=(8,), channels=1, image_format="png"))
    assert (report.images, report.converted) == (1797, {})
    store = ImageStore(tmp_path / "digits")
    assert store.meta.class_names == tuple("0123456789")
    for index in range(0, 1797, 97):
        want = [[round(value * 255 / 16) for value in row] for row in digits.images[index]]
        assert np.asarray(image_of(store, 8, index)).tolist() == want
        assert store.label(index) == digits.target[index]


def emoji_report(tmp_path: Path) -> Report:
    if not EMOJI.exists():
        pytest.skip(f"needs {EMOJI.name} in shared/data beside the repository")
    return prepare(Zip(EMOJI), tmp_path / "emoji", ConversionConfig(sizes=(32,), image_format="png"))


@pytest.mark.slow
def test_emoji(tmp_path: Path) -> None:
    report = emoji_report(tmp_path)
    assert (report.images, report.skipped, report.ignored) == (1906, {}, {".txt": 1})
    with zipfile.ZipFile(EMOJI) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
    store = ImageStore(tmp_path / "emoji")
    classes = sorted({name.split("/")[1] for name in names})
    assert store.meta.class_names == tuple(classes)
    assert [store.meta.class_names[store.label(i) or 0] for i in range(len(store))] == [n.split("/")[1] for n in names]
