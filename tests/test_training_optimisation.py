"""Learning rates against closed forms, the average of the weights against a loop in float64, the paper's AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers.optimization

from tests.toy import (
    Watcher,
    assert_same_run,
    run_of,
    run_training,
    signal_at,
    train_config,
    write_dataset,
)
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.errors import Interrupted, OptionError
from vdiff.models.denoiser import Denoiser
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training.config import LR_SCHEDULES, PACKAGES, TrainConfig, resolve
from vdiff.training.engine import build_engine
from vdiff.training.loop import metrics_of
from vdiff.training.optimisation import build_optimizer, learning_rate
from vdiff.training.presets import read_preset
from vdiff.training.step import TrainStep

N = 1000


def rates(lr_schedule: str, *, warmup: int = 0, lr: float = 2e-4) -> list[float]:
    """The learning rate of each of N updates."""
    config = train_config(Path(), lr=lr, lr_schedule=lr_schedule, warmup_iters=warmup, num_iters=N)
    return [learning_rate(config, step) for step in range(N)]


def network() -> Denoiser:
    config = UNetConfig(1, 1, channels=4, embedding_channels=4, multipliers=(1,), num_blocks=1, attention_strides=())
    return Denoiser(UNet(config), CosineSchedule(), "v")


# The learning rate


def test_a_constant_rate_stays():
    assert rates("constant") == [2e-4] * N


def test_a_linear_rate_falls_evenly_to_zero_behind_the_last_update():
    """lr (1 − n/N): the whole rate at first, 1/N of it at last."""
    found = rates("linear")
    assert found == pytest.approx([2e-4 * (N - n) / N for n in range(N)], rel=1e-12)
    assert found[0] == 2e-4
    assert found[-1] == pytest.approx(2e-7)


def test_a_cosine_rate_falls_along_half_a_wave():
    """lr cos²(πn/2N), which is lr (1 + cos(πn/N))/2."""
    found = rates("cosine")
    assert found == pytest.approx([2e-4 * math.cos(math.pi * n / (2 * N)) ** 2 for n in range(N)], rel=1e-9)
    assert found[N // 2] == pytest.approx(1e-4)


@pytest.mark.parametrize("lr_schedule", LR_SCHEDULES)
@pytest.mark.parametrize("warmup", [1, 7, 100, 2 * N])
def test_warm_up_rises_evenly_to_the_whole_rate(lr_schedule, warmup):
    """Update n of a warm-up of W has (n + 1)/W of what it had without: 1/W at first, all of it from update W − 1 on."""
    with_it, without = rates(lr_schedule, warmup=warmup), rates(lr_schedule)
    share = [a / b for a, b in zip(with_it, without, strict=True)]
    assert share == pytest.approx([(n + 1) / warmup if n < warmup else 1 for n in range(N)], rel=1e-12)
    assert min(with_it) > 0


def test_every_schedule_is_held_to_a_form():
    assert set(LR_SCHEDULES) == {"constant", "linear", "cosine"}


def test_the_optimiser_is_the_paper_s():
    denoiser = network()
    optimizer = build_optimizer(denoiser, train_config(Path(), lr=3e-4, weight_decay=1e-3))
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.9, 0.999), 1e-8, 1e-3)
    assert not group["amsgrad"]
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in denoiser.parameters()}


@pytest.mark.parametrize("name", ["adafactor", "prodigy", "adamw8bit"])
def test_other_optimisers_are_those_of_their_libraries_and_resume_with_the_same_bits(tmp_path, name):
    """The weights after each update are those of the library's optimiser, which gets the same gradients."""
    pytest.importorskip(PACKAGES[name][0])
    config = train_config(
        write_dataset(tmp_path / "data"), optimizer=name, lr=0.5, weight_decay=0.1, ema=0.0, warmup_iters=0
    )
    theirs: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adafactor": lambda weights: transformers.optimization.Adafactor(
            weights, lr=0.5, weight_decay=0.1, scale_parameter=False, relative_step=False
        ),
        "prodigy": lambda weights: __import__("prodigyopt").Prodigy(
            weights, lr=0.5, weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True
        ),
        "adamw8bit": lambda weights: __import__("bitsandbytes").optim.AdamW8bit(weights, lr=0.5, weight_decay=0.1),
    }
    run = run_of(config, tmp_path / "run")
    step = TrainStep(run, build_engine(config))
    own = list(step.denoiser.parameters())
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in own]
    reference = theirs[name](copies)

    def follow(*_: object) -> None:
        for weight, copied in zip(own, copies, strict=True):
            copied.grad = weight.grad.clone()
        reference.step()

    step.optimizer.register_step_pre_hook(follow)
    for _ in metrics_of(run, step, Watcher()):
        pass
    for weight, copied in zip(own, copies, strict=True):
        assert torch.equal(weight, copied)
    for cut in (1, 4):
        with pytest.raises(Interrupted):
            run_training(config, tmp_path / "cut", reporter=signal_at(cut), resume=cut > 1)
    run_training(config, tmp_path / "cut", resume=True)
    run_training(config, tmp_path / "whole")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_an_optimiser_without_its_library_or_with_fsdp_is_refused(tmp_path, monkeypatch):
    config = train_config(tmp_path, optimizer="prodigy")
    monkeypatch.setattr("vdiff.training.config.find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"--optimizer prodigy needs prodigyopt, which is not installed; pip install"):
        build_engine(config)
    with pytest.raises(OptionError, match="--fsdp shards the moments of adamw alone"):
        train_config(tmp_path, optimizer="prodigy", fsdp=True)


@pytest.mark.parametrize(("flags", "lr"), [({}, 1.0), ({"lr": 0.5}, 0.5), ({"optimizer": "adamw"}, 1e-3)])
def test_prodigy_replaces_the_learning_rate_of_a_preset(flags, lr):
    layers = {"preset toy": read_preset("toy").train, "my.toml": {"optimizer": "prodigy"}, "the command line": flags}
    assert resolve(TrainConfig, layers).lr == lr
