"""What a network costs, counted without computing anything."""

from __future__ import annotations

import torch

from vdiff.models.unet import UNet, UNetConfig, parameter_count


def count_flops(config: UNetConfig, image_size: int) -> tuple[int, int]:
    """Parameters, and floating-point operations of one evaluation on one image (a multiply-add counts as two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = UNet(config).eval()
        z = torch.empty(1, config.in_channels, image_size, image_size)
        classes = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(z, torch.zeros(1), **config.signature.condition(classes=classes).tensors)
    return parameter_count(network), int(counter.get_total_flops())
