"""Captions: cleaned, kept in both kinds of datasets, and what training makes of them."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from vdiff.data.batches import Batch, open_batches
from vdiff.data.captions import CaptionSettings, clean_caption, has_control_characters
from vdiff.data.datasets import AnyStore, open_dataset, verify
from vdiff.data.shards import ShardWriter
from vdiff.data.store import DatasetMeta, StoreWriter

TAGS = "red, green, blue, white"
CAPTIONS = ["a dog", "", "a cat\nthe same cat\na tom", TAGS, "größer 🐕"]


def png(value: int, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_store(folder: Path, captions: Sequence[str], tars: bool = False) -> AnyStore:
    """A grey dataset whose image k has the value k and caption k."""
    meta = DatasetMeta("toy", (4,), 1, "png")
    folder.mkdir()
    writer = ShardWriter(folder, meta, name="x", images_per_shard=10_000) if tars else StoreWriter(folder, meta)
    for value, caption in enumerate(captions):
        writer.add({4: png(value)}, None, caption)
    counts: dict[str, object] = {"images": len(captions)}
    if number := sum(map(bool, captions)):
        counts["captions"] = number
    writer.finish(counts)
    return open_dataset(folder)


def batches(store: AnyStore, count: int, start: int = 0, batch_size: int = 6, **options: object) -> list[Batch]:
    opened = open_batches(store, batch_size=batch_size, flip=False, **{"seed": 0, "image_size": 4, **options})
    with closing(opened.start_at(start)) as found:
        return list(islice(found, count))


def pairs(found: Sequence[Batch]) -> list[tuple[int, str]]:
    """(value of the image, caption) of all batches."""
    return [
        (int(image[0, 0, 0]), caption)
        for batch in found
        for image, caption in zip(batch.images, batch.captions or [], strict=True)
    ]


@pytest.mark.parametrize("tars", [False, True])
def test_datasets_keep_captions(tmp_path: Path, tars: bool) -> None:
    store = write_store(tmp_path / "x", CAPTIONS, tars)
    assert [image.caption for image in store.stretch(0, 5)] == CAPTIONS
    assert store.meta.num_captions == 4
    assert verify(store).is_good
    other = write_store(tmp_path / "y", [*CAPTIONS[:-1], "other"], tars)
    assert store.meta.fingerprint != other.meta.fingerprint
    shown = pairs(batches(store, 5))
    assert {value: caption for value, caption in sorted(shown) if value != 2} == {
        0: "a dog",
        1: "",
        3: TAGS,
        4: CAPTIONS[4],
    }
    assert {caption for value, caption in shown if value == 2} == set(CAPTIONS[2].split("\n"))


def test_a_dataset_without_captions_has_the_bytes_of_old(tmp_path: Path) -> None:
    with_none = write_store(tmp_path / "x", ["", ""])
    assert b"caption" not in (tmp_path / "x" / "data.mdb").read_bytes()
    link = bytes(32)  # the chain of fingerprints, written out
    for image in (png(0), png(1)):
        link = hashlib.sha256(link + hashlib.sha256(b"4 %d " % len(image) + image + b"-1").digest()).digest()
    assert with_none.meta.fingerprint == link.hex()
    assert batches(with_none, 1)[0].captions is None


@pytest.mark.parametrize("tars", [False, True])
def test_captions_are_a_function_of_seed_and_position(tmp_path: Path, tars: bool) -> None:
    store = write_store(tmp_path / "x", [f"{k}, a, b, c\n{k}, d, e" for k in range(11)], tars)
    settings = CaptionSettings(dropout=0.3, shuffle=True, keep_tokens=1, prefix="emoji of")
    whole = batches(store, 20, captions=settings)
    resumed = batches(store, 8, 12, captions=settings)
    assert pairs(whole)[72:] == pairs(resumed)
    workers = batches(store, 3, captions=settings, num_workers=1, **({} if tars else {"cache_bytes": 0}))
    assert pairs(workers) == pairs(whole)[:18]
    assert pairs(batches(store, 20, captions=settings, seed=1)) != pairs(whole)
    for value, caption in pairs(whole):
        assert caption == "" or caption.startswith(f"emoji of {value}, ")
        assert Counter(caption.removeprefix(f"emoji of {value}, ").split(", ")) in (
            Counter("abc"), Counter("de"), Counter([""]),
        )  # fmt: skip
    if not tars:  # processes of tar shards read other images than one process does
        parts = [batches(store, 20, captions=settings, rank=rank, world_size=2) for rank in (0, 1)]
        assert [pairs([a]) + pairs([b]) for a, b in zip(*parts, strict=True)] == [pairs([each]) for each in whole]


def test_dropout_shuffle_and_choice_have_their_frequencies() -> None:
    def draws(settings: CaptionSettings, captions: str) -> Counter[str]:
        return Counter(settings.apply(captions, np.random.default_rng([9, k])) for k in range(6000))

    dropped = draws(CaptionSettings(dropout=0.1), "x")
    assert abs(dropped[""] - 600) < 5 * (6000 * 0.09) ** 0.5
    orders = draws(CaptionSettings(shuffle=True, keep_tokens=1), TAGS)
    assert len(orders) == 6
    assert all(sorted(order.split(", ")) == sorted(TAGS.split(", ")) for order in orders)
    assert all(order.startswith("red, ") and abs(count - 1000) < 5 * 29 for order, count in orders.items())
    lines = draws(CaptionSettings(), "a\nb\nc")
    assert set(lines) == set("abc")
    assert all(abs(count - 2000) < 5 * 37 for count in lines.values())
    assert draws(CaptionSettings(dropout=1.0, prefix="p"), "x") == {"": 6000}
    halves = draws(CaptionSettings(dropout=0.5), "a\nb")  # dropping and choosing are independent
    assert all(abs(halves[line] - 1500) < 5 * 34 for line in "ab")
    assert draws(CaptionSettings(), TAGS) == {TAGS: 6000}
    assert draws(CaptionSettings(prefix="p"), "") == {"p": 6000}
    assert draws(CaptionSettings(prefix="p"), TAGS) == {f"p {TAGS}": 6000}
    assert draws(CaptionSettings(shuffle=True, keep_tokens=9), TAGS) == {TAGS: 6000}


@pytest.mark.parametrize(
    ("given", "clean", "has_control"),
    [
        ("a dog\r\na cat\r", "a dog\na cat", False),
        ("  two\t spaces\u2028 and\u00a0more \n\n \n", "two spaces and more", False),
        ("bell\x07 and \ud800 surrogate\0", "bell and surrogate", True),
        ("\x1b[31m red", "[31m red", True),
        (" \n\t", "", False),
    ],
)
def test_captions_are_clean_lines(given: str, clean: str, has_control: bool) -> None:
    assert clean_caption(given) == clean
    assert has_control_characters(given) == has_control
    assert clean_caption(clean) == clean
