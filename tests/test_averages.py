"""Averages against explicit sums and integrals over recorded weights; other lengths against averages of that length."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.commands import ROOT, the_error
from tests.oracles import randn
from tests.programs import Forked, ends
from tests.toy import assert_equal_tensors, train_config, write_checkpoint
from vdiff.cli import ema
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.errors import OptionError, VdiffError
from vdiff.models.checkpoint import (
    CONFIG,
    WEIGHTS,
    load_checkpoint,
    read_config,
    read_metadata,
    read_tensors,
    write_tensors,
)
from vdiff.models.denoiser import Denoiser
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training.averages import (
    MAX_SIGMA_REL,
    TRACKED,
    Averages,
    Exponential,
    PowerFunction,
    Profile,
    gamma_of,
    profiles_of,
)
from vdiff.training.posthoc import (
    MAX_MISFIT,
    coefficients,
    drop_later_snapshots,
    find_snapshots,
    inner_product,
    is_snapshot_due,
    reachable,
    read_exponential,
    reconstruct,
    save_snapshot,
)
from vdiff.training.presets import PRESETS, read_preset

LENGTHS = [0.001, 0.01, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.28, 0.2886]
POWERS = tuple(PowerFunction(sigma_rel) for sigma_rel in TRACKED)


def network(seed: int = 0) -> Denoiser:
    config = UNetConfig(1, 1, channels=4, embedding_channels=4, multipliers=(1,), num_blocks=1, attention_strides=())
    torch.manual_seed(seed)
    return Denoiser(UNet(config), CosineSchedule(), "v")


class Walk(nn.Module):
    """Some float64 weights that take a random walk: where they are after update n is `self.at(n)`."""

    def __init__(self, updates: int, *, width: int = 50, start: float = 0.0) -> None:
        super().__init__()
        self.path = start + randn(updates + 1, width).cumsum(0)
        self.weight = nn.Parameter(self.path[0].clone())

    def follow(self, averages: Averages, updates: range) -> Iterator[int]:
        """Walk on, and yield after each update its number from 1."""
        for step in updates:
            self.weight.data.copy_(self.path[step + 1])
            averages.update(step)
            yield step + 1


def disturb(denoiser: Denoiser, step: int) -> None:
    for k, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(randn(*parameter.shape, seed=1000 * step + k))


def shares(profile: Profile, updates: int) -> np.ndarray:
    """The part that each of the weights 0 (the initial ones) … `updates` has in the average: (1 − βₖ) ∏_{j>k} βⱼ."""
    decay = np.asarray([0.0, *(profile.decay_at(step) for step in range(updates))])
    after = np.append(np.cumprod(decay[:0:-1])[::-1], 1.0)
    return np.asarray((1 - decay) * after)


# What an average remembers


@pytest.mark.parametrize("updates", [1, 2, 200])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999, 1.0])
def test_the_default_weighs_by_powers_of_its_decay(decay, updates):
    """Σₖ dᵏ θ₋ₖ / Σₖ dᵏ over all updates, in float64, without the initial weights; 0 is no average at all."""
    denoiser, total = network(), 0.0
    averages = Averages(denoiser, *profiles_of(ema=decay, ema_more=(), ema_profiles=False))
    expected = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in denoiser.named_parameters()}
    for step in range(updates):
        disturb(denoiser, step)
        averages.update(step)
        weight = decay ** (updates - 1 - step)
        total += weight
        for name, w in denoiser.named_parameters():
            expected[name] += weight * w.detach().double()
    for name, found in averages.model.named_parameters():
        torch.testing.assert_close(found.double(), expected[name] / total, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "profile",
    [Exponential(0.5), Exponential(0.99), Exponential(1.0), *POWERS, PowerFunction(0.25)],
)
def test_an_average_is_the_sum_written_out(profile):
    walk = Walk(300, start=3.0)
    averages = Averages(walk, None, [profile])
    for _ in walk.follow(averages, range(300)):
        pass
    expected = torch.from_numpy(shares(profile, 300)) @ walk.path
    torch.testing.assert_close(averages.named()[profile.name]["weight"], expected, rtol=1e-10, atol=1e-10)
    assert shares(profile, 300).sum() == pytest.approx(1)


@pytest.mark.parametrize("decay", [0.8, 0.9999, 1.0])
def test_weights_count_their_decay_times_as_much_as_the_next(decay):
    found = shares(Exponential(decay), 200)
    assert found[0] == 0  # the initial weights
    assert found[1:-1] / found[2:] == pytest.approx(decay, rel=1e-9)
    assert found.sum() == pytest.approx(1, rel=1e-12)


def test_the_correction_wears_off():
    """β is 0 at first and d in the end."""
    assert Exponential(0.9999).decay_at(0) == 0
    assert Exponential(0.9999).decay_at(10**6) == pytest.approx(0.9999, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 8, 80])
def test_after_a_half_life_the_old_weighs_one_half(batch_size):
    config = train_config(Path(), ema=0.0, ema_images=640.0, batch_size=batch_size)
    found = shares(Exponential(config.average_decay), 2000)
    assert found[-1 - 640 // batch_size] / found[-1] == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_average_is_shorter_than_its_training(name):
    """So the decay means what it says, and the first updates are forgotten."""
    preset = read_preset(name).train
    assert preset["ema"] ** preset["num_iters"] < 1e-3


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_a_power_function_average_is_the_integral_of_its_profile(sigma_rel):
    """(γ + 1)/t^(γ + 1) ∫₀ᵗ τ^γ θ(τ) dτ by the midpoint rule, with θ what it was after the update that τ is in."""
    walk, t, fine = Walk(200, start=5.0), 200, 400
    averages = Averages(walk, None, [PowerFunction(sigma_rel)])
    for _ in walk.follow(averages, range(t)):
        pass
    gamma = gamma_of(sigma_rel)
    tau = (torch.arange(t * fine, dtype=torch.float64) + 0.5) / fine
    profile = (gamma + 1) / t * (tau / t) ** gamma
    theta = walk.path[1:].repeat_interleave(fine, 0)
    integral = profile @ theta / fine
    torch.testing.assert_close(averages.named()[f"power_{sigma_rel}"]["weight"], integral, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_a_length_is_the_standard_deviation_of_the_memory(sigma_rel):
    t = 20_000
    share, when = shares(PowerFunction(sigma_rel), t), np.arange(t + 1)
    assert share[0] == 0  # the initial weights
    assert share.sum() == pytest.approx(1)
    mean = share @ when
    assert np.sqrt(share @ (when - mean) ** 2) / t == pytest.approx(sigma_rel, rel=1e-4)


def test_the_first_decays_of_a_power_function():
    profile = PowerFunction(0.1)
    assert profile.decay_at(0) == 0
    assert profile.decay_at(1) == pytest.approx(0.5 ** (profile.gamma + 1))
    assert profile.decay_at(999) == pytest.approx(0.999 ** (profile.gamma + 1))


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of p(τ) ∝ τ^γ on [0, t], divided by t (EDM2 equation 123)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_lengths_and_exponents_are_one_another_s_inverse(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    s = sigma_rel**-2
    assert gamma == pytest.approx(max(np.roots([1, 7, 16 - s, 12 - s]).real), rel=1e-6, abs=1e-6)


def test_known_lengths():
    """EDM2 section 3.1: γ = 16.97 and 6.94 are widths of 5 % and 10 %; the plain mean is as wide as a width can be."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert sigma_rel_of(0) == MAX_SIGMA_REL == pytest.approx(12**-0.5)
    assert gamma_of(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, math.inf, math.nan])
