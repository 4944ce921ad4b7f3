"""Classes from files beside the images, splits above the classes, samples that come back, and vdiff's own pictures."""

from __future__ import annotations

import gc
import io
import json
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.commands import done, error, image_of
from tests.drawing import run, spec
from tests.test_data_preparation import CONFIG, picture, write, write_zip
from tests.test_data_sources import write_tar
from tests.toy import Watcher, write_checkpoint
from vdiff.data.conversion import ConversionConfig
from vdiff.data.disk_sources import Npz
from vdiff.data.images import save_png
from vdiff.data.labels import clean_name, in_order
from vdiff.data.listing import ListingWriter, key_of
from vdiff.data.preparation import Report, prepare
from vdiff.data.source import SourceOptions
from vdiff.data.sources import open_source
from vdiff.data.store import DatasetMeta, ImageStore
from vdiff.errors import OptionError, VdiffError

Files = dict[str, bytes]
CONTAINERS: dict[str, Callable[[Path, Files], Path]] = {
    "folder": lambda path, files: write(path / "set", files),
    "zip": lambda path, files: write_zip(path / "set.zip", files),
    "tar": lambda path, files: write_tar(path / "set.tar", files, "w:"),
}
every_container = pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)


def prepared(source: Path, out: Path, **options: Any) -> tuple[Report, list[str], dict[int, str | None]]:
    """The report, what was said, and the class name of each `picture(seed)`."""
    watcher = Watcher()
    report = prepare(open_source(source, SourceOptions(**options)), out, CONFIG, reporter=watcher)
    store, known = ImageStore(out), {picture(seed): seed for seed in range(20)}
    labels = [(known[store.encoded(8, index)], store.label(index)) for index in range(len(store))]
    names = report.class_names
    return report, watcher.lines, {seed: None if label is None else names[label] for seed, label in labels}


def edm(count: int = 12) -> tuple[Files, list[list[Any]]]:
    """The images and (file, class) pairs of a zip that EDM2's and StyleGAN's dataset_tool.py writes."""
    names = [f"{k // 5:05d}/img{k:08d}.png" for k in range(count)]
    return {name: picture(k) for k, name in enumerate(names)}, [[name, 3 * (k % 4)] for k, name in enumerate(names)]


@every_container
@pytest.mark.parametrize("form", ["pairs", "object", "floats", "below"])
def test_edm_labels_are_those_that_edm_reads(tmp_path: Path, container: Any, form: str) -> None:
    files, pairs = edm()
    labels = {"object": dict(pairs), "floats": [[name, float(k)] for name, k in pairs]}.get(form, pairs)
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    # as ImageFolderDataset._load_raw_labels of EDM2 does it
    theirs = np.array([dict(pairs)[name] for name in sorted(files) if name.endswith(".png")]).astype(np.int64)
    if form == "below":
        files = {f"edm/{name}": data for name, data in files.items()}
    report, _, found = prepared(container(tmp_path, files), tmp_path / "out")
    assert report.class_names == ("0", "3", "6", "9")
    assert found == {k: str(label) for k, label in enumerate(theirs.tolist())}
    assert report.ignored == {}


def test_edm_without_labels_has_no_classes(tmp_path: Path) -> None:
    files, _ = edm()
    path = write_zip(tmp_path / "edm.zip", {**files, "dataset.json": b'{"labels": null}'})
    report, _, found = prepared(path, tmp_path / "out")
    assert report.class_names == ()
    assert found == dict.fromkeys(range(12))


