"""What a network is asked for, whatever it is: network(z, timestep, **condition) → output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdiff.models.condition import GUIDANCE, Condition, Null


@dataclass(frozen=True)
class Signature:
    """What a network takes and answers.

    Attributes:
        channels, out_channels: of z (B, channels, …) and of the output.
        names: of the conditions that it takes.
        null: what stands for "not told" of a condition, where the network has learned what it means.
        num_classes: of a network that takes classes.
        size_multiple: the sizes of z behind the channels must be multiples of this.
    """

    channels: int
    out_channels: int
    names: tuple[str, ...] = ()
    null: Null = field(default_factory=dict)
    num_classes: int = 0
    size_multiple: int = 1

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes a weight of guidance, whose effect it has learned."""
        return GUIDANCE in self.names

    def condition(self, **tensors: Tensor | None) -> Condition:
        """Those of the tensors that the network takes, with what stands for "not told"."""
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None and name in self.names}
        return Condition(kept, self.null)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse samples (C, …) of a shape that the network does not take.

        Raises:
            ValueError: other channels, or a size that is no multiple of `size_multiple`.
        """
        if shape[0] != self.channels:
            raise ValueError(f"samples of {shape[0]} channels do not fit a network of {self.channels}")
        if any(size % self.size_multiple for size in shape[1:]):
            is_square = len(shape) == 3 and shape[1] == shape[2]
            what = f"images of {shape[1]} pixels" if is_square else f"samples of {' × '.join(map(str, shape[1:]))}"
            raise ValueError(f"{what} need a network for multiples of {self.size_multiple}")


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
