"""Weights that are shared out over processes (FSDP), and the whole of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vdiff.models.denoiser import Denoiser


def shard(denoiser: Denoiser, device: torch.device, world_size: int) -> None:
    """Share a denoiser's weights out in place; each block of the network is put together when it computes."""
    mesh = init_device_mesh(device.type, (world_size,))
    network = denoiser.network
    for module in (*network.down, *network.middle, *network.up):
        fully_shard(module, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether its weights are shared out."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part, the very memory of it; of what is not shared out the tensor itself, wherever it moves."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, shared out as `reference` is."""
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
