"""Fine-tuning of a checkpoint, with all weights and with a LoRA, which is stored alone."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vdiff
from tests.commands import done, error
from tests.oracles import randn
from tests.programs import ends, launch
from tests.toy import (
    SIZE,
    Watcher,
    assert_equal_bits,
    run_training,
    signal_at,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.files import read_json, write_json
from vdiff.models.adapters import AdapterSettings, adapted_layers, add_adapter, merge_adapter
from vdiff.models.checkpoint import ADAPTER, WEIGHTS, load_checkpoint, read_config, read_tensors, weights_fingerprint
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training import base_training
from vdiff.training.base import describe, resolve_training
from vdiff.training.base_training import begin, start_of_conversion
from vdiff.training.config import TrainConfig, resolve
from vdiff.training.dataset import open_images
from vdiff.training.finetuning import adapter_of, with_fingerprint
from vdiff.training.loop import Run
from vdiff.training.presets import FINE_TUNING, read_preset
from vdiff.training.stages import resolve_distillation
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep

WHOLE = {"channels": 8, "embedding_channels": 8, "multipliers": (1, 2), "num_blocks": 1, "attention_strides": (1,)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "toy_4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "original"
    write_checkpoint(folder)
    return folder


def finetune_config(data: Path, base: Path, **changes: Any) -> TrainConfig:
    """Six updates of a LoRA of rank 2 in every linear layer."""
    values = {"unet": {}, "lora_rank": 2, "lora_targets": "linear", "dropout": 0.0, "preset": "lora"}
    return train_config(data, base=str(base), **values | changes)


# Layers


def with_lora(network: UNet) -> None:
    """A LoRA in every layer, whose B is not zero."""
    add_adapter(network, AdapterSettings(2, 3.0, targets=("linear", "conv")))
    for k, (name, weight) in enumerate(network.named_parameters()):
        if "lora_B" in name:
            weight.data.copy_(0.3 * randn(*weight.shape, seed=k))


@pytest.mark.parametrize("options", [{}, {"resample": "conv", "downsample_pad": "end"}, {"resample": "conv"}])
def test_a_lora_adds_its_product_to_the_weights_of_every_layer(options):
    """Written out: W + (alpha/rank)·B A for linear layers, the same of kernels for convolutions."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(**WHOLE, **options)).eval()
    for k, weight in enumerate(network.parameters()):
        weight.data.copy_(0.2 * randn(*weight.shape, seed=k))
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    z, timestep = randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        before = network(z, timestep)
        with_lora(network)
        changed = network(z, timestep)
    lora = dict(network.named_parameters())
    expected = UNet(UNetConfig(**WHOLE, **options)).eval()
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        if (a := lora.get(f"{layer}.lora_A.default.weight")) is not None:
            b = lora[f"{layer}.lora_B.default.weight"]
            tensor = tensor + 3 / 2 * torch.einsum("or,ri...->oi...", b.flatten(1), a).reshape(tensor.shape)
        plain[name] = tensor
    expected.load_state_dict(plain)
    with torch.no_grad():
        wanted = expected(z, timestep)
        assert (wanted - before).abs().max() > 0.01
        torch.testing.assert_close(changed, wanted, rtol=1e-4, atol=1e-4)
        merge_adapter(network)
        assert network.state_dict().keys() == plain.keys()
        torch.testing.assert_close(network(z, timestep), wanted, rtol=1e-4, atol=1e-4)


def test_a_lora_changes_nothing_at_first_and_alone_learns():
    network = UNet(UNetConfig(**WHOLE))
    z, timestep = randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([3.0, 700.0])
    before = network.eval()(z, timestep)
    add_adapter(network, AdapterSettings(2, 2.0))
    assert torch.equal(network.eval()(z, timestep), before)
    learning = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert learning
    assert all(".lora_" in name for name in learning)


