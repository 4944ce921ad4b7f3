"""`vdiff.train`, `vdiff.distill`, `vdiff.prepare`: the bits of the commands, from any tensors, cut and gone on with."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vdiff
from tests.commands import ROOT, done, tree
from tests.oracles import randn
from tests.test_data_preparation import picture, write
from tests.toy import (
    SIZE,
    UNET,
    Bar,
    Watcher,
    assert_equal_bits,
    assert_equal_tensors,
    distill_config,
    run_ladder,
    run_training,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff.data.store import ImageStore
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.models.checkpoint import WEIGHTS, load_checkpoint, read_config, read_tensors, weights_fingerprint
from vdiff.training.base import resolve_training
from vdiff.training.state import state_path
from vdiff.training.tensors import TensorBatches

TINY: dict[str, Any] = {"num_iters": 6, "batch_size": 4, "lr": 1e-2, "device": "cpu", "num_workers": 0, "unet": UNET}
ALL = slice(0, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("api") / "toy_4")


@pytest.fixture
def teacher(tmp_path: Path, data: Path) -> Path:
    write_checkpoint(tmp_path / "original", dataset=str(data))
    return tmp_path / "original"


def images(count: int = 10) -> torch.Tensor:
    return randn(count, 1, SIZE, SIZE, dtype=torch.float32).clamp(-1, 1)


# Preparing


def test_prepare_makes_the_dataset_of_the_command(tmp_path):
    """In its usual form, and with every kind of argument."""
    files = {f"{name}/{k}.png": picture(k) for k, name in enumerate(["cat", "dog", "cat"])}
    source = write(tmp_path / "pictures", files)
    for name, words, options in (
        ("usual", "", {}),
        ("own", "--size 4,8 --channels 1 --crop pad --format webp", {
            "size": (8, 4), "channels": 1, "crop": "pad", "image_format": "webp", "num_workers": 1,
        }),
        ("small", "--size 4", {"size": 4}),
    ):  # fmt: skip
        made = vdiff.prepare(source, out=tmp_path / "api" / name, **options)
        assert made == tmp_path / "api" / name
        done(f"prepare_data.py {source} --out {tmp_path / 'command' / name} {words}")
        assert tree(made) == tree(tmp_path / "command" / name)
    with pytest.raises(VdiffError, match="small exists already"):
        vdiff.prepare(source, out=made, size=8)
    vdiff.prepare(source, out=made, size=8, overwrite=True)
    with closing(ImageStore(made)) as store:
        assert (len(store), store.meta.sizes, store.meta.class_names) == (3, (8,), ("cat", "dog"))
    with pytest.raises(ValueError, match=r"sizes \(0,\); need distinct sizes of at least 1"):
        vdiff.prepare(source, out=tmp_path / "none", size=0)


# Data


def batches_of(data: Any, count: int = 5, step: int = 0, share: slice = ALL) -> torch.Tensor:
    found = TensorBatches(data, (1, SIZE, SIZE), 4, 0, share).start_at(step)
    return torch.stack([batch.images for batch in islice(found, count)])


def test_items_of_any_size_make_the_same_batches():
    """Samples, batches of every size, a loader: the rows in order, again and again, across the end of the data."""
    x = images()
    expected = torch.cat([x, x])[:20].reshape(5, 4, 1, SIZE, SIZE)
    for data in (
        list(x),
        [x[:3], x[3], x[4:]],
        [x],
        DataLoader(TensorDataset(x), 3),
        TensorDataset(x),
        DataLoader(x, 4),
    ):
        assert torch.equal(batches_of(data), expected)
        assert torch.equal(batches_of(data, 2, step=3), expected[3:])
        assert torch.equal(batches_of(data, share=slice(2, 4)), expected[:, 2:])


def test_a_tensor_is_a_dataset_in_the_order_of_the_seed():
    x = images()
    found = batches_of(x).flatten(0, 1)
    for epoch in (found[:10], found[10:]):
        order = [int((x == row).flatten(1).all(1).nonzero()) for row in epoch]
        assert sorted(order) == list(range(10))
        assert order != list(range(10))
    assert torch.equal(batches_of(x, 2, step=3), found.reshape(5, 4, 1, SIZE, SIZE)[3:])


def test_classes_go_with_their_samples():
    x, classes = images(), torch.arange(10)
    loader = DataLoader(TensorDataset(x, classes), 3)
    for data in (loader, [(x[:3], classes[:3]), (x[3:], classes[3:])], list(zip(x, classes.tolist(), strict=True))):
        found = TensorBatches(data, (1, SIZE, SIZE), 4, 0, slice(1, 4)).start_at(0)
        for k, batch in enumerate(islice(found, 4)):
            expected = torch.arange(4 * k + 1, 4 * k + 4) % 10
            assert torch.equal(batch.classes, expected)
            assert torch.equal(batch.images, x[expected])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.zeros(4, 1, SIZE, SIZE + 1)], r"hold a tensor of shape \(4, 1, 4, 5\); give tensors \(1, 4, 4\) or"),
        (["a"], "the data hold a str; give tensors"),
        (iter([torch.zeros(5, 1, SIZE, SIZE)]), "the data have run out; give a list or a DataLoader"),
        ([], "the data have run out"),
        ([(torch.zeros(4, 1, SIZE, SIZE), torch.zeros(3))], "the data hold 4 samples with 3 classes; give each sample"),
        ([images(3), images(3).byte()], "the data hold both uint8 and real numbers; give all items one type"),
        ([(images(3), torch.arange(3)), images(3)], "the data hold samples with and without classes; give all"),
    ],
)
def test_data_that_cannot_be_used_are_one_line(data, message):
    with pytest.raises(VdiffError, match=message):
        batches_of(data)


# Training


def test_a_base_model_has_the_bits_of_the_command(data, tmp_path):
    run_training(train_config(data, tracker="none"), tmp_path / "command")
    values = {**TINY, "warmup_iters": 2, "weight_decay": 1e-3, "ema": 0.9, "dropout": 0.2, "flip": True}
    training = vdiff.train("toy", data, out=tmp_path / "api", num_timesteps=8, lr_schedule="constant", **values)
    seen = [metrics["update"] for metrics in training]
    assert seen == [6]
    assert_equal_bits(tmp_path / "api" / WEIGHTS, tmp_path / "command" / WEIGHTS)
    assert_equal_tensors(training.model.denoiser.state_dict(), read_tensors(tmp_path / "api" / WEIGHTS))
    assert training.model.config == read_config(tmp_path / "api")
    alone = vdiff.train("toy", data, num_timesteps=8, lr_schedule="constant", **values).finish()
    assert_equal_tensors(alone.denoiser.state_dict(), training.model.denoiser.state_dict())
    assert (alone.config.num_iters, alone.config.is_finished) == (6, True)


def test_metrics_come_as_often_as_asked_and_training_waits_for_them():
    training = vdiff.train("toy", images(), log_interval=2, **TINY)
    first = next(iter(training))
    assert first["update"] == 2
    assert {"loss", "grad_norm", "lr", "images_per_second"} <= first.keys()
    before = [weight.clone() for weight in training.model.network.parameters()]
    assert [metrics["update"] for metrics in training] == [4, 6]
    assert any(not torch.equal(a, b) for a, b in zip(before, training.model.network.parameters(), strict=True))


def test_a_training_that_is_left_goes_on_with_the_same_bits(tmp_path):
    """Left after update 2 and after update 4, where the state is saved."""
    options = {**TINY, "ckpt_interval": 2, "dropout": 0.1}
    for name, stops in (("whole", []), ("cut", [2, 4])):
        for stop in [*stops, 6]:
            for metrics in vdiff.train("toy", list(images()), out=tmp_path / name, log_interval=2, **options):
                if metrics["update"] == stop:
                    break
    assert_equal_bits(tmp_path / "whole" / WEIGHTS, tmp_path / "cut" / WEIGHTS)
    assert_equal_bits(state_path(tmp_path / "whole"), state_path(tmp_path / "cut"))
    again = vdiff.train("toy", list(images()), out=tmp_path / "cut", **options)
    assert list(again) == []
    assert_equal_tensors(again.model.denoiser.state_dict(), read_tensors(tmp_path / "cut" / WEIGHTS))
    with pytest.raises(OptionError, match=r"was begun with lr 0\.01, not 0\.1"):
        vdiff.train("toy", list(images()), out=tmp_path / "cut", **{**options, "lr": 0.1}).finish()


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_model_that_is_left_records_its_updates(teacher, tmp_path, is_kept):
    options = {**DISTILLED, "num_iters": 6, "log_interval": 1}
    for training in (
        vdiff.train("toy", images(), out=tmp_path / "run" if is_kept else None, unet=UNET, **options),
        vdiff.distill(teacher, data=images(), to_steps=4, out=tmp_path / "all" if is_kept else None, **options),
    ):
        for metrics in training:
            if metrics["update"] == 3:
                break
        training.model.save(tmp_path / "saved")
        training.close()
        config = read_config(tmp_path / "saved")
        assert (config.num_iters, config.target_iters, config.num_images) == (3, 6, 12)


def test_a_signal_leaves_a_run_that_the_same_call_goes_on_with(teacher, tmp_path):
    options = {**DISTILLED, "log_interval": 1}
    for call in (
        partial(vdiff.train, "toy", images(), out=tmp_path / "run", unet=UNET, **options),
        partial(vdiff.distill, teacher, data=images(), to_steps=4, out=tmp_path / "students", **options),
    ):
        training = call()
        assert next(iter(training))["update"] == 1
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match=r"stopped after update 2 of 3, .* is saved; the same call continues$"):
            training.finish()
        assert [metrics["update"] for metrics in call()] == [3]


def test_the_command_does_not_go_on_with_tensors(tmp_path):
    vdiff.train("toy", images(), out=tmp_path / "run", **TINY).finish()
    with pytest.raises(VdiffError, match=r"run was trained on tensors in Python; the same call of vdiff\.train"):
        resolve_training({}, None, folder=tmp_path / "run", resume=True)


@pytest.mark.parametrize("other", [images()[:5] * 0, images().flip(0), images().double(), list(images())])
def test_a_run_does_not_go_on_with_other_tensors(tmp_path, other):
    options = {**TINY, "out": tmp_path / "run", "log_interval": 2, "ckpt_interval": 2}
    for _ in (training := vdiff.train("toy", images(), **options)):
        break
    training.close()
    with pytest.raises(VdiffError, match="begun with other images than tensors holds; give the same tensors"):
        vdiff.train("toy", other, **options).finish()
    assert vdiff.train("toy", images(), **options).finish().config.num_iters == 6


def test_settings_that_are_none_are_one_line(data):
    with pytest.raises(OptionError, match="unknown setting 'learning_rate'"):
        vdiff.train("toy", data, learning_rate=1.0)
    with pytest.raises(OptionError, match="unknown preset 'tony'"):
        vdiff.train("tony", data)
    with pytest.raises(OptionError, match=r"a preset needs square images .*; give a model, see vdiff\.wrap"):
        vdiff.train("toy", [torch.zeros(4, 1, 64)])
    for call, kind in [(vdiff.train, "preset's name"), (vdiff.distill, "checkpoint's folder")]:
        for model in (None, nn.Linear(1, 1)):
            with pytest.raises(
                OptionError, match=f"is neither a model nor a {kind}; make a model from your network with"
            ):
                call(model, data=images())


# Distillation


DISTILLED: dict[str, Any] = {"num_iters": 3, "batch_size": 4, "lr": 5e-3, "device": "cpu", "num_workers": 0}


@pytest.mark.parametrize("method", ["progressive", "tract"])
def test_students_have_the_bits_of_the_command(data, teacher, tmp_path, method):
    """In a folder and in memory, from a checkpoint: the students that distill.py trains, but for its checks."""
    shared = {"method": method, "phases": "8,4,2", **DISTILLED}
    config = distill_config(data, teacher, check_images=0, **shared, ema_remainder=0.0, lr_schedule="linear")
    run_ladder(config, read_config(teacher))
    options = {**shared, "ema_remainder": 0.0, "lr_schedule": "linear", "last_factor": config.last_factor}
    distilling = vdiff.distill(teacher, out=tmp_path / "api", **options)
    assert [(metrics["num_steps"], metrics["update"]) for metrics in distilling] == [(4, 3), (2, 6)]
    alone = vdiff.distill(teacher, **options).finish()
    for name in ("base_0", "base_1"):
        assert_equal_bits(tmp_path / "api" / name / WEIGHTS, tmp_path / name / WEIGHTS)
    for model in (distilling.model, alone):
        assert_equal_tensors(model.denoiser.state_dict(), read_tensors(tmp_path / "base_1" / WEIGHTS))
        assert (model.config.num_timesteps, model.config.method) == (2, method)
        assert model.config.teacher["num_timesteps"] == 4
    for student, base in (("base_0", teacher), ("base_1", tmp_path / "api" / "base_0")):
        found = read_config(tmp_path / "api" / student).teacher
        assert (found["path"], found["fingerprint"]) == (base.as_posix(), weights_fingerprint(base))
    assert (alone.config.teacher["path"], alone.config.teacher["teacher"]["path"]) == ("", teacher.as_posix())


def test_a_ladder_that_is_left_goes_on(data, teacher, tmp_path):
    options = {"phases": "8,4,2", "ckpt_interval": 1, "log_interval": 1, "dropout": 0.1, **DISTILLED}
    whole = vdiff.distill(teacher, data=data, out=tmp_path / "whole", **options).finish()
    for stop in ((4, 2), (2, 1), None):
        for metrics in (distilling := vdiff.distill(teacher, data=data, out=tmp_path / "cut", **options)):
            if (metrics["num_steps"], metrics["update"]) == stop:
                break
        distilling.close()
    assert_equal_tensors(distilling.model.denoiser.state_dict(), whole.denoiser.state_dict())
    write_checkpoint(teacher, seed=1, dataset=str(data))
    with pytest.raises(VdiffError, match="base_0 was distilled from another teacher"):
        vdiff.distill(teacher, data=data, out=tmp_path / "cut", **options).finish()


def test_a_teacher_in_memory_and_tensors_as_data(teacher):
    student = vdiff.distill(vdiff.load(teacher), data=[images(7)], to_steps=4, **DISTILLED).finish()
    assert student.config.num_timesteps == 4
    assert student.config.dataset == "tensors"
    assert student.sample(3).shape == (3, 1, SIZE, SIZE)
    with pytest.raises(VdiffError, match="load it with precision fp32"):
        vdiff.distill(vdiff.load(teacher, precision="bf16"), data=[images(7)], to_steps=4, **DISTILLED).finish()


# Models


def test_a_model_is_saved_and_loaded(teacher, tmp_path):
    model = vdiff.load(teacher)
    model.save(tmp_path / "saved")
    assert_equal_bits(tmp_path / "saved" / WEIGHTS, teacher / WEIGHTS)
    assert read_config(tmp_path / "saved") == read_config(teacher)
    assert torch.equal(vdiff.load(tmp_path / "saved").sample(3), model.sample(3))


def test_the_loss_is_that_of_the_formula(teacher):
    """Of v: E (SNR + 1) ‖x − x̂‖² = E ‖v − v̂‖²."""
    model, x = vdiff.load(teacher), images(5)
    torch.manual_seed(3)
    loss = model.loss(x, weighting="snr_plus_one")
    torch.manual_seed(3)
    noise = torch.randn_like(x)
    t = 1 - (torch.arange(5) + torch.rand(5, dtype=torch.float64)) / 5
    angle = model.denoiser.schedule.angle(t)[:, None, None, None]
    alpha, sigma = angle.cos().float(), angle.sin().float()
    v = load_checkpoint(teacher)[0](alpha * x + sigma * noise, t).v
    torch.testing.assert_close(loss, (alpha * noise - sigma * x - v).square().mean(), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(weight.grad is not None for weight in model.network.parameters())


def test_a_loss_that_cannot_be_is_one_line():
    class Network(nn.Module):
        def forward(self, z: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            return z * classes[:, None, None, None] + 0 * timestep[:, None, None, None]

    x = images(3)
    model = vdiff.wrap(Network(), (1, SIZE, SIZE), classes=3, null_class=True)
    for classes in (torch.tensor([0, 3, 2]), [0, 3, 2]):  # 3: no class
        assert model.loss(x, classes=classes).isfinite()
    with pytest.raises(VdiffError, match="unknown weighting 'x'; choose from"):
        model.loss(x, classes=torch.zeros(3).long(), weighting="x")
    for classes, found in [([0, 4, 1], "[0, 1, 4]"), ([-1, 0, 0], "[-1, 0]"), ([0.5, 0, 0], "[0.0, 0.5]")]:
        with pytest.raises(ValueError, match=re.escape(f"classes are integers from 0 to 3, got {found}")):
            model.loss(x, classes=torch.tensor(classes))
    with pytest.raises(ValueError, match=re.escape("classes of shape (2,); need one for each of 3 samples")):
        model.loss(x, classes=[0, 1])


def test_a_network_without_weights_draws_and_says_where_it_is():
    class Network(nn.Module):
        def forward(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return z * 0.5 + 0 * timestep[:, None, None]

    model = vdiff.wrap(Network(), (2, 5))
    assert repr(model) == "<vdiff model: base, 1024 steps, (2, 5), on cpu>"
    assert model.sample(3, steps=2).shape == (3, 2, 5)
    with pytest.raises(VdiffError, match="unknown sampler 'dim'; did you mean 'ddim'"):
        model.sample(1, steps=2, sampler="dim")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((), {}, "shape = (); need whole numbers from 1"),
        ((1, 0), {}, "shape = (1, 0); need"),
        ((1, 4), {"size_multiple": 0}, "size_multiple = 0; need a whole number from 1"),
    ],
)
def test_a_network_is_not_wrapped_for_samples_that_cannot_be(shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vdiff.wrap(nn.Linear(4, 4), shape, **options)


def test_samples_become_pictures(teacher):
    samples = vdiff.load(teacher).sample(4)
    assert isinstance(samples, torch.Tensor)
    assert type(samples * 2) is torch.Tensor
    first = samples.to_pil()[0]
    assert (first.size, first.mode) == ((SIZE, SIZE), "L")
    expected = ((samples[0, 0] + 1) * 127.5).round()
    assert [first.getpixel((x, y)) for y in range(SIZE) for x in range(SIZE)] == expected.flatten().tolist()
    assert samples._repr_png_().startswith(b"\x89PNG")
    waves = torch.zeros(3, 1, 64).as_subclass(vdiff.Samples)
    assert waves._repr_png_() is None
    with pytest.raises(ValueError, match=r"\(3, 1, 64\) are not images"):
        waves.to_pil()


# Your own network


def documented_example() -> str:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    block = text.partition("<!-- example: tests -->\n")[2].partition("<!-- example end -->")[0]
    return textwrap.dedent(block)


def test_the_example_of_the_documents_trains_and_distils_a_network_of_its_own(tmp_path, monkeypatch, capsys):
    """As it stands there; the student's 4 steps lead nearer to the teacher's 16 than the teacher's own 4."""
    code = documented_example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "python.md", "exec"), space)
    lines = [list(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]
    losses = [values[0] for values in lines if len(values) == 1]
    assert losses[-1] < 0.95 * losses[0]
    assert [values[0] for values in lines if len(values) == 2] == [8, 4]
    teacher, student, samples = space["teacher"], space["student"].model, space["samples"]
    assert samples.shape == (8, 1, 64)
    assert samples.to("cpu").isfinite().all()
    far = teacher.sample(64, steps=16)
    own, learned = ((model.sample(64, steps=4) - far).square().mean().sqrt() for model in (teacher, student))
    assert learned < 0.7 * own
    again = vdiff.load("waves", network=space["Network"]())
    assert torch.equal(again.sample(8, steps=4), samples)
    with pytest.raises(VdiffError, match=r"its code is not in the folder; load it in Python"):
        vdiff.load("waves")


class Mlp(nn.Module):
    """(z, timestep, classes) → (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 16), nn.Linear(16, 2)

    def forward(self, z: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        told = nn.functional.one_hot(classes, 4).to(z)
        return self.last(torch.relu(self.first(torch.cat([z, timestep[:, None] / 1000, told], 1))))


def points() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Points of the plane, in batches with their classes."""
    return [(randn(8, 2, seed=k, dtype=torch.float32), torch.arange(8) % 3) for k in range(3)]


def test_samples_that_are_no_pictures_are_not_announced(tmp_path, monkeypatch):
    watcher, notes = Watcher(), []
    monkeypatch.setattr("vdiff.api_training.Silent", lambda: watcher)
    monkeypatch.setattr(Bar, "update", lambda *update: notes.append(update[2:]))
    model, options = vdiff.wrap(Mlp(), (2,), classes=3, num_timesteps=8), {"batch_size": 8, "num_workers": 0}
    vdiff.train(model, points(), out=tmp_path / "points", num_iters=3, sample_interval=1, **options).finish()
    assert [name for name, *_ in watcher.bars] == ["points"]
    assert len(notes) >= 3
    assert ("samples drawn",) not in notes


def test_a_network_with_classes_and_frozen_weights_is_cut_and_resumed(tmp_path):
    """On points (2,): trained, distilled and guided; frozen weights stay through all of it."""
    torch.manual_seed(0)
    weights = Mlp().state_dict()
    ends = []
    options = {"batch_size": 8, "ckpt_interval": 1, "log_interval": 1, "class_dropout": 0.2, "num_workers": 0}
    for name, stops in (("whole", []), ("cut", [2, 3])):
        network = Mlp()
        network.load_state_dict(weights)
        network.first.weight.requires_grad_(False)
        teacher = vdiff.wrap(network, (2,), classes=["a", "b", "c"], null_class=True, num_timesteps=8)
        for stop in [*stops, 0]:
            for metrics in (training := vdiff.train(teacher, points(), out=tmp_path / name, num_iters=5, **options)):
                if metrics["update"] == stop:
                    break
            training.close()
        keys = read_tensors(state_path(tmp_path / name)).keys()
        assert not any("first.weight" in key for key in keys)
        assert any("first.bias" in key for key in keys)
        student = vdiff.distill(training.model, data=points(), to_steps=2, num_iters=3, **options).finish()
        assert torch.equal(student.network.model.first.weight, weights["first.weight"])
        assert not torch.equal(student.network.model.first.bias, weights["first.bias"])
        ends.append((training.model, student))
    for first, second in zip(*ends, strict=True):
        assert_equal_tensors(first.denoiser.state_dict(), second.denoiser.state_dict())
    model = ends[0][0]
    guided = model.sample(4, steps=8, classes=["b"], guidance=2.0)
    assert guided.shape == (4, 2)
    assert not torch.equal(guided, model.sample(4, steps=8, classes=["b"]))
    assert model.loss(points()[0][0], classes=points()[0][1]).isfinite()


def test_a_training_knows_its_updates_beforehand_and_settings_go_before_the_usual_ones():
    """Of all stages; an average that is switched off is off, and the default method is the one that is named so."""
    model = vdiff.wrap(Mlp(), (2,), classes=3, num_timesteps=8)
    options = {"batch_size": 8, "log_interval": 1, "num_workers": 0}
    training = vdiff.train(model, points(), num_iters=4, ema=0.0, **options)
    assert training.num_updates == len(list(training)) == 4
    assert training.model.config.weights == "raw"
    students = []
    for method in ({}, {"method": "progressive"}):
        distilling = vdiff.distill(training.model, data=points(), to_steps=2, num_iters=3, **method, **options)
        assert distilling.num_updates == len(list(distilling)) == 3 + 6  # 8 → 4, and twice the updates to 2
        students.append(distilling.model)
    assert_equal_tensors(*(student.denoiser.state_dict() for student in students))
    assert students[0].config.weights == students[1].config.weights == "raw"


class GuidedMlp(Mlp):
    """With a weight of guidance, which it does without where it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.guidance = nn.Linear(1, 2)

    def forward(
        self, z: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor, guidance: torch.Tensor | None = None
    ) -> torch.Tensor:
        output = super().forward(z, timestep, classes)
        return output if guidance is None else output + self.guidance(guidance[:, None])


def test_a_network_of_ones_own_learns_guidance():
    """Its student is told the weight; a network that does not take it is refused in one line."""
    torch.manual_seed(0)
    plain = vdiff.wrap(GuidedMlp(), (2,), classes=3, null_class=True, num_timesteps=8)
    options = {"data": points(), "method": "guided", "num_iters": 3, "batch_size": 8, "num_workers": 0}
    with pytest.raises(OptionError, match=r"--method guided needs a network that takes guidance; see vdiff\.wrap"):
        vdiff.distill(plain, **options).finish()
    takes = vdiff.wrap(plain.network, (2,), classes=3, null_class=True, takes=["guidance"], num_timesteps=8)
    student = vdiff.distill(takes, **options, to_steps=4).finish()
    assert (student.config.num_timesteps, student.config.guidance_range) == (4, [0, 4])
    first, second = (student.sample(4, guidance=weight) for weight in (1.0, 4.0))
    assert not torch.equal(first, second)
    with pytest.raises(VdiffError, match="supports weights 0 to 4, not 5"):
        student.sample(4, guidance=5.0)


def test_a_generator_gives_a_preset_all_its_batches():
    """The first one too, from which the size is found."""
    batches = list(images(12).split(4))
    options = {**TINY, "num_iters": 3, "log_interval": 1}
    listed, generated = (list(vdiff.train("toy", data, **options)) for data in (batches, iter(batches)))
    assert [metrics["loss"] for metrics in listed] == [metrics["loss"] for metrics in generated]


def test_a_run_of_another_model_is_not_gone_on_with(tmp_path):
    """Weights of a v-prediction fit a network that predicts x, and mean something else."""
    options: dict[str, Any] = {"out": tmp_path / "run", "num_iters": 3, "ckpt_interval": 1, "log_interval": 1}
    training = vdiff.train(vdiff.wrap(Mlp(), (2,), classes=3), points(), **options)
    next(iter(training))
    training.close()
    saved = state_path(tmp_path / "run").read_bytes()
    for change, words in (({"prediction": "x"}, "prediction v, not x"), ({"schedule": "linear"}, "schedule ")):
        with pytest.raises(VdiffError, match=f"was begun with {words}"):
            vdiff.train(vdiff.wrap(Mlp(), (2,), classes=3, **change), points(), **options).finish()
    assert state_path(tmp_path / "run").read_bytes() == saved
    vdiff.train(vdiff.wrap(Mlp(), (2,), classes=3), points(), **options).finish()


def test_a_network_whose_parts_share_weights_is_saved_and_resumed(tmp_path):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.again = self.first

        def forward(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.again((self.first(z) + timestep[:, None] / 1000).tanh())

    torch.manual_seed(0)
    start, ends = Shared().state_dict(), []
    for name, stops in (("whole", []), ("cut", [2])):
        for stop in [*stops, 0]:
            network = Shared()
            network.load_state_dict(start)
            training = vdiff.train(
                vdiff.wrap(network, (2,)), randn(20, 2, dtype=torch.float32), out=tmp_path / name, num_iters=4,
                batch_size=4, ckpt_interval=1, log_interval=1,
            )  # fmt: skip
            for metrics in training:
                if metrics["update"] == stop:
                    break
            training.close()
        ends.append(vdiff.load(tmp_path / name, network=Shared()).denoiser.state_dict())
    assert_equal_tensors(*ends)
    learned = vdiff.load(tmp_path / "cut", network=Shared()).network.state_dict()
    assert not torch.equal(learned["model.first.weight"], start["first.weight"])


@pytest.mark.slow
def test_a_loop_that_is_left_ends_quietly_with_the_program(tmp_path):
    lines = f"""
        import torch, vdiff
        left = []
        for out in (None, {str(tmp_path / "run")!r}):
            model = vdiff.wrap(torch.nn.Bilinear(1, 1, 1), (1, 1))
            model.network.model.forward = lambda z, timestep: z * model.network.model.weight
            left.append(vdiff.train(model, torch.ones(8, 1, 1), out=out, num_iters=4, batch_size=4, log_interval=1))
            next(iter(left[-1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert (found.returncode, found.stderr) == (0, "")
