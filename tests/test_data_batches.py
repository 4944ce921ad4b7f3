"""Batches: a pure function of seed and step, however the images are decoded and by how many processes."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from vdiff.data.batches import Batch, BatchPlan, ImageBatches
from vdiff.data.store import DatasetMeta, ImageStore
from vdiff.data.writer import StoreWriter
from vdiff.errors import VdiffError

COUNT, SIZE = 11, 4


def picture(index: int, channels: int) -> np.ndarray:
    pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, channels), dtype=np.uint8)
    pixels[0, 0] = index  # tells the images apart
    return pixels


@pytest.fixture(params=[1, 3])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    channels = request.param
    with StoreWriter(tmp_path, DatasetMeta("toy", (SIZE,), channels, class_names=tuple("abc"))) as writer:
        for index in range(COUNT):
            buffer = io.BytesIO()
            PIL.Image.fromarray(picture(index, channels).squeeze()).save(buffer, format="PNG")
            writer.add({SIZE: buffer.getvalue()}, index % 3)
        writer.finish({"images": COUNT})
    return ImageStore(tmp_path)


def make(store: ImageStore, **options: int | bool) -> ImageBatches:
    defaults: dict[str, int | bool] = {"image_size": SIZE, "batch_size": 4, "seed": 0, "flip": True}
    return ImageBatches(store, **{**defaults, **options})  # type: ignore[arg-type]


def take(batches: ImageBatches, count: int, start: int = 0) -> list[Batch]:
    return list(islice(batches.start_at(start), count))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.classes, b.classes)  # type: ignore[arg-type]
        for a, b in zip(first, second, strict=True)
    )


def test_images_and_classes_are_those_of_the_store(store: ImageStore) -> None:
    batches = make(store)
    for step, batch in enumerate(take(batches, 8)):
        assert batch.images.dtype == torch.float32
        flips = batches.plan.flips(step)
        for place, index in enumerate(batches.plan.indices(step)):
            pixels = picture(int(index), store.meta.channels)
            want = pixels[:, ::-1] if flips[place] else pixels
            got = batch.images[place].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(got, want / 127.5 - 1, atol=1e-7)
            assert batch.classes is not None
            assert batch.classes[place] == index % 3


def test_without_classes(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, DatasetMeta("toy", (1,), 1)) as writer:
        buffer = io.BytesIO()
        PIL.Image.new("L", (1, 1)).save(buffer, format="PNG")
        writer.add({1: buffer.getvalue()}, None)
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


def test_starting_later_is_skipping(store: ImageStore) -> None:
    for cache_bytes in (0, 2**20):
        batches = make(store, cache_bytes=cache_bytes)
        assert equal(take(batches, 6, start=5), take(batches, 11)[5:])


def test_the_cached_path_and_the_streamed_path_agree(store: ImageStore) -> None:
    cached, streamed = make(store), make(store, cache_bytes=0)
    assert (cached._cached, streamed._cached) == (True, False)
    assert equal(take(cached, 9), take(streamed, 9))


def test_worker_processes_change_nothing(store: ImageStore) -> None:
    state = torch.get_rng_state()
    assert equal(take(make(store, cache_bytes=0, num_workers=2), 7, start=2), take(make(store), 7, start=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_the_processes_make_up_the_batch(store: ImageStore, world_size: int) -> None:
    whole = take(make(store), 6)
    parts = [take(make(store, rank=rank, world_size=world_size), 6) for rank in range(world_size)]
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


def test_an_image_of_another_size_than_its_key_is_an_error(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, DatasetMeta("toy", (4,), 1)) as writer:
        buffer = io.BytesIO()
        PIL.Image.new("L", (5, 4)).save(buffer, format="PNG")
        writer.add({4: buffer.getvalue()}, None)
        writer.finish({})
    with pytest.raises(VdiffError, match="image 0 is 5×4, not 4×4"):
        take(make(ImageStore(tmp_path), batch_size=1), 1)
