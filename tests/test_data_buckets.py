"""Aspect-ratio buckets: shapes, what is kept of an image, and batches of one shape each."""

from __future__ import annotations

import io
import itertools
import random
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from tests.commands import done, error, run, tree
from vdiff.cli.prepare import EXIT_SKIPPED
from vdiff.data.batches import Batch, BucketPlan, open_batches
from vdiff.data.buckets import bucket_shapes, fit
from vdiff.data.conversion import ConversionConfig, convert
from vdiff.data.datasets import open_dataset, verify
from vdiff.data.store import ImageStore

SDXL = (1024, 64, 512, 2048)
SIZES = [(40, 40), (60, 30), (30, 60), (33, 17), (90, 31), (31, 90), (64, 50), (8, 8)]  # (width, height)
LINE = "prepare_data.py photos --size 32 --buckets --bucket_step 8 --bucket_sides 16,64 --format png --num_workers 0"


def test_the_shapes_of_sdxl() -> None:
    """Sides that Stable Diffusion XL was trained with (Podell et al. 2023, appendix I) are among them."""
    shapes = bucket_shapes(*SDXL)
    known = [(512, 2048), (576, 1664), (640, 1536), (704, 1408), (768, 1344), (832, 1216), (896, 1152), (1024, 1024)]
    assert {*known, *((width, height) for height, width in known)} <= set(shapes)
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 and 512 <= h <= 2048 and (w, h) in shapes for h, w in shapes)
    assert bucket_shapes(32, 64, 64, 128) == ()
    assert bucket_shapes(32, 8, 16, 40) == ((16, 40), (24, 40), (32, 32), (40, 16), (40, 24))


def test_an_image_that_its_bucket_would_enlarge_keeps_to_the_longest_side() -> None:
    found = fit(1345, 639, 1024, 64, 512, 1280)  # nearest 640 × 1280; 639 becomes 576, 1345 at most 1280
    assert found is not None
    assert found.shape == (576, 1280)


def test_an_image_is_never_enlarged_and_barely_distorted() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        width, height = rng.randint(1, 4000), rng.randint(1, 4000)
        found = fit(width, height, *SDXL)
        assert (found is None) == (min(width, height) < 512)
        if found:
            (tall, wide), (left, top, right, bottom) = found.shape, found.box
            assert 0 <= left <= right - wide <= width - wide
            assert 0 <= top <= bottom - tall <= height - tall
            assert tall % 64 == wide % 64 == 0
            assert tall * wide <= 1024**2
            assert (left, right) == (0, width) or (top, bottom) == (0, height)
            assert (right - left) / (bottom - top) == pytest.approx(wide / tall, rel=0.01)
            assert found.sizes[:2] == (height, width)
            assert found.sizes[4:] == found.shape


@pytest.mark.parametrize(
    ("size", "shape", "crop"),
    [
        ((1024, 1024), (1024, 1024), (0, 0)),
        ((2432, 1664), (832, 1216), (0, 0)),
        ((4000, 3000), (896, 1152), (0, 21)),  # 3857 of 4000 columns, from 71, at 896/3000
        ((3000, 4000), (1152, 896), (21, 0)),
        ((6000, 1000), (512, 2048), (0, 512)),
        ((700, 600), (576, 640), (0, 15)),  # no bucket fits: multiples of 64; 667 columns, from 16, at 640/667
    ],
)
def test_crops_are_those_of_the_resized_image(size: tuple[int, int], shape: tuple[int, int], crop: object) -> None:
    found = fit(*size, *SDXL)
    assert found is not None
    assert (found.shape, found.sizes[2:4]) == (shape, crop)


def test_pixels_are_those_of_the_box() -> None:
    gradient = np.broadcast_to(np.arange(100, dtype=np.uint8) * 2, (31, 100))
    config = ConversionConfig(sizes=(32,), channels=1, image_format="png", resample="box", buckets=(8, 16, 64))
    converted = convert(PIL.Image.fromarray(gradient.copy()), config)
    assert converted.shape == (31, 100, 0, 2, 16, 48)  # 31 · 48/16 = 93 columns, from 3, at 48/93
    with PIL.Image.open(io.BytesIO(converted.images[32])) as image:
        assert image.size == (48, 16)
        middles = 3 + (np.arange(48) + 0.5) * 93 / 48 - 0.5  # of each new column, in old ones
        np.testing.assert_allclose(np.asarray(image)[0], 2 * middles, atol=2)


def photos(folder: Path) -> None:
    """Images in several shapes, each of a colour of its own, with captions."""
    folder.mkdir()
    for number, size in enumerate(SIZES * 3):
        PIL.Image.new("RGB", size, (number, 100, 0)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"photo {number}")


def skipping(line: str) -> str:
    """What a command says that skips some images."""
    result = run(line)
    assert result.exit_code == EXIT_SKIPPED, result.output
    return result.stdout


def batches(store: ImageStore, count: int, start: int = 0, **options: object) -> list[Batch]:
    opened = open_batches(store, **{"image_size": 32, "batch_size": 4, "seed": 0, "flip": False, **options})
    with closing(opened.start_at(start)) as found:
        return list(islice(found, count))


