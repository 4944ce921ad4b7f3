"""Every source gives its images in one order: folders, archives, datasets, torchvision's and the hub's sets."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.error import URLError

import lmdb
import numpy as np
import PIL.Image
import pytest

from tests.commands import image_of
from tests.test_data_preparation import picture, records, write, write_zip
from vdiff.data.conversion import ConversionConfig
from vdiff.data.disk_sources import Dataset, Folder, Tar
from vdiff.data.image_files import extensions
from vdiff.data.listing import Item, ListingWriter, open_listing
from vdiff.data.preparation import prepare
from vdiff.data.source import Defaults, SourceOptions
from vdiff.data.sources import TORCHVISION, Digits, HuggingFace, Torchvision, build_listing, open_source
from vdiff.data.store import ImageStore
from vdiff.errors import OptionError, VdiffError

CONFIG = ConversionConfig(sizes=(8,), image_format="png")
FILES = {
    "top/b/2.png": picture(2),
    "top/a/1.JPG": picture(1, "JPEG"),
    "top/a/0.WebP": picture(0, "WEBP"),
    "top/a/é ü.png": picture(3),
    "top/notes.TXT": b"text",
}


def write_tar(path: Path, files: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_like_a_folder(tmp_path: Path, mode: str) -> None:
    prepare(Folder(write(tmp_path / "x", FILES)), tmp_path / "one", CONFIG)
    source = open_source(write_tar(tmp_path / "x.tar.any", FILES, mode))
    assert isinstance(source, Tar)
    assert source.name == "x"
    report = prepare(source, tmp_path / "two", CONFIG, num_workers=1)
    assert report.ignored == {".txt": 1}
    assert ImageStore(tmp_path / "one").meta.class_names == ("a", "b")
    of_the_name = dict.fromkeys((b"meta", b"check"))
    assert {**records(tmp_path / "two"), **of_the_name} == {**records(tmp_path / "one"), **of_the_name}


def test_what_a_tar_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in [("a.png", picture(0)), ("twice.png", picture(1)), ("twice.png", picture(2))]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    report = prepare(Tar(path), tmp_path / "out", CONFIG)
    assert (report.images, report.skipped) == (2, {"unreadable": 1})
    store = ImageStore(tmp_path / "out")
    assert [store.encoded(8, index) for index in range(2)] == [picture(0), picture(2)]  # the later one counts


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:xz"])
def test_a_damaged_tar_is_one_line(tmp_path: Path, mode: str) -> None:
    files = {f"{index}.png": picture(index) for index in range(30)}
    path = write_tar(tmp_path / "x.tar", files, mode)
    os.truncate(path, path.stat().st_size * 2 // 3 // 512 * 512 + 100)
    with pytest.raises(VdiffError, match=r"cannot read .*x\.tar: .*; give an intact tar"):
        prepare(Tar(path), tmp_path / "out", CONFIG)
    assert os.listdir(tmp_path) == ["x.tar"]


def test_a_zip_that_was_read_from_goes_to_another_process(tmp_path: Path) -> None:
    source = open_source(write_zip(tmp_path / "x.zip", FILES))
    first = source.read(Item("top/b/2.png"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(Item("top/b/2.png")) == source.read(Item("top/b/2.png")) == first


def test_a_dataset_is_a_source(tmp_path: Path) -> None:
    config = ConversionConfig(sizes=(4, 8), image_format="png")
    prepare(Folder(write(tmp_path / "x", FILES)), tmp_path / "one", config)
    source = open_source(tmp_path / "one")
    assert isinstance(source, Dataset)
    assert source.defaults == Defaults(8, 3, "png")
    prepare(source, tmp_path / "two", CONFIG, num_workers=1)
    one, two = ImageStore(tmp_path / "one"), ImageStore(tmp_path / "two")
    assert two.meta.class_names == one.meta.class_names == ("a", "b")
    assert [two.encoded(8, i) for i in range(len(two))] == [one.encoded(8, i) for i in range(len(one))]
    assert [two.label(i) for i in range(len(two))] == [one.label(i) for i in range(len(one))]


def test_a_rosinality_dataset_is_a_source(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "theirs")) as env, env.begin(write=True) as transaction:
        for index in range(12):
            transaction.put(f"8-{index:05d}".encode(), picture(index))
        transaction.put(b"length", b"12")
    prepare(open_source(tmp_path / "theirs"), tmp_path / "ours", CONFIG)
    store = ImageStore(tmp_path / "ours")
    assert [store.encoded(8, index) for index in range(12)] == [picture(index) for index in range(12)]
    assert store.label(0) is None


def test_a_hole_in_a_dataset_is_skipped(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "theirs")) as env, env.begin(write=True) as transaction:
        transaction.put(b"8-00001", picture(1))
        transaction.put(b"length", b"2")
    report = prepare(Dataset(tmp_path / "theirs"), tmp_path / "out", CONFIG)
    assert (report.images, report.skipped) == (1, {"unreadable": 1})


# ---- named sets


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_every_named_set_is_one_of_torchvisions(name: str, tmp_path: Path) -> None:
    """Each split gives arguments that the class of torchvision takes, and `download` only where it can."""
    import torchvision.datasets

    known = TORCHVISION[name]
    signature = inspect.signature(getattr(torchvision.datasets, known.kind))
    for split in known.splits:
        source = Torchvision(name, SourceOptions(root=tmp_path, split=split))
        bound = signature.bind(**source.keywords(download=False)).arguments
        bound |= bound.pop("kwargs", {})
        assert bound["root"] == str(tmp_path)
        assert ("download" in bound) == known.downloads
        if known.argument:
            value = bound[known.argument]
            assert value == ((split == "train") if known.argument == "train" else split)
    assert pickle.loads(pickle.dumps(source)).keywords(download=False) == source.keywords(download=False)


def idx(array: np.ndarray) -> bytes:
    """The file format of MNIST."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_mnist_under_root(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, prefix, count in (("train", "train", 20), ("test", "t10k", 7)):
        pixels, targets = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count).astype(np.uint8)
        files = {f"{prefix}-images-idx3-ubyte": idx(pixels), f"{prefix}-labels-idx1-ubyte": idx(targets)}
        # torchvision wants both splits to be there
        write(tmp_path / "MNIST" / "raw", files)
        if split == "train":
            write(tmp_path / "MNIST" / "raw", {name.replace("train", "t10k"): data for name, data in files.items()})
        source = open_source("mnist", SourceOptions(root=tmp_path, split=split))
        assert (source.name, source.defaults.size) == ("mnist" if split == "train" else "mnist_test", 28)
        config = ConversionConfig(sizes=(28,), channels=1, image_format="png")
        report = prepare(source, tmp_path / split, config, num_workers=1)
        assert (report.images, report.rejected) == (count, 0)
        store = ImageStore(tmp_path / split)
        assert len(store.meta.class_names) == 10
        for index in range(count):
            np.testing.assert_array_equal(np.asarray(image_of(store, 28, index)), pixels[index])
            assert store.label(index) == targets[index]


