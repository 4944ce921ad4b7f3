"""Tar shards: what is written, who else can read it, and the order in which training reads it."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import sys
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.programs import Forked, ends
from vdiff.data import remote_files
from vdiff.data import shards as module
from vdiff.data.batches import NUM_LANES, Batch, LaneOrder, ShardBatches, _Lanes
from vdiff.data.datasets import join_shards
from vdiff.data.remote_files import RemoteFile
from vdiff.data.shards import ShardStore, ShardWriter, fingerprint_of
from vdiff.data.store import INDEX_FILE, DatasetMeta
from vdiff.data.tar_files import members
from vdiff.errors import VdiffError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library, at its import
    import webdataset

SIZE, COUNT, PER_SHARD = 4, 50, 8
CLASSES = ("a", "b", "c")


def pixels(index: int, size: int = SIZE, channels: int = 3) -> np.ndarray:
    """Noise that tells image `index` from any other, and from its mirror image."""
    return np.random.default_rng([index, size]).integers(0, 256, (size, size, channels), dtype=np.uint8)


def encode(array: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array.squeeze()).save(buffer, format=form, **options)
    return buffer.getvalue()


def meta_of(**changes: Any) -> DatasetMeta:
    values = {"name": "toy", "sizes": (SIZE,), "channels": 3, "image_format": "png", "class_names": CLASSES}
    return DatasetMeta(**{**values, **changes})


def write(
    folder: Path, count: int = COUNT, meta: DatasetMeta | None = None, start: int = 0, finish: bool = True
) -> Path:
    meta = meta or meta_of()
    with ShardWriter(folder, meta, name="x", images_per_shard=PER_SHARD, start=start) as writer:
        add(writer, writer.position, start + count)
        if finish:
            writer.finish({"images": count})
    return folder


def add(writer: ShardWriter, start: int, stop: int) -> None:
    for index in range(start, stop):
        images = {size: encode(pixels(index, size, writer.meta.channels)) for size in writer.meta.sizes}
        assert writer.add(images, index % len(CLASSES) if writer.meta.class_names else None) == index
        if writer.is_due:
            writer.commit()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(store: ShardStore) -> list[tuple[int, dict[int, bytes], int | None]]:
    samples = [sample for number in range(len(store.shards)) for sample in store.samples(number, store.meta.sizes)]
    return [(int(key), images, label) for key, images, label, *_ in samples]


def decoded(encoded: bytes) -> np.ndarray:
    return np.array(PIL.Image.open(io.BytesIO(encoded)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards") / "x")


def make(store: ShardStore, **options: Any) -> ShardBatches:
    defaults = {"image_size": SIZE, "batch_size": 3, "seed": 0, "flip": True, "window": 5}
    return ShardBatches(store, **{**defaults, **options})


def take(batches: ShardBatches, count: int, start: int = 0) -> list[Batch]:
    return list(islice(batches.start_at(start), count))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.classes, b.classes)  # type: ignore[arg-type]
        for a, b in zip(first, second, strict=True)
    )


# ---- writing


@pytest.mark.parametrize("sizes", [(4,), (2, 4)])
@pytest.mark.parametrize("classes", [CLASSES, ()])
def test_what_is_written_is_read(tmp_path: Path, sizes: tuple[int, ...], classes: tuple[str, ...]) -> None:
    store = ShardStore(write(tmp_path, meta=meta_of(sizes=sizes, class_names=classes)))
    assert (len(store), len(store.shards), store.meta.sizes) == (COUNT, 7, sizes)
    assert store.meta.complete
    samples = read(store)
    assert [index for index, _, _ in samples] == list(range(COUNT))
    for index, images, label in samples:
        assert label == (index % 3 if classes else None)
        assert list(images) == list(sizes)
        for size in sizes:
            np.testing.assert_array_equal(decoded(images[size]), pixels(index, size))


def test_the_index_says_what_lies_beside_it(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    assert [entry["images"] for entry in index["shards"]] == [8, 8, 8, 8, 8, 8, 2]
    assert sorted(files(folder)) == [INDEX_FILE, *(f"x-{number:06d}.tar" for number in range(7))]
    for entry in index["shards"]:
        content = (folder / entry["file"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    store = ShardStore(folder)
    assert store.num_bytes == sum(entry["bytes"] for entry in index["shards"])
    assert store.fingerprint() == store.meta.fingerprint == fingerprint_of(shard.sha256 for shard in store.shards)


def test_names_in_a_tar(tmp_path: Path) -> None:
    write(tmp_path / "one", 1, meta_of(image_format="jpeg"))
    write(tmp_path / "two", 1, meta_of(image_format="webp", sizes=(64, 128), class_names=()))
    for name, want in (("one", {"0.cls", "0.jpg"}), ("two", {"0.64.webp", "0.128.webp"})):
        with tarfile.open(tmp_path / name / "x-000000.tar") as tar:
            assert {member[8:] for member in tar.getnames()} == want
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_jpeg_keeps_the_image_within_its_error(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(16), np.arange(16))[..., None].repeat(3, 2).astype(np.uint8) * 6
    meta = meta_of(sizes=(16,), image_format="jpeg", class_names=())
    with ShardWriter(tmp_path, meta, name="x") as writer:
        writer.add({16: encode(smooth, "JPEG", quality=95, subsampling=0)}, None)
        writer.finish({})
    (batch,) = take(make(ShardStore(tmp_path), image_size=16, batch_size=1, flip=False), 1)
    assert batch.classes is None
    difference = batch.images[0].permute(1, 2, 0).numpy().astype(int) - smooth
    assert 0 < np.abs(difference).max() <= 8


def write_and_die(out: Path) -> None:
    add(ShardWriter(out, meta_of(), name="x", images_per_shard=PER_SHARD), 0, 21)
    os._exit(9)


def test_a_writer_that_was_killed_is_gone_on_with_to_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "x"
    assert ends([Forked(partial(write_and_die, out), tmp_path)]) == ([9], "", "")
    assert {"x-000000.tar", "x-000001.tar", ".x-000002.tar.tmp"} == set(files(out))
    with pytest.raises(VdiffError, match="incomplete"):
        ShardStore(out)
    (out / ".y-000002.tar.tmp").write_bytes(b"of another writer")
    writer = ShardWriter(out, meta_of(), name="x", images_per_shard=PER_SHARD)
    assert (writer.num_committed, writer.position, writer.is_due) == (2, 16, False)
    assert {"x-000000.tar", "x-000001.tar", ".y-000002.tar.tmp"} == set(files(out))
    (out / ".y-000002.tar.tmp").unlink()
    add(writer, 16, COUNT)
    writer.commit()
    # killed again, between the last shard and the index
    assert INDEX_FILE not in files(out)
    writer = ShardWriter(out, meta_of(), name="x", images_per_shard=PER_SHARD)
    assert writer.num_committed == 7
    assert writer.finish({"images": COUNT}).complete
    assert files(out) == files(folder)
    # and once more, after the index
    writer = ShardWriter(out, meta_of(), name="x", images_per_shard=PER_SHARD)
    assert writer.meta == ShardStore(folder).meta
    with pytest.raises(ValueError, match="written already"):
        add(writer, writer.position, writer.position + 1)


def test_closing_drops_the_open_shard_and_nothing_else(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, meta_of(), name="x", images_per_shard=8) as writer:
        add(writer, 0, 13)
    assert set(files(tmp_path)) == {"x-000000.tar"}
    assert (writer.num_committed, writer.position) == (1, 8)


def test_rejected_images_leave_their_positions_free_and_shards_their_numbers(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", [tmp_path / "1", tmp_path / "2"]
    rejected = {3, 8, 9, 10, 11, 12, 13, 14, 15, 17}

    def fill(folder: Path, start: int, stop: int) -> None:
        with ShardWriter(folder, meta_of(), name="x", images_per_shard=8, start=start) as writer:
            for index in range(start, stop):
                if index in rejected:
                    writer.skip()
                else:
                    add(writer, index, index + 1)
                if writer.is_due:
                    writer.commit()
            writer.finish({"images": 0})

    fill(whole, 0, 30)
    assert set(files(whole)) == {"x-000000.tar", "x-000002.tar", "x-000003.tar", INDEX_FILE}
    assert [index for index, _, _ in read(ShardStore(whole))] == [i for i in range(30) if i not in rejected]
    fill(parts[0], 0, 16)
    fill(parts[1], 16, 30)
    joined = tmp_path / "joined"
    joined.mkdir()
    join_shards([ShardStore(part) for part in parts], joined, meta_of(), {"images": 0})
    assert files(joined) == files(whole)
    with pytest.raises(VdiffError, match=r"shard x-000002.tar, and so has another"):
        join_shards([ShardStore(parts[1])] * 2, write(tmp_path / "z", 0), meta_of(), {})


def test_what_a_writer_refuses(tmp_path: Path) -> None:
    for options in ({"images_per_shard": 0}, {"images_per_shard": 8, "start": 4}):
        with pytest.raises(ValueError, match="need a multiple"):
            ShardWriter(tmp_path, meta_of(), name="x", **options)
    with ShardWriter(tmp_path, meta_of(), name="x", images_per_shard=1) as writer:
        with pytest.raises(ValueError, match=r"sizes \[5\]; need \[4\]"):
            writer.add({5: b""}, 0)
        with pytest.raises(ValueError, match="label None"):
            writer.add({4: b""}, None)
        writer.commit()
        assert (writer.num_committed, files(tmp_path)) == (0, {})
        writer.add({4: b""}, 0)
        assert writer.is_due
        for act in (lambda: writer.add({4: b""}, 0), writer.skip):
            with pytest.raises(ValueError, match="is full"):
                act()


@pytest.mark.parametrize("where", ["add", "commit"])
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ShardWriter(tmp_path, meta_of(class_names=()), name="x") as writer:
        monkeypatch.setattr(*((tarfile.TarFile, "addfile", full) if where == "add" else (module.os, "fsync", full)))
        act = partial(writer.add, {SIZE: bytes(20_000)}, None) if where == "add" else writer.commit
        if where == "commit":
            writer.add({SIZE: b"1"}, None)
        with pytest.raises(VdiffError, match=r"^cannot write .*x-000000\.tar: No space left on device; free space"):
            act()
    assert files(tmp_path) == {}


def test_without_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(VdiffError, match="need the package webdataset; pip install webdataset"):
        ShardStore(tmp_path)


# ---- other programs


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_what_is_written(folder: Path) -> None:
    urls = str(folder / "x-{000000..000006}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    assert len(samples) == COUNT
    for index, (key, image, label) in enumerate(samples):
        assert (int(key), label) == (index, index % 3)
        np.testing.assert_array_equal(image, pixels(index))
    gc.collect()  # the library leaves its files to the garbage collector, which is to find them in this test


def foreign(folder: Path, samples: list[dict[str, Any]], per_shard: int = 4) -> str:
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / "f-%03d.tar"), maxcount=per_shard, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return str(folder / f"f-{{000..{(len(samples) - 1) // per_shard:03d}}}.tar")


def test_what_webdataset_wrote_is_read(tmp_path: Path) -> None:
    samples = [
        {
            "__key__": f"some/dir/n{index}",
            "PNG" if index % 2 else "png": encode(pixels(index)),
            "cls": index,
            "json": {},
        }
        for index in range(10)
    ]
    samples.insert(3, {"__key__": "only-text", "txt": "no image"})
    samples.insert(0, {"__key__": "only-text", "cls": 1000})
    pattern = foreign(tmp_path, samples)
    with pytest.raises(VdiffError, match="have no class"):
        ShardStore(foreign(tmp_path / "a", [{"__key__": "a", "png": encode(pixels(0))}, *samples[1:]]))
    store = ShardStore(pattern)
    assert (len(store), [shard.images for shard in store.shards]) == (10, [3, 3, 4])
    assert (store.path, store.meta.sizes, store.meta.channels) == (pattern, (SIZE,), 3)
    assert store.meta.class_names == tuple(map(str, range(10)))
    seen = {}
    for batch in take(make(store, flip=False), 60):
        for image, label in zip(batch.images, batch.classes, strict=True):  # type: ignore[arg-type]
            seen[int(label)] = image
    assert sorted(seen) == list(range(10))
    for label, image in seen.items():
        np.testing.assert_array_equal(image.permute(1, 2, 0), pixels(label))


def test_foreign_sizes_come_from_the_images(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{index}", **{f"{size}.png": encode(pixels(index, size, 1)) for size in (2, 4)}}
        for index in range(5)
    ]
    store = ShardStore(foreign(tmp_path, samples, per_shard=9))
    assert (store.meta.sizes, store.meta.channels, store.meta.class_names) == ((2, 4), 1, ())
    np.testing.assert_array_equal(decoded(read(store)[3][1][4]), pixels(3, 4, 1).squeeze())
    alone = ShardStore(str(tmp_path / "f-000.tar"))
    assert read(alone) == read(store)
    assert ShardStore(write(tmp_path / "own", 9).joinpath("x-{000000..000001}.tar")).meta.sizes == (SIZE,)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"png": encode(np.zeros((2, 3, 3), np.uint8))}, r"no square images: its first is 3×2; make a dataset"),
        ({"png": b"nothing"}, r"k\.png is not an image"),
        ({"txt": "text"}, r"no square images: it has no images"),
        ({"png": encode(pixels(0)), "cls": b"cat"}, r"the class of k is not a number"),
        ({"png": encode(pixels(0)), "cls": b"99999999999"}, r"the class of k is not a number below 100000"),
        ({"png": encode(pixels(0)), "cls": b"9" * 5000}, r"the class of k is not a number below 100000"),
    ],
)
def test_foreign_tars_that_cannot_be_used(tmp_path: Path, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(VdiffError, match=message) as caught:
        ShardStore(foreign(tmp_path, [{"__key__": "k", **sample}]))
    assert "\n" not in str(caught.value)


def test_stretches_go_through_all_shards(folder: Path) -> None:
    store = ShardStore(folder)
    assert list(store.stretches()) == [(0, 8), (8, 16), (16, 24), (24, 32), (32, 40), (40, 48), (48, 50)]
    for start, stop in ((0, 50), (8, 16), (3, 5), (6, 27), (48, 50), (16, 17), (15, 16)):
        assert [int(image.name) for image in store.stretch(start, stop)] == list(range(start, stop))
    assert [(int(key), images, label) for key, images, label, *_ in store.stretch(0, 50)] == read(store)


# ---- the order of training


@pytest.mark.parametrize(("num_shards", "num_lanes"), [(7, 4), (3, 16), (64, 16), (16, 16), (1, 2)])
def test_each_epoch_of_shards_is_read_once_by_all_lanes_together(num_shards: int, num_lanes: int) -> None:
    order = LaneOrder([5] * num_shards, num_lanes=num_lanes, window=3, seed=1)
    turns = 4 * num_shards
    lanes = [list(islice(order.shards(lane), turns)) for lane in range(num_lanes)]
    sequence = [lanes[turn % num_lanes][turn // num_lanes] for turn in range(turns)]
    epochs = [sequence[start : start + num_shards] for start in range(0, turns, num_shards)]
    assert all(sorted(epoch) == list(range(num_shards)) for epoch in epochs)
    assert num_shards < 5 or len({tuple(epoch) for epoch in epochs}) == 4
    other = LaneOrder([5] * num_shards, num_lanes=num_lanes, window=3, seed=2)
    assert num_shards < 5 or list(islice(other.shards(0), turns)) != lanes[0]


def test_every_image_comes_once_in_an_epoch_of_shards(folder: Path) -> None:
    store = ShardStore(folder)
    batches = make(store, window=7)
    # lane g of 16 and 7 shards: the turns 0 … 111 are 16 epochs, the first 7 of every lane
    seen = Counter[str]()
    for lane in range(NUM_LANES):
        shards = list(islice(batches.order.shards(lane), 7))
        length = sum(store.shards[shard].images for shard in shards)
        whole = -(-length // 7) * 7
        keys = [image.name for image in islice(batches.samples(lane, 0), whole)]
        straight = [image.name for image in islice(batches._in_sequence(lane, 0), whole)]
        for start in range(0, whole, 7):
            assert sorted(keys[start : start + 7]) == sorted(straight[start : start + 7])
        assert keys != straight
        seen.update(straight[:length])
    assert seen == {f"{index:09d}": 16 for index in range(COUNT)}


def test_positions_in_a_lane_are_those_of_a_walk(folder: Path) -> None:
    batches = make(ShardStore(folder), window=6)
    walked = [image.name for image in islice(batches.samples(5, 0), 120)]
    for position in (0, 1, 5, 6, 7, 8, 13, 50, 99):
        assert [image.name for image in islice(batches.samples(5, position), 20)] == walked[position : position + 20]


def test_ranks_share_an_epoch_of_shards(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, meta_of(), name="x", images_per_shard=1) as writer:
        add(writer, 0, 3 * NUM_LANES)
        writer.finish({})
    index_of = {pixels(index).tobytes(): index for index in range(3 * NUM_LANES)}
    for rounds in (0, 1):
        seen = []
        for rank in range(3):
            batches = make(ShardStore(tmp_path), rank=rank, world_size=3, window=1, flip=False)
            for batch in take(batches, NUM_LANES, start=rounds * NUM_LANES):
                assert batch.images.shape == (1, 3, SIZE, SIZE)
                index = index_of[batch.images[0].permute(1, 2, 0).numpy().tobytes()]
                assert batch.classes is not None
                assert batch.classes.tolist() == [index % 3]
                seen.append(index)
        assert sorted(seen) == list(range(3 * NUM_LANES))


def test_starting_later_is_skipping(folder: Path) -> None:
    batches = make(ShardStore(folder), window=6)
    whole = take(batches, 90)
    for step in (0, 1, 2, 15, 16, 17, 31, 32, 47, 63, 80):
        assert equal(take(batches, 10, step), whole[step : step + 10])


def test_starting_later_reads_no_shard_before(folder: Path, tmp_path: Path) -> None:
    store = ShardStore(shutil.copytree(folder, tmp_path / "x"))
    batches = make(store, window=1, batch_size=1)
    position = store.shards[next(batches.order.shards(0))].images
    want = [image.name for image in islice(batches.samples(0, position), 2)]
    assert want == [image.name for image in islice(batches.samples(0, 0), position + 2)][position:]
    (tmp_path / "x" / store.shards[next(batches.order.shards(0))].file).unlink()
    assert [image.name for image in islice(batches.samples(0, position), 2)] == want
    with pytest.raises(VdiffError, match="cannot read"):
        next(batches.samples(0, 0))


FEW_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@FEW_CORES
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 40])
def test_worker_processes_change_nothing(folder: Path, num_workers: int) -> None:
    state = torch.get_rng_state()
    batches = make(ShardStore(folder), num_workers=num_workers)
    assert batches.num_workers == {1: 1, 2: 2, 3: 2, 4: 4, 40: 16}[num_workers]
    if num_workers <= 4:
        assert equal(take(batches, 40, start=5), take(make(ShardStore(folder)), 40, start=5))
    assert torch.equal(torch.get_rng_state(), state)


@FEW_CORES
def test_a_worker_keeps_its_lanes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    begun = ShardBatches.samples

    def samples(self: ShardBatches, lane: int, position: int) -> Any:
        with open(log, "a") as file:
            file.write(f"{lane} ")
        return begun(self, lane, position)

    monkeypatch.setattr(ShardBatches, "samples", samples)
    take(make(ShardStore(folder), num_workers=4), 60, start=3)
    assert sorted(map(int, log.read_text().split())) == list(range(NUM_LANES))


def test_steps_in_any_order_are_the_same(folder: Path) -> None:
    batches = make(ShardStore(folder))
    want, lanes = take(batches, 50), _Lanes(batches)
    for step in (0, 32, 16, 16, 49, 33, 0):
        answer = lanes[step]
        assert not isinstance(answer, VdiffError)
        assert equal([Batch(*answer)], [want[step]])


def test_headers_do_not_pile_up_in_memory(folder: Path) -> None:
    with open(folder / "x-000000.tar", "rb") as file:
        for tar, _ in members(file):
            assert len(tar.members) <= 1  # type: ignore[attr-defined]


def test_batches_can_be_sent_to_another_process(folder: Path) -> None:
    batches = make(ShardStore(folder))
    assert equal(take(pickle.loads(pickle.dumps(batches)), 3), take(batches, 3))


def test_flips_are_those_of_the_plan(folder: Path) -> None:
    plain, flipped = (take(make(ShardStore(folder), flip=flip, batch_size=6), 20) for flip in (False, True))
    plan = make(ShardStore(folder), batch_size=6).plan
    mirrored = 0
    for step, (a, b) in enumerate(zip(plain, flipped, strict=True)):
        for place, flip in enumerate(plan.flips(step)):
            assert torch.equal(b.images[place], a.images[place].flip(-1) if flip else a.images[place])
            mirrored += flip
    assert 40 < mirrored < 80
    share = take(make(ShardStore(folder), batch_size=6, rank=1, world_size=2), 3)
    straight = take(make(ShardStore(folder), batch_size=6, rank=1, world_size=2, flip=False), 3)
    for step, (a, b) in enumerate(zip(straight, share, strict=True)):
        for place, flip in enumerate(plan.flips(step)[3:]):
            assert torch.equal(b.images[place], a.images[place].flip(-1) if flip else a.images[place])


def test_seeds_differ(folder: Path) -> None:
    store = ShardStore(folder)
    assert not equal(take(make(store, seed=1), 3), take(make(store), 3))
    assert LaneOrder([9], num_lanes=1, window=50, seed=0).permutation(0, 0).tolist() != list(range(50))
    of = {
        tuple(LaneOrder([9], num_lanes=2, window=50, seed=seed).permutation(lane, window))
        for seed in (0, 1)
        for lane in (0, 1)
        for window in (0, 1)
    }
    assert len(of) == 8


# ---- what is wrong is said in a line


def one_line(caught: pytest.ExceptionInfo[VdiffError]) -> None:
    assert "\n" not in str(caught.value)


def test_what_cannot_be_is_refused(folder: Path) -> None:
    store = ShardStore(folder)
    with pytest.raises(VdiffError, match="no images of size 5; it has 4"):
        make(store, image_size=5)
    with pytest.raises(VdiffError, match=r"batch of 4 .* 3 processes; give --batch_size a multiple of 3"):
        make(store, batch_size=4, world_size=3)
    with pytest.raises(ValueError, match="rank 2"):
        make(store, rank=2, world_size=2, batch_size=4)
    for options in ({"window": 0}, {"seed": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="need"):
            make(store, **options)


def test_an_incomplete_folder_is_named(tmp_path: Path, folder: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "x")
    (copy / "x-000003.tar").write_bytes((copy / "x-000003.tar").read_bytes()[:-1])
    with pytest.raises(VdiffError, match=r"x-000003\.tar is damaged or truncated: it has \d+ bytes, not \d+") as caught:
        ShardStore(copy)
    one_line(caught)
    (copy / "x-000003.tar").unlink()
    with pytest.raises(VdiffError, match=r"x-000003\.tar is missing; copy the shard again"):
        ShardStore(copy / INDEX_FILE)
    (copy / INDEX_FILE).unlink()
    with pytest.raises(VdiffError, match="is an incomplete dataset"):
        ShardStore(copy)
    with pytest.raises(VdiffError, match="nothing: no such dataset"):
        ShardStore(tmp_path / "nothing")
    with pytest.raises(VdiffError, match=r"cannot read .*nothing\.tar: No such file"):
        ShardStore(str(tmp_path / "nothing.tar"))


def test_the_name_given_to_out_opens_the_folder(folder: Path) -> None:
    store = ShardStore(f"{folder}.tar")
    assert (store.path, len(store)) == (folder.as_posix(), COUNT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["meta"].update(format_version=999), r"index\.json: the dataset has format version 999"),
        (lambda index: index["meta"].update(complete=False), "incomplete dataset"),
        (lambda index: index["meta"].pop("sizes"), "lacks the key 'sizes'"),
        (lambda index: index.pop("meta"), "is not an index of tar shards"),
        (lambda index: index["shards"][0].update(images=0), "is not an index of tar shards"),
        (lambda index: index["shards"][0].update(images="8"), "is not an index of tar shards"),
        (lambda index: index["shards"][0].update(more=1), "is not an index of tar shards"),
        (lambda index: index["shards"][0].update(file="../x-000000.tar"), "names the shard '../x-000000.tar', which"),
        (lambda index: index["shards"][0].update(file="pipe:touch x.tar"), "which is not a file beside it"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, folder: Path, change: Any, message: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "x")
    index = json.loads((copy / INDEX_FILE).read_text())
    change(index)
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(VdiffError, match=message) as caught:
        ShardStore(copy)
    one_line(caught)
    (copy / INDEX_FILE).write_text("no JSON")
    with pytest.raises(VdiffError, match="is not an index of tar shards"):
        ShardStore(copy)


@pytest.mark.parametrize("cut", ["in an image", "in a header", "between images", "wrong header", "end"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_is_damaged_later(tmp_path: Path, folder: Path, cut: str, num_workers: int) -> None:
    copy = shutil.copytree(folder, tmp_path / "x")
    path = copy / "x-000002.tar"
    store = ShardStore(copy)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmembers()[5]
    place = {"in an image": member.offset_data + 9, "in a header": member.offset + 99, "between images": member.offset}
    if cut == "wrong header":
        content = content[: member.offset] + b"x" * 512 + content[member.offset + 512 :]
    else:
        content = content[: place.get(cut, 0)]
    path.write_bytes(content)
    with pytest.raises(VdiffError, match=r"x-000002\.tar is damaged or truncated: .*; copy the shard again") as caught:
        take(make(store, num_workers=num_workers), 99)
    one_line(caught)
    with pytest.raises(VdiffError, match=r"x-000002\.tar is damaged or truncated") as caught:
        ShardStore(str(path))
    one_line(caught)


def test_an_image_of_another_size_or_without_its_class(tmp_path: Path) -> None:
    for name, size, label, message in (("a", 5, 0, "image 000000000 is 5×5, not 4×4"), ("b", 4, 7, "has no class")):
        with ShardWriter(tmp_path / name, meta_of(), name="x") as writer:
            writer.add({SIZE: encode(pixels(0, size))}, label)
            writer.finish({})
        with pytest.raises(VdiffError, match=message):
            take(make(ShardStore(tmp_path / name)), 1)
    with ShardWriter(tmp_path / "c", meta_of(class_names=()), name="x") as writer:
        writer.add({SIZE: encode(pixels(0))}, None)
        writer.finish({})
    index = tmp_path / "c" / INDEX_FILE
    index.write_text(index.read_text().replace('"png"', '"webp"'))
    with pytest.raises(VdiffError, match=r"index\.json is damaged: it is not what was written"):
        ShardStore(tmp_path / "c")
    index.write_text(re.sub(r',\s*"check": \d+', "", index.read_text()))  # as earlier versions wrote it
    with pytest.raises(VdiffError, match="image 000000000 has no size 4"):
        take(make(ShardStore(tmp_path / "c")), 1)


def test_commands_are_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for place in (f"pipe:touch {proof}", f"PIPE:touch {proof}", f"pipe:touch {proof}; x.tar", f"pipe:touch {proof}/"):
        with pytest.raises(VdiffError, match="would run a command"):
            ShardStore(place)
    with pytest.raises(VdiffError, match="cannot read"):
        ShardStore(f"{{pipe:touch {proof},{proof}}}.tar")
    with pytest.raises(VdiffError, match=r"cannot read unknown://x/index.json: .*not known: unknown"):
        ShardStore("unknown://x")
    with pytest.raises(VdiffError, match="is not a valid URL: Invalid IPv6 URL"):
        ShardStore("http://[x")
    with pytest.raises(VdiffError, match=r"cannot read http://a b/index.json: "):
        ShardStore("http://a b")
    assert not proof.exists()


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_schemes_are_left_to_fsspec(folder: Path, scheme: str) -> None:
    if scheme == "memory":
        system = fsspec.filesystem("memory")
        system.put(str(folder), "/x", recursive=True)
    store = ShardStore(f"file://{folder.as_posix()}" if scheme == "file" else "memory://x")
    assert store.meta == ShardStore(folder).meta
    assert read(store) == read(ShardStore(folder))
    assert equal(take(make(store), 20, 3), take(make(ShardStore(folder)), 20, 3))
    if scheme == "memory":
        system.pipe(f"/x/{store.shards[1].file}", b"short")
        with pytest.raises(VdiffError, match=r"memory://x/x-000001\.tar is damaged or truncated: it has 5 bytes, not"):
            read(store)
        system.rm("/x", recursive=True)
        with pytest.raises(VdiffError, match=r"cannot read memory://x/x-000000\.tar: no such file; check the URL"):
            read(store)


class FlakyFile(io.BytesIO):
    """Two reads of three fail, in the words of a library of its own; the others give little."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        FlakyFile.reads += 1
        if FlakyFile.reads % 3:
            raise RuntimeError("throttled")
        return super().read(min(size or 0, 1000))


