"""A folder of samples: filled up after any interruption, and never a mixture of images drawn in different ways."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.drawing import image_path, run, spec, written
from tests.toy import SIZE, Watcher, contents, write_checkpoint
from vdiff.diffusion.samplers import Clipped, Ddim
from vdiff.errors import Interrupted, VdiffError
from vdiff.files import parse
from vdiff.models.checkpoint import (
    CONFIG,
    WEIGHTS,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from vdiff.models.drawing import classes_in_turn, draw
from vdiff.sampling.outputs import GRID, PICTURES
from vdiff.sampling.packing import file_name
from vdiff.sampling.spec import RECORD


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base_0"
    write_checkpoint(folder, channels=3)
    return folder


@pytest.fixture(scope="module")
def grey_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grey") / "base_0"
    write_checkpoint(folder, channels=1)
    return folder


def pixels(path: Path) -> np.ndarray:
    """(H, W, C) uint8."""
    with PIL.Image.open(path) as picture:
        array = np.array(picture)
    return array[..., None] if array.ndim == 2 else array


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def images(num: int) -> list[str]:
    return [f"{k:05d}.png" for k in range(num)]


def test_a_folder_holds_images_grid_and_record(model, tmp_path):
    wanted = spec(model)
    report = run(wanted, tmp_path / "out")
    assert (report.num, report.drawn, report.evaluations, report.out) == (7, 7, 4, tmp_path / "out")
    assert report.images_per_second == pytest.approx(7 / report.seconds)
    assert names(tmp_path) == ["out", f"out.{GRID}"]
    assert names(tmp_path / "out") == [*images(7), RECORD]
    assert report.picture == tmp_path / f"out.{GRID}"
    record = parse((tmp_path / "out" / RECORD).read_text())
    assert record == {**dataclasses.asdict(wanted), "format": "png"}


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({}, Ddim()),
        ({"sampler": "clipped", "options": {"clipping_value": 1.1, "eta": 0.5}}, Clipped(clipping_value=1.1, eta=0.5)),
    ],
)
@pytest.mark.parametrize("name", ["model", "grey_model"])
def test_images_are_those_that_the_model_draws(request, tmp_path, name, changes, sampler):
    """round(127.5 (x + 1)), as `draw` gives them."""
    model = request.getfixturevalue(name)
    run(spec(model, **changes), tmp_path / "out", batch_size=2)
    denoiser, _ = load_checkpoint(model)
    expected = draw(denoiser, sampler, indices=range(7), image_size=SIZE, num_steps=4, seed=3)
    for k in range(7):
        exact = (expected[k].permute(1, 2, 0).numpy() + 1).clip(0, 2) * 127.5
        found = pixels(image_path(tmp_path / "out", k))
        assert found.shape == exact.shape
        assert np.abs(found - exact).max() <= 0.501


@pytest.mark.parametrize(
    ("name", "num", "columns"),
    [("model", 1, 1), ("model", 2, 2), ("model", 5, 3), ("grey_model", 9, 3), ("model", 10, 5), ("model", 70, 8)],
)
def test_grid_shows_the_first_images_from_their_files(request, tmp_path, name, num, columns):
    model = request.getfixturevalue(name)
    run(spec(model, num_steps=1), tmp_path / "out", num=num, batch_size=64)
    grid, shown = pixels(tmp_path / f"out.{GRID}"), min(num, 64)
    scale = -(-72 // SIZE)
    side = scale * SIZE
    pitch, rows = side + 4, -(-shown // columns)
    head, left = grid.shape[0] - 16 - (rows * pitch - 4), (grid.shape[1] - (columns * pitch - 4)) // 2
    assert (grid[16:head] < 128).any(), "a title"
    for k in range(shown):
        y, x = head + k // columns * pitch, left + k % columns * pitch
        expected = np.kron(pixels(image_path(tmp_path / "out", k)), np.ones((scale, scale, 1)))
        assert np.array_equal(grid[y : y + side, x : x + side], np.broadcast_to(expected, (side, side, 3)))


def stop_at(completed: int, error: BaseException, *, calls: int = 1) -> Watcher:
    """Raise when `completed` images are told for the `calls`-th time."""
    heard = []

    def act(_: str, done: int) -> None:
        if done == completed:
            heard.append(done)
            if len(heard) == calls:
                raise error

    return Watcher(act)


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (Interrupted("", 143), 143)], ids=["ctrl_c", "sigterm"]
)
@pytest.mark.parametrize(("completed", "calls", "kept"), [(0, 1, 0), (3, 1, 3), (3, 3, 3), (6, 1, 6), (7, 1, 7)])
def test_what_was_cut_is_filled_up(model, tmp_path, error, code, completed, calls, kept):
    """At the beginning, between batches, inside one, after the last: only what is missing is drawn, and alike."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(spec(model), whole)
    with pytest.raises(Interrupted, match=rf"stopped: {cut} holds {kept} of 7 images; the same command") as caught:
        run(spec(model), cut, reporter=stop_at(completed, error, calls=calls))
    assert caught.value.exit_code == code
    assert names(cut) == [*images(kept), RECORD]
    before = {path.name: path.stat().st_mtime_ns for path in cut.iterdir()}
    watcher = Watcher()
    report = run(spec(model), cut, batch_size=2, reporter=watcher)
    assert report.drawn == 7 - kept
    assert watcher.bars == [("cut", 7, kept)]
    after = {path.name: path.stat().st_mtime_ns for path in cut.iterdir()}
    assert {name: after[name] for name in before} == before
    assert written(cut) == written(whole)


