"""What a run takes: memory from an update without values, time and disk, and the refusal of what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import vdiff
from tests.commands import done, error
from tests.toy import UNET, train_config, write_checkpoint, write_dataset
from vdiff.errors import VdiffError
from vdiff.models.backbone import parameter_count
from vdiff.models.checkpoint import ADAPTER, is_checkpoint, read_config
from vdiff.text import folded
from vdiff.training import estimate
from vdiff.training.base import describe
from vdiff.training.base_training import base_task, memory_of_base
from vdiff.training.config import DistillConfig, TrainConfig, resolve
from vdiff.training.dataset import TrainingData, open_images
from vdiff.training.engine import build_engine
from vdiff.training.estimate import FLOAT, LiveBytes, Memory, check_memory, disk_of, facts, memory_of, time_facts
from vdiff.training.posthoc import NUM_SNAPSHOTS
from vdiff.training.stages import plan_stages
from vdiff.training.student import memory_of_stage

LARGER = {**UNET, "channels": 16, "embedding_channels": 32, "multipliers": [1, 2], "attention_strides": [2]}


def config_of(**changes) -> TrainConfig:
    return train_config(
        Path("none"), **{"unet": LARGER, "batch_size": 8, "device": "cpu", "precision": "fp32", **changes}
    )


def memory(**changes) -> Memory:
    AcceleratorState._reset_state(reset_partial_state=True)  # whose precision would stay
    config, images = config_of(**changes), TrainingData(16, 3)
    return memory_of_base(config, images, describe(config, images), build_engine(config))


def test_live_bytes_are_those_of_tensors_that_live():
    with LiveBytes() as live:
        kept = [torch.ones(256) for _ in range(3)]
        view, _ = kept[0].view(16, 16), kept[0].add_(1)  # neither is new memory
        assert (live.now, live.peak) == (3 * 1024, 3 * 1024)
        kept.pop()
        assert (live.now, live.peak) == (2 * 1024, 3 * 1024)
        doubled = (kept[1] * 2) * 2  # a passing one beside it
        assert (live.now, live.peak) == (3 * 1024, 4 * 1024)
        del doubled, kept, view, _
    assert live.now == 0


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}, {"precision": "bf16"}])
def test_an_update_without_values_takes_what_a_real_one_does(changes):
    """Counted on real tensors: the same operations make the same tensors."""
    config, images = config_of(**changes), TrainingData(16, 3)
    engine, description = build_engine(config), describe(config, images)
    task = base_task(config, description.build())
    network = task.denoiser.train().network
    network.checkpointing = config.checkpointing
    z, t = torch.randn(8, 3, 16, 16), torch.linspace(0.1, 1, 8).double()
    live = LiveBytes()
    for weight in task.denoiser.parameters():
        live.known(weight)
    with live:
        with engine.accelerator.autocast():
            prediction = task.denoiser(z, t)
        (z - prediction.x).square().mean().backward()
    found = memory_of_base(config, images, description, engine)
    assert found.gradients == parameter_count(network) * FLOAT
    assert found.activations == pytest.approx(live.peak - found.gradients, rel=0.1)


def test_weights_gradients_moments_and_averages_are_counted():
    found = memory(ema=0.999, ema_more="0.99,0.9")
    weights = found.gradients
    assert (found.weights, found.moments, found.averages) == (weights, 2 * weights, 3 * weights)
    assert memory(ema=0.0, ema_images=0.0, ema_more="", ema_profiles=False).averages == 0
    assert found.total == sum(vars(found).values())


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_share_a_batch_and_with_fsdp_the_weights_too(fsdp):
    config, images, parts = config_of(), TrainingData(16, 3), 2 if fsdp else 1
    engine, description = build_engine(config), describe(config, images)
    alone = memory_of_base(config, images, description, engine)
    shared = memory_of_base(replace(config, fsdp=fsdp), images, description, replace(engine, world_size=2))
    for name in ("weights", "gradients", "moments", "averages"):
        assert getattr(shared, name) == getattr(alone, name) // parts > 0
    assert shared.activations == memory(batch_size=4).activations


def test_activations_follow_batch_parts_and_checkpointing():
    whole = memory().activations
    assert memory(batch_size=16).activations == pytest.approx(2 * whole, rel=0.1)
    assert memory(grad_accum=2).activations == pytest.approx(whole / 2, rel=0.1)
    assert memory(checkpointing=True).activations < 0.5 * whole
    assert memory(precision="bf16").activations < 0.75 * whole


@pytest.mark.parametrize(
    "method", ["progressive", "tract", "consistency", "trajectory", "match", "scm", "ect", "meanflow"]
)
def test_a_stage_of_every_method_tells_its_memory(tmp_path, method):
    write_checkpoint(tmp_path / "teacher", num_timesteps=8)
    data = write_dataset(tmp_path / "toy_4")
    values = {"base": str(tmp_path / "teacher"), "num_iters": 4, "batch_size": 4, "lr": 1e-3, "method": method}
    config = resolve(DistillConfig, {"": {**values, "device": "cpu"}})
    stage = plan_stages(config, read_config(tmp_path / "teacher"))[0]
    engine, images = build_engine(config), open_images(str(data), None)
    found = check_memory(lambda config: memory_of_stage(stage, config, images, engine), config, engine)
    if method == "trajectory":  # whose sampler looks at its times
        assert found is None
        return
    own = found.weights - 2 * found.gradients
    assert own < 0 if method == "meanflow" else own == 0  # whose student takes a second time
    assert found.activations > 0
    assert found.images == 10 * 4 * 4
    sharing = replace(config, fsdp=True)
    shared = memory_of_stage(stage, sharing, images, replace(engine, world_size=2))
    assert found.weights - shared.weights == found.gradients - shared.gradients == found.gradients // 2


def test_a_check_of_many_images_may_take_more_than_an_update_of_few(tmp_path):
    write_checkpoint(tmp_path / "teacher", num_timesteps=8)
    images = open_images(str(write_dataset(tmp_path / "toy_4")), None)
    values = {"base": str(tmp_path / "teacher"), "num_iters": 4, "batch_size": 2, "lr": 1e-3, "device": "cpu"}
    peaks = []
    for checked in (0, 2, 64, 500):
        config = resolve(DistillConfig, {"": {**values, "check_images": checked}})
        stage = plan_stages(config, read_config(tmp_path / "teacher"))[0]
        peaks.append(memory_of_stage(stage, config, images, build_engine(config)).activations)
    assert peaks[0] == peaks[1] < peaks[2] == peaks[3]


class AsksForValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.layer(z) * (2 if timestep.sum().item() > 0 else 1)


def test_a_network_that_computes_by_values_has_no_estimate():
    config = config_of()
    engine = build_engine(config)

    def build(_):
        return base_task(config, vdiff.wrap(AsksForValues(), (1, 4, 4)).denoiser)

    assert check_memory(lambda _: memory_of(build, (1, 4, 4), 0, engine), config, engine) is None
    assert facts(None, config, engine) == {"memory": "unknown: the network or method depends on tensor values"}


GIB = 2**30
NEEDS = Memory(
    weights=GIB, frozen=0, gradients=GIB, moments=2 * GIB, averages=GIB, activations=8 * GIB, images=0, program=0
)


def needs(config: TrainConfig) -> Memory:
    share = config.batch_size / 8 / config.grad_accum * (0.25 if config.checkpointing else 1)
    return replace(NEEDS, activations=round(NEEDS.activations * share))


@pytest.mark.parametrize(
    ("free", "flags"),
    [
        (12, ["--preset small64", "--grad_accum 2", "--batch_size 4", "--checkpointing True"]),
        (6.5, ["--preset small64", "--grad_accum 8", "--batch_size 1"]),
        (5.5, ["--preset small64"]),
    ],
)
def test_what_does_not_fit_is_refused_with_flags_that_make_it_fit(monkeypatch, free, flags):
    config = config_of()
    engine = build_engine(config)
    monkeypatch.setattr(estimate, "memory_left", lambda memory, _: round(free * GIB) - memory.total)
    with pytest.raises(VdiffError) as caught:
        check_memory(needs, config, engine, "small64")
    assert caught.value.cause == f"the run needs 13.0 GiB of memory, and cpu has {free:.1f} GiB"
    assert caught.value.hint == f"give {' or '.join(flags)}"
    for flag in flags[1:]:
        name, value = flag.removeprefix("--").split()
        changed = replace(config, **{name: True if value == "True" else int(value)})
        assert check_memory(needs, changed, engine) == needs(changed)
    monkeypatch.setattr(estimate, "memory_left", lambda *_: -1)
    with pytest.raises(VdiffError, match="train on a device with more memory"):
        check_memory(lambda _: replace(NEEDS, activations=0), config, engine)


@pytest.mark.parametrize(("device", "processes", "left"), [("cpu", 1, 88), ("cpu", 2, 76), ("cuda", 2, 87)])
def test_memory_that_is_left_counts_all_processes_and_what_they_have_taken(monkeypatch, device, processes, left):
    taken = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB))
    monkeypatch.setattr(estimate, "free_memory", lambda _: 100 * GIB)
    monkeypatch.setattr(estimate.psutil, "Process", lambda: taken)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert estimate.memory_left(NEEDS, SimpleNamespace(device=torch.device(device))) == left * GIB


@pytest.mark.parametrize(
    ("mine", "longest", "found", "updates"),
    [(3.0, 3.0, 1.0, 4), (4.0, 4.0, 4.0, 1), (3.0, 5.0, 3.0, 1)],
)
def test_an_update_is_timed_as_often_in_all_processes(monkeypatch, mine, longest, found, updates):
    """The first one chooses kernels; if it took long in any process, it is the only one."""
    config = config_of()
    engine, description = build_engine(config), describe(config, TrainingData(16, 3))
    now, done, task = 0.0, [], base_task(config, description.build())

    def update(_, n, batch):
        nonlocal now
        assert tuple(batch.images.shape) == (8, 3, 16, 16)
        done.append(n)
        now += (mine, 2.0, 1.0, 3.0)[n]
        return SimpleNamespace(norm=1.0)

    monkeypatch.setattr(estimate.TrainStep, "__call__", update)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(engine.accelerator, "gather", lambda mine: torch.cat([mine, torch.full_like(mine, longest)]))
    assert estimate.update_times(task, (3, 16, 16), engine) == (mine, found)
    assert done == list(range(updates))
    now, compiled = 0.0, replace(engine, compile=True)  # its first update says nothing about the others
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    done.clear()
    assert estimate.update_times(base_task(config, description.build()), (3, 16, 16), compiled) == (mine, 1.0)
    assert done == [0, 1, 2, 3]


def test_disk_and_time_in_words():
    plain = config_of(num_iters=12, keep_last=0, keep_every=0, ema=0.9, ema_more="", ema_profiles=False)
    for changes, gibibytes in [
        ({}, 2 * (1 + 4)),
        ({"keep_last": 3}, 2 * (1 + 4) + 3),
        ({"keep_every": 5}, 2 * (1 + 4) + 2),
        ({"ema_more": "0.99,0.999"}, 2 * (1 + 4) + 2 * NUM_SNAPSHOTS),
        ({"ema_more": "0.99,0.999", "ema_interval": 5}, 2 * (1 + 4) + 2 * 3),
        ({"fsdp": True}, 2 * 2 * (1 + 4)),  # of which two processes hold a half each
    ]:
        assert disk_of(NEEDS, replace(plain, **changes), world_size=2) == gibibytes * GIB, changes
    assert time_facts(7200, 100, "cpu") == {"time": "2:00:00 on cpu: 100 updates of 72 s"}
    longer = time_facts(90_000, 100, "cpu")
    assert longer["warning"] == "more than a day: fewer --num_iters, a smaller --preset or a GPU"


def test_the_disk_of_a_run_includes_weights_that_do_not_learn(tmp_path):
    """Compared with the files of a run: model and state, of which there are two while they are replaced."""

    class PartlyFrozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 64, 1), nn.Conv2d(64, 1, 1)
            self.middle = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
            self.learns = nn.Conv2d(64, 64, 1)

        def forward(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.last(self.learns(self.middle(self.first(z)))) + 0 * timestep.view(-1, 1, 1, 1)

    AcceleratorState._reset_state(reset_partial_state=True)
    model, config = vdiff.wrap(PartlyFrozen(), (1, 4, 4)), config_of(num_iters=2, ema=0.9, ema_more="")
    engine = build_engine(config)

    def build(_):
        return base_task(config, vdiff.wrap(PartlyFrozen(), (1, 4, 4)).denoiser)

    found = memory_of(build, (1, 4, 4), 0, engine)
    middle = 4 * parameter_count(model.denoiser.network.model.middle)
    assert found.frozen == middle == 4 * 64 * (64 * 9 + 1)
    settings = {"num_iters": 2, "batch_size": 2, "ema_remainder": 0.0, "ema": 0.9, "device": "cpu", "lr": 1e-3}
    vdiff.train(model, torch.zeros(4, 1, 4, 4), out=tmp_path / "run", **settings).finish()
    sizes = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert sizes == pytest.approx(disk_of(found, config, 1) / 2, rel=0.05)
    assert sizes > 1.5 * disk_of(replace(found, frozen=0), config, 1) / 2
    assert disk_of(found, replace(config, lora_rank=2, base="base"), 1) == disk_of(replace(found, frozen=0), config, 1)
    both = memory_of(build, (1, 4, 4), 0, replace(engine, world_size=2))
    sharing = replace(config, fsdp=True)
    shared = memory_of(lambda e: replace(build(e), config=sharing), (1, 4, 4), 0, replace(engine, world_size=2))
    assert (shared.frozen, shared.weights) == (middle, both.weights // 2)
    assert disk_of(shared, sharing, 2) == disk_of(both, config, 2)


def test_a_dry_run_says_what_a_training_takes_and_a_training_says_it_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/toy_4"))
    line = "train.py --preset toy --num_iters 100 --batch_size 2 --device cpu"
    shown = done(f"{line} --dry_run").stdout.splitlines()
    assert all(len(part) <= 80 for row in shown for part in folded(row, 80))
    rows = dict(row.split(maxsplit=1) for row in shown if not row.startswith(" "))
    assert list(rows) == ["parameters", "images", "memory", "disk", "time"]
    assert rows["images"].endswith("200, 100 updates of 2")
    assert "on cpu: 100 updates of" in rows["time"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert "give --dry_run too" in error("train.py --all", 2)
    said = done(line).stderr
    assert all(said.index(f"\n{name} ") < said.index("training checkpoints/original") for name in rows)


def test_a_lora_is_estimated_and_trained_by_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/toy_4"))
    write_checkpoint(Path("checkpoints/original"))
    line = "train.py --base checkpoints/original --out checkpoints/lora --lora_rank 2 --lora_targets linear"
    said = done(f"{line} --num_iters 2 --batch_size 2 --device cpu").stderr
    assert "\nmemory " in said
    assert is_checkpoint(Path("checkpoints/lora"))
    assert (Path("checkpoints/lora") / ADAPTER).exists()


def test_a_training_without_memory_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/toy_4"))
    monkeypatch.setattr(estimate, "free_memory", lambda _: 1000)
    line = "train.py --preset toy --device cpu"
    assert "GiB of memory, and cpu has" in (said := error(line, 1))
    assert "--preset" not in said, "no preset is smaller"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert "\nmemory " in done(f"{line} --dry_run").stdout
