"""Points of the plane: data, a small network, its teachers and students by `vdiff.train` and `vdiff.distill`, a map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor, nn

import vdiff
from vdiff.diffusion.parameterisation import Parameterisation
from vdiff.models.codec import from_uint8

MODES, WAVES, TEACHER_STEPS = 8, 5, 64
RADIUS, SPREAD = 0.8, 0.06
PARTS, GUIDED_PARTS = {8: 3, 4: 4, 2: 6, 1: 8}, 4
SIDE, FINER, FRAME, GREY = 168, 3, (214, 214, 220), (120, 120, 128)
Points = tuple[Tensor, Tensor]
"""(count, 2), and their classes (count,)."""


def ring(count: int, generator: torch.Generator) -> Points:
    """Eight Gaussians of deviation 0.06 on a circle of radius 0.8, and which of them a point is from."""
    which = torch.randint(MODES, (count,), generator=generator)
    angle = which * (2 * math.pi / MODES)
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return means + SPREAD * torch.randn(count, 2, generator=generator), which


def moons(count: int, generator: torch.Generator) -> Points:
    """Two half circles that reach into each other, with noise of 0.04; no classes."""
    side = 1 - 2 * torch.randint(2, (count,), generator=generator)
    angle = math.pi * torch.rand(count, generator=generator)
    arcs = torch.stack([0.6 * angle.cos() - 0.3 * side, side * (0.6 * angle.sin() - 0.15)], 1)
    return arcs + 0.04 * torch.randn(count, 2, generator=generator), torch.zeros_like(side)


def spiral(count: int, generator: torch.Generator) -> Points:
    """One arm of a turn and a half, evenly filled, with noise of 0.025; no classes."""
    part = torch.rand(count, generator=generator).sqrt()
    angle = 3 * math.pi * part
    arm = 0.9 * part[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return arm + 0.025 * torch.randn(count, 2, generator=generator), torch.zeros(count, dtype=torch.int64)


DATA: dict[str, Callable[[int, torch.Generator], Points]] = {"ring": ring, "moons": moons, "spiral": spiral}


class Mlp(nn.Module):
    """z (B, 2), timestep (B,) and, with `num_classes`, a class (the last one: none) and a weight of guidance → v."""

    frequencies: Tensor
    evaluations = 0
    """Points that went through any of these networks."""

    def __init__(self, num_classes: int = 0, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(WAVES))
        self.begin = nn.Linear(2 + 2 * WAVES, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.end = nn.Linear(width, 2)
        if num_classes:
            self.classes = nn.Embedding(num_classes + 1, width)
            self.guidance = nn.Linear(1, width, bias=False)
            nn.init.zeros_(self.guidance.weight)

    def forward(
        self, z: Tensor, timestep: Tensor, classes: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        Mlp.evaluations += len(z)
        waves = (timestep[:, None] + 1) / 1024 * self.frequencies
        h = self.begin(torch.cat([z, waves.sin(), waves.cos()], 1))
        h = h if classes is None else h + self.classes(classes)
        h = h if guidance is None else h + self.guidance(guidance[:, None])
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        return self.end(nn.functional.silu(h))


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        seeds: networks for each data set.
        data: points that a network learns from.
        batch_size: points in an update of a student.
        teacher: updates of a teacher, of `teacher_batch_size` points.
        part: updates of a part of a student's budget.
        points: samples of each network that are compared, over `directions` directions.
    """

    seeds: int = 3
    data: int = 2**18
    batch_size: int = 64
    teacher_batch_size: int = 256
    teacher: int = 6000
    part: int = 150
    points: int = 4096
    directions: int = 64


def new_teacher(
    data: list[Points],
    seed: int,
    scale: Scale,
    *,
    num_classes: int = 0,
    parameterisation: Parameterisation | None = None,
) -> vdiff.Model:
    """A network that has learned the data, taken at 64 steps."""
    torch.manual_seed(seed)
    model = vdiff.wrap(
        Mlp(num_classes), (2,), classes=num_classes, null_class=num_classes > 0, num_timesteps=TEACHER_STEPS,
        parameterisation=parameterisation,
    )  # fmt: skip
    return vdiff.train(
        model, data, num_iters=scale.teacher, batch_size=scale.teacher_batch_size, seed=seed,
        lr=2e-3, lr_schedule="cosine", ema=0.0, class_dropout=0.1,
    ).finish()  # fmt: skip


def learning(
    teacher: vdiff.Model, data: list[Points], seed: int, scale: Scale, parts: int, **settings: Any
) -> vdiff.Training:
    """A distillation of as many updates as `parts` says, all stages together, each with its share as in distill.py."""
    same = {"batch_size": scale.batch_size, "lr": 1e-3, "seed": seed, **settings}
    shares = vdiff.distill(teacher, data=data, num_iters=1000, **same).num_updates / 1000
    return vdiff.distill(teacher, data=data, num_iters=round(parts * scale.part / shares), **same)


def guided_student(teacher: vdiff.Model, data: list[Points], seed: int, scale: Scale) -> vdiff.Model:
    """A network that takes guidance as an input, as it learned from a teacher of classes."""
    told = vdiff.wrap(
        teacher.network, (2,), classes=MODES, null_class=True, takes=["guidance"], num_timesteps=TEACHER_STEPS
    )
    return learning(told, data, seed, scale, GUIDED_PARTS, method="guided").finish()


def shadows(points: Tensor, directions: int) -> Tensor:
    """Points (n, 2) seen from evenly spread directions, in rising order: (directions, n)."""
    angle = math.pi * torch.arange(directions) / directions
    return (torch.stack([angle.cos(), angle.sin()], 1) @ points.T).sort(1).values


def rms(difference: Tensor) -> float:
    """√ mean d². Between shadows it is the sliced 2-Wasserstein distance."""
    return float(difference.square().mean().sqrt())


def panel(points: Tensor, extent: float = 1.2, noise: Tensor | None = None) -> Tensor:
    """Points (n, 2) within ±`extent` as a picture (3, SIDE, SIDE) in [−1, 1].

    Their colours tell the noise (n, 2) that they came from, its direction as the hue, paler towards the middle.
    """
    side, radius = SIDE * FINER, 1.1 * FINER
    picture = PIL.Image.new("RGB", (side, side), "white")
    draw = PIL.ImageDraw.Draw(picture)
    inks: list[Any] = [GREY] * len(points)
    if noise is not None:
        hues = torch.atan2(noise[:, 1], noise[:, 0]).rad2deg() % 360
        strengths = (noise.norm(dim=1) / 1.5).clamp(max=1)
        pairs = zip(hues.tolist(), strengths.tolist(), strict=True)
        inks = [f"hsv({hue:.2f},{20 + 80 * much:.2f}%,{90 - 15 * much:.2f}%)" for hue, much in pairs]
    for (x, y), ink in zip(((points / extent + 1) * side / 2).tolist(), inks, strict=True):
        draw.ellipse((x - radius, side - y - radius, x + radius, side - y + radius), fill=ink)
    draw.rectangle((0, 0, side - 1, side - 1), outline=FRAME, width=FINER)
    small = picture.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    return from_uint8(torch.from_numpy(np.array(small)).permute(2, 0, 1))