def test_there_are_lengths_that_no_power_function_has(sigma_rel):
    with pytest.raises(OptionError, match=r"out of range.*0\.2887"):
        gamma_of(sigma_rel)


# The averages of a denoiser


def settings(**changes: Any) -> tuple[Profile | None, tuple[Profile, ...]]:
    values: dict[str, Any] = {"ema": 0.9, "ema_more": (), "ema_profiles": False}
    return profiles_of(**values | changes)


def test_settings_say_which_averages_there_are():
    assert settings() == (Exponential(0.9), ())
    assert settings(ema=0.0) == (None, ())
    assert settings(ema_more=(0.5, 0.99)) == (Exponential(0.9), (Exponential(0.5), Exponential(0.99)))
    assert settings(ema_profiles=True)[1] == (PowerFunction(0.05), PowerFunction(0.1))
    with pytest.raises(ValueError, match="same name"):
        Averages(network(), *settings(ema_more=(0.5, 0.5)))


def test_several_lengths_are_what_each_alone_is():
    further = (Exponential(0.5), Exponential(0.99), *POWERS)
    denoiser = network()
    together = Averages(denoiser, Exponential(0.9), further)
    alone = [Averages(denoiser, profile) for profile in (Exponential(0.9), *further)]
    for step in range(20):
        disturb(denoiser, step)
        for averages in (together, *alone):
            averages.update(step)
    assert list(together.named()) == ["ema", "ema_0.5", "ema_0.99", "power_0.05", "power_0.1"]
    for found, averages in zip(together.named().values(), alone, strict=True):
        assert_equal_tensors(found, averages.named()["ema"])


def test_the_model_is_a_denoiser_of_its_own():
    denoiser = network()
    averages = Averages(denoiser, Exponential(0.9), POWERS)
    disturb(denoiser, 0)
    averages.update(0)
    assert not averages.model.training
    assert denoiser.training
    assert not any(parameter.requires_grad for parameter in averages.model.parameters())
    assert all(parameter.requires_grad for parameter in denoiser.parameters())
    memory = [tensor.data_ptr() for values in averages.named().values() for tensor in values.values()]
    assert len({*memory, *(parameter.data_ptr() for parameter in denoiser.parameters())}) == 4 * len(memory) // 3
    z, t = randn(2, 1, 4, 4, dtype=torch.float32), torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert averages.model(z, t).x.isfinite().all()


