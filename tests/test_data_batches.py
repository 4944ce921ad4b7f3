"""Batches: a pure function of seed and step, however the images are decoded and by how many processes."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from tests.toy import Watcher
from vdiff.data import batches as batches_module
from vdiff.data.batches import Batch, BatchPlan, ImageBatches, cache_limit, decode
from vdiff.data.store import DatasetMeta, ImageStore, StoreWriter
from vdiff.errors import VdiffError

COUNT, SIZE = 11, 4
# of seed 5, 11 images, batches of 8: steps 0, 1 and 100
INDICES = [[4, 9, 0, 7, 8, 1, 6, 2], [3, 10, 5, 9, 7, 0, 5, 8], [9, 8, 5, 1, 3, 9, 5, 4]]
FLIPS = ["10000001", "01100011", "00111101"]


def picture(index: int, channels: int) -> np.ndarray:
    pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, channels), dtype=np.uint8)
    pixels[0, 0] = index  # tells the images apart
    return pixels


def encoded(pixels: np.ndarray, image_format: str = "PNG", **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        buffer, format=image_format, **options
    )
    return buffer.getvalue()


def write_store(folder: Path, channels: int) -> ImageStore:
    writer = StoreWriter(folder, DatasetMeta("toy", (SIZE,), channels, class_names=tuple("abc")))
    for index in range(COUNT):
        writer.add({SIZE: encoded(picture(index, channels))}, index % 3)
    writer.finish({"images": COUNT})
    return ImageStore(folder)


@pytest.fixture(params=[1, 3])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    return write_store(tmp_path, request.param)


@pytest.fixture
def colour_store(tmp_path: Path) -> ImageStore:
    return write_store(tmp_path, 3)


def make(store: ImageStore, **options: int | bool) -> ImageBatches:
    defaults: dict[str, int | bool] = {"image_size": SIZE, "batch_size": 4, "seed": 0, "flip": True}
    return ImageBatches(store, **{**defaults, **options})  # type: ignore[arg-type]


def image_bytes(store: ImageStore) -> int:
    return store.meta.channels * SIZE**2


def take(batches: ImageBatches, count: int, start: int = 0) -> list[Batch]:
    with closing(batches.start_at(start)) as found:
        return list(islice(found, count))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.classes, b.classes)  # type: ignore[arg-type]
        for a, b in zip(first, second, strict=True)
    )


def assert_right(batches: ImageBatches, step: int, batch: Batch, channels: int) -> None:
    """The pictures that the plan names, mirrored where it says so, made here from nothing."""
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (batches.plan.batch_size, channels, SIZE, SIZE)
    flips = batches.plan.flips(step)
    for place, index in enumerate(batches.plan.indices(step)):
        pixels = picture(int(index), channels)
        want = pixels[:, ::-1] if flips[place] else pixels
        np.testing.assert_array_equal(batch.images[place].permute(1, 2, 0).numpy(), want)
        assert batch.classes is not None
        assert batch.classes[place] == index % 3


@pytest.mark.parametrize("cached_images", [0, 1, 5, COUNT, 100])
def test_images_and_classes_are_those_of_the_store(store: ImageStore, cached_images: int) -> None:
    """Through more than three epochs: while the cache fills, with part of the set in it, and with all of it."""
    batches = make(store, cache_bytes=cached_images * image_bytes(store))
    for step, batch in enumerate(take(batches, 10)):
        assert_right(batches, step, batch, store.meta.channels)


@pytest.mark.parametrize("batch_size", [1, 11, 25])
def test_batches_of_a_part_a_whole_and_more_than_an_epoch(store: ImageStore, batch_size: int) -> None:
    for cached_images in (0, 5, 100):
        batches = make(store, batch_size=batch_size, cache_bytes=cached_images * image_bytes(store))
        for step, batch in enumerate(take(batches, 30 // batch_size + 2)):
            assert_right(batches, step, batch, store.meta.channels)


def test_without_classes(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, DatasetMeta("toy", (1,), 1))
    writer.add({1: encoded(np.zeros((1, 1, 1), np.uint8))}, None)
    writer.finish({})
    for cache_bytes in (0, 1000):
        batches = make(ImageStore(tmp_path), image_size=1, batch_size=3, cache_bytes=cache_bytes)
        assert take(batches, 2)[1].classes is None


@pytest.mark.parametrize(("length", "batch_size"), [(11, 4), (11, 11), (3, 10), (1, 2), (8, 4)])
def test_every_epoch_is_a_new_permutation_without_gaps(length: int, batch_size: int) -> None:
    plan = BatchPlan(length=length, batch_size=batch_size, seed=3, flip=False)
    stream = np.concatenate([plan.indices(step) for step in range(-(-4 * length // batch_size))])[: 4 * length]
    epochs = stream.reshape(4, length)
    assert (np.sort(epochs, 1) == np.arange(length)).all()
    assert length < 8 or len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_differ_and_flips_are_fair_and_fresh() -> None:
    plans = [BatchPlan(length=1000, batch_size=1000, seed=seed, flip=True) for seed in (0, 1)]
    assert (plans[0].indices(0) != plans[1].indices(0)).mean() > 0.9
    assert 0.4 < plans[0].flips(0).mean() < 0.6
    assert 0.4 < (plans[0].flips(0) == plans[0].flips(1)).mean() < 0.6
    assert 0.4 < (plans[0].flips(0) == plans[1].flips(0)).mean() < 0.6
    assert not BatchPlan(length=9, batch_size=9, seed=0, flip=False).flips(0).any()


def test_the_order_is_that_of_every_version_before() -> None:
    """Runs that were begun with an earlier version go on with the same images."""
    plan = BatchPlan(length=11, batch_size=8, seed=5, flip=True)
    assert [plan.indices(step).tolist() for step in (0, 1, 100)] == INDICES
    assert ["".join(str(int(flip)) for flip in plan.flips(step)) for step in (0, 1, 100)] == FLIPS


def test_starting_later_is_skipping(store: ImageStore) -> None:
    for cache_bytes in (0, 5 * image_bytes(store), 2**20):
        batches = make(store, cache_bytes=cache_bytes)
        late = take(make(store, cache_bytes=cache_bytes), 6, start=5)
        assert equal(late, take(batches, 11)[5:])
        assert equal(late, take(batches, 6, start=5))  # from what the cache has now


@pytest.mark.parametrize(
    ("method", "cached"), [("fork", 0), ("fork", 5), ("fork", COUNT), pytest.param("spawn", 5, marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # of threads of earlier tests
def test_worker_processes_change_nothing(
    colour_store: ImageStore, method: str, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    monkeypatch.setattr(batches_module, "ALONE_BYTES", 0)
    before, state = multiprocessing.get_start_method(), torch.get_rng_state()
    multiprocessing.set_start_method(method, force=True)
    try:
        batches = make(colour_store, cache_bytes=cached * image_bytes(colour_store), num_workers=2)
        found = take(batches, 12, start=2)
        again = take(batches, 9, start=5)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert equal(found, take(make(colour_store), 12, start=2))
    assert equal(again, found[3:])
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children()


def test_a_slow_trainer_finds_its_batches_untouched(colour_store: ImageStore) -> None:
    """Workers are several batches ahead, and their memory is used again: what was handed out must not change."""
    wanted = take(make(colour_store), 30)
    with closing(make(colour_store, cache_bytes=0, num_workers=2).start_at(0)) as found:
        kept = []
        for batch in islice(found, 30):
            kept.append(batch)
            time.sleep(0.005)
    assert equal(kept, wanted)


def test_a_batch_may_be_overwritten(store: ImageStore) -> None:
    """What is handed out is the trainer's own: neither the cache nor a later batch sees what is done to it."""
    batches = make(store)
    for _ in range(3):
        for step, batch in enumerate(take(batches, 4)):
            assert_right(batches, step, batch, store.meta.channels)
            batch.images.zero_()
            assert batch.classes is not None
            batch.classes.zero_()


