"""Learning rates against closed forms, the average of the weights against a loop in float64, the paper's AdamW."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.toy import train_config
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.models.denoiser import Denoiser
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.training.config import LR_SCHEDULES
from vdiff.training.optimisation import build_optimizer, learning_rate

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