def test_no_decay_is_no_average():
    denoiser = network()
    averages = Averages(denoiser, None, [Exponential(0.5)])
    before = {name: w.detach().clone() for name, w in denoiser.named_parameters()}
    averages.update(0)
    assert averages.model is denoiser
    assert denoiser.training
    assert_equal_tensors(dict(denoiser.named_parameters()), before)
    assert averages.decay_at(5) == 0
    assert Averages(denoiser, Exponential(0.5)).decay_at(1) == pytest.approx(1 / 3)
    assert list(averages.named()) == ["ema_0.5"]
    assert Averages(denoiser, None).named() == {}


def test_an_average_keeps_its_memory_format():
    denoiser = network().to(memory_format=torch.channels_last)
    averages = Averages(denoiser, Exponential(0.9), POWERS)
    strides = [parameter.stride() for parameter in denoiser.parameters()]
    assert strides != [parameter.stride() for parameter in network().parameters()]
    for _ in range(2):
        averages.update(0)
        for values in averages.named().values():
            assert [tensor.stride() for tensor in values.values()] == strides
        averages.load(
            {name: {k: v.clone(memory_format=torch.contiguous_format) for k, v in values.items()}
             for name, values in averages.named().items()}
        )  # fmt: skip


class Calls(TorchDispatchMode):
    """Keeps the names of the operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_update_is_one_operation_for_each_average():
    """None that reads a number back, which would wait for the device."""
    averages = Averages(network(), Exponential(0.9), (Exponential(0.5), *POWERS))
    with Calls() as calls:
        averages.update(7)
    assert calls.names == ["aten._foreach_lerp_.Scalar"] * 4


class Normalised(nn.Module):
    """A module with buffers, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


def test_buffers_are_copied(tmp_path):
    module = Normalised()
    averages = Averages(module, Exponential(0.9), POWERS)
    for step in range(3):
        module.norm(randn(5, 3, seed=step, dtype=torch.float32))
        averages.update(step)
    assert_equal_tensors(dict(averages.model.named_buffers()), dict(module.named_buffers()))
    assert averages.model.norm.num_batches_tracked == 3
    module.norm(randn(5, 3, dtype=torch.float32))
    assert averages.model.norm.num_batches_tracked == 3
    save_snapshot(tmp_path, averages, step=3, images=12)
    (found,) = reconstruct(tmp_path, [0.1])
    module.load_state_dict(found.weights)
    assert module.norm.num_batches_tracked == 3


def test_going_on_from_a_saved_state_is_never_having_stopped(tmp_path):
    further = (Exponential(0.5), *POWERS)
    first = network()
    whole = Averages(first, Exponential(0.9), further)
    for step in range(10):
        disturb(first, step)
        whole.update(step)
        if step == 4:
            flat = {f"{name}.{key}": v for name, values in whole.named().items() for key, v in values.items()}
            write_tensors(tmp_path / "state.safetensors", flat, {})
    second = network(seed=1)
    resumed = Averages(second, Exponential(0.9), further)
    saved = read_tensors(tmp_path / "state.safetensors")
    resumed.load(
        {name: {key.removeprefix(f"{name}."): v for key, v in saved.items() if key.startswith(f"{name}.")}
         for name in resumed.named()}
    )  # fmt: skip
    for step in range(5, 10):
        disturb(second, step)
        resumed.update(step)
    for name, values in whole.named().items():
        assert_equal_tensors(values, resumed.named()[name])


def test_a_state_of_another_model_is_refused():
    averages = Averages(network(), Exponential(0.9), POWERS)
    good = averages.named()
    name = next(iter(good["power_0.1"]))
    with pytest.raises(KeyError):
        averages.load({key: good[key] for key in ("ema", "power_0.1")})
    with pytest.raises(RuntimeError):
        averages.load({**good, "ema": {}})
    with pytest.raises(KeyError):
        averages.load({**good, "power_0.1": {}})
    with pytest.raises(ValueError, match=r"has shape .*, not"):
        averages.load({**good, "power_0.1": {**good["power_0.1"], name: torch.zeros(1)}})


# What a training makes of the denoiser


