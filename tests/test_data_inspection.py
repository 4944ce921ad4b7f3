"""Looking at datasets and joining parts: facts, checks that find damage, a sheet by class, merges byte for byte."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import lmdb
import numpy as np
import PIL.Image
import pytest

from tests.commands import ROOT, done, error, run, tree
from tests.test_data_preparation import EMOJI, picture, write
from tests.test_data_resume import CONFIG, COUNT, photos
from vdiff.data import preparation, store, workers
from vdiff.data.conversion import ConversionConfig
from vdiff.data.datasets import facts, merge, open_dataset, sheet, verify
from vdiff.data.disk_sources import Folder, Zip
from vdiff.data.images import CELL_PIXELS, GAP
from vdiff.data.preparation import Part, prepare
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH_IMAGES", 7)
    monkeypatch.setattr(preparation, "IMAGES_PER_SHARD", 10)


def make(source: Path, out: Path, part: Part | None = None) -> Path:
    prepare(Folder(source), out, CONFIG, part=part)
    return out.with_suffix("") if out.suffix == ".tar" else out


# ---- facts


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_facts(source: Path, tmp_path: Path, name: str) -> None:
    values = facts(open_dataset(make(source, tmp_path / name)))
    assert (values["images"], values["sizes"], values["channels"]) == (COUNT, (4, 8), 3)
    assert values["counts"]["skipped"] == {"not an image": 9}
    assert values["format"] == ("lmdb" if name == "out" else "tar shards")
    assert values["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "out").iterdir() if name == "out" or file.suffix == ".tar"
    )
    if name == "out":
        assert values["classes"] == {"a": 20, "b": 20, "c": 20}
    else:
        assert values["shards"] == 7


def test_info_is_for_people_and_for_programs(source: Path, tmp_path: Path) -> None:
    out = make(source, tmp_path / "out")
    text = done(f"vdiff data info {out}").stdout
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}
    assert (rows["images"], rows["sizes"], rows["skipped"]) == ("60", "4, 8", "9 not an image")
    assert rows["classes"] == "3: a 20, b 20, c 20"
    values = json.loads(done(f"vdiff data info {out} --json").stdout)
    assert (values["images"], values["class_names"], values["fingerprint"]) == (
        60, ["a", "b", "c"], ImageStore(out).meta.fingerprint,
    )  # fmt: skip


def test_the_only_dataset_needs_no_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no dataset under data/" in error("vdiff data info", 1)
    make(source, tmp_path / "data" / "one")
    assert "data/one" in done("vdiff data info").stdout


# ---- verify


@pytest.mark.parametrize(
    ("name", "num_workers"),
    [("out", 0), ("out", 2), ("out.tar", 0), pytest.param("out.tar", 2, marks=pytest.mark.slow)],
)
def test_a_whole_dataset_is_good(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_workers: int
) -> None:
    monkeypatch.setattr(workers, "SECONDS_ALONE", 0)
    verdict = verify(open_dataset(make(source, tmp_path / name)), num_workers=num_workers)
    assert (verdict.checked, verdict.num_problems, verdict.fingerprint, verdict.is_good) == (COUNT, 0, "equal", True)


def change(path: Path, key: bytes, value: bytes | None) -> None:
    with lmdb.open(str(path), lock=False) as env, env.begin(write=True) as transaction:
        if value is None:
            assert transaction.delete(key)
        else:
            assert transaction.get(key)
            transaction.put(key, value)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        (b"8-00007", picture(0)[:90], "image 7, size 8: "),
        (b"4-00007", picture(0), "image 7, size 4: it is 8×8"),
        (b"8-00059", None, "has no image 59 of size 8"),
        (b"8-00007", picture(0), None),  # a good image, but another one
        (b"label-00007", b"2", None),
    ],
)
@pytest.mark.parametrize("has_checks", [False, True])
def test_damage_is_found_and_named(
    source: Path, tmp_path: Path, key: bytes, value: bytes | None, problem: str | None, has_checks: bool
) -> None:
    out = make(source, tmp_path / "out")
    change(out, key, value)
    if not has_checks:
        change(out, b"check-00007", None)
    elif value is not None:
        of = "the class of image 7" if key[:1] == b"l" else f"image 7 of size {key[:1].decode()}"
        problem = f"{out} is damaged: {of} is not what was written"
    verdict = verify(open_dataset(out))
    assert verdict.fingerprint == "unequal"
    assert not verdict.is_good
    assert (problem in verdict.problems[0]) if problem else (verdict.num_problems == 0)
    result = run(f"vdiff data verify {out} --num_workers 0")
    assert result.exit_code == 1
    assert "checksum unequal; copy it again, or prepare it again" in result.stderr.splitlines()[-1]
    assert problem is None or problem in result.stderr
    assert json.loads(run(f"vdiff data verify {out} --num_workers 0 --json").stdout)["is_good"] is False


def test_a_changed_shard_is_found(source: Path, tmp_path: Path) -> None:
    out = make(source, tmp_path / "out.tar")
    shard = sorted(out.glob("*.tar"))[1]
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT") + 4
    data[at : at + 20] = bytes(20)
    shard.write_bytes(data)
    verdict = verify(open_dataset(out))
    assert (verdict.num_problems, verdict.fingerprint) == (1, "unequal")
    assert verdict.problems[0].startswith("image ")


def test_a_rosinality_dataset_has_no_checksum(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "theirs")) as env, env.begin(write=True) as transaction:
        transaction.put(b"8-00000", picture(0))
        transaction.put(b"length", b"1")
    assert "1 images decoded in every size, no checksum" in done(f"vdiff data verify {tmp_path / 'theirs'}").stdout


# ---- show


def cell(image: PIL.Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """The pixels of one cell of a sheet whose table touches the right and the lower margin."""
    side = CELL_PIXELS
    right, bottom = image.width - 16, image.height - 16
    x, y = right - (columns - column) * (side + GAP) + GAP, bottom - (rows - row) * (side + GAP) + GAP
    return np.asarray(image)[y : y + side, x : x + side]


def test_a_sheet_has_a_row_for_each_class(tmp_path: Path) -> None:
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    for name, colour in colours.items():
        for index in range({"red": 1, "green": 12, "blue": 4}[name]):
            path = tmp_path / "x" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (8, 8), colour).save(path)
    for out in ("lmdb", "tars.tar"):
        dataset = open_dataset(make(tmp_path / "x", tmp_path / out))
        image = sheet(dataset, columns=6)
        for row, name in enumerate(["blue", "green", "red"]):
            count = {"red": 1, "green": 6, "blue": 4}[name]
            for column in range(6):
                want = colours[name] if column < count else (255, 255, 255)
                assert (cell(image, row, column, 3, 6) == want).all()


def test_a_sheet_without_classes_spreads_over_the_set(tmp_path: Path) -> None:
    files = {f"{index:03d}.png": (index,) * 3 for index in range(200)}
    (tmp_path / "x").mkdir()
    for name, colour in files.items():
        PIL.Image.new("RGB", (8, 8), colour).save(tmp_path / "x" / name)
    image = sheet(open_dataset(make(tmp_path / "x", tmp_path / "out")), columns=5, max_rows=2)
    shown = [cell(image, row, column, 2, 5)[0, 0, 0] for row in range(2) for column in range(5)]
    assert shown == list(range(0, 200, 20))


def test_show_writes_a_png_beside_the_dataset(source: Path, tmp_path: Path) -> None:
    out = make(source, tmp_path / "out")
    assert done(f"vdiff data show {out} --columns 3 --image_size 4").stdout.strip() == f"{out}.png"
    with PIL.Image.open(f"{out}.png") as image:
        assert image.format == "PNG"
    assert "no images of size 5" in error(f"vdiff data show {out} --image_size 5", 1)
    assert "is not a name for a PNG file" in error(f"vdiff data show {out} --out sheet.jpg", 1)


@pytest.mark.slow
def test_the_emoji_in_two_sizes(tmp_path: Path) -> None:
    if not EMOJI.exists():
        pytest.skip(f"needs {EMOJI.name} in shared/data beside the repository")
    report = prepare(Zip(EMOJI), tmp_path / "emoji", ConversionConfig(sizes=(32, 64)), num_workers=2)
    assert (report.images, len(report.class_names), report.converted["alpha"]) == (1906, 9, 1906)
    dataset = open_dataset(tmp_path / "emoji")
    assert verify(dataset, num_workers=2).is_good
    image = sheet(dataset, size=64)
    assert image.height > 9 * 72


# ---- merge


@pytest.mark.parametrize("name", ["out", "out.tar"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_make_what_one_run_would_have_written(source: Path, tmp_path: Path, count: int, name: str) -> None:
    whole = make(source, tmp_path / name)
    suffix = Path(name).suffix
    parts = [make(source, tmp_path / f"p_{k}of{count}{suffix}", Part(k, count)) for k in range(1, count + 1)]
    if count == 1:
        with pytest.raises(VdiffError, match="is not a part of a dataset; give folders that --shard"):
            merge(parts, tmp_path / "joined")
        return
    assert sum(len(open_dataset(part)) for part in parts) == COUNT
    meta = merge([*parts[1:], parts[0]], tmp_path / "joined")
    assert meta == open_dataset(whole).meta
    assert tree(tmp_path / "joined") == tree(whole)


def test_a_part_without_images_is_a_part(tmp_path: Path) -> None:
    write(tmp_path / "x", {f"{index}.png": picture(index) for index in range(2)} | {"0.png": b"text"})
    parts = [make(tmp_path / "x", tmp_path / f"p{k}", Part(k, 4)) for k in range(1, 5)]
    assert [len(open_dataset(part)) for part in parts] == [0, 0, 0, 1]
    merge(parts, tmp_path / "joined")
    assert tree(tmp_path / "joined") == tree(make(tmp_path / "x", tmp_path / "whole"))


def test_parts_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    one, two = (make(source, tmp_path / f"p{k}", Part(k, 3)) for k in (1, 2))
    again = shutil.copytree(one, tmp_path / "again")
    halves = make(source, tmp_path / "half", Part(1, 2))
    other = make(source / "a", tmp_path / "other", Part(3, 3))
    tars = make(source, tmp_path / "tars.tar", Part(3, 3))
    for parts, message in [
        ([one, two], "part 3/3 is missing; prepare it with --shard 3/3"),
        ([one, again, two], "are both part 1; give each once"),
        ([one, two, halves], "half is part 1/2, .* one of 3"),
        ([one, two, other], "come from different images or settings"),
        ([one, two, tars], "come from different images or settings"),
        ([tmp_path / "nothing"], "no such dataset"),
    ]:
        with pytest.raises(VdiffError, match=message):
            merge(parts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_shards_as_they_are_typed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = f"prepare_data.py {source} --size 8 --num_workers 0"
    for k in (1, 2):
        result = run(f"{base} --shard {k}/2")
        assert result.exit_code == 3
        assert result.stdout.splitlines()[-1].split()[1:] == ["vdiff", "data", "merge", "data/photos_8.*of2"]
    text = done("vdiff data merge data/photos_8.1of2 data/photos_8.2of2").stdout
    assert "data/photos_8: 60 images of 2 parts" in text
    assert run(f"{base} --out whole").exit_code == 3
    assert tree(tmp_path / "data" / "photos_8") == tree(tmp_path / "whole")
    assert "exists already; give another " in error("vdiff data merge data/photos_8.1of2 data/photos_8.2of2", 1)
    done("vdiff data merge data/photos_8.1of2 data/photos_8.2of2 --overwrite")
    assert "is not called NAME.IofN" in error("vdiff data merge whole", 1)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear").write_text("x")
    words = "vdiff data merge data/photos_8.1of2 data/photos_8.2of2 --overwrite --out letters"
    assert "letters exists and is not a dataset that vdiff wrote" in error(words, 1)
    for wrong in ("2", "3/2", "0/2", "a/b", "1/2/3"):
        assert "--shard" in error(f"{base} --shard {wrong}", 2)


def test_bounds_share_out_everything_once() -> None:
    for length in (0, 1, 9, 10, 61):
        for unit in (1, 10):
            for count in (1, 2, 3, 7):
                bounds = [Part(k, count).bounds(length, unit) for k in range(1, count + 1)]
                assert bounds[0][0] == 0
                assert bounds[-1][1] == length
                assert all(stop == start for (_, stop), (start, _) in pairwise(bounds))
                assert all(start % unit == 0 or start == length for start, _ in bounds)
    with pytest.raises(ValueError, match="part 3 of 2"):
        Part(3, 2)


def test_the_group_tells_what_it_can_do() -> None:
    text = done("vdiff data --help").stdout
    for name in ("info", "verify", "show", "merge"):
        assert name in text
        assert "Examples" in done(f"vdiff data {name} --help").stdout
    assert "id you mean 'verify'?" in error("vdiff data verfy", 2)
    assert (ROOT / "vdiff" / "cli" / "data.py").exists()
