"""What only a GPU shows: the same numbers as on the CPU, every precision, compiled or not, resumed, sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.toy import (
    distill_config,
    run_ladder,
    run_training,
    signal_at,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff.api import load
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import Interrupted
from vdiff.models.checkpoint import WEIGHTS, load_checkpoint, read_config, read_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cuda") / "toy_4")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiles", [False, True])
def test_a_run_learns_in_every_precision(data: Path, tmp_path: Path, precision: str, compiles: bool) -> None:
    config = train_config(data, device="cuda", precision=precision, compile=compiles, dropout=0.0)
    run_training(config, tmp_path / "run")
    before = run_training(replace(config, lr=0.0, weight_decay=0.0), tmp_path / "still")
    assert before.num_iters == 6
    moved, still = (read_tensors(tmp_path / name / WEIGHTS) for name in ("run", "still"))
    assert all(tensor.isfinite().all() for tensor in moved.values())
    assert sum(not torch.equal(moved[name], still[name]) for name in moved) > len(moved) // 2


def test_a_run_that_is_cut_ends_as_one_that_was_not(data: Path, tmp_path: Path) -> None:
    config = train_config(data, device="cuda", precision="fp32", compile=False)
    run_training(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(config, tmp_path / "cut", reporter=signal_at(3))
    run_training(config, tmp_path / "cut", resume=True)
    whole, cut = (read_tensors(tmp_path / name / WEIGHTS) for name in ("whole", "cut"))
    for name, tensor in whole.items():  # kernels of a GPU may add in another order
        torch.testing.assert_close(cut[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("guided", "match")])
def test_every_method_makes_a_student(data: Path, tmp_path: Path, method: str) -> None:
    write_checkpoint(tmp_path / "original")
    config = distill_config(data, tmp_path / "original", method=method, to_steps=2, device="cuda", check_images=4)
    stages = run_ladder(config, read_config(tmp_path / "original"))
    denoiser, description = load_checkpoint(stages[-1].folder)
    assert description.num_timesteps == 2
    assert all(tensor.isfinite().all() for tensor in denoiser.state_dict().values())


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_a_sampler_draws_what_it_draws_on_the_cpu(tmp_path: Path, sampler: str) -> None:
    write_checkpoint(tmp_path / "model")
    images = [
        load(tmp_path / "model", device=device, precision="fp32").sample(num=3, steps=4, sampler=sampler)
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=2e-3)