def train(averages: Averages, model: nn.Module, denoiser: Denoiser, *, rank: int = 0, ranks: int = 1) -> None:
    """Six updates by gradient descent on this rank's part of each batch."""
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    for step in range(6):
        z = randn(4, 1, 4, 4, seed=step, dtype=torch.float32).chunk(ranks)[rank]
        t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64).chunk(ranks)[rank]
        (model(z, t).v - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update(step)


def plain() -> dict[str, Any]:
    denoiser = network()
    averages = Averages(denoiser, Exponential(0.9), POWERS)
    train(averages, denoiser, denoiser)
    return averages.named()


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same averages, and not those of weights that stood still."""
    assert found.keys() == expected.keys()
    untrained = network().state_dict()
    for name, values in expected.items():
        assert found[name].keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-5, atol=1e-6)
        assert any((value - untrained[key]).abs().max() > 1e-3 for key, value in values.items())


@pytest.mark.parametrize(
    ("compiled_first", "backend"),
    [
        (False, "aot_eager"),
        (True, "eager"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, "eager"), (True, "aot_eager"))),
    ],
)
def test_compiling_in_place_makes_no_difference(backend, compiled_first):
    denoiser, seen = network(), []

    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        seen.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    if compiled_first:
        denoiser.network.compile(backend=compiler)
    averages = Averages(denoiser, Exponential(0.9), POWERS)
    if not compiled_first:
        denoiser.network.compile(backend=compiler)
    train(averages, denoiser, denoiser)
    assert seen
    count = len(seen)
    averages.model(randn(3, 1, 8, 8, dtype=torch.float32), torch.full((3,), 0.5, dtype=torch.float64))
    assert len(seen) == count  # the average itself is not compiled
    assert_near(averages.named(), plain())
    torch._dynamo.reset()


def in_process(rank: int, ranks: int, folder: Path) -> None:
    """One process of a distributed training, which leaves its averages behind."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    try:
        denoiser = network(seed=0 if rank == 0 else 99)  # DDP hands the weights of the first process to all
        model = DistributedDataParallel(denoiser)
        averages = Averages(denoiser, Exponential(0.9), POWERS)
        train(averages, model, denoiser, rank=rank, ranks=ranks)
        flat = {f"{name}/{key}": v for name, values in averages.named().items() for key, v in values.items()}
        write_tensors(folder / f"{rank}.safetensors", flat, {})
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    values: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        name, _, rest = key.partition("/")
        values.setdefault(name, {})[rest] = tensor
    return values


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed training")
@pytest.mark.parametrize("ranks", [1, 2])
def test_distributed_training_makes_no_difference(ranks, tmp_path):
    """Two processes with half of each batch: the averages of one with all of it, the same bits in both."""
    codes, _, stderr = ends([Forked(partial(in_process, rank, ranks, tmp_path), tmp_path) for rank in range(ranks)])
    assert codes == [0] * ranks, stderr
    found = [read_tensors(tmp_path / f"{rank}.safetensors") for rank in range(ranks)]
    for other in found[1:]:
        assert_equal_tensors(found[0], other)
    assert_near(nested(found[0]), plain())


# Snapshots


def walked(folder: Path, updates: int, *, every: int, further: Sequence[Profile] = POWERS, **walk: Any) -> Averages:
    """The averages of a random walk, with snapshots."""
    module = Walk(updates, **walk)
    averages = Averages(module, None, further)
    for done in module.follow(averages, range(updates)):
        if is_snapshot_due(done, updates, every):
            save_snapshot(folder, averages, step=done, images=4 * done)
    return averages


def test_snapshots_are_due_forty_times_and_at_the_end():
    assert [done for done in range(1, 11) if is_snapshot_due(done, 10, 4)] == [4, 8, 10]
    for num_iters in (40, 400, 12_345, 800_000):
        due = [done for done in range(1, num_iters + 1) if is_snapshot_due(done, num_iters, None)]
        assert len(due) in (39, 40)
        assert due[-1] == num_iters
    assert [done for done in range(1, 4) if is_snapshot_due(done, 3, None)] == [1, 2, 3]


def test_a_snapshot_says_what_it_holds(tmp_path):
    averages = walked(tmp_path, 10, every=4, further=(Exponential(0.5), *POWERS), width=3)
    found = find_snapshots(tmp_path)
    assert [(snapshot.step, snapshot.images) for snapshot in found] == [(4, 16), (8, 32), (10, 40)]
    assert [path.name for path in sorted((tmp_path / "averages").iterdir())] == [
        "000000004.safetensors", "000000008.safetensors", "000000010.safetensors",
    ]  # fmt: skip
    assert found[-1].sigma_rels == [0.05, 0.1]
    assert found[-1].decays == [0.5]
    tensors = read_tensors(found[-1].path)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "ema_0.5.weight": torch.float32, "power_0.05.weight": torch.float16, "power_0.1.weight": torch.float16,
    }  # fmt: skip
    for name, values in averages.named().items():
        assert torch.equal(tensors[f"{name}.weight"], values["weight"].to(tensors[f"{name}.weight"].dtype))


def test_a_run_with_one_average_leaves_no_snapshots(tmp_path):
    save_snapshot(tmp_path, Averages(network(), Exponential(0.9)), step=1, images=4)
    assert list(tmp_path.iterdir()) == []
    assert find_snapshots(tmp_path) == []


def test_snapshots_behind_the_update_that_a_run_goes_on_from_are_dropped(tmp_path):
    walked(tmp_path, 12, every=3, width=3)
    (tmp_path / "averages" / ".000000012.safetensors.77.tmp").write_bytes(b"half a file")
    (tmp_path / "averages" / "mine.safetensors").write_bytes(b"another's")
    drop_later_snapshots(tmp_path, 6)
    assert [snapshot.step for snapshot in find_snapshots(tmp_path)] == [3, 6]
    assert (tmp_path / "averages" / "mine.safetensors").exists()
    drop_later_snapshots(tmp_path, 5)
    assert [snapshot.step for snapshot in find_snapshots(tmp_path)] == [3]
    drop_later_snapshots(tmp_path, 0)
    assert find_snapshots(tmp_path) == []
    drop_later_snapshots(tmp_path / "nowhere", 0)


