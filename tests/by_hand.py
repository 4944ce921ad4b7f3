"""What a checkpoint draws, by a DDIM written out in α and σ of the cosine schedule with λ ∈ [−20, 20]."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.oracles import condition
from tests.toy import SIZE
from vdiff.models.checkpoint import load_checkpoint
from vdiff.models.denoiser import Denoiser


def image_said(denoiser: Denoiser, z: Tensor, t: Tensor, weight: float) -> Tensor:
    """x̂; with a weight w of guidance what the network says when told it, else (1 + w) x̂_c − w x̂_∅."""
    config = denoiser.network.config
    if not config.num_classes:
        return denoiser(z, t).x
    classes = torch.arange(len(z)) % config.num_classes
    if config.guidance_input:
        return denoiser(z, t, condition(classes, torch.full((len(z),), weight))).x
    if not config.null_class:
        return denoiser(z, t, condition(classes)).x
    none = torch.full_like(classes, config.num_classes)
    return (1 + weight) * denoiser(z, t, condition(classes)).x - weight * denoiser(z, t, condition(none)).x


def drawn_by(denoiser: Denoiser, num_steps: int, *, count: int, seed: int, weight: float = 0.0) -> np.ndarray:
    """Images 0 … count − 1 of `seed`, x̂ clipped to ±1 and ε̂ derived from it: (n, 1, 4, 4)."""
    streams = (np.random.Generator(np.random.Philox(key=np.array([seed, k], np.uint64))) for k in range(count))
    noise = [stream.standard_normal((1, SIZE, SIZE), dtype=np.float32) for stream in streams]
    z = torch.from_numpy(np.stack(noise))
    low = math.atan(math.exp(-10))
    for i in range(num_steps, 0, -1):
        t = torch.full((count,), i / num_steps, dtype=torch.float64)
        angle, after = ((math.pi / 2 - 2 * low) * k / num_steps + low for k in (i, i - 1))
        with torch.no_grad():
            x = image_said(denoiser, z, t, weight).double().clamp(-1, 1)
        eps = (z - math.cos(angle) * x) / math.sin(angle)
        z = (math.cos(after) * x + math.sin(after) * eps if i > 1 else x).float()
    return z.numpy()


def drawn(folder: Path, num_steps: int, *, count: int, seed: int, weight: float = 0.0) -> np.ndarray:
    """`drawn_by` the model in `folder`."""
    return drawn_by(load_checkpoint(folder)[0], num_steps, count=count, seed=seed, weight=weight)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """√ mean (a − b)²."""
    return float(np.sqrt(np.mean((a.astype(float) - b) ** 2)))
