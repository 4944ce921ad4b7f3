"""A network half of whose weights are frozen: what learns is averaged, saved and resumed; the rest is left alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.programs import ends, launch
from tests.toy import assert_equal_bits, fit_run, run_of, signal_at, train_config, write_dataset
from vdiff.errors import Interrupted, VdiffError
from vdiff.models.checkpoint import WEIGHTS, load_checkpoint, read_tensors
from vdiff.models.denoiser import Denoiser
from vdiff.training.engine import build_engine
from vdiff.training.loop import Run
from vdiff.training.posthoc import find_snapshots, read_exponential, reconstruct
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep

SETTINGS = {"ema_more": "0.5", "ema_profiles": True, "ema_interval": 1, "ckpt_interval": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("frozen") / "toy_4")


def is_frozen(name: str) -> bool:
    return name.startswith(("network.embed", "network.down"))


def frozen_weights(denoiser: Denoiser) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in denoiser.named_parameters() if is_frozen(name))


def half_frozen(data: Path, folder: Path, **changes: Any) -> Run:
    """The run of `tests.toy`, half of whose network does not learn, with every kind of average."""
    run = run_of(train_config(data, **SETTINGS | changes), folder)
    for _, weight in frozen_weights(run.denoiser):
        weight.requires_grad_(False)
    return replace(run, self_ema=0.5)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run without a break, and the weights that it began with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = half_frozen(data, folder)
    began = {name: tensor.clone() for name, tensor in run.denoiser.state_dict().items()}
    fit_run(run)
    return folder, began


def test_files_of_a_run_hold_the_weights_that_learn(whole):
    folder, began = whole
    learning = {name for name in began if not is_frozen(name)}
    assert 0 < len(learning) < len(began)
    parts = ("raw", "ema", "self_teacher", "ema_0.5", "power_0.05", "power_0.1", "exp_avg", "exp_avg_sq")
    assert read_tensors(state_path(folder)).keys() == {f"{part}.{name}" for part in parts for name in learning}
    for snapshot in find_snapshots(folder):
        names = ("ema_0.5", "power_0.05", "power_0.1")
        assert read_tensors(snapshot.path).keys() == {f"{part}.{name}" for part in names for name in learning}


def test_frozen_weights_stay_and_the_others_learn(whole):
    folder, began = whole
    denoiser, _ = load_checkpoint(folder)  # the whole network, by its path alone
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(tensor, began[name]) == is_frozen(name)


def test_other_averages_are_whole_models(whole):
    folder, began = whole
    (made,) = reconstruct(folder, [0.1])
    for weights in (made.weights, read_exponential(folder, 0.5)):
        assert weights.keys() == began.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, began[name]) == is_frozen(name)


@pytest.mark.parametrize("cuts", [[1], [2, 4]])
def test_a_run_that_is_cut_ends_with_the_same_bits(data, whole, tmp_path, cuts):
    for cut in cuts:
        with pytest.raises(Interrupted):
            fit_run(half_frozen(data, tmp_path / "run"), signal_at(cut))
    fit_run(half_frozen(data, tmp_path / "run"))
    for name in (Path(WEIGHTS), state_path(Path()), Path("averages/000000003.safetensors")):
        assert_equal_bits(tmp_path / "run" / name, whole[0] / name)


def test_a_state_with_other_frozen_weights_is_refused(data, tmp_path):
    with pytest.raises(Interrupted):
        fit_run(half_frozen(data, tmp_path / "run"), signal_at(2))
    run = half_frozen(data, tmp_path / "run")
    run.denoiser.requires_grad_(True)
    with pytest.raises(VdiffError, match=r"does not belong to this run .*start again with another --out"):
        fit_run(run)


def test_frozen_weights_are_in_memory_once_and_in_no_optimiser(data, tmp_path):
    run = half_frozen(data, tmp_path / "run")
    step = TrainStep(run, build_engine(run.config))
    addresses = {name: weight.data_ptr() for name, weight in step.denoiser.named_parameters()}
    for module in (step.averages.model, step.averages.teacher):
        for name, weight in module.named_parameters():
            assert (weight.data_ptr() == addresses[name]) == is_frozen(name)
    moved = [weight for group in step.optimizer.param_groups for weight in group["params"]]
    frozen = {id(weight) for _, weight in frozen_weights(step.denoiser)}
    assert len(moved) == len(addresses) - len(frozen)
    assert frozen.isdisjoint(map(id, moved))


def test_a_network_that_cannot_learn_is_refused(data, tmp_path):
    run = run_of(train_config(data), tmp_path / "run")
    run.denoiser.requires_grad_(False)
    with pytest.raises(VdiffError, match=r"no weight of the network learns; set requires_grad"):
        fit_run(run)


def train_half_frozen(data: Path, folder: Path, **changes: Any) -> None:
    """The run, in a program of its own; two processes draw other numbers for dropout, so there is none."""
    fit_run(half_frozen(data, folder, dropout=0.0, lr=1e-3, lr_schedule="constant", **changes))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_the_others_are_shared_out_over_processes(data, whole, tmp_path):
    """FSDP: the weights of one process, frozen ones as they were; a run that is cut ends with the same bits."""
    for name, count, updates in (("one", 1, 6), ("two", 2, 6), ("cut", 2, 3), ("cut", 2, 6)):
        act = partial(train_half_frozen, data, tmp_path / name, fsdp=count > 1, num_iters=updates)
        codes, stdout, stderr = ends(launch(act, tmp_path, count))
        assert codes == [0] * count, stdout + stderr
    files = Path(WEIGHTS), state_path(Path()), Path("averages/000000006.safetensors")
    for name in files:
        assert_equal_bits(tmp_path / "two" / name, tmp_path / "cut" / name)
        one, two = (read_tensors(tmp_path / folder / name) for folder in ("one", "two"))
        assert one.keys() == two.keys()
    one, two = (read_tensors(tmp_path / folder / WEIGHTS) for folder in ("one", "two"))
    for name, began in whole[1].items():
        assert torch.equal(two[name], began) == is_frozen(name)
    learned = [torch.cat([(found[name] - whole[1][name]).flatten() for name in one]) for found in (one, two)]
    assert (learned[0] - learned[1]).norm() < 0.05 * learned[0].norm()