def test_a_dataset_json_of_another_tool_changes_nothing(tmp_path: Path) -> None:
    files = {"cat/0.png": picture(0), "dog/1.png": picture(1), "dataset.json": b'{"name": "pets"}'}
    report, _, found = prepared(write(tmp_path / "set", files), tmp_path / "out")
    assert (found, report.ignored) == ({0: "cat", 1: "dog"}, {".json": 1})


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("dataset.json", b'{"labels": [["00000/img00000000.png", [0.5, 1]]]}', r"\[0.5, 1\] is a value, not a class"),
        ("dataset.json", b'{"labels": [["00000/img00000000.png", 1.5]]}', "1.5 is a value"),
        ("dataset.json", b'{"labels": [["00000/img00000000.png", -1]]}', "-1 is not the number of a class"),
        ("dataset.json", b'{"labels": [["00000/img00000000.png"]]}', "cannot be read"),
        ("dataset.json", b'{"labels": 7}', "cannot be read"),
        ("dataset.json", b'{"labels": ', "cannot be read"),
        ("dataset.json", b'{"labels": [["img00000000.png", 1]]}', "names none of the images: img00000000.png"),
        ("dataset.json", b"[" * 100_000, "cannot be read"),
        ("metadata.jsonl", b'{"file_name": "a.png", "label": 1}\n{"file_name"', "cannot be read"),
        ("metadata.jsonl", b'{"image": "a.png", "label": 1}', "cannot be read"),
        ("metadata.csv", b"file_name,label\n" + b"x" * 200_000, "cannot be read: field larger than field limit"),
    ],
)
def test_label_files_that_cannot_be_used_are_one_line(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    files = edm()[0] | {name: data}
    path = write(tmp_path / "set", files)
    with pytest.raises(VdiffError, match=f"{words}.*--label_column none") as caught:
        prepared(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()
    report, _, _ = prepared(path, tmp_path / "out", label_column="none")
    assert (report.images, report.class_names) == (12, ())


# ---- image folders of the Hugging Face hub

KINDS = ["owl", "cat", "owl", "cat"]


def image_folder(form: str, values: list[Any]) -> Files:
    """Four images in `images/` with a table of their classes and a caption, in one of the library's forms."""
    names = [f"images/{k}.png" for k in range(4)]
    files = {name: picture(k) for k, name in enumerate(names)}
    if form == "csv":
        rows = "".join(f'{name},"a, b",{value}\n' for name, value in zip(names, values, strict=True))
        return {**files, "metadata.csv": f"file_name,text,label\n{rows}".encode()}
    rows = "".join(
        json.dumps({"file_name": name, "text": "x", "label": value}) + "\n"
        for name, value in zip(names, values, strict=True)
    )
    return {**files, "metadata.jsonl": rows.encode()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves the table open
@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("csv", KINDS),
        ("jsonl", [10, 9, 10, 9]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("jsonl", KINDS), ("csv", [10, 9, 10, 9]))),
    ],
)
def test_image_folders_have_the_classes_that_datasets_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, values: list[Any]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    path = write(tmp_path / "set", image_folder(form, values))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    wanted = {Path(row["image"]["path"]).name: str(row["label"]) for row in theirs}
    del theirs
    gc.collect()  # here, where its warning is passed over, and not in a later test
    report, _, found = prepared(path, tmp_path / "out")
    assert {f"{seed}.png": name for seed, name in found.items()} == wanted
    assert report.class_names == tuple(sorted(map(str, set(values)), key=lambda text: text.zfill(9)))
    assert report.ignored == {}


def test_another_column_or_none(tmp_path: Path) -> None:
    files = {f"{folder}/{k}.png": picture(k) for k, folder in enumerate(["a", "b"])}
    files["metadata.csv"] = b"file_name,season\na/0.png,autumn\nb/1.png,spring\n"
    path = write(tmp_path / "set", files)
    assert prepared(path, tmp_path / "1")[2] == {0: "a", 1: "b"}  # no column "label": the folders say it
    assert prepared(path, tmp_path / "2", label_column="season")[2] == {0: "autumn", 1: "spring"}
    assert prepared(path, tmp_path / "3", label_column="none")[2] == {0: None, 1: None}
    with pytest.raises(OptionError, match=r"--label_column kind: .* has no such column"):
        prepared(path, tmp_path / "4", label_column="kind")


def test_images_without_a_class_are_left_out_and_counted(tmp_path: Path) -> None:
    files = {f"{k}.png": picture(k) for k in range(4)} | {
        "metadata.csv": b"file_name,label\n0.png,x\n./2.png,y\n1.png,\n"
    }
    report, _, found = prepared(write(tmp_path / "set", files), tmp_path / "out")
    assert (found, report.ignored) == ({0: "x", 2: "y"}, {"without a class": 2})


def test_a_table_names_only_images_of_its_own_folder(tmp_path: Path) -> None:
    files = {
        "in/0.png": picture(0),
        "in/metadata.csv": b"file_name,label\n0.png,x\n../1.png,y\n/1.png,y\n",
        "1.png": picture(1),
    }
    report, _, found = prepared(write(tmp_path / "set", files), tmp_path / "out")
    assert (found, report.ignored) == ({0: "x"}, {"without a class": 1})


def test_class_names_in_order() -> None:
    assert in_order(["b", "10", "9", "a"], []) == ["9", "10", "a", "b"]
    assert in_order(["a", "b", "x"], ["b", "a"]) == ["b", "a", "x"]