def test_an_image_is_decoded_once_and_not_before_it_is_needed(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    read = ImageStore.encoded
    monkeypatch.setattr(
        ImageStore, "encoded", lambda self, size, index: decoded.append(index) or read(self, size, index)
    )
    batches = make(store, batch_size=2)
    take(batches, 2)
    assert decoded == batches.plan.permutation(0)[:4].tolist()
    take(batches, 20)
    assert sorted(decoded) == list(range(COUNT))
    decoded.clear()
    part = make(store, batch_size=2, cache_bytes=6 * image_bytes(store))
    take(part, COUNT)  # two epochs: six images are kept, five come anew
    assert sorted(np.bincount(decoded).tolist()) == [1] * 6 + [2] * 5


def test_workers_end_once_all_is_decoded_and_when_the_batches_are_closed(
    colour_store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "ALONE_BYTES", 0)
    batches = make(colour_store, num_workers=2)
    for _ in range(2):
        with closing(batches.start_at(0)) as found:
            next(found)
            assert len(multiprocessing.active_children()) == 2
        assert not multiprocessing.active_children()
    with closing(batches.start_at(0)) as found:
        for _ in islice(found, 4):
            pass
        assert not multiprocessing.active_children()


def test_a_small_set_needs_no_workers(colour_store: ImageStore) -> None:
    with closing(make(colour_store, num_workers=2).start_at(0)) as found:
        next(found)
        assert not multiprocessing.active_children()


ENDLESS = """
import signal
import sys
from contextlib import closing
from itertools import islice
from vdiff.data.batches import ImageBatches
from vdiff.data.store import ImageStore

if __name__ == "__main__":
    batches = ImageBatches(
        ImageStore(sys.argv[1]), image_size=4, batch_size=4, seed=0, flip=True, num_workers=2, cache_bytes=0
    )
    if sys.argv[2] == "fail":
        batches._store.meta = None  # something that is nobody's mistake: workers fail with a traceback
    found, stops = batches.start_at(0), []
    for _ in islice(found, 10):
        pass
    if sys.argv[2] == "leave":
        sys.exit(5)
    if sys.argv[2] == "finish":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stops.append(1))
    try:
        with closing(found):
            print("going", flush=True)
            while not stops:
                next(found)
            for _ in islice(found, 50):
                pass
    except KeyboardInterrupt:
        pass
    print("stopped", flush=True)
"""


def endless(store: ImageStore, folder: Path, what: str) -> subprocess.Popen[str]:
    """A program that reads batches, in a process group of its own."""
    (folder / "endless.py").write_text(ENDLESS)
    return subprocess.Popen(
        [sys.executable, str(folder / "endless.py"), str(store.path), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="sends signals to a process group")
@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("stop", signal.SIGINT),
        *(pytest.param("finish", number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGTERM)),
    ],
)
def test_a_signal_to_all_processes_is_for_the_trainer_alone(
    colour_store: ImageStore, tmp_path: Path, what: str, number: signal.Signals
) -> None:
    """As Ctrl-C in a terminal: whether the trainer stops at once or goes on for a while, its workers say nothing."""
    program = endless(colour_store, tmp_path, what)
    assert program.stdout is not None
    assert program.stdout.readline() == "going\n"
    os.killpg(program.pid, number)
    assert program.communicate(timeout=60) == ("stopped\n", "")
    assert program.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(program.pid, 0)  # nobody is left in the group