def test_a_run_that_was_cut_leaves_the_same_snapshots(tmp_path):
    further = (Exponential(0.5), *POWERS)
    walked(tmp_path / "whole", 12, every=3, further=further, width=3)
    module, folder = Walk(12, width=3), tmp_path / "cut"
    averages = Averages(module, None, further)
    for done in module.follow(averages, range(11)):  # its last state is of update 7, and it got beyond
        if is_snapshot_due(done, 12, 3):
            save_snapshot(folder, averages, step=done, images=4 * done)
        if done == 7:
            state = copy.deepcopy(averages.named())
    resumed = Averages(module, None, further)
    resumed.load(state)
    drop_later_snapshots(folder, 7)
    for done in module.follow(resumed, range(7, 12)):
        if is_snapshot_due(done, 12, 3):
            save_snapshot(folder, resumed, step=done, images=4 * done)
    assert [snapshot.step for snapshot in find_snapshots(folder)] == [3, 6, 9, 12]
    for one, other in zip(find_snapshots(tmp_path / "whole"), find_snapshots(folder), strict=True):
        assert_equal_tensors(read_tensors(one.path), read_tensors(other.path))
        assert read_metadata(one.path) == read_metadata(other.path)


def test_a_file_that_is_no_snapshot_is_named(tmp_path):
    walked(tmp_path, 6, every=3, width=3)
    write_tensors(tmp_path / "averages" / "000000004.safetensors", {}, {"step": "4"})
    with pytest.raises(VdiffError, match=r"000000004\.safetensors is not a snapshot"):
        find_snapshots(tmp_path)


# Another length, afterwards