# ---- splits


@every_container
def test_one_of_the_splits_above_the_classes_is_taken_and_said(tmp_path: Path, container: Any) -> None:
    files = {
        f"set/{split}/{kind}/{k}.png": picture(4 * s + 2 * c + k)
        for s, split in enumerate(["Training", "valid", "test"])
        for c, kind in enumerate(["cat", "dog"])
        for k in range(2)
    }
    path = container(tmp_path, files | {"set/overview.png": picture(19)})
    _, lines, found = prepared(path, tmp_path / "out")
    assert found == {0: "cat", 1: "cat", 2: "dog", 3: "dog"}
    assert lines == ["split Training: 4 of 13 images; there are Training, test, valid; --split chooses, all takes all"]
    assert prepared(path, tmp_path / "val", split="validation")[2] == {4: "cat", 5: "cat", 6: "dog", 7: "dog"}
    source = open_source(path, SourceOptions(split="validation"))
    assert (source.name, source.identity()["split"]) == ("set_validation", "validation")
    with pytest.raises(OptionError, match="--split dev: there are only Training, test, valid; choose one of them"):
        prepared(path, tmp_path / "dev", split="dev")


def test_all_splits_and_none(tmp_path: Path) -> None:
    files = {
        f"{split}/{kind}/0.png": picture(2 * s + c)
        for s, split in enumerate(["val", "test"])
        for c, kind in enumerate("ab")
    }
    path = write(tmp_path / "set", files)
    with pytest.raises(OptionError, match="--split train: there are only test, val; choose one of them"):
        prepared(path, tmp_path / "1")
    assert prepared(path, tmp_path / "2", split="all")[2] == {0: "a", 1: "b", 2: "a", 3: "b"}
    flat = write(tmp_path / "flat", {"train/0.png": picture(0), "test/1.png": picture(1)})
    assert prepared(flat, tmp_path / "3")[2] == {0: None}
    with pytest.raises(OptionError, match="--split test: there are no folders train, val or test; leave it out"):
        prepared(write(tmp_path / "x", {"a/0.png": picture(0), "test/1.png": picture(1)}), tmp_path / "4", split="test")


def test_each_split_has_its_own_table(tmp_path: Path) -> None:
    files = {f"{split}/{k}.png": picture(2 * s + k) for s, split in enumerate(["test", "train"]) for k in range(2)}
    files |= {f"{split}/metadata.csv": b"file_name,label\n0.png,x\n1.png,y\n" for split in ("test", "train")}
    path = write(tmp_path / "set", files)
    assert prepared(path, tmp_path / "1")[2] == {2: "x", 3: "y"}
    assert prepared(path, tmp_path / "2", split="test")[2] == {0: "x", 1: "y"}


# ---- samples of sample.py


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "owls"
    write_checkpoint(folder, channels=3, classes=3, class_names=["owl", "cat", "dog"])
    return folder


@pytest.mark.parametrize("classes", [[0, 1, 2], [2, 0]])
@pytest.mark.parametrize("form", ["png", "zip", "npz", "lmdb"])
def test_samples_come_back_with_their_classes(model: Path, tmp_path: Path, form: str, classes: list[int]) -> None:
    out = tmp_path / ("samples" if form == "png" else f"samples.{form}")
    drawn = run(spec(model, classes=classes), out, form=form)
    assert drawn.drawn == 7
    report = prepare(open_source(out), tmp_path / "back", ConversionConfig(sizes=(4,), image_format="png"))
    store = ImageStore(tmp_path / "back")
    assert (len(store), report.ignored) == (7, {".json": 1} if form in ("png", "zip") else {})
    assert store.meta.class_names == (("owl", "cat", "dog") if len(classes) == 3 else ("owl", "dog"))
    wanted = ["owl", "cat", "dog"]
    assert [store.meta.class_names[store.label(k)] for k in range(7)] == [
        wanted[classes[k % len(classes)]] for k in range(7)
    ]
    assert run(spec(model, classes=classes), out, form=form).drawn == 0


def test_classes_of_a_folder_grow_with_it(model: Path, tmp_path: Path) -> None:
    run(spec(model), tmp_path / "out", num=2)
    (tmp_path / "out" / "dataset.json").unlink()  # as earlier versions left it
    run(spec(model), tmp_path / "out", num=2)
    run(spec(model), tmp_path / "out", num=5)
    labels = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert labels == {"labels": [[f"{k:05d}.png", k % 3] for k in range(5)], "class_names": ["owl", "cat", "dog"]}