@pytest.mark.slow
def test_a_program_that_leaves_its_batches_open_ends(colour_store: ImageStore, tmp_path: Path) -> None:
    program = endless(colour_store, tmp_path, "leave")
    try:
        assert program.communicate(timeout=60) == ("", "")
    finally:
        program.kill()
    assert program.returncode == 5


@pytest.mark.slow
def test_a_program_whose_workers_fail_ends(colour_store: ImageStore, tmp_path: Path) -> None:
    """The uncaught error keeps its traceback, and that all it passed through, until the interpreter ends."""
    program = endless(colour_store, tmp_path, "fail")
    try:
        _, said = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 1
    assert "Error" in said


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_the_processes_make_up_the_batch(store: ImageStore, world_size: int) -> None:
    """Each meets every image only after several epochs, so batches of cached and of new images are common."""
    whole = take(make(store), 20)
    parts = [take(make(store, rank=rank, world_size=world_size), 20) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part[step].classes for part in parts]), batch.classes)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused(store: ImageStore) -> None:
    with pytest.raises(VdiffError, match="no images of size 5"):
        make(store, image_size=5)
    with pytest.raises(VdiffError, match=r"batch of 4 .* 3 processes; give --batch_size a multiple of 3"):
        make(store, world_size=3)
    with pytest.raises(ValueError, match="rank 2"):
        make(store, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size 0"):
        make(store, batch_size=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_of_another_size_than_its_key_is_an_error(tmp_path: Path, num_workers: int) -> None:
    """One line, also from a worker."""
    writer = StoreWriter(tmp_path, DatasetMeta("toy", (4,), 1))
    writer.add({4: encoded(np.zeros((4, 5, 1), np.uint8))}, None)
    writer.finish({})
    said = f"{tmp_path}: image 0 is 5×4, not 4×4; prepare the images again with prepare_data.py"
    with pytest.raises(VdiffError) as raised:
        take(make(ImageStore(tmp_path), batch_size=1, num_workers=num_workers, cache_bytes=0), 1)
    assert str(raised.value) == said
    assert not multiprocessing.active_children()


def test_a_damaged_image_is_an_error() -> None:
    jpeg, png = encoded(picture(0, 3), "JPEG"), encoded(picture(0, 3))
    for damaged in (b"", b"no image", jpeg[:-20], png[:60]):
        with pytest.raises(VdiffError, match=r"^shard 3: image 7 cannot be decoded: .*; prepare the images again"):
            decode(damaged, 3, SIZE, "shard 3: image 7")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stored", [1, 3, 4])
def test_decode_is_what_pillow_says(image_format: str, channels: int, stored: int) -> None:
    """Whatever colours the file has: grey from colour, colour from grey, and the transparent as if it were not."""
    if (image_format, stored) == ("JPEG", 4):
        pytest.skip("JPEG has no transparency")
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, stored), dtype=np.uint8)
    data = encoded(pixels, image_format)
    with PIL.Image.open(io.BytesIO(data)) as image:
        want = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(SIZE, SIZE, channels)
    got = decode(data, channels, SIZE, "an image")
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want.transpose(2, 0, 1))
    if image_format == "PNG" and stored == channels:
        np.testing.assert_array_equal(got, pixels.transpose(2, 0, 1))


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="nothing to compare with")
def test_the_cache_takes_a_quarter_of_what_is_available() -> None:
    assert 0 < cache_limit() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def test_without_room_in_shared_memory_this_process_decodes_and_says_so(
    colour_store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "ALONE_BYTES", 0)
    monkeypatch.setattr(batches_module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(batches_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=700))
    watcher, want = Watcher(), take(make(colour_store), 6)
    for num_workers in (1, 2):  # rings of 3 and 5 batches of 192 bytes
        found = make(colour_store, num_workers=num_workers, reporter=watcher)  # type: ignore[arg-type]
        assert found.num_workers == (1 if num_workers == 1 else 0)
    (line,) = watcher.lines
    assert "MiB free, so this process decodes images, as with --num_workers 0; docker: --shm-size" in line
    assert all(torch.equal(a.images, b.images) for a, b in zip(take(found, 6), want, strict=True))


