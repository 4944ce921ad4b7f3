"""`vdiff inspect`: what is printed is what is in the folder, for models trained, unfinished, distilled, imported."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, done, error
from tests.reference_network import Shape, save
from tests.toy import distill_config, run_ladder, run_training, signal_at, train_config, write_checkpoint, write_dataset
from vdiff.cli.inspect import ancestors, described, facts
from vdiff.errors import Interrupted
from vdiff.models.backbone import parameter_count
from vdiff.models.checkpoint import CONFIG, WEIGHTS, load_checkpoint, read_config, read_tensors, write_tensors


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> Path:
    """A folder with a dataset, a base model of 8 steps and its students of 4 and 2."""
    folder = tmp_path_factory.mktemp("ladder")
    data = write_dataset(folder / "data")
    run_training(train_config(data), folder / "original")
    config = distill_config(data, folder / "original", to_steps=2, check_images=2, distance_every=0)
    run_ladder(config, read_config(folder / "original"))
    return folder


def rows(text: str) -> dict[str, str]:
    """The aligned rows above the table."""
    return dict(line.split("  ", 1) for line in text.partition("Lineage")[0].splitlines() if "  " in line)


def told(folder: Path) -> dict[str, str]:
    return {key: value.strip() for key, value in rows(done(f"vdiff inspect {folder}").stdout).items()}


def test_facts_are_those_of_the_files(ladder):
    folder = ladder / "base_1"
    found = json.loads(done(f"vdiff inspect {folder} --json").stdout)
    denoiser, config = load_checkpoint(folder)
    assert found["path"] == folder.as_posix()
    assert found["parameters"] == parameter_count(denoiser)
    assert found["fingerprint"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert found["weights_bytes"] == (folder / WEIGHTS).stat().st_size
    assert found["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for key in ("unet", "schedule", "prediction", "num_timesteps", "method", "num_iters", "num_images", "dataset"):
        assert found[key] == getattr(config, key)
    assert found["is_finished"]
    assert not found["takes_any_num_steps"]


def test_torch_is_not_loaded(ladder):
    """Loading it costs more than all the rest: a fresh interpreter ends without it."""
    code = (
        "import sys\nfrom vdiff.cli.main import main\n"
        f"main(['inspect', {str(ladder / 'base_1')!r}], standalone_mode=False)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("checkpoint")
    assert done.stdout.endswith("\nFalse\n")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_in_numbers_that_numpy_does_not_know(dtype, tmp_path):
    write_checkpoint(tmp_path / "model")
    weights = {name: tensor.to(dtype) for name, tensor in read_tensors(tmp_path / "model" / WEIGHTS).items()}
    write_tensors(tmp_path / "model" / WEIGHTS, weights, {})
    assert facts(tmp_path / "model")["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_lineage_leads_back_to_the_original(ladder):
    found = facts(ladder / "base_1")["lineage"]
    assert [entry["path"] for entry in found] == [(ladder / name).as_posix() for name in ("base_0", "original")]
    assert [entry["num_timesteps"] for entry in found] == [4, 8]
    assert [entry["method"] for entry in found] == ["progressive", "base"]
    for entry in found:
        assert entry["fingerprint"] == facts(Path(entry["path"]))["fingerprint"]
        assert entry["num_iters"] == read_config(Path(entry["path"])).num_iters
    assert facts(ladder / "original")["lineage"] == []
    text = done(f"vdiff inspect {ladder / 'base_1'}").stdout
    table = [line.split()[:3] for line in text.partition("Lineage\n")[2].splitlines()]
    assert table[1:] == [
        [(ladder / "base_1").as_posix(), "progressive", "2"],
        [(ladder / "base_0").as_posix(), "progressive", "4"],
        [(ladder / "original").as_posix(), "base", "8"],
    ]
    assert "Lineage" not in done(f"vdiff inspect {ladder / 'original'}").stdout


def test_rows_for_people(ladder):
    student, base = told(ladder / "base_1"), told(ladder / "original")
    assert student["model"] == f"student of {(ladder / 'base_0').as_posix()} (4 steps), method progressive"
    assert student["steps"] == "2, or a number that divides them"
    assert base["model"] == "base model"
    assert base["steps"] == "8, or any other number"
    assert base["network"] == "UNet, widths 4, 1 block a level, attention in the middle alone (1 head)"
    assert base["images"] == "4 × 4 pixels, channels: 1"
    assert base["training"].startswith("6 updates, 24 images, ")
    assert base["dataset"].startswith((ladder / "data").as_posix())
    assert base["weights"].startswith("ema, ")
    assert base["on disk"].endswith("including training state")
    assert "options" in base
    assert base.keys() & {"classes", "guidance"} == set()


def test_the_newest_is_taken_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error("vdiff inspect", 1)
    write_checkpoint(Path("checkpoints/model"))
    assert json.loads(done("vdiff inspect --json").stdout)["path"] == "checkpoints/model"


def test_classes_and_guidance(tmp_path):
    names = [f"class {k}" for k in range(9)]
    write_checkpoint(tmp_path / "model", classes=9, class_names=names, guidance_range=[0.0, 4.0])
    found = told(tmp_path / "model")
    assert found["classes"] == f"9: {', '.join(names[:8])}, …"
    assert found["guidance"] == "weights from 0 to 4 as an input"
    assert facts(tmp_path / "model")["class_names"] == names


def test_an_unfinished_run(ladder, tmp_path):
    config = train_config(ladder / "data")
    with pytest.raises(Interrupted):
        run_training(config, tmp_path / "run", reporter=signal_at(3))
    found = facts(tmp_path / "run")
    done_so_far = read_config(tmp_path / "run").num_iters
    assert 3 <= done_so_far < 6
    assert (found["num_iters"], found["target_iters"], found["is_finished"]) == (done_so_far, 6, False)
    assert found["can_be_resumed"]
    assert told(tmp_path / "run")["training"].startswith(
        f"unfinished: {done_so_far} of 6 updates, {4 * done_so_far} images, "
    )
    (tmp_path / "run" / CONFIG).unlink()
    assert "run is a run that has saved no checkpoint yet; " in error(f"vdiff inspect {tmp_path / 'run'}", 1)


@pytest.mark.parametrize("time_scale", [1, 4])
def test_an_imported_model(time_scale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("theirs.pt"), Shape(), time_scale=time_scale)
    done("vdiff import reference theirs.pt --image_size 8 --attention_heads 1")
    found = told(Path("checkpoints/theirs"))
    digest = hashlib.sha256(Path("theirs.pt").read_bytes()).hexdigest()
    kind = "base model" if time_scale == 1 else "student, method progressive"
    assert found["model"] == f"{kind}, imported: reference/theirs.pt sha256:{digest}"
    assert found["training"] == "not by vdiff"
    assert "dataset" not in found
    assert facts(Path("checkpoints/theirs"))["is_imported"]


def test_an_imported_model_with_teachers(tmp_path):
    """As a pipeline that vdiff wrote brings them along: the first row names its teacher, another where it came from."""
    teacher = {"path": "base_0", "num_timesteps": 8, "method": "base", "teacher": None}
    origin = "diffusers/base_1, trained by vdiff on digits_8"
    write_checkpoint(tmp_path / "again", dataset=f"imported:{origin}", method="progressive", teacher=teacher)
    found = described(facts(tmp_path / "again"))
    assert found["model"] == "student of base_0 (8 steps), method progressive"
    assert found["imported"] == origin
    assert "dataset" not in found


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_what_is_missing_is_said(name, tmp_path):
    write_checkpoint(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    assert name in error(f"vdiff inspect {tmp_path / 'model'}", 1)


def test_models_made_of_what_was_in_memory(tmp_path):
    write_checkpoint(tmp_path / "base", dataset="tensors", dataset_fingerprint="")
    assert told(tmp_path / "base")["dataset"] == "tensors"
    teacher = {**read_config(tmp_path / "base").to_dict(), "path": "", "fingerprint": "ab"}
    write_checkpoint(tmp_path / "student", method="progressive", teacher=teacher)
    assert told(tmp_path / "student")["model"].startswith("student of a model in memory (8 steps)")


def test_a_lineage_of_half_descriptions_is_still_told(tmp_path):
    """As an older version, or another hand, may have written them."""
    write_checkpoint(tmp_path / "model", teacher={"method": 3, "train_seconds": "x", "num_iters": [1], "teacher": {}})
    assert len(list(ancestors(read_config(tmp_path / "model").teacher))) == 2
    table = done(f"vdiff inspect {tmp_path / 'model'}").stdout.partition("Lineage\n")[2].splitlines()
    assert [line.split() for line in table[2:]] == [["?", "3", "?"], ["?", "?", "?"]]
