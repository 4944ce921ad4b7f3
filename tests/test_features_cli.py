"""`vdiff features`: from a dataset to a file that any program with torch can run, or to one line of error."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vdiff
from tests.commands import done, error, run
from tests.digits import SIDE, write_digits
from tests.exported import run_without
from tests.oracles import randn
from tests.toy import contents, write_dataset
from vdiff.cli.features import learned
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError
from vdiff.evaluation.features import load_features
from vdiff.models import feature_network
from vdiff.models.feature_network import FeatureMetadata, parse_metadata
from vdiff.models.program import METADATA
from vdiff.reporting import Silent
from vdiff.training import feature_training
from vdiff.training.feature_training import FeatureTraining, train_features

ITERS, DIM = 3, 6
QUICK = f"--num_iters {ITERS} --batch_size 16 --device cpu --num_workers 0 --dim {DIM} --seed 4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with classes and without, and a network of each, as the command made them."""
    root: Path = tmp_path_factory.mktemp("features")
    write_digits(root / "digits", count=200)
    write_digits(root / "unnamed", count=200, classes=())
    result = done(f"vdiff features --data {root / 'digits'} --out {root / 'new/c.pt2'} {QUICK}")
    (root / "c.txt").write_text(result.stdout)
    result = done(f"vdiff features --data {root / 'unnamed'} --out {root / 'a.pt2'} --json {QUICK}")
    (root / "a.json").write_text(result.stdout)
    return root


def about(path: Path) -> FeatureMetadata:
    """What a file says of itself."""
    torch.export.load(path, extra_files=(told := {METADATA: ""}))
    found = parse_metadata(told[METADATA])
    assert found is not None
    return found


FILES = pytest.mark.parametrize(("data", "file"), [("digits", "new/c.pt2"), ("unnamed", "a.pt2")])


@FILES
def test_the_file_answers_what_the_network_does_for_any_number_of_images(data, file, folder):
    """The network that Python trains from the same settings, too: equal seeds give equal features."""
    training = FeatureTraining(dim=DIM, num_iters=ITERS, batch_size=16, seed=4)
    network, _ = train_features(ImageStore(folder / data), SIDE, training, reporter=Silent())
    program = torch.export.load(folder / file).module()
    images = randn(5, 1, SIDE, SIDE, dtype=torch.float32)
    with torch.no_grad():
        due = network(images)
        assert due.shape == (5, DIM)
        assert float(due.std()) > 0.01
        for count in (1, 2, 5):
            torch.testing.assert_close(program(images[:count]), due[:count], rtol=0, atol=1e-5)


@FILES
def test_evaluations_take_the_file(data, file, folder):
    features = load_features(str(folder / file), image_size=SIDE, channels=1)
    assert features.dim == DIM
    images = randn(4, 1, SIDE, SIDE, dtype=torch.float32)
    with torch.no_grad():
        due = torch.export.load(folder / file).module()(images).double().numpy()
    np.testing.assert_allclose(features(images), due, rtol=0, atol=1e-6)
    with pytest.raises(VdiffError, match="takes images of 8"):
        load_features(str(folder / file), image_size=16, channels=1)
    assert data


@pytest.mark.slow
def test_it_runs_where_vdiff_is_not_installed(folder):
    save_file({"images": randn(3, 1, SIDE, SIDE, dtype=torch.float32)}, folder / "images.safetensors")
    code = """
import torch
from safetensors.torch import load_file, save_file
images = load_file("images.safetensors")["images"]
save_file({"features": torch.export.load("new/c.pt2").module()(images).detach()}, "features.safetensors")
"""
    run_without(["vdiff"], code, folder)
    due = load_features(str(folder / "new/c.pt2"), image_size=SIDE, channels=1)
    images = load_file(folder / "images.safetensors")["images"]
    found = load_file(folder / "features.safetensors")["features"].numpy()
    np.testing.assert_allclose(found, due(images), rtol=0, atol=1e-5)


