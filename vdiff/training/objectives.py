"""What the network is to learn from a batch: noisy images, their times, and the image it should see in each.

An objective is given all its randomness: `noise` N(0, I) like the images, and `u` (B,) uniform in [0, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.diffusion.distillation import Method
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import Schedule, coefficient, diffuse
from vdiff.models.denoiser import Denoiser


@dataclass(frozen=True)
class Example:
    """Noisy images `z` (B, C, H, W) at `t` (B,), and the images `x` to answer."""

    z: Tensor
    t: Tensor
    x: Tensor


Objective = Callable[[Tensor, "Tensor | None", Tensor, Tensor], Example]
"""(images, classes, noise, u) → Example."""


@dataclass(frozen=True)
class DenoisingObjective:
    """Base training: the target is the image itself.

    t = 1 − u ∈ (0, 1], every time; for a schedule that is a table of N levels t = (⌊u·N⌋ + 1)/N.
    """

    schedule: Schedule

    def __call__(self, x: Tensor, classes: Tensor | None, noise: Tensor, u: Tensor) -> Example:
        del classes
        levels = self.schedule.num_levels
        t = 1 - u if levels is None else ((u * levels).floor() + 1) / levels
        return Example(diffuse(x, noise, self.schedule.angle(t)), t, x)


@dataclass(frozen=True)
class DistillationObjective:
    """A student of N = `num_steps` steps: t = (⌊u·N⌋ + 1)/N, and the target is what `method` makes of its teacher.

    Source: Salimans & Ho 2022, algorithm 2.
    """

    teacher: Denoiser
    method: Method
    num_steps: int

    def __call__(self, x: Tensor, classes: Tensor | None, noise: Tensor, u: Tensor) -> Example:
        schedule = self.teacher.schedule
        t = ((u * self.num_steps).floor() + 1) / self.num_steps
        z = diffuse(x, noise, schedule.angle(t))

        def teach(z: Tensor, t: Tensor) -> Prediction:
            prediction: Prediction = self.teacher(z, t, classes)
            return prediction

        with torch.inference_mode():
            target = self.method.target(teach, schedule, z=z, t=t, num_steps=self.num_steps)
        return Example(z, t, target.x)


def stratified(size: int, *, first: int = 0, total: int | None = None) -> Tensor:
    """One uniform number in each of `total` equal parts of [0, 1), the parts from `first` on: (size,) float64.

    Each is uniform once images are shuffled, and together they cover all times evenly: a loss of lower variance.
    """
    u = (first + torch.arange(size) + torch.rand(size, dtype=torch.float64)) / (total or size)
    return u.clamp(max=1 - 2**-53)  # the last one might be rounded up to 1


def weighted_loss(
    prediction: Prediction, example: Example, schedule: Schedule, weighting: Callable[[Tensor], Tensor]
) -> Tensor:
    """E w(λ_t) ‖x − x̂‖², the mean over pixels and images."""
    error = (example.x - prediction.x).square().flatten(1).mean(1)
    return (coefficient(weighting(schedule.logsnr(example.t)), error) * error).mean()