class Flaky(MemoryFileSystem):
    protocol = "flaky"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, *args: Any, **kwargs: Any) -> FlakyFile:
        data = super()._open(*args, **kwargs).getvalue()
        file = FlakyFile(data)
        file.size = len(data)
        return file


def test_any_library_that_fails_now_and_then_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "RETRY_SECONDS", 0.001)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    fsspec.filesystem("memory").put(str(folder), "/y", recursive=True)
    assert read(ShardStore("flaky://y")) == read(ShardStore(folder))
    assert FlakyFile.reads > 3 * len(ShardStore(folder).shards)


@pytest.mark.parametrize(
    ("place", "module", "hint"),
    [
        ("s3://bucket/x", "s3fs", "pip install 'vdiff[s3]'"),
        ("gs://bucket/x", "gcsfs", "pip install 'vdiff[gs]'"),
        ("http://example.org/x", "aiohttp", "pip install 'vdiff[webdataset]'"),
        ("wandb://me/x", "wandbfs", "Install wandbfs to access wandb"),
    ],
)
def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, place: str, module: str, hint: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    scheme = place.partition(":")[0]
    # another test may have loaded it
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(VdiffError) as caught:
        ShardStore(place)
    assert str(caught.value) == f"{scheme}:// addresses need a package that is not installed; {hint}"