def test_the_file_says_what_it_is(folder):
    classifier, autoencoder = about(folder / "new/c.pt2"), about(folder / "a.pt2")
    for found, data in ((classifier, "digits"), (autoencoder, "unnamed")):
        store = ImageStore(folder / data)
        assert (found.image_size, found.channels, found.dim) == (SIDE, 1, DIM)
        assert (found.num_iters, found.batch_size, found.seed, found.num_held_out) == (ITERS, 16, 4, 20)
        assert (found.dataset, found.dataset_fingerprint) == ("digits", store.meta.fingerprint)
        assert found.vdiff_version == vdiff.__version__
    assert (classifier.kind, classifier.metric, len(classifier.class_names)) == ("classifier", "accuracy", 10)
    assert (autoencoder.kind, autoencoder.metric, autoencoder.class_names) == ("autoencoder", "psnr", [])
    for path in (folder / "new/c.pt2", folder / "a.pt2"):
        with zipfile.ZipFile(path) as archive:
            held = b"".join(archive.read(name) for name in archive.namelist())
        for secret in (str(Path(vdiff.__file__).parent), "site-packages", ".py", str(folder)):
            assert secret.encode() not in held


def test_the_result_is_told_in_words_and_in_json(folder):
    found = about(folder / "new/c.pt2")
    first, second, third = (folder / "c.txt").read_text().splitlines()
    assert first == f"written    {folder / 'new/c.pt2'}: 6 features of 8 × 8 images"
    assert second == (
        f"held out   accuracy {found.held_out:.1%} on 20 images (guessing the most common class: {found.baseline:.1%})"
    )
    assert third.startswith("next       vdiff evaluate ")
    told = json.loads((folder / "a.json").read_text())
    assert told.pop("path") == str(folder / "a.pt2")
    assert FeatureMetadata(**told) == about(folder / "a.pt2")


def test_the_same_command_gives_the_same_file(folder, tmp_path):
    result = done(f"vdiff features --data {folder / 'digits'} --out {tmp_path / 'c.pt2'} {QUICK}")
    assert "held out   accuracy" in result.stdout
    assert "warning: accuracy" in result.stderr  # three updates teach nothing
    assert "--num_iters" in result.stderr
    assert (tmp_path / "c.pt2").read_bytes() == (folder / "new/c.pt2").read_bytes()


@pytest.mark.parametrize(
    ("metric", "held_out", "baseline", "due"),
    [("accuracy", 0.1, 0.1, 0.0), ("accuracy", 0.95, 0.5, 0.9), ("psnr", 30.0, 20.0, 0.9), ("psnr", 10.0, 10.0, 0.0)],
)
def test_what_was_learned_is_the_part_of_the_errors_that_is_gone(metric, held_out, baseline, due, folder):
    values = json.loads((folder / "a.json").read_text()) | {
        "metric": metric,
        "held_out": held_out,
        "baseline": baseline,
    }
    values.pop("path")
    assert learned(FeatureMetadata(**values)) == pytest.approx(due)


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"vdiff_version": "1"}', '{"features": 99}', '{"features": 1}'])
def test_metadata_of_others_is_nothing(text):
    assert parse_metadata(text) is None


