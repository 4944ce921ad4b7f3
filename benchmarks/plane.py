"""Diffusion on points of the plane: data, small networks that learn side by side, and what they are measured by.

There is a network for each data set and seed, and all S of them are one: row r of points (B, 2) belongs to network
r mod S. So nine trainings cost the overhead of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.diffusion.distillation import TrainTarget
from vdiff.diffusion.samplers import SAMPLERS, Denoise, sample
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.diffusion.weighting import WEIGHTINGS
from vdiff.models.backbone import Signature
from vdiff.models.condition import Condition
from vdiff.models.denoiser import Denoiser
from vdiff.training.averages import Averages, Exponential
from vdiff.training.config import LoopConfig
from vdiff.training.objectives import (
    LOSSES,
    Objective,
    StudentState,
    TrainBatch,
    stratified,
    weighted_losses,
)
from vdiff.training.optimisation import build_optimizer, learning_rate

MODES, GUIDANCE = 8, (0.0, 4.0)
LABELS = 1024
NUM_WAVES = 5
CLASS_DROPOUT = 0.1


# Data: (count, generator) → points (count, 2), classes (count,)

Data = Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]]


def ring(count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Eight Gaussians of deviation 0.06 on a circle of radius 0.8, and which of them a point is from."""
    which = torch.randint(MODES, (count,), generator=generator)
    angle = which * (2 * math.pi / MODES)
    means = 0.8 * torch.stack([angle.cos(), angle.sin()], 1)
    return means + 0.06 * torch.randn(count, 2, generator=generator), which