def test_single_missing_images_are_drawn_again(model, tmp_path):
    run(spec(model), tmp_path / "out")
    before = written(tmp_path / "out")
    for k in (0, 4):
        image_path(tmp_path / "out", k).unlink()
    assert run(spec(model), tmp_path / "out").drawn == 2
    assert written(tmp_path / "out") == before


def test_tools_that_read_a_folder_find_the_images_alone(model, tmp_path):
    """EDM's `dataset_tool.py` and `fid.py`, clean-fid and pytorch-fid take every file with a picture's suffix."""
    run(spec(model), tmp_path / "out", trajectory=True)
    suffixes = PIL.Image.registered_extensions()
    assert [path.name for path in sorted((tmp_path / "out").rglob("*")) if path.suffix in suffixes] == images(7)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *(f"out.{name}" for name in PICTURES)}


@pytest.mark.parametrize("num", [7, 9])
def test_a_folder_of_an_earlier_version_goes_on(model, tmp_path, num):
    """Its pictures lay among the images; they are moved where they belong, or drawn again of more images."""
    run(spec(model), tmp_path / "whole", trajectory=True)
    run(spec(model), tmp_path / "out", trajectory=True)
    for name in PICTURES:
        (tmp_path / f"out.{name}").rename(tmp_path / "out" / name)
    assert run(spec(model), tmp_path / "out", num=num).drawn == num - 7
    if num > 7:
        run(spec(model), tmp_path / "whole", num=num)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_the_current_folder_may_be_filled(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(spec(model), Path(), num=2).picture == tmp_path / f"here.{GRID}"
    assert names(tmp_path / "here") == [*images(2), RECORD]


def test_a_complete_folder_is_left_alone(model, tmp_path):
    run(spec(model), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for num in (7, 3):
        report = run(spec(model), tmp_path / "out", num=num)
        assert (report.drawn, report.evaluations, report.images_per_second) == (0, None, None)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_can_be_extended(model, tmp_path):
    run(spec(model), tmp_path / "whole", num=11)
    run(spec(model), tmp_path / "out", num=4)
    watcher = Watcher()
    assert run(spec(model), tmp_path / "out", num=11, reporter=watcher).drawn == 7
    assert watcher.bars == [("out", 11, 4)]
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_cut_extension_leaves_no_old_grid(model, tmp_path):
    """All images are there when it stops: the grid of the first four must not pass for that of all."""
    run(spec(model), tmp_path / "whole")
    run(spec(model), tmp_path / "out", num=4)
    with pytest.raises(Interrupted, match="holds 7 of 7 images"):
        run(spec(model), tmp_path / "out", reporter=stop_at(7, KeyboardInterrupt()))
    run(spec(model), tmp_path / "out")
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "seed 3, not 4"),
        ({"num_steps": 8}, "num_steps 4, not 8"),
        ({"sampler": "ddpm"}, "sampler ddim, not ddpm"),
        ({"options": {"eta": 0.5}}, "options {}, not {'eta': 0.5}"),
        ({"classes": [1]}, "classes [], not [1]"),
        ({"fingerprint": "0" * 64}, "other weights"),
    ],
)
def test_images_of_another_order_are_not_mixed(model, tmp_path, changes, words):
    run(spec(model), tmp_path / "out", num=2)
    before = written(tmp_path / "out")
    with pytest.raises(VdiffError) as caught:
        run(spec(model, **changes), tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'out'} holds images drawn with {words}; give another --name or --out, or --overwrite"
    )
    assert written(tmp_path / "out") == before