# What cannot be done


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before anything is trained."""

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("it was trained")

    monkeypatch.setattr(feature_training, "train_features", never)


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """A folder of datasets and files that do not do."""
    write_digits(tmp_path / "digits", count=30)
    write_dataset(tmp_path / "small")
    write_dataset(tmp_path / "one", classes=["only"])
    write_dataset(tmp_path / "cut.partial")
    (tmp_path / "old.pt2").write_bytes(b"old")
    (tmp_path / "folder.pt2").mkdir()
    return tmp_path


BAD = [
    ("--data none --out f.pt2", 1, "none: no such dataset; give"),
    ("--data cut --out f.pt2", 1, "cut is an incomplete dataset"),
    ("--data small --out f.pt2", 1, "small has images of 4 pixels; a feature network needs 8 to 256"),
    ("--data digits --out f.pt2 --image_size 9", 1, "has no images of size 9; it has 8"),
    (
        "--data small --out f.pt2 --kind classifier",
        2,
        "--kind classifier: small has no classes; give --kind autoencoder",
    ),
    ("--data one --out f.pt2 --kind classifier", 2, "--kind classifier: one has 1 class; give"),
    ("--data digits --out old.pt2", 1, "old.pt2 exists and is not a program that vdiff wrote; choose"),
    ("--data digits --out folder.pt2 --overwrite", 2, "folder.pt2 is a folder; give"),
    ("--data digits --out f.onnx", 2, "--out f.onnx: the file is a torch.export program; give FILE.pt2"),
    ("--data digits --out old.pt2/f.pt2", 1, "cannot write old.pt2/f.pt2: "),
    ("--data digits --out /proc/f.pt2", 1, "cannot write /proc/f.pt2: "),
    ("--data digits", 2, "Missing option '--out'"),
    ("--out f.pt2", 1, "no dataset under data/; make one"),
    ("--data digits --out f.pt2 --kind gan", 2, "'gan' is unknown; "),
    ("--data digits --out f.pt2 --dim 1", 2, "1 is not in the range"),
]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("words", "code", "message"), BAD)
def test_what_cannot_be_done_is_said_in_a_line(words, code, message, wrong, monkeypatch):
    monkeypatch.chdir(wrong)
    before = contents(wrong)
    assert message in error(f"vdiff features {words}", code)
    assert contents(wrong) == before


@pytest.mark.usefixtures("no_training")
def test_it_is_one_process(wrong):
    line = f"vdiff features --data {wrong / 'digits'} --out {wrong / 'f.pt2'}"
    assert "trains in one process" in error(line, 2, {"WORLD_SIZE": "2"})


def test_of_several_sizes_one_is_chosen(tmp_path, folder):
    done(f"prepare_data.py {folder / 'digits'} --size 8,10 --out {tmp_path / 'data'} --num_workers 0")
    line = f"vdiff features --data {tmp_path / 'data'} --out {tmp_path / 'f.pt2'} {QUICK}"
    assert "has the sizes 8, 10; choose one with --image_size" in error(line, 2)
    done(f"{line} --image_size 10 --kind autoencoder")
    assert about(tmp_path / "f.pt2").image_size == 10


def program() -> bytes:
    """A file that claims to be one of ours."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("model/extra/vdiff.json", "{}")
    return buffer.getvalue()


OLD = program()


@pytest.fixture
def ready(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command that has trained and exported its network already, and would replace a file."""
    program = torch.export.load(folder / "new/c.pt2")
    training = FeatureTraining(dim=DIM, num_iters=ITERS, batch_size=16, seed=4)
    answer = train_features(ImageStore(folder / "digits"), SIDE, training, reporter=Silent())
    monkeypatch.setattr(feature_training, "train_features", lambda *_, **__: answer)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: program)
    (tmp_path / "f.pt2").write_bytes(OLD)
    return f"vdiff features --data {folder / 'digits'} --out {tmp_path / 'f.pt2'} --overwrite {QUICK}"


def test_a_program_that_answers_wrongly_leaves_the_old_file(ready, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_network, "TOLERANCE", -1.0)
    assert "the exported features differ by " in error(ready, 1)
    assert contents(tmp_path) == {"f.pt2": OLD}


def test_a_full_disk_leaves_the_old_file(ready, tmp_path, monkeypatch):
    def full(self: Path, _: Any) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert f"cannot write {tmp_path / 'f.pt2'}: No space left on device" in error(ready, 1)
    assert contents(tmp_path) == {"f.pt2": OLD}


def test_with_overwrite_the_file_is_replaced(ready, tmp_path, folder):
    done(ready)
    assert about(tmp_path / "f.pt2") == about(folder / "new/c.pt2")


def test_interrupted_it_leaves_no_file(folder, tmp_path, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_training, "train_features", stop)
    result = run(f"vdiff features --data {folder / 'digits'} --out {tmp_path / 'f.pt2'}")
    assert result.exit_code == 130
    assert re.search("^interrupted$", result.stderr, re.MULTILINE)
    assert contents(tmp_path) == {}


def test_a_loss_that_is_not_finite_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_training, "LR", math.inf)
    line = f"vdiff features --data {folder / 'digits'} --out {tmp_path / 'f.pt2'} {QUICK}"
    assert "the loss is nan at update 2; try another --seed" in error(line, 1)
    assert contents(tmp_path) == {}