def equal(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images) and torch.equal(a.sizes, b.sizes) and a.captions == b.captions  # type: ignore[arg-type]
        for a, b in zip(some, others, strict=True)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    folder = tmp_path_factory.mktemp("buckets")
    photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = skipping(f"{LINE} --out data")
    assert "buckets    " in said
    assert "3 too small" in said
    return ImageStore(folder / "data")


def test_a_dataset_of_buckets(store: ImageStore) -> None:
    assert len(store) == 21
    assert store.meta.buckets == (8, 16, 64)
    assert sum(store.meta.counts["buckets"].values()) == 21
    assert verify(store).is_good
    large_enough = [size for size in SIZES * 3 if size != (8, 8)]
    for image, (width, height) in zip(store.stretch(0, 21), large_enough, strict=True):
        assert image.shape[:2] == (height, width)
        with PIL.Image.open(io.BytesIO(image.images[32])) as picture:
            assert picture.size == (image.shape[5], image.shape[4])


def test_a_batch_has_one_shape_and_its_sizes(store: ImageStore) -> None:
    found = batches(store, 40)
    colours: Counter[int] = Counter()
    for batch in found:
        assert batch.sizes is not None
        assert batch.sizes.dtype == torch.float32
        assert len({tuple(row) for row in batch.sizes[:, 4:].tolist()}) == 1
        assert batch.images.shape == (4, 3, *map(int, batch.sizes[0, 4:].tolist()))
        for image, sizes, caption in zip(batch.images, batch.sizes.tolist(), batch.captions or [], strict=True):
            number = int(image[0, 0, 0])
            assert torch.equal(image, torch.tensor([number, 100, 0], dtype=torch.uint8)[:, None, None].expand_as(image))
            assert tuple(sizes[1::-1]) == (SIZES * 3)[number]
            assert caption == f"photo {number}"
            colours[number] += 1
    assert len(colours) == 21
    assert len({tuple(batch.images.shape) for batch in found}) > 3


@pytest.mark.parametrize("options", [{"num_workers": 1, "cache_bytes": 0}, {"cache_bytes": 0}, {"flip": True}])
def test_batches_of_buckets_are_a_function_of_seed_and_step(store: ImageStore, options: dict[str, object]) -> None:
    flip = {"flip": True} if "flip" in options else {}
    whole = batches(store, 16, **flip)
    assert equal(batches(store, 5, 11, **options), whole[11:])
    assert not equal(batches(store, 16, seed=1, **flip), whole)
    parts = [batches(store, 16, rank=rank, world_size=2, **options) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([first.images, second.images]), batch.images)
        assert [*first.captions, *second.captions] == batch.captions  # type: ignore[misc]


@pytest.mark.parametrize("counts", [[7, 1, 13], [3, 2], [20], [1, 1, 1]])
def test_every_image_comes_equally_often(counts: list[int]) -> None:
    edges = list(itertools.accumulate(counts, initial=0))
    buckets = [np.arange(first, last) for first, last in itertools.pairwise(edges)]
    plan = BucketPlan(buckets, batch_size=4, seed=3, flip=False)
    steps = sum(counts)  # after 4 epochs every bucket has shown whole batches alone
    shown = [plan.indices(step) for step in range(steps)]
    assert Counter(np.concatenate(shown).tolist()) == dict.fromkeys(range(edges[-1]), 4)
    for batch in shown:
        assert len({int(np.searchsorted(edges, index, "right")) for index in batch}) == 1
    ends = [sum(epoch * count // 4 for count in counts) for epoch in range(1, 5)]
    for epoch, end in enumerate(ends, start=1):  # what is left of an epoch is less than a batch of each bucket
        found = Counter(index for batch in shown[:end] for index in batch.tolist())
        for first, count in zip(edges, counts, strict=False):
            assert all(epoch - -(-4 // count) <= found[first + k] <= epoch for k in range(count))
    far = plan.indices(10**6)
    assert len(far) == 4


def test_other_settings_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    assert "--buckets takes one --size" in error("prepare_data.py photos --buckets --size 32,64", 2)
    assert "--crop pad does not apply to --buckets" in error("prepare_data.py photos --buckets --crop pad", 2)
    assert "no shape has sides from 16 to 64" in error("prepare_data.py photos --buckets --size 32 --bucket_step 64", 2)
    assert "--bucket_step does not apply without" in error("prepare_data.py photos --bucket_step 8", 2)
    assert "--buckets: tar shards" in error(f"{LINE} --out x.tar", 2)
    skipping(f"{LINE} --out data/x")
    squares = "data/x has images of many shapes"
    assert squares in error("prepare_data.py data/x --out y", 1)
    assert squares in error("train.py --data data/x --out y --dry_run", 1)
    assert "(height×width)" in done("vdiff data info data/x").stdout
    assert "photo" in done("vdiff data show data/x").stdout
    for part in (1, 2):
        skipping(f"{LINE} --out data/p.{part}of2 --shard {part}/2")
    done("vdiff data merge data/p.1of2 data/p.2of2")
    assert {k: v for k, v in tree(tmp_path / "data/p").items() if k != "rejected.jsonl"} == {
        k: v for k, v in tree(tmp_path / "data/x").items() if k != "rejected.jsonl"
    }
    assert len(open_dataset("data/p")) == 21
