"""Linear layers that see one row per sample, such as modulation: their weights stay where they are, and outputs travel.

FSDP would gather such weights to multiply each with a few rows, and scatter their gradients. Here every rank of the
fsdp axis applies its own rows of all these weights to the samples of all ranks, in one product, and an all-to-all
brings each rank all outputs of its own samples. In the backward pass the gradients of outputs travel back, and the
product that makes the gradient of a rank's rows has summed it over the axis already. Context parallel ranks bring the
same sample several times, with the gradients of different tokens, so the same sum is right for them.

Parameters are DTensors as FSDP's are: split along their first dim over fsdp, copied over dp_replicate, where their
gradients are summed.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from parallel.data_parallel import spread_mesh
from parallel.group import Group, make_group
from parallel.names import find_modules


def apply_modulation_parallel(
    model: nn.Module,
    layers: Sequence[str],
    product: str,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> set[nn.Parameter]:
    """Splits the parameters of linear layers over the ranks of `mesh`, in place, and puts a `StationaryLinears` in the
    place of the module that applies them. Names stay as they are.

    All ranks of fsdp must call the model with equally many samples.

    Args:
        model: on the meta device or materialized.
        layers: patterns of names of the linear layers; none: nothing changes.
        product: name of the parameter-free module that is called (x_BD, linear layers) and gives the output of each.
        mesh: 2-D, dp_replicate x fsdp.
        param_dtype: of the computation.
        reduce_dtype: in which gradients are summed over ranks.

    Returns:
        The parameters, which FSDP must leave alone.
    """
    if not layers:
        return set()
    found = find_modules(model, layers).values()
    for layer in found:
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, _split(parameter, spread_mesh(mesh)))
    copies, shards = (make_group(mesh[axis]) for axis in mesh.mesh_dim_names or ())
    model.set_submodule(product, StationaryLinears(copies, shards, param_dtype, reduce_dtype))
    return {parameter for layer in found for parameter in layer.parameters()}


class StationaryLinears(nn.Module):
    """Applies linear layers whose rows are split over ranks to the rows of input that each rank has."""

    def __init__(self, copies: Group, shards: Group, param_dtype: torch.dtype, reduce_dtype: torch.dtype):
        super().__init__()
        self.copies, self.shards, self.param_dtype, self.reduce_dtype = copies, shards, param_dtype, reduce_dtype

    def forward(self, x_BD: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
        """Returns the output of each layer, `[B, its outputs]`."""
        # In the sum's dtype, since its gradient is summed over the ranks.
        gathered = self.shards.gather(x_BD.to(self.reduce_dtype)).to(x_BD.dtype)
        weights = [_local(layer.weight) for layer in layers]
        biases = [_local(layer.bias) for layer in layers if layer.bias is not None]
        outputs = [layer.out_features for layer in layers]
        # The joined weights are not kept for the backward pass, but joined again.
        y = checkpoint(
            self._multiply,
            gathered,
            weights,
            biases,
            [self._rows(width) for width in outputs],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        parts = self.shards.exchange(y).unflatten(0, (self.shards.size, -1))  # by rank, then sample
        return list(self._put_together(parts, outputs))

    def _multiply(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """This rank's rows of all layers, as many of each as the rank with most has."""
        bias = _Join.apply(self, rows, x.device, *biases) if biases else None
        return F.linear(x, _Join.apply(self, rows, x.device, *weights), bias)

    def _rows(self, outputs: int) -> int:
        """Of a layer with so many outputs, those of the rank that has most."""
        return -(-outputs // self.shards.size)

    def _put_together(self, parts: Tensor, outputs: Sequence[int]) -> Iterator[Tensor]:
        """What ranks computed of each layer -> the output of each layer; one copy for several of one width."""
        runs = [(width, len(list(run))) for width, run in groupby(outputs)]
        pieces = parts.split([self._rows(width) * count for width, count in runs], dim=-1)
        for (width, count), piece in zip(runs, pieces, strict=True):
            by_layer = piece.unflatten(-1, (count, -1)).permute(2, 1, 0, 3).flatten(2)
            yield from by_layer[..., :width].unbind()  # without the rows that only fill up


class _Join(torch.autograd.Function):
    """This rank's rows of several parameters under one another, as and where the computation wants them; their
    gradients are summed over the copies.
    """

    @staticmethod
    def forward(
        ctx: Any, owner: StationaryLinears, rows: Sequence[int], device: torch.device, *parts: Tensor
    ) -> Tensor:
        ctx.owner, ctx.rows = owner, rows
        ctx.lengths, ctx.like = [len(part) for part in parts], parts[0].new_empty(0)
        joined = torch.empty(sum(rows), *parts[0].shape[1:], dtype=owner.param_dtype, device=device)
        places = joined.split(rows)
        for place, length in zip(places, ctx.lengths, strict=True):
            place[length:] = 0  # a NaN there would reach the gradient of the inputs
        torch._foreach_copy_([place[: len(part)] for place, part in zip(places, parts, strict=True)], parts)
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.owner.copies.size > 1:
            gradient = ctx.owner.copies.sum(gradient.to(ctx.owner.reduce_dtype))
        places = gradient.to(ctx.like).split(ctx.rows)
        return None, None, None, *(place[:length] for place, length in zip(places, ctx.lengths, strict=True))


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def _split(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's rows."""
    placements = (Replicate(), Shard(0))[-mesh.ndim :]
    part = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)  # without communication
    return nn.Parameter(part, requires_grad=parameter.requires_grad)
