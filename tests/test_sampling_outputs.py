"""Every kind of output, read back by those who read it elsewhere; gone on with after any death; never overwritten."""

from __future__ import annotations

import io
import json
import os
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from tests import dying
from tests.commands import error
from tests.drawing import run, spec
from tests.programs import Forked, ends
from tests.toy import SIZE, Watcher, contents, train_config, write_checkpoint
from vdiff.data.datasets import verify
from vdiff.data.store import ImageStore
from vdiff.diffusion.samplers import Ddim, Ddpm
from vdiff.errors import Interrupted, VdiffError
from vdiff.models.checkpoint import load_checkpoint
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw
from vdiff.models.speed import ready_to_draw
from vdiff.sampling.outputs import FORMATS, GRID
from vdiff.sampling.record_log import HEAD, RecordLog, RecordReader
from vdiff.sampling.spec import RECORD
from vdiff.training.base_training import train
from vdiff.training.dataset import open_images

NUM = 7
ARCHIVES = [form for form in FORMATS if form != "png"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    write_checkpoint(root / "rgb", channels=3)
    write_checkpoint(root / "grey", channels=1, classes=3, class_names=["cat", "dog", "owl"])
    return {"rgb": root / "rgb", "grey": root / "grey"}


@pytest.mark.parametrize("out", ["drawn", "drawn.npz", "drawn.lmdb"])
def test_images_of_four_channels_are_no_pictures(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("latents"), channels=4)
    told = error(f"sample.py --checkpoint latents --num 1 --device cpu --out {out}", 1)
    assert told.startswith("the model's images have 4 channels, but pictures need 1 or 3; latents need an autoencoder")
    assert os.listdir() == ["latents"]


def exact(model: Path, sampler=None, num: int = NUM, **options) -> np.ndarray:
    """(N, H, W, C) pixels before rounding, of what `draw` draws."""
    denoiser, _ = load_checkpoint(model)
    images = draw(denoiser, sampler or Ddim(), indices=range(num), image_size=SIZE, num_steps=4, seed=3, **options)
    return (images.permute(0, 2, 3, 1).numpy().clip(-1, 1) + 1) * 127.5


def unpacked(path: Path) -> np.ndarray:
    """(N, H, W, C) uint8, read from a finished output of any kind."""
    if path.suffix == ".npz":
        return np.load(path)["arr_0"]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as file:
            files = [file.read(f"{k:05d}.png") for k in range(NUM)]
    elif path.suffix == ".lmdb":
        store = ImageStore(path)
        files = [store.encoded(SIZE, k) for k in range(len(store))]
    else:
        files = [(path / f"{k:05d}.png").read_bytes() for k in range(NUM)]
    pictures = [np.array(PIL.Image.open(io.BytesIO(data))) for data in files]
    return np.stack([array[..., None] if array.ndim == 2 else array for array in pictures])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["rgb", "grey"])
def test_every_format_holds_the_images_of_the_model(models, tmp_path, name, form):
    """round(127.5 (x + 1)) of what `draw` gives, and the grid beside them."""
    out = tmp_path / f"out.{form}"
    report = run(spec(models[name]), out, form=form)
    found = unpacked(out)
    assert found.dtype == np.uint8
    assert np.abs(found - exact(models[name])).max() <= 0.501
    assert (report.out, report.num, report.drawn, report.evaluations) == (out, NUM, NUM, 4)
    assert report.picture == tmp_path / f"out.{form}.{GRID}"
    assert {path.name for path in tmp_path.iterdir()} == {out.name, report.picture.name}