def test_cifar10_under_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, labels = rng.integers(0, 256, (10, 3, 32, 32), np.uint8), rng.integers(0, 10, 10).tolist()

    def put(name: str, value: object) -> str:
        data = pickle.dumps(value)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    train = []
    for batch in range(5):
        part = slice(2 * batch, 2 * batch + 2)
        entry = {"data": pixels[part].reshape(2, -1), "labels": labels[part]}
        train.append([f"data_batch_{batch + 1}", put(f"data_batch_{batch + 1}", entry)])
    names = [f"class {number}" for number in range(10)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": put("batches.meta", {"label_names": names})}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    source = open_source("cifar10", SourceOptions(root=tmp_path))
    prepare(source, tmp_path / "out", ConversionConfig(sizes=(32,), image_format="png"))
    store = ImageStore(tmp_path / "out")
    assert store.meta.class_names == tuple(names)
    for index in range(10):
        np.testing.assert_array_equal(np.asarray(image_of(store, 32, index)), pixels[index].transpose(1, 2, 0))
        assert store.label(index) == labels[index]


def test_a_set_of_folders_under_root(tmp_path: Path) -> None:
    files = {"Forest/1.jpg": picture(1), "River/2.jpg": picture(2), "Forest/3.jpg": picture(3)}
    write(tmp_path / "eurosat" / "2750", files)
    prepare(open_source("eurosat", SourceOptions(root=tmp_path)), tmp_path / "out", CONFIG, num_workers=1)
    store = ImageStore(tmp_path / "out")
    assert store.meta.class_names == ("Forest", "River")
    assert [store.label(index) for index in range(3)] == [0, 0, 1]
    assert [store.encoded(8, index) for index in range(3)] == [picture(1), picture(3), picture(2)]


def test_named_sets_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"--split training: cifar10 has no such split; choose from train, test"):
        open_source("cifar10", SourceOptions(split="training"))
    with pytest.raises(OptionError, match=r"--image_column x does not apply to cifar10"):
        open_source("cifar10", SourceOptions(image_column="x"))
    with pytest.raises(OptionError, match=r"--split test does not apply to digits"):
        open_source("digits", SourceOptions(split="test"))
    with pytest.raises(VdiffError, match=r"cifar11: no such file or folder; did you mean 'cifar10'\?"):
        open_source("cifar11")
    with pytest.raises(VdiffError, match=r"ImageNet under .*: .*cannot download this set.*; .*--root"):
        prepare(open_source("imagenet", SourceOptions(root=tmp_path)), tmp_path / "out", CONFIG)

    def offline(_: Torchvision, *, download: bool) -> None:
        raise URLError("no network") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(Torchvision, "_build", offline)
    with pytest.raises(VdiffError, match=r"CIFAR10 cannot be downloaded: no network; check the network, or .* --root"):
        prepare(open_source("cifar10", SourceOptions(root=tmp_path / "r")), tmp_path / "out", CONFIG)
    assert not (tmp_path / "out.partial").exists()


