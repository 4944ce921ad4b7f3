"""Schedulers of diffusers as oracles: on our tables, with our grids, in float64 as far as they go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.oracles import mixture
from vdiff.diffusion.samplers import Denoise
from vdiff.diffusion.schedules import Schedule, TableSchedule, grid_angles

PREDICTION_NAMES = {"v": "v_prediction", "eps": "epsilon", "x": "sample"}


def foreign(kind: Any, schedule: TableSchedule, num_steps: int, **options: Any) -> Any:
    """A scheduler of diffusers on our table, whose ᾱ are not rounded to float32."""
    betas = schedule.betas()
    scheduler = kind(
        **{"num_train_timesteps": len(betas), "trained_betas": betas, "timestep_spacing": "trailing"} | options
    )
    exact = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=2e-4, atol=1e-8)
    scheduler.alphas_cumprod = exact
    scheduler.set_timesteps(num_steps)
    return scheduler


def with_exact_sigmas(scheduler: Any, schedule: Schedule, times: Tensor) -> Any:
    """The scheduler with σ/α = tan φ(t) in float64 at `times`, which its own rounded ones must agree with."""
    sigmas = grid_angles(schedule, times).tan().flip(0)
    if len(scheduler.sigmas) == 2 * len(sigmas) - 2:  # Heun's: each but the ends twice
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=2e-4, atol=1e-8)
    scheduler.sigmas = sigmas
    return scheduler


def walk(scheduler: Any, schedule: Schedule, denoise: Denoise, z: Tensor, output: str, scales: Tensor) -> list[Tensor]:
    """z at each step of a scheduler that walks through `scales`·z; the network is asked at its timesteps."""
    states = [z * scales[0]]
    for timestep, scale in zip(scheduler.timesteps.tolist(), scales[:-1], strict=True):
        t = torch.full((len(z),), (timestep + 1) / schedule.label_scale, dtype=torch.float64)
        said = getattr(denoise(states[-1] / scale, t), output)
        with no_float32():
            states.append(scheduler.step(said, timestep, states[-1]).prev_sample)
    return [state / scale for state, scale in zip(states, scales, strict=True)]


@contextmanager
def no_float32() -> Iterator[None]:
    """Schedulers that round their states to `torch.float32` find float64 there."""
    float32 = torch.float32
    torch.float32 = torch.float64  # type: ignore[misc]
    try:
        yield
    finally:
        torch.float32 = float32  # type: ignore[misc]


def wild(schedule: Schedule) -> Denoise:
    """A mixture whose x̂ leaves [−1, 1], so that clipping matters."""
    return mixture(schedule, means=(-1.6, 0.1, 1.3))
