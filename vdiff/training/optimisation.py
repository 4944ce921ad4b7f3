"""The optimiser, its learning rate at each update, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vdiff.models.denoiser import Denoiser
from vdiff.training.config import LoopConfig

BETAS = (0.9, 0.999)

LR_FACTORS: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
"""Progress n/N ∈ [0, 1) → the part of the learning rate that is left."""


def learning_rate(config: LoopConfig, step: int) -> float:
    """The learning rate of update `step` (from 0): warm-up × schedule × `lr`."""
    warmup = min(1.0, (step + 1) / config.warmup_iters) if config.warmup_iters else 1.0
    return config.lr * warmup * LR_FACTORS[config.lr_schedule](step / config.num_iters)


def build_optimizer(network: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999), fused into one kernel where the device has one."""
    fused = next(network.parameters()).device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(
        network.parameters(), lr=config.lr, betas=BETAS, weight_decay=config.weight_decay, fused=fused
    )


class WeightAverage:
    """Exponential moving average of a denoiser's weights: ema ← d·ema + (1 − d)·raw, d = min(decay, (1 + n)/(10 + n)).

    The warm-up of d lets the first averages forget the initial weights. `model` is the averaged denoiser, ready to
    use; with `decay` 0 it is the denoiser itself.
    """

    def __init__(self, denoiser: Denoiser, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(denoiser).eval().requires_grad_(False) if decay else denoiser
        self._raw: list[Tensor] = list(denoiser.parameters())
        self._average: list[Tensor] = list(self.model.parameters())

    def decay_at(self, step: int) -> float:
        """d after update `step` (from 0)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step`."""
        if self.decay:
            torch._foreach_lerp_(self._average, self._raw, 1 - self.decay_at(step))
