"""What a network is asked for, whatever it is: network(z, timestep, **condition) → output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from vdiff.models.condition import Condition, Signature


class Backbone(nn.Module):
    """A network of one of the kinds of `vdiff.models.kinds`.

    Its forward takes z (B, C, …), a real timestep (B,) and conditions by the names of its signature, and answers
    (B, C_out, …).

    Attributes:
        kind: its name in `vdiff.models.kinds`.
        signature: what it takes and answers.
        full_precision: compute in the precision of the weights, whatever mixed precision is switched on outside.
        checkpointing: keep less for the gradient and compute it again (Chen et al. 2016).
    """

    kind: ClassVar[str]
    signature: Signature
    full_precision = False
    checkpointing = False

    def describe(self) -> dict[str, Any]:
        """Plain values from which a checkpoint builds it again: the `config` of its kind."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The parts whose weights are put together one after the other where they are shared out over processes."""
        raise NotImplementedError

    def encode(self, condition: Condition) -> Condition:
        """The condition as it is the same at all times: what is computed of it once, before a sampling loop."""
        return condition

    @property
    def output_layer(self) -> nn.Module | None:
        """The layer whose output is the network's; None: unknown."""
        return None

    def own_precision(self, device: torch.device) -> AbstractContextManager[object]:
        """What `full_precision` asks for, around a forward pass."""
        return without_autocast(device) if self.full_precision else nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Mixed precision off; where it is off anyway, nothing at all, so that exported graphs stay free of it."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def parameter_count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())


def count_flops(build: Callable[[], Backbone], shape: Sequence[int]) -> tuple[int, int]:
    """Parameters, and floating-point operations of one evaluation on one sample (a multiply-add counts as two).

    Nothing is computed: the network is made without weights.

    Args:
        shape: (C, H, W), (C, L), … of a sample.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = build().eval()
        condition = network.signature.condition(classes=torch.zeros(1, dtype=torch.int64))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, *shape), torch.zeros(1), **condition.tensors)
    return parameter_count(network), int(counter.get_total_flops())
