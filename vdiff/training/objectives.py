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


def stratified(size: int, device: torch.device | str = "cpu") -> Tensor:
    """One uniform number in each of `size` equal parts of [0, 1): (size,) float64 (float32 where a GPU has no more).

    Each is uniform once images are shuffled, and together they cover all times evenly: a loss of lower variance.
    """
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    u = (torch.arange(size, device=device) + torch.rand(size, dtype=dtype, device=device)) / size
    return u.clamp(max=1 - torch.finfo(dtype).eps / 2)  # the last one might be rounded up to 1


def weighted_losses(
    prediction: Prediction, example: Example, logsnr: Tensor, weighting: Callable[[Tensor], Tensor]
) -> Tensor:
    """w(λ_t) ‖x − x̂‖², the mean over pixels: (B,); `logsnr` (B,) = λ_t."""
    error = (example.x - prediction.x).square().flatten(1).mean(1)
    return coefficient(weighting(logsnr), error) * error
