"""The optimiser, its learning rate at each update, and its state."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.models.checkpoint import TEXT_ENCODERS
from vdiff.training.config import LR_SCHEDULES, LoopConfig, check_packages
from vdiff.training.weights import like, trainable, whole

BETAS = (0.9, 0.999)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Tensors of AdamW for each weight."""


def learning_rate(config: LoopConfig, step: int) -> float:
    """The learning rate of update `step` (from 0): warm-up × schedule × `lr`."""
    warmup = min(1.0, (step + 1) / config.warmup_iters) if config.warmup_iters else 1.0
    return config.lr * warmup * LR_SCHEDULES[config.lr_schedule](step / config.num_iters)


def build_optimizer(network: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """The optimiser of the trained weights, with β = (0.9, 0.999); text encoders are a separate group.

    AdamW is fused into one kernel where the device has one. The states of `adamw8bit` have 8 bits a number (Dettmers et
    al. 2022). `adafactor` (Shazeer & Stern 2018) has no momentum, and `lr` is its absolute step size. `prodigy`
    (Mishchenko & Defazio 2023) estimates the step size, with the options of diffusers' scripts.

    Raises:
        OptionError: its library is not installed.
    """
    check_packages(config)
    learning = trainable(network)
    of_text = [weight for name, weight in learning.items() if name.startswith(f"{TEXT_ENCODERS}.")]
    others = [weight for name, weight in learning.items() if not name.startswith(f"{TEXT_ENCODERS}.")]
    weights: list[dict[str, Any]] = [{"params": others}]
    if of_text:
        weights.append({"params": of_text, "lr": getattr(config, "text_encoder_lr", None) or config.lr})
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(weights, **shared, scale_parameter=False, relative_step=False)
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        with contextlib.redirect_stdout(io.StringIO()):  # it prints that the weight decay is decoupled
            return Prodigy(weights, **shared, betas=BETAS, use_bias_correction=True, safeguard_warmup=True)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(weights, **shared, betas=BETAS)
    fused = others[0].device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(weights, **shared, betas=BETAS, fused=fused)


def optimizer_state(
    optimizer: torch.optim.Optimizer, learning: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything that updates have changed in an optimiser: tensors `KEY.WEIGHT`, and numbers as metadata.

    Every process must ask for it, since weights may be sharded.

    Args:
        learning: name → weight, of those that learn.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    numbers: dict[str, dict[str, float]] = {}
    step = "0.0"
    for name, weight in learning.items():
        for key, value in optimizer.state.get(weight, {}).items():
            if key == "step":  # the same for all weights; a float is a tensor, an integer a number
                step = repr(value.item() if isinstance(value, Tensor) else value)
            elif isinstance(value, Tensor):
                tensors.setdefault(key, {})[name] = value
            elif value is not None:
                numbers.setdefault(key, {})[name] = value
    groups = [dict(_changed(group, optimizer.defaults)) for group in optimizer.param_groups]
    facts = {"tensors": {key: len(found) for key, found in tensors.items()}, "numbers": numbers, "groups": groups}
    named = {f"{key}.{name}": tensor for key, found in tensors.items() for name, tensor in whole(found).items()}
    return named, {"optimizer_step": step, "optimizer": json.dumps(facts)}


def _changed(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a group that its optimiser has changed; the learning rate is that of the update."""
    for key, value in group.items():
        number = value.item() if isinstance(value, Tensor) else value
        if key != "lr" and type(number) in (int, float) and number != defaults.get(key):
            yield key, number


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    learning: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Restore what `optimizer_state` gave, or what earlier versions stored of AdamW.

    Raises:
        KeyError, ValueError: it belongs to other weights.
    """
    earlier: dict[str, Any] = {"tensors": dict.fromkeys(MOMENTS, len(learning)), "numbers": {}, "groups": [{}]}
    facts: dict[str, Any] = json.loads(metadata["optimizer"]) if "optimizer" in metadata else earlier
    step = metadata["optimizer_step"]
    if float(step) == 0:
        return
    states: dict[str, dict[str, Any]] = {}
    for name, weight in learning.items():
        state: dict[str, Any] = {"step": torch.tensor(float(step)) if "." in step else int(step)}
        for key in facts["tensors"]:
            if (tensor := tensors.get(f"{key}.{name}")) is not None:
                state[key] = like(tensor, weight) if tensor.shape == weight.shape else tensor
        states[name] = state | {key: values[name] for key, values in facts["numbers"].items() if name in values}
    for key, count in facts["tensors"].items():
        if sum(key in state for state in states.values()) != count:
            raise KeyError(f"{key} of a weight is missing")
    names = {weight: name for name, weight in learning.items()}
    order = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    for group, changed in zip(groups, facts["groups"], strict=True):
        group.update(changed)
    optimizer.load_state_dict({"state": {k: states[name] for k, name in enumerate(order)}, "param_groups": groups})