@pytest.mark.parametrize("a", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("b", [0.5, 2.0, 1e6])
@pytest.mark.parametrize(("gamma_a", "gamma_b"), [(0.0, 0.5), (6.94, 16.97), (16.97, 6.94), (3.3, 3.3)])
def test_inner_products_are_integrals(a, b, gamma_a, gamma_b):
    """∫ p_a p_b dτ over [0, min(a, b)] by Gauss and Legendre's rule."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    end = min(a, b)
    tau = end * (nodes + 1) / 2
    p_a, p_b = ((g + 1) / t * (tau / t) ** g for t, g in ((a, gamma_a), (b, gamma_b)))
    expected = end / 2 * weights @ (p_a * p_b)
    assert float(inner_product(a, gamma_a, b, gamma_b)) == pytest.approx(expected, rel=1e-6, abs=1e-12 * end)
    assert float(inner_product(a, gamma_a, b, gamma_b)) == pytest.approx(
        float(inner_product(b, gamma_b, a, gamma_a)), rel=1e-14
    )


def tracked(updates: int, count: int) -> tuple[list[float], list[float], np.ndarray]:
    """Ends, exponents and shares (P, updates + 1) of both power functions at `count` snapshots."""
    ends = [updates * (k + 1) // count for k in range(count)]
    rows = [
        np.concatenate([shares(power, end), np.zeros(updates - end)]) for end in ends for power in POWERS
    ]  # fmt: skip
    return [float(end) for end in ends for _ in POWERS], [power.gamma for _ in ends for power in POWERS], np.stack(rows)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_misfit_is_how_far_the_memory_is_off(count):
    """The closed form against what each of 4,000 updates has in the combination and in the average that is wanted."""
    times, gammas, rows = tracked(4000, count)
    lengths = [0.03, 0.07, 0.15, 0.25]
    x, off = coefficients(times, gammas, 4000, lengths)
    assert x.shape == (4, 2 * count)
    assert x.sum(1) == pytest.approx(1, rel=1e-9)
    for k, length in enumerate(lengths):
        wanted = shares(PowerFunction(length), 4000)
        found = np.linalg.norm(x[k] @ rows - wanted) / np.linalg.norm(wanted)
        assert off[k] == pytest.approx(found, rel=0.02, abs=1e-4)


@pytest.mark.parametrize(("count", "length"), [(2, 0.03), (3, 0.2), (8, 0.17)])
def test_no_other_combination_is_nearer(count, length):
    """None whose shares sum up to 1."""
    times, gammas, rows = tracked(4000, count)
    wanted = shares(PowerFunction(length), 4000)
    ((x,), _) = coefficients(times, gammas, 4000, [length])
    best = np.linalg.norm(x @ rows - wanted)
    generator = np.random.default_rng(0)
    for _ in range(200):
        other = generator.normal(size=len(x))
        other -= other.mean()
        assert np.linalg.norm((x + 1e-2 * other / np.linalg.norm(other)) @ rows - wanted) > best


def test_a_length_that_was_tracked_is_found_again():
    times, gammas, _ = tracked(1000, 30)
    x, off = coefficients(times, gammas, 1000, TRACKED)
    expected = np.zeros((2, 60))
    expected[0, -2] = expected[1, -1] = 1
    assert x == pytest.approx(expected, abs=1e-7)
    assert off == pytest.approx(0, abs=1e-6)


def test_a_thousand_snapshots_are_not_too_many():
    """Nearby profiles are nearly the same: the equations must bear it."""
    lengths = [0.02, 0.05, 0.1, 0.2]
    offs = []
    for count in (10, 100, 1000):
        ends = np.repeat(np.arange(1, count + 1) * (1e6 / count), 2)
        x, off = coefficients(ends, [power.gamma for power in POWERS] * count, 1e6, lengths)
        assert np.isfinite(x).all()
        offs.append(off)
    assert (offs[2] < np.maximum(offs[1], 1e-6)).all()
    assert (offs[1] < np.maximum(offs[0], 1e-6)).all()
    assert offs[2].max() < 1e-4


@pytest.mark.parametrize("start", [0.0, 1000.0])
@pytest.mark.parametrize("count", [20, 40])
def test_what_is_made_afterwards_is_what_would_have_been_tracked(count, start):
    """Random walks of 800 updates, wherever they begin: the error is small beside how far the average lags behind."""
    walk = Walk(800, start=start)
    lengths = [0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25]
    averages = Averages(walk, None, [PowerFunction(length) for length in lengths])
    times, gammas, snapshots = [], [], []
    for done in walk.follow(averages, range(800)):
        if done % (800 // count) == 0:
            for power in POWERS:
                times.append(float(done))
                gammas.append(power.gamma)
                snapshots.append(averages.named()[power.name]["weight"].clone())
    x, off = coefficients(times, gammas, 800, lengths)
    assert off.max() < MAX_MISFIT
    for k, length in enumerate(lengths):
        expected = averages.named()[f"power_{length}"]["weight"]
        error = (torch.from_numpy(x[k]) @ torch.stack(snapshots) - expected).norm()
        lag = (expected - walk.weight.detach()).norm()
        assert error / lag < (1e-6 if length in TRACKED else 0.02)


def test_snapshots_on_the_disk_make_the_same_up_to_their_rounding(tmp_path):
    lengths = [0.03, 0.05, 0.075, 0.1, 0.2]
    further = (*POWERS, *(PowerFunction(length) for length in lengths if length not in TRACKED))
    averages = walked(tmp_path, 600, every=20, further=POWERS, start=2.0)
    direct = walked(tmp_path / "direct", 600, every=600, further=further, start=2.0).named()
    assert torch.equal(direct["power_0.1"]["weight"], averages.named()["power_0.1"]["weight"])
    found = reconstruct(tmp_path, lengths)
    assert [one.sigma_rel for one in found] == lengths
    for one in found:
        assert one.snapshots == 30
        (weight,) = one.weights.values()
        assert weight.dtype == torch.float32
        expected = direct[f"power_{one.sigma_rel}"]["weight"]
        assert (weight - expected).norm() / expected.norm() < 3e-3
        if one.sigma_rel in TRACKED:
            assert one.misfit < 1e-6
            assert torch.equal(weight.half(), expected.half())


def test_an_average_can_be_made_of_any_snapshot(tmp_path):
    """It takes those up to then, as if the training had ended there."""
    walked(tmp_path, 600, every=20)
    ((late,), (early,)) = reconstruct(tmp_path, [0.15]), reconstruct(tmp_path, [0.15], at=400)
    assert (late.weights["weight"] - early.weights["weight"]).norm() > 1
    assert early.snapshots == 20
    drop_later_snapshots(tmp_path, 400)
    (last,) = reconstruct(tmp_path, [0.15])
    assert torch.equal(early.weights["weight"], last.weights["weight"])
    with pytest.raises(OptionError, match=r"--at 410: .*the nearest is --at 400"):
        reconstruct(tmp_path, [0.15], at=410)


def test_what_can_be_made_depends_on_the_snapshots(tmp_path):
    walked(tmp_path, 600, every=20, width=2)
    snapshots = find_snapshots(tmp_path)
    low, high = reachable(snapshots, 600)
    assert 0.01 < low < 0.03 < 0.25 < high < MAX_SIGMA_REL
    low_of_few, high_of_few = reachable(snapshots, 60)
    assert low < low_of_few < 0.05 < 0.1 < high_of_few < high
    reconstruct(tmp_path, [low, high])
    for wrong in (low - 0.001, high + 0.001):
        with pytest.raises(
            OptionError, match=rf"{wrong}: the profile from 30 snapshots .* off; give one from {low} to {high}"
        ):
            reconstruct(tmp_path, [0.1, wrong])


def test_snapshots_of_two_models_are_not_mixed(tmp_path):
    walked(tmp_path, 6, every=3, width=3)
    other = tmp_path / "other"
    walked(other, 6, every=3, width=4)
    (other / "averages" / "000000006.safetensors").replace(tmp_path / "averages" / "000000006.safetensors")
    with pytest.raises(VdiffError, match="another model"):
        reconstruct(tmp_path, [0.1])


def test_without_power_functions_there_is_nothing_to_make_others_of(tmp_path):
    with pytest.raises(VdiffError, match=r"no snapshots.*--ema_more profiles"):
        reconstruct(tmp_path, [0.1])
    averages = walked(tmp_path, 6, every=3, further=[Exponential(0.5)], width=3)
    with pytest.raises(VdiffError, match=r"no power functions.*--ema_more profiles"):
        reconstruct(tmp_path, [0.1])
    found = read_exponential(tmp_path, 0.5)
    assert torch.equal(found["weight"], averages.named()["ema_0.5"]["weight"].float())
    assert not torch.equal(found["weight"], read_exponential(tmp_path, 0.5, at=3)["weight"])
    with pytest.raises(OptionError, match=r"--decay 0\.9: .*it has 0\.5"):
        read_exponential(tmp_path, 0.9)


# The command


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 updates that kept everything."""
    folder = tmp_path_factory.mktemp("runs") / "original"
    denoiser = write_checkpoint(folder, num_iters=40, target_iters=40, num_images=160, weights="raw", train_seconds=8.0)
    averages = Averages(denoiser, Exponential(0.9), (Exponential(0.5), *POWERS))
    for step in range(40):
        for k, parameter in enumerate(denoiser.parameters()):
            parameter.data.add_(0.1 * randn(*parameter.shape, seed=50 * step + k).float())
        averages.update(step)
        if is_snapshot_due(step + 1, 40, 2):
            save_snapshot(folder, averages, step=step + 1, images=4 * (step + 1))
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of it, named from the folder above."""
    target = tmp_path / "runs" / "original"
    target.parent.mkdir()
    target.mkdir()
    for path in original.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(original)
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return "runs/original"


def typed(line: str) -> Any:
    return CliRunner().invoke(ema.command, line.split(), prog_name="vdiff ema")


def done(line: str) -> str:
    result = typed(line)
    assert result.exit_code == 0, result.output
    assert result.exception is None
    assert result.stderr == ""
    return str(result.stdout)


def error(line: str, code: int) -> str:
    result = typed(line)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return the_error(result.stdout, result.stderr)


def test_the_command_writes_a_checkpoint_like_any_other(run):
    text = done(f"{run} --sigma_rel 0.1")
    assert text.splitlines() == [
        "runs/original_ema0.100: σ_rel 0.1 (γ 6.94) at update 40, from 20 snapshots, profile 0.00% off",
        "next       python sample.py --checkpoint runs/original_ema0.100",
    ]
    made = Path("runs/original_ema0.100")
    assert sorted(path.name for path in made.iterdir()) == ["average.json", CONFIG, WEIGHTS]
    denoiser, config = load_checkpoint(made)
    before = read_config(Path(run))
    assert config == replace(before, weights="ema")
    stored = read_tensors(Path(run) / "averages" / "000000040.safetensors")
    for name, parameter in denoiser.named_parameters():
        torch.testing.assert_close(parameter.data, stored[f"power_0.1.{name}"].float(), rtol=1e-5, atol=1e-6)
    assert read_metadata(made / WEIGHTS) == {"format": "pt"}
    note = json.loads((made / "average.json").read_text())
    assert note.pop("misfit") < 1e-6
    assert note.pop("gamma") == pytest.approx(6.9377, abs=1e-3)
    assert note == {
        "run": run, "update": 40, "profile": "power function", "sigma_rel": 0.1, "snapshots": 20,
    }  # fmt: skip


def test_the_command_writes_several_at_once(run):
    text = done(f"{run} --sigma_rel 0.05,0.1234,0.2 --decay 0.5")
    assert len(text.splitlines()) == 5
    names = ["original", "original_decay0.5", "original_ema0.050", "original_ema0.1234", "original_ema0.200"]
    assert sorted(path.name for path in Path("runs").iterdir()) == names
    assert len({(Path("runs") / name / WEIGHTS).read_bytes() for name in names}) == 5
    (alone,) = reconstruct(Path(run), [0.1234])
    assert_equal_tensors(alone.weights, read_tensors(Path("runs/original_ema0.1234") / WEIGHTS))
    assert_equal_tensors(read_exponential(Path(run), 0.5), read_tensors(Path("runs/original_decay0.5") / WEIGHTS))
    assert json.loads(Path("runs/original_decay0.5/average.json").read_text()) == {
        "run": run, "update": 40, "profile": "exponential", "decay": 0.5,
    }  # fmt: skip


def test_the_command_makes_what_was_there_earlier(run):
    done(f"{run} --sigma_rel 0.1 --decay 0.5 --at 30")
    (expected,) = reconstruct(Path(run), [0.1], at=30)
    assert_equal_tensors(expected.weights, read_tensors(Path("runs/original_ema0.100_at30") / WEIGHTS))
    kept = read_tensors(Path("runs/original_decay0.5_at30") / WEIGHTS)
    assert_equal_tensors(read_exponential(Path(run), 0.5, at=30), kept)
    assert not torch.equal(kept["network.conv_in.weight"], read_exponential(Path(run), 0.5)["network.conv_in.weight"])
    config = read_config(Path("runs/original_ema0.100_at30"))
    assert (config.num_iters, config.num_images, config.train_seconds) == (30, 120, 6.0)
    assert not config.is_finished


def test_the_command_alone_says_what_there_is(run):
    lines = done(run).splitlines()
    assert lines[0] == "run              runs/original"
    assert lines[1].startswith("snapshots        20, updates 2 to 40, ")
    assert lines[2].startswith("power functions  stored with σ_rel 0.05, 0.1; --sigma_rel can be 0.0")
    assert lines[3] == "exponential      --decay 0.5"
    facts = json.loads(done(f"{run} --json"))
    low, high = facts.pop("sigma_rel")
    assert (low, high) == reachable(find_snapshots(Path(run)), 40)
    assert facts.pop("bytes") > 0
    assert facts == {
        "run": run, "updates": list(range(2, 41, 2)), "images": 160, "tracked": [0.05, 0.1], "decays": [0.5],
    }  # fmt: skip
    assert json.loads(done(f"{run} --at 20 --json"))["updates"] == list(range(2, 21, 2))
    assert sorted(path.name for path in Path("runs").iterdir()) == ["original"]


def test_the_command_answers_programs(run):
    written = json.loads(done(f"{run} --sigma_rel 0.1,0.2 --json"))["written"]
    assert [one["path"] for one in written] == ["runs/original_ema0.100", "runs/original_ema0.200"]
    assert written[1]["misfit"] < MAX_MISFIT


def test_the_command_names_its_folder_wherever_the_run_is(run, monkeypatch):
    monkeypatch.chdir(run)
    done(". --sigma_rel 0.1")
    assert (Path("..") / "original_ema0.100" / CONFIG).is_file()


def test_nothing_is_replaced_unasked(run):
    done(f"{run} --sigma_rel 0.1 --out made")
    before = (Path("made") / WEIGHTS).read_bytes()
    assert error(f"{run} --sigma_rel 0.2 --out made", 1).startswith("made exists already; give another ")
    assert (Path("made") / WEIGHTS).read_bytes() == before
    done(f"{run} --sigma_rel 0.2 --out made --overwrite")
    assert (Path("made") / WEIGHTS).read_bytes() != before
    write_checkpoint(Path("trained"))
    for out in (f"--out {run}", "--out trained"):
        words = error(f"{run} --sigma_rel 0.1 {out} --overwrite", 2 if "original" in out else 1)
        assert "choose another --out" in words
    assert sorted(path.name for path in Path().iterdir()) == ["made", "runs", "trained"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--sigma_rel 0.3", 2, "σ_rel 0.3 is out of range"),
        ("--sigma_rel 0", 2, "σ_rel 0.0 is out of range"),
        ("--sigma_rel nan", 2, "σ_rel nan is out of range"),
        ("--sigma_rel 0.003", 2, "σ_rel 0.003: the profile from 20 snapshots until update 40 would be"),
        ("--sigma_rel 0.1,0.003", 2, "σ_rel 0.003: the profile from 20 snapshots until update 40 would be"),
        ("--sigma_rel 0.1 --at 31", 2, "--at 31: runs/original holds no snapshot of that update; the nearest is"),
        ("--sigma_rel much", 2, "Invalid value for '--sigma_rel': 'much' is not a number"),
        ("--sigma_rel 0.1,0.2 --out made", 2, "--out names one checkpoint, but there are 2"),
        ("--decay 0.7", 2, "--decay 0.7: runs/original has no such average; it has 0.5"),
        ("--out made", 2, "--out needs an average to write; give --sigma_rel"),
        ("--overwrite", 2, "--overwrite needs an average to write; give --sigma_rel"),
        ("--at 0", 2, "Invalid value for '--at'"),
    ],
)
def test_a_wrong_word_is_one_line(words, code, message, run):
    assert error(f"{run} {words}", code).startswith(message)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["original"]


@pytest.mark.parametrize("words", ["", "--sigma_rel 0.1", "--json"])
def test_a_run_without_snapshots_is_told_how_to_get_them(words, tmp_path):
    write_checkpoint(tmp_path / "bare")
    message = error(f"{tmp_path / 'bare'} {words}", 1)
    assert "holds no snapshots of averages; train with --ema_more profiles" in message
    assert "no such checkpoint" in error(f"{tmp_path / 'nowhere'} {words}", 1)


def test_damaged_snapshots_are_one_line(run):
    path = Path(run) / "averages" / "000000020.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert f"{path} cannot be read" in error(f"{run} --sigma_rel 0.1", 1)
    path.write_bytes(whole)
    write_checkpoint(Path(run), unet={**read_config(Path(run)).unet, "channels": 8})
    assert "do not fit its config.json" in error(f"{run} --sigma_rel 0.1", 1)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["original"]


def test_the_help_of_the_command_is_immediate(tmp_path):
    code = (
        "import sys\nfrom vdiff.cli.ema import command\n"
        "try: command(['--help'], prog_name='vdiff ema')\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'numpy', 'safetensors'} & {*sys.modules}))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.stderr == ""
    assert process.stdout.startswith("Usage: vdiff ema [OPTIONS] RUN")
    assert process.stdout.splitlines()[-1] == "0 []"