def test_npz_is_what_evaluation_suites_read(models, tmp_path):
    """`arr_0` (N, H, W, C) uint8 as ADM's evaluator takes it from the zip, and the classes as `arr_1`."""
    run(spec(models["grey"], classes=[2, 0]), tmp_path / "out.npz", form="npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].shape == (NUM, SIZE, SIZE, 1)
        assert file["arr_1"].dtype == np.int64
        assert file["arr_1"].tolist() == [2, 0, 2, 0, 2, 0, 2]
    with zipfile.ZipFile(tmp_path / "out.npz") as file, file.open("arr_0.npy") as stream:
        assert np.lib.format.read_magic(stream) == (1, 0)
        assert np.lib.format.read_array_header_1_0(stream) == ((NUM, SIZE, SIZE, 1), False, np.dtype(np.uint8))
        assert len(stream.read()) == NUM * SIZE * SIZE
    run(spec(models["rgb"]), tmp_path / "plain.npz", form="npz")
    assert np.load(tmp_path / "plain.npz").files == ["arr_0"]


def test_an_npz_of_too_many_classes_is_refused_before_it_is_drawn(models, tmp_path):
    """Its record, the comment of a zip file, has 64 KiB; more than 5,000 classes fit."""
    with pytest.raises(VdiffError, match="an npz cannot record so many classes; name fewer with --classes, or give"):
        run(spec(models["grey"], classes=[0] * 20_000), tmp_path / "out.npz", form="npz")
    assert list(tmp_path.iterdir()) == []
    run(spec(models["grey"], classes=[1] * 5_000), tmp_path / "out.npz", form="npz")
    assert run(spec(models["grey"], classes=[1] * 5_000), tmp_path / "out.npz", form="npz").drawn == 0


def test_an_npz_of_an_earlier_version_is_known(models, tmp_path):
    """Its record was a file in it."""
    out, wanted = tmp_path / "out.npz", spec(models["rgb"])
    run(wanted, out, form="npz")
    with zipfile.ZipFile(out, "a") as file:
        record, file.comment = file.comment, b""
        file.writestr(RECORD, record)
    before = contents(tmp_path)
    assert run(wanted, out, form="npz").drawn == 0
    with pytest.raises(VdiffError, match="drawn with seed 3, not 4; give another --name or --out, or --overwrite"):
        run(spec(models["rgb"], seed=4), out, form="npz")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("form", FORMATS)
def test_no_picture_of_what_was_replaced_is_left(models, tmp_path, form):
    out = tmp_path / f"out.{form}"
    run(spec(models["rgb"]), out, form=form, trajectory=True)
    assert len(list(tmp_path.glob("out.*.trajectory.*"))) == 2
    run(spec(models["rgb"], seed=4), out, form=form, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"out.{form}.{GRID}"}


def test_zip_holds_files_record_and_classes(models, tmp_path):
    wanted = spec(models["grey"])
    run(wanted, tmp_path / "out.zip", form="zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as file:
        assert file.testzip() is None
        assert file.namelist() == [*(f"{k:05d}.png" for k in range(NUM)), "dataset.json", RECORD]
        labels = json.loads(file.read("dataset.json"))["labels"]
        assert labels == [[f"{k:05d}.png", k % 3] for k in range(NUM)]
        assert json.loads(file.read(RECORD)) == json.loads(wanted.to_json(format="zip", num=NUM))


def test_lmdb_is_a_dataset_that_training_reads(models, tmp_path):
    run(spec(models["grey"]), tmp_path / "out.lmdb", form="lmdb", num=9)
    store = ImageStore(tmp_path / "out.lmdb")
    assert (len(store), store.meta.sizes, store.meta.channels) == (9, (SIZE,), 1)
    assert store.meta.class_names == ("cat", "dog", "owl")
    assert [store.label(k) for k in range(9)] == [0, 1, 2] * 3
    verdict = verify(store)
    assert (verdict.checked, verdict.is_good, verdict.fingerprint) == (9, True, "equal")
    data = str(tmp_path / "out.lmdb")
    config = train_config(tmp_path / "out.lmdb", num_iters=1, class_conditional=True)
    done = train(
        config, open_images(data, SIZE), folder=tmp_path / "new", resume=False, overwrite=False, reporter=Watcher()
    )
    assert done.class_names == ["cat", "dog", "owl"]


@pytest.mark.parametrize("form", ARCHIVES)
def test_equal_images_make_equal_bytes_in_any_batches(models, tmp_path, form):
    for size in (1, 3, 64):
        run(spec(models["grey"], sampler="ddpm"), tmp_path / str(size) / f"out.{form}", form=form, batch_size=size)
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == contents(tmp_path / "64")
    assert np.abs(unpacked(tmp_path / "1" / f"out.{form}") - exact(models["grey"], Ddpm())).max() <= 0.501


@pytest.mark.skipif(os.name == "nt", reason="fork and SIGKILL")
@pytest.mark.parametrize(("kills", "most", "least"), [(0, 1, 4), pytest.param(1, 99, 25, marks=pytest.mark.slow)])
def test_what_died_anywhere_goes_on_to_the_same_bytes(tmp_path, kills, most, least):
    """Also where it was killed: nothing is lost, nothing is left over, and the pictures are the same."""
    write_checkpoint(tmp_path / "model", channels=3, classes=2)
    (code,), stdout, stderr = ends([Forked(partial(dying.main, tmp_path, kills, most), tmp_path)], 600)
    assert code == 0, stderr[-3000:]
    found = json.loads(stdout)
    assert found["wrong"] == []
    assert found["deaths"] >= least


def stop_at(completed: int) -> Watcher:
    def act(_: str, done: int) -> None:
        if done == completed:
            raise KeyboardInterrupt

    return Watcher(act)


@pytest.mark.parametrize("form", ARCHIVES)
def test_what_was_stopped_is_gone_on_with(models, tmp_path, form):
    """Only what is missing is drawn; until then there is a partial folder and nothing else."""
    run(spec(models["rgb"]), tmp_path / "whole" / f"out.{form}", form=form)
    out = tmp_path / "cut" / f"out.{form}"
    with pytest.raises(Interrupted, match=rf"stopped: {out}\.partial holds 3 of 7 images; the same command") as caught:
        run(spec(models["rgb"]), out, form=form, reporter=stop_at(3))
    assert caught.value.exit_code == 130
    assert [path.name for path in out.parent.iterdir()] == [f"out.{form}.partial"]
    watcher = Watcher()
    assert run(spec(models["rgb"]), out, form=form, reporter=watcher).drawn == 4
    assert watcher.bars == [(out.name, 7, 3)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_partial_output_may_grow(models, tmp_path):
    run(spec(models["rgb"]), tmp_path / "whole" / "out.zip", form="zip", num=9)
    with pytest.raises(Interrupted):
        run(spec(models["rgb"]), tmp_path / "cut" / "out.zip", form="zip", reporter=stop_at(3))
    assert run(spec(models["rgb"]), tmp_path / "cut" / "out.zip", form="zip", num=9).drawn == 6
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("form", ARCHIVES)
def test_a_finished_output_is_left_alone(models, tmp_path, form):
    out = tmp_path / f"out.{form}"
    run(spec(models["rgb"]), out, form=form)
    before = contents(tmp_path)
    assert run(spec(models["rgb"]), out, form=form).drawn == 0
    for changes, num, words in [
        ({}, 5, "holds 7 images, not 5"),
        ({"seed": 4}, NUM, "holds images drawn with seed 3, not 4"),
        ({"guidance": 1.0}, NUM, r"holds images drawn with guidance 0\.0, not 1\.0"),
    ]:
        with pytest.raises(VdiffError, match=f"{words}; give another --name or --out, or --overwrite"):
            run(spec(models["rgb"], **changes), out, form=form, num=num)
    other = {"zip": "npz", "npz": "zip", "lmdb": "zip"}[form]
    with pytest.raises(VdiffError, match=f"holds images as {form}, not {other}; give another"):
        run(spec(models["rgb"]), out, form=other)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("form", ARCHIVES)
def test_overwriting_keeps_the_old_until_the_new_is_whole(models, tmp_path, form):
    out = tmp_path / f"out.{form}"
    run(spec(models["rgb"]), out, form=form)
    before = contents(tmp_path)
    with pytest.raises(Interrupted):
        run(spec(models["rgb"], seed=4), out, form=form, overwrite=True, reporter=stop_at(3))
    assert {name: data for name, data in contents(tmp_path).items() if ".partial" not in name} == before
    run(spec(models["rgb"], seed=4), out, form=form, num=5, overwrite=True)
    run(spec(models["rgb"], seed=4), tmp_path / "new" / out.name, form=form, num=5)
    new = {name.removeprefix("new/"): data for name, data in contents(tmp_path).items() if name.startswith("new/")}
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("new/")} == new != before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_made_is_left_alone(models, tmp_path, overwrite):
    (tmp_path / "mine.zip").write_text("text")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr("0.png", "mine")
    (tmp_path / "data.lmdb").mkdir()
    (tmp_path / "data.lmdb" / "data.mdb").write_text("mine")
    (tmp_path / "new.npz.partial").mkdir()
    (tmp_path / "new.npz.partial" / "x").write_text("mine")
    before = contents(tmp_path)
    for name in ("mine.zip", "photos.zip", "data.lmdb"):
        with pytest.raises(
            VdiffError, match="exists and is not a set of samples that vdiff wrote; choose another --out"
        ):
            run(spec(models["rgb"]), tmp_path / name, form=name[-4:].strip("."), overwrite=overwrite)
    with pytest.raises(VdiffError, match=r"new\.npz\.partial exists and is not a set of samples that vdiff wrote"):
        run(spec(models["rgb"]), tmp_path / "new.npz", form="npz", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_images_wait_on_the_disk_that_a_link_points_to(models, tmp_path):
    (tmp_path / "disk" / "whole").mkdir(parents=True)
    link = tmp_path / "out.lmdb"
    link.symlink_to("disk/whole")
    with pytest.raises(Interrupted):
        run(spec(models["rgb"]), link, form="lmdb", reporter=stop_at(3))
    assert (tmp_path / "disk" / "whole.partial").is_dir()
    assert run(spec(models["rgb"]), link, form="lmdb").drawn == 4
    assert sorted(os.listdir(tmp_path / "disk")) == ["whole"]
    assert len(ImageStore(link)) == NUM


def test_a_folder_of_files_is_not_filled_with_something_else(models, tmp_path):
    run(spec(models["rgb"]), tmp_path / "out.lmdb", form="lmdb")
    with pytest.raises(VdiffError, match="holds images as lmdb, not png; give another"):
        run(spec(models["rgb"]), tmp_path / "out.lmdb", form="png")
    run(spec(models["rgb"]), tmp_path / "out.lmdb", form="png", overwrite=True)
    names = sorted(path.name for path in (tmp_path / "out.lmdb").iterdir())
    assert names == [*(f"{k:05d}.png" for k in range(NUM)), RECORD]


def test_a_full_disk_is_said_in_one_line_and_gone_on_from(models, tmp_path, monkeypatch):
    out = tmp_path / "cut" / "out.npz"
    real, calls = RecordLog.append, []

    def full(self, images):
        calls.append(1)
        if len(calls) == 2:
            monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        real(self, images)

    monkeypatch.setattr(RecordLog, "append", full)
    with pytest.raises(VdiffError, match=r"part-00000\.images: No space left on device; free space"):
        run(spec(models["rgb"]), out, form="npz")
    monkeypatch.undo()
    assert run(spec(models["rgb"]), out, form="npz").drawn <= 4
    run(spec(models["rgb"]), tmp_path / "whole" / "out.npz", form="npz")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


# Where images wait


def logged(folder: Path, num: int = 9) -> dict[int, bytes]:
    found = RecordReader(folder, num)
    there = np.flatnonzero(found.held).tolist()
    return dict(zip(there, found.read(there), strict=True))


def test_a_log_of_several_processes(tmp_path):
    RecordLog(tmp_path, 0).append([(4, b"four"), (0, b"")])
    RecordLog(tmp_path, 3).append([(2, b"two"), (99, b"beyond")])
    assert logged(tmp_path) == {0: b"", 2: b"two", 4: b"four"}
    assert list(RecordReader(tmp_path, 5).read([4, 2, 4])) == [b"four", b"two", b"four"]
    with pytest.raises(VdiffError, match="image 1 is missing"):
        list(RecordReader(tmp_path, 5).read([1]))


def test_a_log_ends_before_what_is_not_whole(tmp_path):
    """Cut at every byte of its second record, or with any byte of it changed: the first is kept, and it goes on."""
    RecordLog(tmp_path, 0).append([(1, b"one")])
    path = next(tmp_path.iterdir())
    first = path.read_bytes()
    RecordLog(tmp_path, 0).append([(2, b"second")])
    both = path.read_bytes()
    damaged = [both[:length] for length in range(len(first), len(both))]
    damaged += [both[:k] + bytes([both[k] ^ 1]) + both[k + 1 :] for k in [*range(len(first), len(first) + 4)]]
    damaged += [both[:k] + bytes([both[k] ^ 1]) + both[k + 1 :] for k in range(len(first) + HEAD.size, len(both))]
    for data in damaged:
        path.write_bytes(data)
        assert logged(tmp_path) == {1: b"one"}
        RecordLog(tmp_path, 0).append([(3, b"three")])
        assert logged(tmp_path) == {1: b"one", 3: b"three"}
        assert path.read_bytes()[: len(first)] == first


def test_a_million_images_take_little_memory(tmp_path):
    RecordLog(tmp_path, 0).append([(999_999, b"last")])
    found = RecordReader(tmp_path, 10**6)
    assert found.places.nbytes <= 16 * 10**6
    assert logged(tmp_path, 10**6) == {999_999: b"last"}


def test_a_compiled_network_is_asked_for_one_number_of_images(models, tmp_path, monkeypatch):
    """The last batch is filled up, so that nothing is compiled or recorded again; a single small one is not."""
    sizes = []

    def compiled(denoiser: Denoiser, **_: object) -> Denoiser:
        fast = ready_to_draw(denoiser)
        fast.network.is_compiled = True
        fast.network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        return fast

    monkeypatch.setattr("vdiff.sampling.job.ready_to_draw", compiled)
    run(spec(models["grey"]), tmp_path / "out.npz", form="npz", compiled=True)
    assert sizes == [3] * 3 * 4
    assert np.abs(unpacked(tmp_path / "out.npz") - exact(models["grey"])).max() <= 0.501
    sizes.clear()
    run(spec(models["grey"]), tmp_path / "small.npz", form="npz", num=2, compiled=True)
    assert sizes == [2] * 4


def test_precision_and_grid_reach_the_network(models, tmp_path):
    run(spec(models["rgb"]), tmp_path / "plain.npz", form="npz")
    run(spec(models["rgb"], grid="logsnr"), tmp_path / "grid.npz", form="npz")
    run(spec(models["rgb"], precision="bf16"), tmp_path / "half.npz", form="npz", precision="bf16")
    plain, grid, half = (unpacked(tmp_path / f"{name}.npz").astype(int) for name in ("plain", "grid", "half"))
    assert np.abs(grid - exact(models["rgb"], grid="logsnr")).max() <= 0.501
    assert np.abs(plain - grid).max() > 2
    assert 0 < np.abs(plain - half).max() < 12
    denoiser, _ = load_checkpoint(models["rgb"])
    assert denoiser.network.conv_in.weight.dtype == torch.float32