# ---- by URL


class Server(ThreadingHTTPServer):
    """Serves a folder; `script` says what goes wrong with the next requests of a name."""

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool) -> None:
        self.folder, self.ranges = folder, ranges
        self.script: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/x"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.asked.append((self.path, self.headers["Range"]))
        fate = self.server.script[name].pop(0) if self.server.script.get(name) else ""
        path = self.server.folder / name
        if fate.isdigit() or not path.exists():
            self.send_error(int(fate or 404))
            return
        content, start = path.read_bytes(), 0
        if self.server.ranges and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        content = content[start:]
        self.wfile.write(content[: len(content) // 2] if fate == "half" else b"" if fate == "nothing" else content)


@pytest.fixture(params=[False, True], ids=["from the start only", "ranges"])
def server(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote_files, "RETRY_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(folder, request.param) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_url_gives_the_same_batches(server: Server, folder: Path, num_workers: int) -> None:
    for place in (server.url, server.url + "/", server.url + "/index.json"):
        store = ShardStore(place)
        assert (store.path, store.meta) == (server.url, ShardStore(folder).meta)
    want = take(make(ShardStore(folder)), 40, start=9)
    assert equal(take(make(store, num_workers=num_workers), 40, start=9), want)
    assert store.fingerprint() == store.meta.fingerprint


def test_the_proxy_of_the_environment_is_asked(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/x"))
    monkeypatch.setenv("no_proxy", "")
    assert read(ShardStore("http://photos.invalid/x")) == read(ShardStore(folder))
    assert {path.rpartition("/")[0] for path, _ in server.asked} == {"http://photos.invalid/x"}


def test_a_token_goes_to_every_file_and_into_no_message(server: Server) -> None:
    store = ShardStore(server.url + "?token=secret")
    assert store.path == server.url
    server.script = {"x-000001.tar": ["403"]}
    with pytest.raises(VdiffError, match=r"cannot read http://.*/x/x-000001\.tar: HTTP status 403; check") as caught:
        read(store)
    one_line(caught)
    assert "secret" not in str(caught.value)
    assert all(path.endswith("?token=secret") for path, _ in server.asked)


@pytest.mark.parametrize("fates", [["half"], ["503", "half", "nothing"], ["429", "500", "half"]])
def test_a_connection_that_breaks_is_survived(server: Server, folder: Path, fates: list[str]) -> None:
    store = ShardStore(server.url)
    server.script = {f"x-{number:06d}.tar": list(fates) for number in range(6)}
    assert read(store) == read(ShardStore(folder))
    assert not any(server.script.values())


def test_reading_goes_on_where_a_connection_broke(server: Server, folder: Path) -> None:
    with closing(RemoteFile(f"{server.url}/x-000001.tar")) as file:
        start = file.read(1000)
        file.close()  # as after an error
        rest = b"".join(iter(file.read, b""))
    assert 0 < len(start) <= 1000
    assert start + rest == (folder / "x-000001.tar").read_bytes()
    assert [given for _, given in server.asked] == [None, f"bytes={len(start)}-"]


def test_a_server_that_keeps_failing_is_named(server: Server) -> None:
    store = ShardStore(server.url)
    asked = len(server.asked)
    for fate, reason in (("500", "HTTP status 500"), ("nothing", "the connection ended after 0 of")):
        server.script = {"x-000000.tar": [fate] * 9}
        with pytest.raises(VdiffError, match=reason) as caught:
            read(store)
        one_line(caught)
        assert len(server.asked) - asked == 4
        asked = len(server.asked)


def test_what_is_not_there_is_named_at_once(server: Server, tmp_path: Path) -> None:
    server.folder = tmp_path
    with pytest.raises(
        VdiffError, match=r"cannot read http://.*/x/index\.json: HTTP status 404; check the URL"
    ) as caught:
        ShardStore(server.url)
    one_line(caught)
    assert len(server.asked) == 1


def test_a_shard_of_another_length_is_refused(server: Server, tmp_path: Path, folder: Path) -> None:
    server.folder = shutil.copytree(folder, tmp_path / "x")
    store = ShardStore(server.url)
    (server.folder / "x-000000.tar").write_bytes(b"short")
    with pytest.raises(VdiffError, match=r"x-000000\.tar is damaged or truncated: it has 5 bytes, not \d+"):
        read(store)


def test_a_pattern_of_urls_needs_an_index(server: Server) -> None:
    for place in (server.url + "/x-{000000..000006}.tar", server.url + "/x-000000.tar", "s3://bucket/x-{0..1}.tar"):
        with pytest.raises(VdiffError, match=r"has no index of its contents; put the index\.json"):
            ShardStore(place)


def test_a_server_that_does_not_answer_at_first_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s")

    monkeypatch.setattr(remote_files.time, "sleep", sleep)
    monkeypatch.setattr("vdiff.network.SECONDS", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(VdiffError, match=rf"cannot read {url}/index.json: no answer in 0.2 s; check the URL"):
            ShardStore(url)
    with pytest.raises(VdiffError, match=rf"cannot read {url}/index.json: Connection refused; check") as caught:
        ShardStore(url)
    one_line(caught)


def test_random_crops_of_shards_are_parts_of_mirrored_images(tmp_path):
    store = ShardStore(write(tmp_path / "shards"))
    options: dict[str, Any] = {"image_size": SIZE, "batch_size": 10, "seed": 2, "flip": True}
    with closing(ShardBatches(store, **options).start_at(0)) as whole:
        images = list(islice(whole, 3))
    with closing(ShardBatches(store, crop=3, **options).start_at(0)) as crops:
        found = list(islice(crops, 3))
    corners = set()
    for original, cropped in zip(images, found, strict=True):
        assert cropped.images.shape == (10, 3, 3, 3)
        for image, part, sizes in zip(original.images, cropped.images, cropped.sizes, strict=True):
            height, width, top, left, *sides = sizes.int().tolist()
            assert (height, width, *sides) == (SIZE, SIZE, 3, 3)
            assert torch.equal(image[:, top : top + 3, left : left + 3], part)
            corners.add((top, left))
    assert len(corners) == 4
