"""The interface of all networks: network(z, timestep, **condition) → output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vdiff.models.condition import CLASSES, IMAGE, TOKENS, Condition, Signature


class Backbone(nn.Module):
    """A network of one of the kinds in `vdiff.models.kinds`.

    Its forward takes z (B, C, …), a real timestep (B,) and conditions by the names of its signature, and returns
    (B, C_out, …).

    Attributes:
        kind: its name in `vdiff.models.kinds`.
        signature: its inputs and outputs.
        full_precision: compute in the precision of the weights, even under mixed precision.
        attention_layers: the suffixes of the names of the attention projections, see `vdiff.models.adapters`.
        unused_layers: names of layers whose weights have no effect on the output, so they get no gradient.
        checkpointing: store fewer activations for the gradient, and recompute them (Chen et al. 2016).
    """

    kind: ClassVar[str]
    signature: Signature
    attention_layers: tuple[str, ...] = ()
    unused_layers: tuple[str, ...] = ()
    full_precision = False
    checkpointing = False

    def describe(self) -> dict[str, Any]:
        """Plain values to rebuild it from a checkpoint: the `config` of its kind."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The parts whose sharded weights are gathered one part at a time."""
        raise NotImplementedError

    def encode(self, condition: Condition) -> Condition:
        """The parts of the condition that are equal at all times, computed once before a sampling loop."""
        return condition

    @property
    def output_layer(self) -> nn.Module | None:
        """The layer that computes the network's output; None: unknown."""
        return None

    def run(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """A part of the network, or a function of it, on its inputs; see `checkpointing`."""
        if self.checkpointing and torch.is_grad_enabled():  # dropout repeats its random numbers
            found: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=True)
            return found
        return function(*inputs)

    def own_precision(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of a forward pass that implements `full_precision`."""
        return without_autocast(device) if self.full_precision else nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable mixed precision; does nothing if it is off, so that exported graphs do not contain it."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def parameter_count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())


def example_condition(takes: Signature, count: int, shape: Sequence[int]) -> Condition:
    """A condition of `count` rows with which the cost of a network can be measured: class 0, the empty prompt, grey.

    Args:
        shape: (C, H, W), … of a sample.
    """
    classes = torch.zeros(count, dtype=torch.int64)
    tokens = torch.tensor(takes.null.get(TOKENS, ())).expand(count, -1)
    image = torch.zeros(count, *shape)
    return takes.condition(**{CLASSES: classes, TOKENS: tokens, "time_ids": torch.zeros(count, 6), IMAGE: image})


def count_flops(build: Callable[[], Backbone], shape: Sequence[int]) -> tuple[int, int]:
    """Parameters, and floating-point operations per evaluation and sample (a multiply-add counts as two).

    Nothing is computed: the network has no weights.

    Args:
        shape: (C, H, W), (C, L), … of a sample.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = build().eval()
        condition = example_condition(network.signature, 1, shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, *shape), torch.zeros(1), **condition.tensors)
    return parameter_count(network), int(counter.get_total_flops())
