"""Tensors that lie on the ranks as a parameter does, so that both are saved, loaded and counted alike."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(parameter: Tensor, part: Tensor, block: int = 1) -> Tensor:
    """What this rank holds, as a part of a tensor that is spread over the mesh of a parameter.

    Args:
        part: a plain tensor with a number for each of this rank's, or one for each `block` of neighbors in a row.
    """
    if not isinstance(parameter, DTensor):
        return part
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // block))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
