"""Weights that a process may hold only a piece of, under ZeRO-3 and FSDP2: read, written and put together in one way.

A *piece* is what this process holds of a parameter: a flat partition under ZeRO-3, the local shard under FSDP2, else all
of it. Two sets of weights of one model are cut alike, so that they are averaged and exchanged piece by piece, without a
process asking another one.
"""

import torch
from accelerate.utils import gather
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def free_gathered(model: torch.nn.Module) -> None:
    """Have a model forget what it gathered of its weights, so that its pieces are all that counts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.partition()


def piece(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter, in the memory of the model: what is written there, the model has."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.data
    return parameter.data.to_local() if isinstance(parameter.data, DTensor) else parameter.data


def whole(parameter: torch.nn.Parameter, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    The tensor that the pieces of all processes make; all of them call it together.

    Args:
        parameter (`torch.nn.Parameter`): Says how the pieces are cut.
        values (`torch.Tensor`): The piece of this process, of the shape of `piece(parameter)`.
        device (`torch.device`): Where processes exchange tensors.
    """
    if hasattr(parameter, "ds_tensor"):
        return gather(values.to(device))[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter.data, DTensor):
        data = parameter.data
        options = {"shape": data.shape, "stride": data.stride()}
        return DTensor.from_local(values.to(device), data.device_mesh, data.placements, **options).full_tensor()
    return values


def piece_of(parameter: torch.nn.Parameter, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The inverse of [`whole`]: this process's piece of a tensor that all processes have."""
    if hasattr(parameter, "ds_tensor"):
        size = parameter.ds_tensor.numel()
        start = torch.distributed.get_rank(parameter.ds_process_group) * size
        values = values.flatten()[start : start + size]
        return torch.nn.functional.pad(values, (0, size - len(values)))
    if isinstance(parameter.data, DTensor):
        return distribute_tensor(values.to(device), parameter.data.device_mesh, parameter.data.placements).to_local()
    return values