def test_an_npz_of_another_tool(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    np.savez_compressed(tmp_path / "x.npz", pixels, np.array([7, 3, 7, 3, 3]))
    source = open_source(tmp_path / "x.npz")
    assert isinstance(source, Npz)
    assert (source.defaults.size, source.defaults.channels) == (8, 1)
    prepare(source, tmp_path / "out", ConversionConfig(sizes=(8,), channels=1, image_format="png"), num_workers=1)
    store = ImageStore(tmp_path / "out")
    assert store.meta.class_names == ("3", "7")
    for k in range(5):
        np.testing.assert_array_equal(np.asarray(image_of(store, 8, k)), pixels[k, ..., 0])
        assert store.meta.class_names[store.label(k) or 0] == str([7, 3, 7, 3, 3][k])
    for arrays, words in [
        ([pixels.astype(float)], r"arr_0 is float64"),
        ([pixels, np.zeros((5, 2))], r"arr_1 is float64 \(5, 2\), not one class"),
        ([], "arr_0"),
    ]:
        np.savez(tmp_path / "y.npz", *arrays)
        with pytest.raises(VdiffError, match=f"cannot read .*y.npz: .*{words}"):
            prepare(open_source(tmp_path / "y.npz"), tmp_path / "y", CONFIG)
    (tmp_path / "y.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-90])
    with pytest.raises(VdiffError, match="cannot read"):
        prepare(open_source(tmp_path / "y.npz"), tmp_path / "y", CONFIG)


# ---- what vdiff drew itself


def test_a_sheet_costs_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("data"), {"cat/0.png": picture(0), "dog/1.png": picture(1)})
    done("prepare_data.py data --size 8 --format png")
    done("vdiff data show")
    done("vdiff data show --out data/cat/renamed.png")
    os.link("data/cat/0.png", "data/data_8.copy.png")  # a photograph stays one, whatever it is called
    os.rename("data/data_8.copy.png", "data/dog/data_8.png")
    result = done("prepare_data.py data --size 8 --format png --out two")
    assert ImageStore("two").meta.counts["images"] == 3
    assert ImageStore("two").meta.class_names == ("cat", "dog")
    assert "2 drawn by vdiff" in result.stdout
    assert "1 datasets" in result.stdout
    assert "classes    cat, dog" in result.stdout
    (Path("data") / "data_8.png").write_bytes(picture(9))  # as earlier versions drew it, known by the dataset beside it
    assert "2 drawn by vdiff" in done("prepare_data.py data --size 8 --format png --out three").stdout


@every_container
def test_samples_inside_a_source_are_passed_over(model: Path, tmp_path: Path, container: Any) -> None:
    run(spec(model), tmp_path / "drawn" / "out", trajectory=True)
    files = {f"drawn/{p.relative_to(tmp_path / 'drawn')}": p.read_bytes() for p in (tmp_path / "drawn").rglob("*.*")}
    files |= {"cat/0.png": picture(0), "dog/1.png": picture(1)}
    report, _, found = prepared(container(tmp_path, files), tmp_path / "prepared")
    assert found == {0: "cat", 1: "dog"}
    assert report.ignored["drawn by vdiff"] == 7 + 3


def test_every_picture_of_vdiffs_has_its_mark(tmp_path: Path) -> None:
    save_png(PIL.Image.new("L", (3, 3)), tmp_path / "x.png")
    with pytest.raises(VdiffError, match=r"no images in .*; it holds 1 drawn by vdiff"):
        prepared(tmp_path, tmp_path.parent / f"{tmp_path.name}_out")


# ---- names that are no text


def test_clean_names() -> None:
    assert clean_name(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert clean_name("café, کتاب\u200cها 🦊") == "café, کتاب\u200cها 🦊"
    assert clean_name("a\nb\x1b") == r"a\nb\x1b"
    assert clean_name("\ud83d") == r"\ud83d"
    for name in (os.fsdecode(b"\xff\xfe"), "\ud83d\udca9", "\udce9\ud800"):
        clean_name(name).encode()
    assert key_of("./a//b.png") == "a\0b.png"


@every_container
@pytest.mark.parametrize("crop", ["center", "random_resized"])
def test_folders_that_are_no_utf8(tmp_path: Path, container: Any, crop: str) -> None:
    """In a zip they are what cp437 makes of them, which is text."""
    names = [os.fsdecode(b"caf\xe9/\xff.png"), "the/b.png"]
    if container is CONTAINERS["zip"]:
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("cafX/a.png", picture(0))
            archive.writestr("the/b.png", picture(1))
        path.write_bytes(path.read_bytes().replace(b"cafX", b"caf\xe9"))
    else:
        path = container(tmp_path, {name: picture(k) for k, name in enumerate(names)})
    config = ConversionConfig(sizes=(8,), image_format="png", crop=crop)
    watcher = Watcher()
    report = prepare(open_source(path), tmp_path / "out", config, reporter=watcher)
    assert (report.images, report.rejected) == (2, 0)
    if container is not CONTAINERS["zip"]:
        assert report.class_names == (r"caf\xe9", "the")
        assert watcher.lines == [r"class names that cannot be printed are written as caf\xe9"]
    json.dumps(report.to_dict(), ensure_ascii=False).encode()
    assert len(report.class_names) == 2


def test_names_in_a_table_that_is_no_utf8(tmp_path: Path) -> None:
    files = {os.fsdecode(b"\xe9.png"): picture(0), "b.png": picture(1)}
    files["metadata.csv"] = b"\xef\xbb\xbffile_name,label\n\xe9.png,caf\xe9\nb.png,tea\n"
    _, _, found = prepared(write(tmp_path / os.fsdecode(b"s\xe9t"), files), tmp_path / "out")
    assert found == {0: r"caf\xe9", 1: "tea"}
    assert open_source(tmp_path / os.fsdecode(b"s\xe9t")).name == r"s\xe9t"


def test_a_dataset_of_an_earlier_version_gets_clean_names() -> None:
    meta = DatasetMeta("x", (8,), 3, class_names=(os.fsdecode(b"caf\xe9"),))
    assert DatasetMeta.from_json(meta.to_json()).class_names == (r"caf\xe9",)


# ---- what is no file


def test_pipes_and_sockets_are_counted_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("set"), {"0.png": picture(0)})
    for name in ("1.png", "2.webp", "notes.txt"):
        os.mkfifo(Path("set") / name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("set/3.png")
        report, _, _ = prepared(Path("set"), Path("out"))
        assert (report.images, report.skipped) == (1, {"unreadable": 3})
        assert "is a pipe, a socket or a device" in error("prepare_data.py set/1.png", 1)
        assert "is a pipe, a socket or a device" in error("prepare_data.py set/3.png", 1)
    assert "is a pipe, a socket or a device" in error("prepare_data.py /dev/zero", 1)
    os.mkfifo("set/metadata.csv")
    assert "cannot read metadata.csv: unreadable (not a regular file)" in error("prepare_data.py set --size 8", 1)


def test_devices_in_a_tar_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.FIFOTYPE), ("b.png", tarfile.CHRTYPE), ("c.png", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, data = kind, picture(0) if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    report, _, _ = prepared(tmp_path / "x.tar", tmp_path / "out")
    assert (report.images, report.skipped) == (1, {"unreadable": 2})


# ---- classes without images


def test_classes_without_an_image_are_dropped(tmp_path: Path) -> None:
    with ListingWriter(tmp_path / "listing") as listing:
        listing.class_names = ("a", "b", "c", "d")
        for number, label in enumerate([3, 1, 3]):
            listing.add(number, label)
        whole = listing.finish()
    with closing(whole):
        assert (whole.class_names, [item.label for item in whole.items()]) == (("b", "d"), [1, 0, 1])
    assert whole.remarks == ["2 of 4 classes have no images, dropped: a, c"]


@pytest.mark.parametrize("suffix", ["", ".tar"])
def test_a_class_of_which_no_image_can_be_read_is_named_and_keeps_its_number(tmp_path: Path, suffix: str) -> None:
    """Parts on several machines, and a run that goes on, must number classes alike."""
    files = {"ant/0.png": b"", "bee/1.png": picture(1), "bee/2.png": b"", "cow/3.png": b"text", "dog/4.png": picture(4)}
    files[os.fsdecode(b"ant/\xff.png")] = b""
    watcher = Watcher()
    source = open_source(write(tmp_path / "set", files))
    report = prepare(source, tmp_path / f"out{suffix}", CONFIG, reporter=watcher)
    assert report.class_names == ("ant", "bee", "cow", "dog")
    assert watcher.lines == [
        "no readable images in ant, cow; prepare again without these classes, or train with them empty"
    ]
