"""Shards of a model too large for one device (torch's fully_shard, FSDP2): each process holds a part of every weight.

Its gradients and moments are parts too. A block is whole while it runs. Files hold whole tensors.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from spvit.errors import DataError, first_line
from spvit.hosts.recognise import family_of
from spvit.train.processes import processes


def sharded(model: nn.Module, called: nn.Module) -> nn.Module:
    """Return a module that calls a model, or the model itself, with its parameters as shards on the devices.

    The model stays sharded, so it is a copy. Raises DataError when torch cannot shard it.
    """
    state = processes()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    blocks = [model.get_submodule(site.path) for site in family_of(model).sites]
    # A block that is a list is not called, its layers are.
    units: list[Any] = [part for block in blocks for part in (block if isinstance(block, nn.ModuleList) else [block])]
    try:
        for unit in (*units, called):
            fully_shard(unit, mesh=mesh)
            unit.set_force_sum_reduction_for_comms(True)  # gloo adds up even where it is asked for the mean
        return called
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise DataError(f"this model cannot be sharded: {first_line(error)}; leave out --shard") from error


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or one that is whole as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from its shards, in all processes, which ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors on the CPU in the first process; the others, which ask for them too, get none."""
    first, found = processes().is_main_process, {}
    for name, tensor in tensors.items():
        own = whole(tensor.detach())
        if first:
            found[name] = own.cpu().contiguous()
    return found


def scattered(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return this process's part of a whole tensor where one of the same shape is of shards; else the tensor."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


@torch.no_grad()
def put_together(shards: nn.Module, model: nn.Module) -> None:
    """Give a model the weights of its sharded copy, on the device of the run."""
    for own, shard in zip(model.state_dict().values(), shards.state_dict().values()):
        own.copy_(whole(shard))
    model.to(processes().device)