def moons(count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Two half circles that reach into each other, with noise of 0.04; no classes."""
    side = 1 - 2 * torch.randint(2, (count,), generator=generator)
    angle = math.pi * torch.rand(count, generator=generator)
    arcs = torch.stack([0.6 * angle.cos() - 0.3 * side, side * (0.6 * angle.sin() - 0.15)], 1)
    return arcs + 0.04 * torch.randn(count, 2, generator=generator), torch.zeros_like(side)


def spiral(count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One arm of a turn and a half, evenly filled, with noise of 0.025; no classes."""
    part = torch.rand(count, generator=generator).sqrt()
    angle = 3 * math.pi * part
    arm = 0.9 * part[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return arm + 0.025 * torch.randn(count, 2, generator=generator), torch.zeros(count, dtype=torch.int64)


DATA: dict[str, Data] = {"ring": ring, "moons": moons, "spiral": spiral}


# Networks


@dataclass
class Tally:
    """Rows that went through any of the networks that share it, their copies too."""

    rows: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Tally:
        return self


@dataclass(frozen=True)
class MlpsConfig:
    """S residual MLPs, and what a `Denoiser` asks of its network."""

    count: int
    width: int = 128
    blocks: int = 3
    num_classes: int = 0
    guidance_input: bool = False
    in_channels: int = 2
    out_channels: int = 2

    @property
    def signature(self) -> Signature:
        """What the network takes: "no class" is one class more."""
        names = ("classes",) * (self.num_classes > 0) + ("guidance",) * self.guidance_input
        return Signature(2, self.out_channels, names, {"classes": self.num_classes} if names else {}, self.num_classes)


class Linears(nn.Module):
    """S linear maps: (S, b, in) → (S, b, out)."""

    def __init__(self, count: int, size_in: int, size_out: int) -> None:
        super().__init__()
        bound = size_in**-0.5
        self.weight = nn.Parameter(torch.empty(count, size_in, size_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, size_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Mlps(nn.Module):
    """Points (B, 2), waves of t = (timestep + 1)/L, classes and guidance → (B, 2); row r by network r mod S."""

    def __init__(self, config: MlpsConfig, tally: Tally) -> None:
        super().__init__()
        self.config, self.signature, self.tally = config, config.signature, tally
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(NUM_WAVES))
        told = 2 + 2 * NUM_WAVES + (config.num_classes + 1 if config.num_classes else 0)
        self.begin = Linears(config.count, told, config.width)
        self.blocks = nn.ModuleList(Linears(config.count, config.width, config.width) for _ in range(config.blocks))
        self.end = Linears(config.count, config.width, 2)
        if config.guidance_input:
            self.guidance = nn.Parameter(torch.zeros(config.count, 1, config.width))

    def forward(
        self, z: Tensor, timestep: Tensor, classes: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        def split(rows: Tensor) -> Tensor:
            return rows.reshape(-1, self.config.count, rows.shape[-1]).transpose(0, 1)

        self.tally.rows += len(z)
        waves = (timestep[:, None] + 1) / LABELS * self.frequencies
        told = [z, waves.sin(), waves.cos()]
        if classes is not None:
            told.append(nn.functional.one_hot(classes, self.config.num_classes + 1).to(z))
        h = self.begin(split(torch.cat(told, 1)))
        if guidance is not None:
            h = h + split(guidance[:, None]) * self.guidance
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        return self.end(nn.functional.silu(h)).transpose(0, 1).reshape(-1, 2)


def new_denoiser(config: MlpsConfig, like: Denoiser | None = None) -> Denoiser:
    """A denoiser; with the weights of another, as far as they go, and its tally."""
    tally = Tally() if like is None else like.network.tally
    denoiser = Denoiser(Mlps(config, tally), CosineSchedule(label_scale=LABELS), "v")
    if like is not None:
        denoiser.load_state_dict(like.state_dict(), strict=False)
    return denoiser


# The loop


def draw(data: Sequence[str], known: MlpsConfig, size: int) -> TrainBatch:
    """What an update is given: `size` rows for each network, which are for one data set after the other."""
    seeds = known.count // len(data)
    found = [DATA[name](size * seeds, None) for name in data]
    x = torch.cat([points.reshape(size, seeds, 2) for points, _ in found], 1).reshape(-1, 2)
    condition = Condition()
    if known.num_classes:
        classes = torch.cat([which.reshape(size, seeds) for _, which in found], 1).flatten()
        condition = known.signature.condition(classes=classes).drop(torch.rand(len(x)) < CLASS_DROPOUT)
    if known.guidance_input:
        weight = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(len(x))
        condition = condition.with_tensors(guidance=weight)
    return TrainBatch(x, torch.randn_like(x), stratified(len(x)), condition)


def sorted_out(example: TrainTarget, draws: TrainBatch, count: int) -> tuple[TrainTarget, TrainBatch]:
    """The rows of an example in an order in which row r is for network r mod S again, and the draws they belong to."""
    assert example.rows is not None
    order = (example.rows % count).argsort(stable=True).reshape(count, -1).T.flatten()
    return TrainTarget(example.z[order], example.t[order], example.x[order]), draws[example.rows[order]]


def clip_each(network: nn.Module, most: float) -> None:
    """Shorten the gradient of each of the S networks to `most`."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (most / norms.clamp(min=1e-12)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factors[:, None, None])


def learn(
    denoiser: Denoiser,
    objective: Objective,
    config: LoopConfig,
    data: Sequence[str],
    seed: int,
    self_ema: float | None = None,
) -> Denoiser:
    """The updates of one stage, as distill.py does them; returns the average where the settings ask for one.

    `config.batch_size` is that of each network.
    """
    torch.manual_seed(seed)
    profile = Exponential(config.average_decay) if config.average_decay else None
    averages = Averages(denoiser, profile, of_teacher=None if self_ema is None else Exponential(self_ema))
    optimizer = build_optimizer(denoiser, config)
    weighting, loss = WEIGHTINGS[config.weighting], LOSSES[config.loss]
    known = denoiser.network.config
    for step in range(config.num_iters):
        draws = draw(data, known, config.batch_size)
        example = objective(draws, StudentState(denoiser, averages.teacher, step / config.num_iters))
        if example.rows is not None:
            example, draws = sorted_out(example, draws, known.count)
        prediction = denoiser(example.z, example.t, draws.condition)
        losses = weighted_losses(prediction, example, denoiser.schedule.logsnr(example.t), weighting, loss)
        (losses.mean() * known.count).backward()  # the mean over each network's own rows
        clip_each(denoiser, config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        averages.update(step)
    return averages.model.eval().requires_grad_(False)


# Measures


def points_of(denoise: Denoise, num_steps: int, z: Tensor, sampler: str = "ddim") -> Tensor:
    """Where noise z (B, 2) is led."""

    def no_noise() -> Tensor:
        raise AssertionError("a deterministic sampler draws none")

    with torch.inference_mode():
        how = SAMPLERS[sampler](clipping_value=None)
        return sample(denoise, CosineSchedule(), how, z=z, num_steps=num_steps, noise=no_noise)


def shadows(points: Tensor, directions: int) -> Tensor:
    """Points (S, n, 2) seen from evenly spread directions, in rising order: (S, directions, n)."""
    angle = math.pi * torch.arange(directions) / directions
    return (torch.stack([angle.cos(), angle.sin()], 1) @ points.mT).sort(2).values


def rms(difference: Tensor) -> Tensor:
    """√ mean d² of each network's: (S, …) → (S,). Between shadows it is the sliced 2-Wasserstein distance."""
    return difference.square().flatten(1).mean(1).sqrt()