def test_the_same_model_in_another_place_goes_on(model, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in (WEIGHTS, CONFIG):
        (moved / name).write_bytes((model / name).read_bytes())
    run(spec(model), tmp_path / "out", num=2)
    assert run(spec(moved), tmp_path / "out", num=3).drawn == 1


def test_a_record_of_an_earlier_version_goes_on(model, tmp_path):
    """It said `clip` where records now say `clipping_value`."""
    run(spec(model, options={"clipping_value": 0.9}), tmp_path / "out", num=1)
    record = tmp_path / "out" / RECORD
    before = parse(record.read_text()) | {"options": {"clip": 0.9}}
    record.write_text(json.dumps(before))
    assert run(spec(model, options={"clipping_value": 0.9}), tmp_path / "out", num=2).drawn == 1
    with pytest.raises(VdiffError, match=r"options \{'clipping_value': 0.9\}, not \{\}"):
        run(spec(model), tmp_path / "out", num=3)


def test_overwriting_begins_anew(model, tmp_path):
    run(spec(model), tmp_path / "out")
    run(spec(model, seed=4), tmp_path / "whole", num=2)
    run(spec(model, seed=4), tmp_path / "out", num=2, overwrite=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_folders_are_left_alone(model, tmp_path, overwrite):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "00000.png").write_text("mine")
    with pytest.raises(
        VdiffError, match=r"photos exists and is not a set of samples that vdiff wrote; choose another --out"
    ):
        run(spec(model), tmp_path / "photos", overwrite=overwrite)
    with pytest.raises(VdiffError, match=r"00000\.png exists and is not a set of samples"):
        run(spec(model), tmp_path / "photos" / "00000.png", overwrite=overwrite)
    assert contents(tmp_path / "photos") == {"00000.png": b"mine"}


def test_an_empty_folder_is_filled(model, tmp_path):
    (tmp_path / "out").mkdir()
    run(spec(model), tmp_path / "out", num=1)
    assert names(tmp_path / "out") == [*images(1), RECORD]


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"seed": 3}'])
def test_a_damaged_record_proves_nothing(model, tmp_path, text):
    run(spec(model), tmp_path / "out", num=1)
    (tmp_path / "out" / RECORD).write_text(text)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(VdiffError, match="out exists and is not a set of samples that vdiff wrote; choose another"):
            run(spec(model), tmp_path / "out", num=2, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_damaged_image_is_named(model, tmp_path):
    run(spec(model), tmp_path / "out", num=2)
    image_path(tmp_path / "out", 1).write_bytes(image_path(tmp_path / "out", 1).read_bytes()[:40])
    with pytest.raises(VdiffError, match=r"00001\.png is damaged; delete it"):
        run(spec(model), tmp_path / "out", num=3)


def test_a_damaged_model_costs_no_images(model, tmp_path):
    """With --overwrite the old images go only when the model could be read."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in (WEIGHTS, CONFIG):
        (broken / name).write_bytes((model / name).read_bytes())
    run(spec(broken), tmp_path / "out", num=2)
    before = written(tmp_path / "out")
    with open(broken / WEIGHTS, "rb+") as file:
        file.truncate(100)
    with pytest.raises(VdiffError, match="truncated or damaged"):
        run(spec(broken, seed=5), tmp_path / "out", overwrite=True)
    assert written(tmp_path / "out") == before


def test_a_model_that_draws_nothing_finite_writes_no_image(tmp_path):
    denoiser = write_checkpoint(tmp_path / "model")
    weights = {name: tensor * float("nan") for name, tensor in denoiser.state_dict().items()}
    save_checkpoint(tmp_path / "model", weights, read_config(tmp_path / "model"))
    with pytest.raises(VdiffError, match=r"step 1 of 4 produced non-finite values in torch\.float32"):
        run(spec(tmp_path / "model"), tmp_path / "out")
    assert names(tmp_path / "out") == [RECORD]


def test_classes_are_drawn_in_turn(tmp_path):
    write_checkpoint(tmp_path / "model", classes=3)
    wanted = spec(tmp_path / "model", classes=[2, 0])
    run(wanted, tmp_path / "out", num=5)
    denoiser, _ = load_checkpoint(tmp_path / "model")
    for k, label in enumerate((2, 0, 2, 0, 2)):
        image = draw(
            denoiser,
            Ddim(),
            indices=[k],
            image_size=SIZE,
            num_steps=4,
            seed=3,
            conditions=partial(classes_in_turn, choices=[label]),
        )[0]
        exact = (image.permute(1, 2, 0).numpy() + 1).clip(0, 2) * 127.5
        assert np.abs(pixels(image_path(tmp_path / "out", k)) - exact).max() <= 0.501


def test_progress_counts_images_and_steps(model, tmp_path):
    watcher = Watcher()
    run(spec(model), tmp_path / "out", reporter=watcher)
    assert [done for _, done in watcher.seen] == [0] * 4 + [3] * 5 + [6] * 5 + [7]


def test_numbers_beyond_five_digits():
    assert [file_name(k) for k in (7, 99_999, 123_456)] == ["00007.png", "99999.png", "123456.png"]
