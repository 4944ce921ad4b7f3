"""Captions beside images, in tables, in archives and columns: what `prepare_data.py` makes of them."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.commands import done, tree
from tests.test_data_captions import batches
from tests.test_data_labels import Files, every_container
from tests.test_data_preparation import CONFIG, picture, write, write_zip
from tests.test_data_sources import write_tar
from tests.toy import Watcher
from vdiff.data.datasets import AnyStore, open_dataset
from vdiff.data.preparation import prepare
from vdiff.data.source import SourceOptions
from vdiff.data.sources import open_source
from vdiff.data.store import ImageStore
from vdiff.errors import OptionError, VdiffError

NAMES = [f"{folder}/{k}.png" for folder in ("cat", "dog") for k in range(3)]
IMAGES = {name: picture(k) for k, name in enumerate(NAMES)}
TEXTS = [f"number {k}, größer" for k in range(6)]


def prepared(source: Path | str, out: Path, **options: Any) -> tuple[AnyStore, list[str], dict[str, int]]:
    """The dataset, what was said, and what was ignored."""
    watcher = Watcher()
    report = prepare(open_source(source, SourceOptions(**options)), out, CONFIG, reporter=watcher)
    store = open_dataset(report.path)
    captions = [image.caption for image in store.stretch(0, len(store))]
    assert report.captions == store.meta.num_captions == sum(map(bool, captions))
    return store, watcher.lines, report.ignored


def captions(store: AnyStore) -> dict[int, str]:
    """The captions of each `picture(seed)`."""
    known = {picture(seed): seed for seed in range(20)}
    return {known[image.images[8]]: image.caption for image in store.stretch(0, len(store))}


def table(suffix: str, rows: list[dict[str, Any]]) -> bytes:
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


ROWS = [{"file_name": name, "text": text} for name, text in zip(NAMES, TEXTS, strict=True)]
BESIDE: dict[str, Files] = {
    **{
        suffix: {name.replace(".png", suffix): f"{text}\n".encode() for name, text in zip(NAMES, TEXTS, strict=True)}
        for suffix in (".txt", ".caption", ".TXT")
    },
    **{f"metadata{suffix}": {f"metadata{suffix}": table(suffix, ROWS)} for suffix in (".csv", ".jsonl", ".parquet")},
    "in each folder": {
        f"{folder}/metadata.jsonl": table(".jsonl", [{**row, "file_name": row["file_name"][4:]} for row in rows])
        for folder, rows in (("cat", ROWS[:3]), ("dog", ROWS[3:]))
    },
    "column caption": {"metadata.csv": table(".csv", [{"file_name": n, "caption": t} for n, t in zip(NAMES, TEXTS)])},  # noqa: B905
}


@every_container
@pytest.mark.parametrize("beside", BESIDE)
def test_captions_beside_images_and_class_folders(tmp_path: Path, container: Any, beside: str) -> None:
    store, lines, ignored = prepared(container(tmp_path, IMAGES | BESIDE[beside]), tmp_path / "out")
    assert captions(store) == dict(enumerate(TEXTS))
    assert store.meta.class_names == ("cat", "dog")
    assert (lines, ignored) == ([], {})


def test_captions_in_tar_shards_are_those_in_lmdb(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "set.tar", IMAGES | BESIDE[".txt"], "w:")  # as WebDataset lays it out
    stores = [prepared(source, tmp_path / out)[0] for out in ("lmdb", "tars.tar")]
    assert captions(stores[0]) == captions(stores[1]) == dict(enumerate(TEXTS))
    again, _, _ = prepared(tmp_path / "lmdb", tmp_path / "again")
    assert captions(again) == dict(enumerate(TEXTS))
    foreign = open_dataset(next((tmp_path / "tars").glob("*.tar")))
    assert foreign.meta.num_captions == 6
    assert captions(foreign) == dict(enumerate(TEXTS))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_list_elsewhere_names_images_below_the_top_folder(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"list{suffix}").write_bytes(table(suffix, ROWS))
    source = write_zip(tmp_path / "set.zip", {f"top/{name}": data for name, data in (IMAGES | BESIDE[".txt"]).items()})
    store, lines, _ = prepared(source, tmp_path / "out", captions=str(tmp_path / f"list{suffix}"))
    assert captions(store) == dict(enumerate(TEXTS))
    assert store.meta.class_names == ("cat", "dog")
    assert lines == []


def test_names_of_a_list_may_begin_with_the_source(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", IMAGES)
    rows = [{**row, "file_name": str(folder / row["file_name"])} for row in ROWS]
    (tmp_path / "list.jsonl").write_bytes(table(".jsonl", rows))
    store, _, _ = prepared(folder, tmp_path / "out", captions=str(tmp_path / "list.jsonl"))
    assert captions(store) == dict(enumerate(TEXTS))


def test_what_is_missing_or_odd_is_counted_and_said(tmp_path: Path) -> None:
    rows = [
        {"file_name": NAMES[0], "text": ["first\n one", "second"]},
        {"file_name": NAMES[1], "text": "  "},
        {"file_name": NAMES[2], "text": None},
        {"file_name": NAMES[3], "text": "a \x1b[31mred\x07 dog"},
        {"file_name": "cat/none.png", "text": "x"},
        {"file_name": "../../etc/passwd", "text": "x"},
    ]
    files = {**IMAGES, "metadata.jsonl": table(".jsonl", rows), "dog/1.txt": b"", "notes.txt": b"x"}
    files["dog/2.txt"], files["dog/2.caption"] = b"tags", b"words"
    files["cat/1.txt"] = b"\xef\xbb\xbfbeside\r\nit"
    store, lines, ignored = prepared(write(tmp_path / "set", files), tmp_path / "out")
    assert captions(store) == {0: "first one\nsecond", 1: "beside\nit", 2: "", 3: "a [31mred dog", 4: "", 5: "tags"}
    assert ignored == {".txt": 1}
    assert lines == [
        "metadata.jsonl: 2 of 6 names are those of no image, such as cat/none.png",
        "1 caption had control characters, which became spaces",
    ]
    some, _, ignored = prepared(tmp_path / "set", tmp_path / "some", only_captioned=True)
    assert captions(some) == {seed: caption for seed, caption in captions(store).items() if caption}
    assert ignored == {".txt": 1, "without a caption": 2}
    assert some.meta.class_names == ("cat", "dog")
    none, lines, ignored = prepared(tmp_path / "set", tmp_path / "none", captions="none")
    assert (none.meta.num_captions, lines, ignored[".jsonl"]) == (0, [], 1)


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({"cat/0.txt": b"gr\xf6\xdfer"}, {}, "cat/0.txt is not UTF-8.*--captions none"),
        ({"metadata.csv": b"file_name,text\ncat/0.png,gr\xf6\n"}, {}, "caption gr.* is not UTF-8"),
        ({"metadata.jsonl": b'{"file_name": "cat/0.png", "text": "\\ud83d"}'}, {}, "is not UTF-8"),
        ({"metadata.jsonl": b'{"file_name": "cat/0.png", "text": 7}'}, {}, "7 is not a caption"),
        ({"metadata.jsonl": b'{"file_name": "cat/0.png", "text": [{}]}'}, {}, "is not a caption"),
        ({"metadata.parquet": b"PAR1"}, {}, "metadata.parquet cannot be read"),
        ({}, {"only_captioned": True}, "--only_captioned: none of 6 images has a caption"),
        ({}, {"caption_column": "tags"}, "--caption_column tags: .* has no such column"),
        ({}, {"captions": "there is none.csv"}, "--captions there is none.csv cannot be read"),
        ({}, {"captions": "list.doc"}, "--captions list.doc is none of .csv, .jsonl, .parquet"),
        ({}, {"repeats": True}, "--repeats: the folder cat is not called N_name"),
    ],
)
def test_captions_that_cannot_be_used_are_one_line(tmp_path: Path, files: Files, options: Any, words: str) -> None:
    source = write(tmp_path / "set", IMAGES | files)
    with pytest.raises(VdiffError, match=words) as caught:
        prepared(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"file_name": "other/0.png", "text": "x"}', "names none of the images: other/0.png"),
        (b'{"image": "cat/0.png", "text": "x"}', "it needs the columns file_name and text"),
        (b"", "it needs the columns file_name and text"),
        (b'{"file_name"', "cannot be read"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "list.jsonl").write_bytes(data)
    source = write(tmp_path / "set", IMAGES)
    with pytest.raises(VdiffError, match=words):
        prepared(source, tmp_path / "out", captions=str(tmp_path / "list.jsonl"))


@pytest.mark.parametrize("source", ["digits", "cifar10", "hf:x", "data"])
def test_sources_without_files_know_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    prepared(write(tmp_path / "set", IMAGES), tmp_path / "data")
    with pytest.raises(OptionError, match=r"--captions list\.csv does not apply to"):
        open_source(source, SourceOptions(captions="list.csv"))


def test_repeats_show_images_more_often(tmp_path: Path) -> None:
    names = {"3_cat/0.png": 0, "3_cat/1.png": 1, "1_big dog/2.png": 2}
    files = {**{name: picture(seed) for name, seed in names.items()}, "3_cat/0.txt": b"a tom"}
    store, _, _ = prepared(write(tmp_path / "set", files), tmp_path / "out", repeats=True)
    assert (store.meta.class_names, store.meta.repeats) == (("big dog", "cat"), (1, 3))
    assert captions(store) == {0: "a tom", 1: "cat", 2: "big dog"}
    found = Counter(
        caption for batch in batches(store, 2, batch_size=7, image_size=8) for caption in batch.captions or []
    )
    assert found == {"a tom": 6, "cat": 6, "big dog": 2}
    with pytest.raises(OptionError, match="--repeats: tar shards"):
        prepared(tmp_path / "set", tmp_path / "tars.tar", repeats=True)
    plain, _, _ = prepared(tmp_path / "set", tmp_path / "plain")
    assert (plain.meta.class_names, plain.meta.repeats) == (("1_big dog", "3_cat"), ())


def test_a_single_folder_of_repeats_gives_its_name(tmp_path: Path) -> None:
    files = {f"set/10_sks dog/{k}.png": picture(k) for k in range(3)}
    store, _, _ = prepared(write_zip(tmp_path / "set.zip", files), tmp_path / "out", repeats=True)
    assert set(captions(store).values()) == {"sks dog"}
    assert store.meta.repeats == ()


def test_parts_of_several_machines_have_captions(tmp_path: Path) -> None:
    source = write(tmp_path / "set", IMAGES | BESIDE[".txt"])
    line = f"prepare_data.py {source} --size 8 --format png --num_workers 0 --out"
    done(f"{line} {tmp_path}/whole")
    for part in ("1/2", "2/2"):
        done(f"{line} {tmp_path}/parts.{part.replace('/', 'of')} --shard {part}")
    done(f"vdiff data merge {tmp_path}/parts.1of2 {tmp_path}/parts.2of2")
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert captions(ImageStore(tmp_path / "parts")) == dict(enumerate(TEXTS))


def test_captions_are_shown(tmp_path: Path) -> None:
    source = write(tmp_path / "set", IMAGES | dict(list(BESIDE[".txt"].items())[:5]))
    said = done(f"prepare_data.py {source} --size 8 --num_workers 0 --out {tmp_path}/out").stdout
    assert "captions   5 of 6 images have one" in said
    assert "captions        5 images have one, 1 have none" in done(f"vdiff data info {tmp_path}/out").stdout
    shown = done(f"vdiff data show {tmp_path}/out --out {tmp_path}/sheet.png").stdout
    assert [line.split(maxsplit=1) for line in shown.splitlines()[1:]] == [[str(k), TEXTS[k]] for k in range(5)]
    done(f"prepare_data.py {source} --size 8 --num_workers 0 --out {tmp_path}/plain --captions none")
    assert len(done(f"vdiff data show {tmp_path}/plain").stdout.splitlines()) == 1
    heights = []
    for name in ("sheet.png", "plain.png"):
        with PIL.Image.open(tmp_path / name) as picture_of_it:
            heights.append(picture_of_it.height)
    assert heights[0] > heights[1]  # a line of words below each row


def test_the_columns_of_a_hub_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": picture(k), "path": None} for k in range(4)],
        "text": ["a", "", "c\x07", None],
        "several": [["x", "y"], [], ["z"], None],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "several": datasets.List(datasets.Value("string")),
        }
    )
    folder = tmp_path / "hub"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(str(folder / "train.parquet"))
    store, lines, _ = prepared(f"hf:{folder}", tmp_path / "out")
    assert captions(store) == {0: "a", 1: "", 2: "c", 3: ""}
    assert lines == ["1 caption had control characters, which became spaces"]
    several, _, _ = prepared(f"hf:{folder}", tmp_path / "several", caption_column="several", only_captioned=True)
    assert captions(several) == {0: "x\ny", 2: "z"}
    with pytest.raises(OptionError, match=r"--caption_column tags: .* choose from image, text, several"):
        prepared(f"hf:{folder}", tmp_path / "x", caption_column="tags")
