"""Which weights of a denoiser are trained, and weights that are sharded over processes (FSDP).

A weight is trained if it has `requires_grad`. The others are frozen: optimiser, averages and saved state do not contain
them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vdiff.models.denoiser import Denoiser


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, of those that are trained."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, of those that are frozen; a parameter with two names appears twice."""
    everything = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in everything if not parameter.requires_grad}


def copy_sharing(denoiser: Denoiser, shared: Iterable[Tensor]) -> Denoiser:
    """A copy of a denoiser with the same tensors `shared`, which are in memory once; all others are copied."""
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in shared})


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
    """Shard a denoiser's weights in place, except `whole_ones`; a block's weights are gathered when it computes."""
    mesh, ignored = init_device_mesh(device.type, (world_size,)), set(whole_ones)
    network = denoiser.network  # not the denoiser: guidance and text encoders call the network itself
    for module in (*network.blocks(), network):
        fully_shard(module, mesh=mesh, ignored_params=ignored)
    register_fsdp_forward_method(network, "encode")


def is_sharded(module: nn.Module) -> bool:
    """Whether its weights are sharded."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that may be sharded, as whole ones, all of one type; every process must call this.

    They are gathered together, in one collective. `DTensor.full_tensor` sends each alone: hundreds in each checkpoint.
    """
    shared = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    if not shared:
        return dict(tensors)
    mesh = next(iter(shared.values())).device_mesh
    parts = []
    for tensor in shared.values():
        part = local(tensor)  # the first ⌈rows / processes⌉ rows, the next ones, …; the last processes may hold fewer
        rows = -(-len(tensor) // mesh.size())
        parts.append(torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])]).flatten())
    mine = torch.cat(parts)
    everyones = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(everyones, mine, group=mesh.get_group())
    pieces = torch.stack(everyones).split([len(part) for part in parts], dim=1)
    found = {
        name: piece.reshape(-1, *tensor.shape[1:])[: len(tensor)]
        for (name, tensor), piece in zip(shared.items(), pieces, strict=True)
    }
    return {**tensors, **found}


def local(tensor: Tensor) -> Tensor:
    """This process's shard, not a copy; of a tensor that is not sharded, the tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor that every process has, sharded like `reference`: each keeps its part, nothing is sent."""
    if not isinstance(reference, DTensor):
        return tensor
    mesh, placements = reference.device_mesh, reference.placements
    return distribute_tensor(tensor.to(reference.device), mesh, placements, src_data_rank=None).clone()
