"""Which weights of a denoiser learn, and weights that are shared out over processes (FSDP).

A weight learns if it `requires_grad`. The others are frozen: optimiser, averages and saved state know nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vdiff.models.denoiser import Denoiser


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, of those that learn."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, of those that do not learn; a parameter with two names has both."""
    everything = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in everything if not parameter.requires_grad}


def state_without(module: nn.Module, names: Set[str]) -> dict[str, Tensor]:
    """The module's state dict without the weights `names`; its buffers stay."""
    return {name: tensor for name, tensor in module.state_dict().items() if name not in names}


def load_without(module: nn.Module, values: Mapping[str, Tensor], names: Set[str]) -> None:
    """Load what `state_without` gave.

    Raises:
        RuntimeError: one is missing, has another shape, or is none of the module's.
    """
    known = dict(module.named_parameters())
    whole_values = {name: like(tensor, known.get(name, tensor)) for name, tensor in values.items()}
    missing, unexpected = module.load_state_dict(whole_values, strict=False)
    if wrong := [*unexpected, *(name for name in missing if name not in names)]:
        raise RuntimeError(f"{wrong[0]} is missing, or not of this model")


def shard(denoiser: Denoiser, device: torch.device, world_size: int, whole_ones: Set[nn.Parameter]) -> None:
    """Share a denoiser's weights out in place, but for `whole_ones`; each block is put together when it computes."""
    mesh, ignored = init_device_mesh(device.type, (world_size,)), set(whole_ones)
    for module in denoiser.network.blocks():
        fully_shard(module, mesh=mesh, ignored_params=ignored)
    fully_shard(denoiser, mesh=mesh, ignored_params=ignored)


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