def test_what_lies_on_the_disk_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cifar10", {"1.png": picture(1)})
    assert isinstance(open_source("cifar10"), Folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset as the hub holds it, in a folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "flowers"
    folder.mkdir()
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "photo": datasets.Image(),
            "mask": datasets.Image(),
            "kind": datasets.ClassLabel(names=["rose", "tulip"]),
            "season": datasets.ClassLabel(names=["spring", "autumn"]),
        }
    )
    for split, numbers in (("train", range(10)), ("test", range(10, 13))):
        rows = {
            "id": list(numbers),
            "photo": [{"bytes": picture(number), "path": None} for number in numbers],
            "mask": [{"bytes": picture(number + 20), "path": None} for number in numbers],
            "kind": [number % 2 for number in numbers],
            "season": [number % 3 % 2 for number in numbers],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-00000.parquet"))
    yield folder
    datasets.disable_progress_bars()


def test_a_dataset_of_the_hub(hub: Path, tmp_path: Path) -> None:
    source = open_source(f"hf:{hub}")
    assert isinstance(source, HuggingFace)
    assert source.name == "flowers"
    report = prepare(source, tmp_path / "out", CONFIG, num_workers=1)
    assert report.images == 10
    store = ImageStore(tmp_path / "out")
    assert store.meta.class_names == ("rose", "tulip")
    assert [store.encoded(8, index) for index in range(10)] == [picture(index) for index in range(10)]
    assert [store.label(index) for index in range(10)] == [0, 1] * 5


def test_columns_and_splits_of_the_hub(hub: Path, tmp_path: Path) -> None:
    options = SourceOptions(split="test", image_column="mask", label_column="season")
    prepare(open_source(f"hf:{hub}", options), tmp_path / "out", CONFIG)
    store = ImageStore(tmp_path / "out")
    assert store.meta.class_names == ("spring", "autumn")
    assert [store.encoded(8, index) for index in range(3)] == [picture(index) for index in (30, 31, 32)]
    prepare(open_source(f"hf:{hub}", SourceOptions(label_column="none")), tmp_path / "two", CONFIG)
    assert ImageStore(tmp_path / "two").meta.class_names == ()


@pytest.mark.parametrize(
    ("lacking", "hint"),
    [
        (ImportError("No module named 'soundfile'", name="soundfile"), "pip install soundfile, or give a folder"),
        (ImportError("To decode sounds, please install torchcodec"), "install what it asks for, or give a folder"),
    ],
)
def test_what_the_library_of_the_hub_lacks(hub, tmp_path, monkeypatch, lacking, hint) -> None:
    def load(*_, **__):
        raise lacking

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(VdiffError, match=hint) as caught:
        open_source(f"hf:{hub}").fetch(tmp_path)
    assert str(lacking) in str(caught.value)


def test_what_is_not_on_the_hub(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failure(name: str, **options: str) -> str:
        with pytest.raises(VdiffError) as caught:
            open_source(name, SourceOptions(**options)).fetch(tmp_path)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--image_column id: " in failure(f"hf:{hub}", image_column="id")
    assert "choose from photo, mask" in failure(f"hf:{hub}", image_column="id")
    assert "choose from kind, season" in failure(f"hf:{hub}", label_column="photo")
    assert "check the name, --split and the network" in failure(f"hf:{hub}", split="validation")
    assert "check the name, --split and the network" in failure(f"hf:{tmp_path}/nothing")
    assert "give hf:OWNER/NAME" in failure("hf:")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "needs the package datasets; pip install 'vdiff[hf]'" in failure(f"hf:{hub}")


# ---- listings


def test_a_listing_is_opened_as_it_was_built(tmp_path: Path) -> None:
    built = build_listing(Folder(write(tmp_path / "x", FILES)), tmp_path / "listing")
    with closing(built), closing(open_listing(tmp_path / "listing")) as listing:
        names = ["top/a/0.WebP", "top/a/1.JPG", "top/a/é ü.png", "top/b/2.png"]
        assert [(item.name, item.label) for item in listing.items()] == list(zip(names, (0, 0, 0, 1), strict=True))
        assert (listing.class_names, listing.ignored, listing.fingerprint, len(listing)) == (
            ("a", "b"), {".txt": 1}, built.fingerprint, 4,
        )  # fmt: skip
        assert list(listing.items(1, 3)) == list(built.items())[1:3]
    (tmp_path / "listing").write_bytes(b"no database")
    with pytest.raises(VdiffError, match="listing cannot be read"):
        open_listing(tmp_path / "listing")


def test_the_fingerprint_tells_listings_apart(tmp_path: Path) -> None:
    def fingerprint(names: list[str]) -> str:
        with ListingWriter(tmp_path / "listing", extensions()) as listing:
            for name in names:
                listing.add_file(name)
            with closing(listing.finish()) as whole:
                return whole.fingerprint

    names = (["a.png"], ["b.png"], ["a.png", "b.png"], ["a/b.png"], ["a/b.png", "c.png"])
    assert len({fingerprint(each) for each in names}) == 5


def test_a_shuffled_listing_is_a_permutation_that_names_alone_decide(tmp_path: Path) -> None:
    def names(numbers: range, shuffled: bool) -> list[str]:
        with ListingWriter(tmp_path / "listing", shuffled=shuffled) as listing:
            for number in numbers:
                listing.add(number, number)
            with closing(listing.finish()) as whole:
                return [item.name for item in whole.items()]

    plain, mixed = names(range(1000), False), names(range(1000), True)
    assert sorted(mixed) == plain
    assert mixed == names(range(999, -1, -1), True)
    ranks = np.argsort(np.argsort(mixed))
    assert abs(np.corrcoef(ranks, np.arange(1000))[0, 1]) < 0.1


def test_a_listing_does_not_grow_in_memory(tmp_path: Path) -> None:
    """12,000 names of 100 bytes pass through a writer and a reader in no more memory than 4,000."""
    import tracemalloc

    def peak(count: int) -> int:
        tracemalloc.start()
        with ListingWriter(tmp_path / "listing", {".png"}) as listing:
            for number in range(count):
                listing.add_file(f"folder/{number:0100d}.png")
            whole = listing.finish()
        assert sum(1 for _ in whole.items()) == count
        whole.close()
        answer = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return answer

    peak(2_000)
    assert peak(12_000) < peak(4_000) + 1e6


def test_a_source_without_pixels_says_so(tmp_path: Path) -> None:
    assert PIL.Image.open(io.BytesIO(Digits().read(Item("0000000")).data)).size == (8, 8)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("notes.txt", "text")
    with pytest.raises(VdiffError, match=r"no images in .*x\.zip; it holds 1 \.txt"):
        prepare(open_source(tmp_path / "x.zip"), tmp_path / "out", CONFIG)
