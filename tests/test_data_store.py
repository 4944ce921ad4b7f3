"""The dataset on disk: readable by a foreign reader, safe to share, and never half-written unnoticed."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import PIL.Image
import pytest

from tests.commands import image_of
from vdiff.data import store as writer_module
from vdiff.data.store import DatasetMeta, ImageStore, StoreWriter
from vdiff.errors import VdiffError


class RosinalityReader:
    """The reader of the rosinality repositories, word for word in what it asks of LMDB."""

    def __init__(self, path: Path) -> None:
        self.env = lmdb.open(str(path), max_readers=32, readonly=True, lock=False, readahead=False, meminit=False)
        with self.env.begin(write=False) as txn:
            self.length = int(txn.get(b"length").decode("utf-8"))

    def image(self, resolution: int, index: int) -> PIL.Image.Image:
        with self.env.begin(write=False) as txn:
            return PIL.Image.open(io.BytesIO(txn.get(f"{resolution}-{str(index).zfill(5)}".encode())))


def png(value: int, size: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (value, value, value)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, count: int = 3, *, classes: bool = True) -> DatasetMeta:
    path.mkdir(parents=True)
    meta = DatasetMeta("toy", (4, 8), 3, class_names=("a", "b") if classes else ())
    writer = StoreWriter(path, meta)
    for index in range(count):
        writer.add({4: png(index, 4), 8: png(index, 8)}, index % 2 if classes else None)
    return writer.finish({"images": count})


def records(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def test_a_rosinality_reader_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "set")
    reader = RosinalityReader(tmp_path / "set")
    assert reader.length == 3
    for size in (4, 8):
        for index in range(3):
            assert np.asarray(reader.image(size, index)).tolist() == np.full((size, size, 3), index).tolist()


def test_the_store_reads_back_what_was_written(tmp_path: Path) -> None:
    meta = write(tmp_path / "set")
    store = ImageStore(tmp_path / "set")
    assert store.meta == meta
    assert meta.complete
    assert len(store) == 3
    assert [store.label(index) for index in range(3)] == [0, 1, 0]
    assert store.encoded(8, 2) == png(2, 8)
    assert image_of(store, 4, 1).getpixel((0, 0)) == (1, 1, 1)
    for call in (lambda: store.encoded(8, 3), lambda: store.label(-1)):
        with pytest.raises(IndexError):
            call()


def test_a_rosinality_dataset_is_read(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "theirs")) as env, env.begin(write=True) as transaction:
        for size in (8, 16, 128):
            for index in range(5):
                transaction.put(f"{size}-{index:05d}".encode(), png(index, size))
        transaction.put(b"length", b"5")
    store = ImageStore(tmp_path / "theirs")
    assert store.meta.sizes == (8, 16, 128)
    assert (store.meta.name, store.meta.channels, len(store), store.label(0)) == ("theirs", 3, 5, None)
    assert image_of(store, 16, 4).getpixel((0, 0)) == (4, 4, 4)


def test_all_sizes_of_a_rosinality_dataset_are_found_wherever_its_pages_end(tmp_path: Path) -> None:
    for count in range(5, 40):
        with lmdb.open(str(tmp_path / str(count))) as env, env.begin(write=True) as transaction:
            for size in (8, 16, 128):
                for index in range(count):
                    transaction.put(f"{size}-{index:05d}".encode(), bytes(300))
            transaction.put(b"length", str(count).encode())
        assert ImageStore(tmp_path / str(count)).meta.sizes == (8, 16, 128)


def test_the_fingerprint_is_of_the_content_in_order(tmp_path: Path) -> None:
    meta = write(tmp_path / "set")
    link = bytes(32)
    for index in range(3):
        digest = hashlib.sha256()
        for size in (4, 8):
            digest.update(f"{size} {len(png(index, size))} ".encode() + png(index, size))
        digest.update(str(index % 2).encode())
        link = hashlib.sha256(link + digest.digest()).digest()
    assert meta.fingerprint == link.hex()
    assert write(tmp_path / "again").fingerprint == meta.fingerprint
    assert write(tmp_path / "without", classes=False).fingerprint != meta.fingerprint


def test_the_map_grows_and_batches_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "one", 50)
    monkeypatch.setattr(writer_module, "FIRST_MAP_BYTES", 16384)
    monkeypatch.setattr(writer_module, "BATCH_IMAGES", 7)
    assert write(tmp_path / "two", 50) == whole
    assert records(tmp_path / "one") == records(tmp_path / "two")
    assert (tmp_path / "one" / "data.mdb").stat().st_size < 2**20  # no huge sparse file


def test_a_batch_is_due_after_images_or_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BATCH_BYTES", 300)
    monkeypatch.setattr(writer_module, "BATCH_IMAGES", 5)
    writer = StoreWriter(tmp_path, DatasetMeta("toy", (4,), 3))
    for num_bytes, after in ((100, 3), (1, 5), (300, 1)):
        due = []
        for _ in range(after):
            writer.add({4: bytes(num_bytes)}, None)
            due.append(writer.is_due)
        assert due == [False] * (after - 1) + [True]
        writer.commit()
        assert not writer.is_due
        assert writer._records == []


@pytest.mark.parametrize("map_bytes", [16 * 2**20, 16384])
def test_a_writer_goes_on_where_the_last_commit_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, map_bytes: int
) -> None:
    """Byte for byte, whatever was lost in between, and however often the map had to grow."""
    monkeypatch.setattr(writer_module, "FIRST_MAP_BYTES", map_bytes)

    def fill(path: Path, upto: int, commits: list[int]) -> StoreWriter:
        path.mkdir(exist_ok=True)
        writer = StoreWriter(path, DatasetMeta("toy", (4,), 3, class_names=("a",)))
        for index in range(writer.length, upto):
            writer.add({4: png(index, 4)}, 0)
            if index + 1 in commits:
                writer.commit()
        return writer

    whole = fill(tmp_path / "whole", 300, [100, 200]).finish({"images": 300})
    for upto in (50, 130, 100, 230, 230):
        fill(tmp_path / "cut", upto, [100, 200])
    writer = StoreWriter(tmp_path / "cut", DatasetMeta("toy", (4,), 3, class_names=("a",)))
    assert (writer.num_committed, writer.length) == (2, 200)
    assert fill(tmp_path / "cut", 300, [100, 200]).finish({"images": 300}) == whole
    assert (tmp_path / "cut/data.mdb").read_bytes() == (tmp_path / "whole/data.mdb").read_bytes()
    assert b"state" not in records(tmp_path / "cut")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise lmdb.DiskError(os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lmdb, "open", full)
    with pytest.raises(VdiffError, match=r"cannot write .*: No space left.*; free space or choose another --out"):
        write(tmp_path / "set")


def test_stores_of_one_file_live_side_by_side(tmp_path: Path) -> None:
    write(tmp_path / "set")
    first, second = ImageStore(tmp_path / "set"), ImageStore(tmp_path / "set")
    copy = pickle.loads(pickle.dumps(first))
    first.close()
    assert second.encoded(4, 0) == copy.encoded(4, 0) == first.encoded(4, 0)
    for store in (first, second, copy):
        store.close()
    gc.collect()
    with lmdb.open(str(tmp_path / "set"), readonly=True, lock=False) as env:  # refused if one of them were still open
        assert env.stat()["entries"] == 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_store_crosses_a_fork(tmp_path: Path) -> None:
    write(tmp_path / "set")
    stores = [ImageStore(tmp_path / "set"), ImageStore(tmp_path / "set")]
    child = os.fork()
    if child == 0:
        good = all(store.encoded(8, 2) == png(2, 8) for store in stores)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(store.encoded(8, 2) == png(2, 8) for store in stores)


def test_a_replaced_dataset_is_seen_by_a_new_store(tmp_path: Path) -> None:
    write(tmp_path / "set", 3)
    old = ImageStore(tmp_path / "set")
    write(tmp_path / "new", 5)
    os.replace(tmp_path / "new" / "data.mdb", tmp_path / "set" / "data.mdb")
    assert (len(old), len(ImageStore(tmp_path / "set"))) == (3, 5)
    assert old.encoded(4, 2) == png(2, 4)


def test_errors_name_the_cause_and_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(VdiffError, match=r"no such dataset; .*prepare_data"):
        ImageStore(tmp_path / "nothing")
    with pytest.raises(VdiffError, match=r"is not a dataset.*prepare_data\.py PATH"):
        ImageStore(tmp_path)
    write(tmp_path / "set")
    with pytest.raises(VdiffError, match=r"no images of size 5; it has 4, 8.*--size 5"):
        ImageStore(tmp_path / "set").encoded(5, 0)


def test_an_unfinished_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    writer = StoreWriter(tmp_path / "set", DatasetMeta("toy", (4,), 3, complete=True))
    writer.add({4: png(0, 4)}, None)
    writer.commit()
    with pytest.raises(VdiffError, match=r"incomplete dataset.*--overwrite"):
        ImageStore(tmp_path / "set")


@pytest.mark.parametrize("kept", [0, 100, 8192, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    write(tmp_path / "set", 40)
    file = tmp_path / "set" / "data.mdb"
    size = file.stat().st_size
    os.truncate(file, int(kept * size) if isinstance(kept, float) else kept)
    with pytest.raises(VdiffError, match=r"data\.mdb|incomplete"):
        ImageStore(tmp_path / "set")


def test_meta_round_trip_and_its_errors() -> None:
    meta = DatasetMeta(
        "toy",
        (4, 8),
        1,
        "jpeg",
        90,
        "pad",
        "box",
        "#ffffff",
        class_names=("a",),
        counts={"images": 2},
        complete=True,
        fingerprint="f",
        origin="o",
        shard="1/2",
        vdiff_version="0.1.0",
    )
    assert DatasetMeta.from_json(meta.to_json()) == meta
    text = meta.to_json()
    for wrong, message in [
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        (text.replace('"crop"', '"corp"'), "has an unknown key 'corp'; did you mean 'crop'?"),
        (replace(meta, format_version=3).to_json(), "format version 3"),
    ]:
        with pytest.raises(VdiffError, match=re.escape(message)):
            DatasetMeta.from_json(wrong)