def test_targets_are_words_or_ends_of_names():
    network = UNet(UNetConfig(**WHOLE))
    linear = {name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    convolutions = {name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}

    def found(*targets: str) -> set[str]:
        return set(adapted_layers(network, AdapterSettings(1, 1.0, targets=targets)))

    assert found("linear") == linear
    assert found("conv") == convolutions
    assert found("linear", "conv") == linear | convolutions
    assert found("attention") == {name for name in linear if "attention" in name} != set()
    assert found("qkv", "middle.0.attention.out") == {n for n in linear if n.endswith("qkv")} | {
        "middle.0.attention.out"
    }
    with pytest.raises(OptionError, match="--lora_targets to_q: no layer of the network is called so; give attention"):
        found("linear", "to_q")


# Runs


@pytest.fixture(scope="module")
def lora(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a break."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    run_training(finetune_config(data, base, ckpt_interval=2, keep_last=1), folder)
    return folder


def test_a_checkpoint_of_a_lora_holds_the_lora_alone(lora, base):
    assert not (lora / WEIGHTS).exists()
    tensors = read_tensors(lora / ADAPTER)
    assert tensors
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    config = read_config(lora)
    assert config.adapter == AdapterSettings(2, 2.0, targets=("linear",))
    assert Path((config.base or {})["path"]).resolve() == base.resolve()
    said = " ".join(done(f"vdiff inspect {lora}").output.split())
    assert "LoRA rank 2, alpha 2, layers: linear" in said
    assert f"(fingerprint {weights_fingerprint(base)[:12]})" in said
    raw = {name for name in read_tensors(state_path(lora)) if name.startswith(("raw.", "exp_avg.", "ema."))}
    assert len(raw) == 3 * len(tensors)


def test_a_lora_is_loaded_as_a_plain_model_of_changed_weights(lora, base):
    denoiser, config = load_checkpoint(lora)
    original, _ = load_checkpoint(base)
    tensors = read_tensors(lora / ADAPTER)
    assert config.adapter is None
    assert denoiser.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        layer = name.removeprefix("network.").removesuffix(".weight")
        b, a = (tensors.get(f"network.{layer}.lora_{part}.weight") for part in ("B", "A"))
        delta = torch.zeros_like(tensor) if b is None or a is None else b @ a
        torch.testing.assert_close(denoiser.state_dict()[name], tensor + delta, rtol=1e-5, atol=1e-6)
    assert any(b.abs().max() > 0 for name, b in tensors.items() if "lora_B" in name)
    history = next(iter((lora / "history").iterdir()))
    assert load_checkpoint(history)[1].num_iters == int(history.name)


@pytest.mark.parametrize(("alpha", "expected"), [(None, 2.0), (3.0, 3.0)])
def test_alpha_is_that_of_the_settings_or_the_rank(data, base, alpha, expected):
    config = finetune_config(data, base, lora_alpha=alpha, lora_dropout=0.1, lora_targets="to_q, conv")
    assert adapter_of(config) == AdapterSettings(2, expected, 0.1, ("to_q", "conv"))


def test_a_lora_with_the_key_of_the_first_ones_is_read(lora, tmp_path):
    shutil.copytree(lora, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    values = read_json(path, "")
    values["adapter"]["text_encoder"] = False
    write_json(path, values)
    assert read_config(tmp_path / "run") == read_config(lora)


def test_a_lora_draws_is_saved_and_starts_another(lora, data, tmp_path):
    model = vdiff.load(lora, device="cpu")
    model.save(tmp_path / "merged")
    merged = vdiff.load(tmp_path / "merged", device="cpu")
    for a, b in zip(model.network.parameters(), merged.network.parameters(), strict=True):
        assert torch.equal(a, b)
    second = finetune_config(data, lora, lora_targets="attention", num_iters=1)
    run_training(second, tmp_path / "second")
    load_checkpoint(tmp_path / "second")


@pytest.mark.parametrize("cuts", [[1], [2, 4]])
def test_a_cut_run_of_a_lora_ends_with_the_same_bits(data, base, lora, tmp_path, cuts):
    config = finetune_config(data, base, ckpt_interval=2, keep_last=1)
    for k, cut in enumerate(cuts):
        with pytest.raises(Interrupted):
            run_training(config, tmp_path / "run", reporter=signal_at(cut), resume=k > 0)
    run_training(config, tmp_path / "run", resume=True)
    for name in (ADAPTER, state_path(Path())):
        assert_equal_bits(tmp_path / "run" / name, lora / name)


def test_all_weights_of_a_base_learn_and_begin_with_its_own(data, base, tmp_path):
    config = finetune_config(data, base, lora_rank=0, lora_targets="attention", preset="finetune", num_iters=1, lr=1e-9)
    run_training(config, tmp_path / "run")
    original, tuned = load_checkpoint(base)[0].state_dict(), load_checkpoint(tmp_path / "run")[0].state_dict()
    for name, tensor in original.items():
        torch.testing.assert_close(tuned[name], tensor, rtol=0, atol=1e-6)
    assert read_config(tmp_path / "run").adapter is None
    assert any(not torch.equal(tuned[name], tensor) for name, tensor in original.items())


def test_dropout_of_a_finetuning_is_its_own(data, base):
    config = finetune_config(data, base, dropout=0.5)
    description = with_fingerprint(describe(config, open_images(config.data, SIZE)))
    denoiser = begin(description)
    assert {module.p for module in denoiser.modules() if isinstance(module, nn.Dropout) and module.p} == {0.5}


def test_the_start_of_a_conversion_is_measured(data, tmp_path, monkeypatch):
    """Written out for ε, at times with α ≥ 0.1: v = α ε − σ x, and read as before v̂ = α ε̂ − σ (z − σ ε̂)/α."""
    write_checkpoint(tmp_path / "eps", prediction="eps")
    values = {"prediction": "v", "num_iters": 1, "weighting": "snr_plus_one", "batch_size": 32}
    config = finetune_config(data, tmp_path / "eps", **values)
    expected: list[float] = []

    def measured(run: Run, step: TrainStep, before: str) -> str:
        with closing(run.batches.start_at(0)) as batches:
            given = step.draw(0, next(batches))
        t = 1 - given.u
        angle = step.denoiser.schedule.angle(t)
        alpha, sigma = (f(angle).float().reshape(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
        x, z = given.images, alpha * given.images + sigma * given.noise
        with torch.no_grad():
            output = step.denoiser.network(z, step.denoiser.schedule.timestep(t).float())
        v, rows = alpha * given.noise - sigma * x, alpha.flatten() >= 0.1
        assert 0 < rows.sum() < len(rows)
        as_before = alpha * output - sigma * (z - sigma * output) / alpha
        expected.extend(float((v - other)[rows].square().mean()) for other in (output, as_before, 0 * v))
        return start_of_conversion(run, step, before)

    monkeypatch.setattr(base_training, "start_of_conversion", measured)
    watcher = Watcher()
    run_training(config, tmp_path / "run", reporter=watcher)
    [line] = [line for line in watcher.lines if line.startswith("eps → v: ")]
    numbers = [float(word.strip(",")) for word in line.split() if word.strip(",").replace(".", "").isdigit()]
    assert numbers == pytest.approx(expected, rel=0.01)
    assert len(numbers) == 3
    assert read_config(tmp_path / "run").prediction == "v"
    watcher = Watcher()
    run_training(
        finetune_config(data, tmp_path / "eps", prediction="eps", num_iters=1, weighting="snr"), tmp_path / "same"
    )
    assert not any("→" in line for line in watcher.lines)


@pytest.mark.parametrize("name", FINE_TUNING)
def test_presets_of_finetuning_resolve(base, name):
    settings = read_preset(name, 100).train
    config = resolve(TrainConfig, {"preset": settings, "flags": {"base": str(base), "schedule": "linear"}})
    assert config.num_iters > 0
    if name == "sdxl_lora_v":  # the numbers of its source
        assert (config.lora_rank, config.lora_alpha, config.batch_size, config.lr) == (8, 8.0, 2, 1e-5)
        assert (config.weight_decay, config.clip_norm, config.num_iters) == (1e-2, 1.0, 2500)
        assert read_preset(name).train["num_iters"] == 20825


def test_the_command_estimates_trains_and_continues_a_lora(data, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = (
        f"train.py --base {base} --data {data} --device cpu --num_workers 0 --lora_rank 2 --batch_size 2 --tracker none"
    )
    estimate = done(f"{line} --dry_run").stdout
    assert re.search(r"^memory +\S+ of \S+ GiB", estimate, re.MULTILINE)
    told = done(f"{line} --num_iters 2").stdout
    folder = base.with_name(f"{base.name}_lora")
    assert f"{folder}: 2 updates" in told
    assert (folder / ADAPTER).is_file()
    assert f"{folder}: 3 updates" in done(f"train.py --resume --out {folder} --num_iters 3 --device cpu").stdout
    assert "is the base itself; choose another --out" in error(f"{line} --out {base} --overwrite", 2)
    assert (base / WEIGHTS).is_file()
    drawn = done(f"sample.py --checkpoint {folder} --num 2 --num_timesteps 2 --device cpu --out {tmp_path / 'drawn'}")
    assert drawn.exit_code == 0


def test_a_lora_is_trained_in_python(data, base, tmp_path):
    settings = {"base": str(base), "num_iters": 2, "batch_size": 2, "device": "cpu", "num_workers": 0, "lora_rank": 2}
    in_memory = vdiff.train("lora", data, **settings).finish()
    model = vdiff.train("lora", data, out=tmp_path / "run", **settings).finish()
    original = load_checkpoint(base)[0].state_dict()
    for found in (in_memory, model):
        found.save(tmp_path / "saved")
        state = load_checkpoint(tmp_path / "saved")[0].state_dict()
        changed = {name for name, tensor in original.items() if not torch.equal(state[name], tensor)}
        assert changed
        assert all("attention" in name for name in changed)
        shutil.rmtree(tmp_path / "saved")
    with pytest.raises(OptionError, match="a model in memory is trained as it is; give the preset 'lora'"):
        vdiff.train(model, data, base=str(base))
    with pytest.raises(OptionError, match="--preset lora fine-tunes a model; give it with --base"):
        vdiff.train("lora", data)


# Refusals


def resolved(data: Path, base: Path, **flags: Any) -> tuple[TrainConfig, list[str]]:
    """What train.py makes of its flags, and the lines that it prints."""
    watcher = Watcher()
    given = {"data": str(data), "base": str(base), **flags}
    config, images = resolve_training(given, None, folder=Path("none"), resume=False, reporter=watcher)
    describe(config, images)
    return config, watcher.lines


def test_a_finetuning_has_schedule_prediction_and_steps_of_its_base(data, tmp_path):
    table = {"name": "linear", "num_levels": 8}
    write_checkpoint(tmp_path / "eps", prediction="eps", schedule=table)
    config, lines = resolved(data, tmp_path / "eps", lora_rank=4)
    assert (config.preset, config.prediction, config.schedule, config.num_timesteps) == ("lora", "eps", "linear", 8)
    assert config.weighting == "snr"
    assert f"fine-tuning {tmp_path / 'eps'}" in lines[0]
    assert resolved(data, tmp_path / "eps")[0].preset == "finetune"
    config, lines = resolved(data, tmp_path / "eps", prediction="v", zero_snr=True)
    assert config.weighting == "snr_plus_one"
    assert "zero terminal SNR; the weight snr_plus_one is constant in v" in lines


def test_a_finetuned_model_is_distilled_by_a_preset_of_distilling(data, lora):
    config, teacher = resolve_distillation({"base": str(lora), "data": str(data)}, None)
    assert teacher.adapter
    assert config.num_iters > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"preset": "toy"},
            "--preset toy describes a new network, and --base names one; give finetune or lora or",
        ),
        ({"schedule": "linear"}, "--schedule linear: .* has cosine; leave it out"),
        ({"prediction": "both"}, "--prediction both: .* predicts v, with other channels; leave it out"),
        ({"class_conditional": True}, "class_conditional follows from --base .*; leave it out"),
        ({"class_dropout": 0.1}, "--class_dropout 0.1: the base cannot drop classes; leave it out"),
        ({"zero_snr": True}, "--zero_snr: the cosine schedule of .* has no betas; leave it out"),
        ({"lora_alpha": 2.0}, "--lora_alpha: all weights are to learn; give --lora_rank, or leave it out"),
    ],
)
def test_what_does_not_go_with_a_base_is_refused(data, base, flags, message):
    with pytest.raises(OptionError, match=message):
        resolved(data, base, **flags)


def test_a_lora_or_a_preset_of_finetuning_without_a_base_is_refused(data):
    with pytest.raises(OptionError, match="--preset finetune fine-tunes a model; give it with --base"):
        resolve_training({"data": str(data), "preset": "finetune"}, None, folder=Path("none"), resume=False)
    with pytest.raises(OptionError, match="--lora_rank: a LoRA needs a model; give it with --base"):
        resolve_training({"data": str(data), "lora_rank": 2}, None, folder=Path("none"), resume=False)


def test_a_student_and_images_of_another_shape_are_refused(data, base, tmp_path):
    write_checkpoint(tmp_path / "student", method="progressive", num_timesteps=4, teacher={})
    with pytest.raises(OptionError, match="is a student of 4 steps, which knows no other times"):
        resolved(data, tmp_path / "student")
    colours = write_dataset(tmp_path / "colour_4", channels=3)
    with pytest.raises(OptionError, match="has samples of 3 × 4 × 4, the base of 1 × 4 × 4"):
        resolved(colours, base)
    classes = write_dataset(tmp_path / "classes_4", classes=("cat", "dog"))
    write_checkpoint(tmp_path / "of_three", classes=3)
    with pytest.raises(OptionError, match="has 2 classes, the base 3"):
        resolved(classes, tmp_path / "of_three")


def test_a_base_that_is_gone_or_another_one_is_told_in_one_line(data, tmp_path):
    write_checkpoint(tmp_path / "base")
    run_training(finetune_config(data, tmp_path / "base", num_iters=1), tmp_path / "lora")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(VdiffError, match="base, the base of this model: no such checkpoint; put the base back"):
        load_checkpoint(tmp_path / "lora")
    write_checkpoint(tmp_path / "base", seed=1)
    with pytest.raises(VdiffError, match="has other weights than the base of this model had"):
        load_checkpoint(tmp_path / "lora")
    with pytest.raises(VdiffError, match=r"lora was begun from other weights than .*base has now"):
        run_training(finetune_config(data, tmp_path / "base", num_iters=2), tmp_path / "lora", resume=True)


def test_a_run_and_its_base_may_be_moved_together(data, tmp_path):
    write_checkpoint(tmp_path / "a/base")
    run_training(finetune_config(data, tmp_path / "a/base", num_iters=1), tmp_path / "a/lora")
    (tmp_path / "a").rename(tmp_path / "b")
    load_checkpoint(tmp_path / "b/lora")


# Processes


def train_lora(data: Path, base: Path, folder: Path, **changes: Any) -> None:
    """The run, in a program of its own."""
    resume = folder.exists()
    run_training(finetune_config(data, base, lr=1e-3, **changes), folder, resume=resume)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo")
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_the_lora_of_one(data, base, tmp_path, fsdp):
    for name, count, updates in (("one", 1, 6), ("two", 2, 6), ("cut", 2, 3), ("cut", 2, 6)):
        act = partial(train_lora, data, base, tmp_path / name, fsdp=fsdp and count > 1, num_iters=updates)
        codes, stdout, stderr = ends(launch(act, tmp_path, count))
        assert codes == [0] * count, stdout + stderr
    assert_equal_bits(tmp_path / "two" / ADAPTER, tmp_path / "cut" / ADAPTER)
    one, two = (read_tensors(tmp_path / folder / ADAPTER) for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