def test_shared_memory_that_others_fill_is_one_line(colour_store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(VdiffError, match="shared memory is full; give --num_workers 0, or docker run a larger --shm-"):
        take(make(colour_store, num_workers=2, cache_bytes=0), 1)


@pytest.mark.parametrize("kind", ["squares", "buckets"])
def test_random_crops_are_parts_of_mirrored_images_with_their_corners_in_the_sizes(tmp_path, kind):
    """Each image has pixels of its own, so a crop is found in it; crops of an image differ from epoch to epoch."""
    size, shapes = 10, [(10, 10)] if kind != "buckets" else [(8, 12), (12, 8)]
    generator, images = np.random.default_rng(0), []
    buckets: dict[str, Any] = {"buckets": (4, 8, 12)} if kind == "buckets" else {}
    folder = tmp_path / "data"
    folder.mkdir()
    writer = StoreWriter(folder, DatasetMeta("crops", (size,), 3, **buckets))
    for k in range(8):
        height, width = shapes[k % len(shapes)]
        images.append(generator.integers(0, 256, (3, height, width), dtype=np.uint8))
        buffer = io.BytesIO()
        PIL.Image.fromarray(images[-1].transpose(1, 2, 0)).save(buffer, format="PNG")
        shape = (40 + k, 50 + k, k, 2 * k, height, width) if kind == "buckets" else ()
        writer.add({size: buffer.getvalue()}, None, "", shape)
    counts = {"buckets": {"8×12": 4, "12×8": 4}} if kind == "buckets" else {}
    writer.finish({"images": 8, **counts})
    options: dict[str, Any] = {"image_size": size, "batch_size": 4, "seed": 5, "flip": True, "crop": 5}
    store = ImageStore(folder)
    parts = [ImageBatches(store, rank=rank, world_size=2, **options).start_at(0) for rank in (0, 1)]
    whole = ImageBatches(store, **options)
    corners: dict[int, set[tuple[int, int]]] = {}
    for step, batch in zip(range(8), whole.start_at(0), strict=False):
        assert batch.images.shape == (4, 3, 5, 5)
        halves = [next(part) for part in parts]
        assert torch.equal(torch.cat([half.images for half in halves]), batch.images)
        assert torch.equal(torch.cat([half.sizes for half in halves]), batch.sizes)
        again = next(ImageBatches(store, **options).start_at(step))
        assert torch.equal(again.images, batch.images)
        for place, index in enumerate(whole.plan.indices(step).tolist()):
            image = images[index][..., ::-1] if whole.plan.flips(step)[place] else images[index]
            windows = np.lib.stride_tricks.sliding_window_view(image, (3, 5, 5))[0]
            [[top, left]] = np.argwhere((windows == batch.images[place].numpy()).all(axis=(2, 3, 4)))
            corners.setdefault(index, set()).add((int(top), int(left)))
            height, width = image.shape[1:]
            original = (40 + index, 50 + index, index, 2 * index) if kind == "buckets" else (height, width, 0, 0)
            expected = [*original[:2], original[2] + top, original[3] + left, 5, 5]
            assert batch.sizes[place].tolist() == expected
    assert min(len(found) for found in corners.values()) > 1
