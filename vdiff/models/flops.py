"""What a network costs, counted without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vdiff.models.backbone import Backbone, parameter_count


def count_flops(build: Callable[[], Backbone], shape: Sequence[int]) -> tuple[int, int]:
    """Parameters, and floating-point operations of one evaluation on one sample (a multiply-add counts as two).

    Args:
        build: makes the network, which is made without weights.
        shape: (C, H, W), (C, L), … of a sample.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = build().eval()
        condition = network.signature.condition(classes=torch.zeros(1, dtype=torch.int64))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, *shape), torch.zeros(1), **condition.tensors)
    return parameter_count(network), int(counter.get_total_flops())
