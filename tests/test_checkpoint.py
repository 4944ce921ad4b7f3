"""The model folder: what is saved comes back bit for bit, and whatever is wrong with it is said in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vdiff
from tests.oracles import ALL_SCHEDULES, condition, randn
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.errors import VdiffError
from vdiff.files import CHECKSUM
from vdiff.models import checkpoint
from vdiff.models.checkpoint import (
    CONFIG,
    WEIGHTS,
    CheckpointConfig,
    load_checkpoint,
    read_config,
    read_metadata,
    read_tensors,
    save_checkpoint,
    weights_fingerprint,
    write_tensors,
)
from vdiff.models.unet_config import UNetConfig

UNET = UNetConfig(channels=4, embedding_channels=4, multipliers=(1,), num_blocks=1, attention_strides=(1,))


def config(schedule: str = "cosine", prediction: str = "v", **changes) -> CheckpointConfig:
    out_channels = 3 * PREDICTION_TYPES[prediction].channel_factor
    values = {
        "unet": dataclasses.replace(UNET, out_channels=out_channels).to_dict(),
        "schedule": ALL_SCHEDULES[schedule].to_dict(),
        "prediction": prediction,
        "num_timesteps": 8,
        "image_size": 4,
        "method": "base",
        "weights": "ema",
        "num_iters": 3,
        "target_iters": 3,
        "num_images": 96,
        "dataset": "digits – Größe 4",
        "dataset_fingerprint": "abc",
    }
    return CheckpointConfig(**values | changes)


def saved(folder: Path, described: CheckpointConfig | None = None, seed: int = 0):
    """A checkpoint with random weights everywhere; returns its denoiser."""
    described = described or config()
    denoiser = described.build().eval()
    for i, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(randn(*parameter.shape, seed=seed + i))
    save_checkpoint(folder, denoiser.state_dict(), described)
    return denoiser


def edit(folder: Path, **changes) -> None:
    """Change (or with `...` remove) keys of config.json, as somebody who deletes its checksum."""
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {CHECKSUM: ..., **changes}
    kept = {key: value for key, value in values.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(kept), encoding="utf-8")


def assert_refused(folder: Path, *words: str, load=load_checkpoint) -> None:
    with pytest.raises(VdiffError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 1
    assert not re.search(r"\wError\b|Traceback", message)
    for word in words:
        assert word in message
    assert caught.value.hint


@pytest.mark.parametrize("schedule", [name for name in ALL_SCHEDULES if name != "cosine_uncut"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_round_trip_is_bit_equal(tmp_path, schedule, prediction):
    if prediction == "eps" and ALL_SCHEDULES[schedule].zero_snr:
        pytest.skip("eps carries no information at zero SNR: refused")
    described = config(schedule, prediction, teacher={"method": "base"}, class_names=["a", "ß"])
    denoiser = saved(tmp_path / "deep" / "model", described)
    loaded, found = load_checkpoint(tmp_path / "deep" / "model")
    assert found == described
    assert not loaded.training
    assert loaded.schedule == ALL_SCHEDULES[schedule]
    z, t = randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([0.25, 0.9], dtype=torch.float64)
    for name in ("x", "eps", "v"):
        assert torch.equal(getattr(loaded(z, t), name), getattr(denoiser(z, t), name))
    assert sorted(path.name for path in (tmp_path / "deep" / "model").iterdir()) == [CONFIG, WEIGHTS]
    values = json.loads((tmp_path / "deep" / "model" / CONFIG).read_text(encoding="utf-8"))
    assert values["vdiff_version"] == vdiff.__version__
    assert values["format_version"] == checkpoint.FORMAT_VERSION


def test_a_folder_may_be_named_by_its_path_as_text(tmp_path):
    saved(tmp_path)
    assert read_config(str(tmp_path)) == read_config(tmp_path)
    loaded, found = load_checkpoint(str(tmp_path))
    expected, described = load_checkpoint(tmp_path)
    assert found == described
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)
    with pytest.raises(VdiffError, match="no such checkpoint"):
        load_checkpoint(str(tmp_path / "other"))


def test_classes_survive(tmp_path):
    described = config(unet=dataclasses.replace(UNET, num_classes=3).to_dict())
    denoiser = saved(tmp_path, described)
    z, t, classes = torch.ones(2, 3, 4, 4), torch.tensor([0.25, 0.9]), torch.tensor([0, 2])
    loaded, model = load_checkpoint(tmp_path)
    assert model.class_names == ["0", "1", "2"]  # those of a file without names
    assert torch.equal(loaded(z, t, condition(classes)).v, denoiser(z, t, condition(classes)).v)
    assert not torch.equal(loaded(z, t, condition(classes)).v, loaded(z, t, condition(classes.flip(0))).v)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix):
    denoiser = saved(tmp_path)
    state = denoiser.state_dict()
    save_checkpoint(tmp_path, {prefix + name: tensor for name, tensor in state.items()}, config())
    assert set(load_file(tmp_path / WEIGHTS)) == set(state)
    save_file({f"network.{prefix}{name.removeprefix('network.')}": t for name, t in state.items()}, tmp_path / WEIGHTS)
    loaded, _ = load_checkpoint(tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_saving_again_replaces_both_files(tmp_path):
    saved(tmp_path)
    first = weights_fingerprint(tmp_path)
    denoiser = saved(tmp_path, config(num_iters=7), seed=9)
    loaded, found = load_checkpoint(tmp_path)
    assert found.num_iters == 7
    assert weights_fingerprint(tmp_path) != first
    assert torch.equal(loaded.network.conv_in.weight, denoiser.network.conv_in.weight)


def test_fingerprint_is_the_sha256_of_the_weights_file(tmp_path):
    saved(tmp_path)
    assert weights_fingerprint(tmp_path) == hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()


def test_missing_folder_names_what_is_beside_it(tmp_path):
    assert_refused(tmp_path / "original", "original: no such checkpoint", "python train.py")
    saved(tmp_path / "base_0")
    saved(tmp_path / "base_1")
    assert_refused(tmp_path / "original", "original: no such checkpoint", "holds base_0, base_1")


def test_file_where_a_folder_is_due(tmp_path):
    saved(tmp_path)
    assert_refused(tmp_path / WEIGHTS, "model.safetensors is a file", "folder")


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "state.safetensors"
    tensors = {"a": randn(2, 3), "b": torch.tensor(7)}
    for metadata in ({"num_iters": "3", "größe": "ü"}, {}):
        write_tensors(path, tensors, metadata)
        assert read_metadata(path) == metadata
        found = read_tensors(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
    assert [child.name for child in tmp_path.iterdir()] == ["state.safetensors"]
    save_file(tensors, path)
    assert read_metadata(path) == {}
    for read in (read_tensors, read_metadata):
        assert_refused(tmp_path / "nothing", "nothing is missing", load=read)
        assert_refused(tmp_path, "cannot be read", load=read)


def test_missing_config_and_missing_weights(tmp_path):
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert_refused(tmp_path, "model.safetensors is missing")
    (tmp_path / CONFIG).unlink()
    assert_refused(tmp_path, "holds no config.json")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1, -400])
def test_truncated_weights(tmp_path, size):
    saved(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:size])
    assert_refused(tmp_path, "model.safetensors cannot be read", "truncated or damaged")
    for read in (read_tensors, read_metadata):
        assert_refused(tmp_path / WEIGHTS, "cannot be read", load=read)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}]'])
def test_config_that_is_no_json_object(tmp_path, text):
    saved(tmp_path)
    (tmp_path / CONFIG).write_text(text, encoding="utf-8")
    assert_refused(tmp_path, "config.json cannot be read", "train again")


def test_config_that_is_no_text(tmp_path):
    saved(tmp_path)
    (tmp_path / CONFIG).write_bytes(b"\xff\xfe\x00")
    assert_refused(tmp_path, "config.json cannot be read")


def test_unknown_key_with_a_suggestion(tmp_path):
    saved(tmp_path)
    edit(tmp_path, num_timestep=8)
    assert_refused(tmp_path, "unknown key 'num_timestep'", "did you mean 'num_timesteps'?")


def test_missing_keys_are_named(tmp_path):
    saved(tmp_path)
    edit(tmp_path, unet=..., dataset=...)
    assert_refused(tmp_path, "lacks the key 'dataset', 'unet'", "train again")


def test_defaults_may_be_missing(tmp_path):
    saved(tmp_path)
    edit(tmp_path, teacher=..., class_names=..., format_version=...)
    assert read_config(tmp_path) == config()


def test_newer_format(tmp_path):
    saved(tmp_path)
    edit(tmp_path, format_version=checkpoint.FORMAT_VERSION + 1, key_of_the_future=1)
    assert_refused(tmp_path, f"format {checkpoint.FORMAT_VERSION + 1}, newer than", "update vdiff")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet": {"chanels": 4}}, ["does not describe a model", "unknown UNet option chanels"]),
        ({"unet": {"channels": "4"}}, ["does not describe a model", "channels must be a whole number, got '4'"]),
        (
            {"unet": {"in_channels": float("nan")}},
            ["does not describe a model", "in_channels must be a whole number, got nan"],
        ),
        ({"unet": {"num_classes": 3}, "class_names": ["a"]}, ["does not describe a model", "names 1 of 3 classes"]),
        ({"schedule": {"name": "sine"}}, ["does not describe a model", "unknown schedule 'sine'"]),
        ({"prediction": "both"}, ["does not describe a model", "needs 6 output channels"]),
        ({"prediction": "w"}, ["unknown prediction type 'w'"]),
    ],
)
def test_config_that_describes_no_model(tmp_path, changes, words):
    saved(tmp_path)
    edit(tmp_path, **changes)
    assert_refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("schedule", "cosine", "an object"),
        ("unet", [], "an object"),
        ("teacher", "base_0", "an object or null"),
        ("format_version", "2", "a whole number"),
        ("format_version", None, "a whole number"),
        ("format_version", True, "a whole number"),
        ("num_iters", 3.5, "a whole number"),
        ("dataset", None, "a string"),
        ("class_names", "ab", "a list"),
        ("class_names", ["a", 3], "a list of strings"),
        ("guidance_range", [0.0, "4"], "a list of numbers"),
    ],
)
def test_config_with_values_of_the_wrong_kind(tmp_path, key, value, kind):
    saved(tmp_path)
    edit(tmp_path, **{key: value})
    assert_refused(tmp_path, f"config.json: '{key}' must be {kind};", "train again")


@pytest.mark.parametrize("field", dataclasses.fields(CheckpointConfig), ids=lambda field: field.name)
def test_every_key_is_held_to_its_kind(tmp_path, field):
    saved(tmp_path)
    edit(tmp_path, **{field.name: [True]})
    kind = "true or false" if field.type == "bool" else "a"
    assert_refused(tmp_path, f"config.json: '{field.name}' must be {kind}", load=read_config)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_timesteps", 0, "'num_timesteps' must be at least 1, not 0"),
        ("image_size", -8, "'image_size' must be at least 1, not -8"),
        ("image_size", 65536, "'image_size' must be at most 8192, not 65536"),
        ("train_seconds", float("nan"), "'train_seconds' must be at least 0, not nan"),
        ("train_seconds", float("inf"), "'train_seconds' must be at most 9223372036854775808, not inf"),
        ("num_images", -1, "'num_images' must be at least 0, not -1"),
        ("target_iters", 10**400, "'target_iters' must be at most 9223372036854775808, not 1"),
        ("guidance_range", [0.0, float("nan")], "'guidance_range' must be finite"),
        ("schedule", {"name": "cosin"}, "does not describe a model: unknown schedule 'cosin'"),
        ("schedule", {"name": "cosine", "logsnr_max": -1}, "does not describe a model: logsnr_max must be positive"),
    ],
)
def test_values_without_a_meaning_are_blamed_on_the_file(tmp_path, key, value, words):
    saved(tmp_path)
    edit(tmp_path, **{key: value})
    assert_refused(tmp_path, words, load=read_config)


def test_images_of_a_size_that_the_network_cannot_halve(tmp_path):
    saved(tmp_path, config(unet=dataclasses.replace(UNET, multipliers=(1, 1)).to_dict()))
    load_checkpoint(tmp_path)
    edit(tmp_path, image_size=5)
    assert_refused(tmp_path, "config.json: 'image_size' must be a multiple of 2")


def test_weights_that_do_not_fit(tmp_path):
    saved(tmp_path)
    edit(tmp_path, unet=dataclasses.replace(UNET, embedding_channels=6).to_dict())
    assert_refused(tmp_path, "does not fit config.json", "is (4, 4), not (6, 4)")
    edit(tmp_path, unet=dataclasses.replace(UNET, num_blocks=2).to_dict())
    assert_refused(tmp_path, "does not fit", "missing (network.")
    edit(tmp_path, unet=dataclasses.replace(UNET, num_classes=2).to_dict())
    assert_refused(tmp_path, "does not fit", "1 missing (network.embed_class.weight")
    edit(tmp_path, unet=UNET.to_dict())
    save_file(load_file(tmp_path / WEIGHTS) | {"more": torch.zeros(1)}, tmp_path / WEIGHTS)
    assert_refused(tmp_path, "does not fit", "1 unexpected (more")


def test_a_failing_write_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    denoiser = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_fills_up(tensors, path, metadata):
        del tensors, metadata
        Path(path).write_bytes(b"half of the wei")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", disk_fills_up)
    with pytest.raises(VdiffError, match=r"cannot write .*model\.safetensors: No space left on device; free space"):
        save_checkpoint(tmp_path, denoiser.state_dict(), config(num_iters=99))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


SAVE_UNDER_A_LIMIT = """
import resource, sys, torch
from pathlib import Path
from tests.test_checkpoint import config
from vdiff.errors import VdiffError
from vdiff.models.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    save_checkpoint(Path(sys.argv[1]), {"weight": torch.zeros(10_000)}, config())
except VdiffError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_real_failing_write_leaves_the_old_checkpoint_whole(tmp_path):
    """The operating system refuses the bytes, below safetensors, whose own error is no OSError."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", SAVE_UNDER_A_LIMIT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"cannot write .*model\.safetensors: .*File too large.*; free space.*\n", done.stdout)


def test_steps_that_a_model_was_made_for():
    config(num_timesteps=1024).check_num_steps(7)
    student = config(method="progressive", num_timesteps=8)
    table = config("linear", num_timesteps=1000)
    few = config("linear", method="progressive", num_timesteps=96)
    no_part, too_many = "does not divide", "too few for"
    for described, good, bad, reason in (
        (student, (1, 2, 4, 8), (3, 5, 16), no_part),
        (few, (1, 32, 96), (7, 64, 1000), no_part),
        (table, (1, 3, 8, 128, 500, 1000), (1001, 2000), too_many),
    ):
        for num_steps in good:
            described.check_num_steps(num_steps)
        for num_steps in bad:
            with pytest.raises(ValueError, match=reason):
                described.check_num_steps(num_steps)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        config().check_num_steps(0)
    assert [described.takes_any_num_steps for described in (config(), student, table)] == [True, False, True]


def test_finished_when_the_last_update_is_done():
    assert [config(num_iters=n, target_iters=3).is_finished for n in (2, 3, 4)] == [False, True, True]
