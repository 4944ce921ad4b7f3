"""The optimiser, and its learning rate at each update."""

from __future__ import annotations

import torch
from torch import nn

from vdiff.training.config import LR_SCHEDULES, LoopConfig
from vdiff.training.weights import trainable

BETAS = (0.9, 0.999)


def learning_rate(config: LoopConfig, step: int) -> float:
    """The learning rate of update `step` (from 0): warm-up × schedule × `lr`."""
    warmup = min(1.0, (step + 1) / config.warmup_iters) if config.warmup_iters else 1.0
    return config.lr * warmup * LR_SCHEDULES[config.lr_schedule](step / config.num_iters)


def build_optimizer(network: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999) of the weights that learn, fused into one kernel where the device has one."""
    weights = list(trainable(network).values())
    fused = weights[0].device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(weights, lr=config.lr, betas=BETAS, weight_decay=config.weight_decay, fused=fused)
