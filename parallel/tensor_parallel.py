"""Tensor parallelism: ranks share each matrix product (Megatron-LM, arXiv 1909.08053).

A column-parallel layer computes some of its outputs, a row-parallel layer takes those as its inputs, and one sum over
the ranks makes the result whole again. Several matrices packed into one (queries, keys and values, and an MLP) are
split piece by piece, so that a rank holds whole heads and the MLP's matching columns, and the model needs no edit.

Weights are DTensors on the mesh, so that a checkpoint knows what they are part of. All that surrounds these layers
is computed alike on every rank.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from parallel.names import matches
from parallel.shards import split_dim


def apply_tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, column: Mapping[str, int], row: Mapping[str, int], head_norms: Collection[str]
) -> None:
    """Puts layers that compute this rank's part in the place of linear layers and of the norms of heads.

    Everything else stays a plain tensor that all ranks of the mesh hold alike. Parameters keep their names.

    Args:
        model: on the meta device.
        mesh: 1-D, the tensor parallel axis.
        column: pattern of module names -> the number of equally large pieces that are packed into the rows of the
            weight, its outputs. Their biases stay whole on every rank; a rank uses its part.
        row: the same for the columns of the weight, its inputs.
        head_norms: patterns of the norms that a rank applies to its own heads only.

    Raises:
        ValueError: a layer that is to be split is not a plain nn.Linear.
    """
    for name, module in list(model.named_modules()):
        if (pieces := _find(column, name)) is not None:
            _replace(model, name, ColumnLinear(_plain_linear(name, module), mesh, pieces))
        elif (pieces := _find(row, name)) is not None:
            _replace(model, name, RowLinear(_plain_linear(name, module), mesh, pieces))
        elif any(matches(name, pattern) for pattern in head_norms):
            assert isinstance(module, nn.RMSNorm), name
            _replace(model, name, HeadNorm(module, mesh))


def fsdp_placement(parameter: nn.Parameter) -> Shard:
    """The dim that FSDP may split; for `shard_placement_fn` of fully_shard.

    Never one that tensor parallelism splits already: of packed rows that are split twice, DTensor would put the parts
    together in a wrong order.
    """
    split = isinstance(parameter, DTensor) and 0 in map(split_dim, parameter.placements)
    return Shard(1 if split else 0)


class ColumnLinear(nn.Module):
    """A linear layer that computes this rank's part of each piece of the outputs, from whole inputs."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, pieces: int):
        super().__init__()
        self.group, self.rank, self.ranks, self.pieces = _group_name(mesh), mesh.get_local_rank(), mesh.size(), pieces
        self.weight = _split(linear.weight, mesh, 0, pieces)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        if self.bias is not None:
            parts = sum_gradient(self.bias, self.group).unflatten(0, (self.pieces, self.ranks, -1))
            bias = parts[:, self.rank].flatten()
        return F.linear(sum_gradient(x, self.group), _local(self.weight), bias)


class RowLinear(nn.Module):
    """A linear layer that takes this rank's part of each piece of the inputs; the outputs are whole."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, pieces: int):
        super().__init__()
        self.group = _group_name(mesh)
        self.weight = _split(linear.weight, mesh, 1, pieces)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = sum_ranks(F.linear(x, _local(self.weight)), self.group)
        return y if self.bias is None else y + self.bias


class HeadNorm(nn.Module):
    """RMSNorm of this rank's heads; the gradient of its weight is that of all heads."""

    def __init__(self, norm: nn.RMSNorm, mesh: DeviceMesh):
        super().__init__()
        self.group, self.eps = _group_name(mesh), norm.eps
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, sum_gradient(self.weight, self.group), self.eps)


def sum_gradient(x: Tensor, group: str) -> Tensor:
    """x as it is; its gradient is summed over the ranks, each of which uses x for another part of the result."""
    return _SumGradient.apply(x, group)


def sum_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x, on all of them."""
    return _SumRanks.apply(x, group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _all_reduce(x: Tensor, group: str) -> Tensor:
    # The operators themselves, which the compiler and rules of recomputation see; by name, which the compiler can keep.
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group))


def _local(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()


def _split(weight: Tensor, mesh: DeviceMesh, dim: int, pieces: int) -> nn.Parameter:
    """This rank's part of a weight without values, as a DTensor that knows where its pieces belong."""
    assert weight.is_meta and weight.shape[dim] % (pieces * mesh.size()) == 0, (weight.device, weight.shape, pieces)
    local = weight.detach().chunk(mesh.size(), dim)[0].contiguous()
    placement: Placement = _StridedShard(dim, split_factor=pieces) if pieces > 1 else Shard(dim)
    part = DTensor.from_local(local, mesh, [placement], run_check=False, shape=weight.shape, stride=weight.stride())
    return nn.Parameter(part, requires_grad=weight.requires_grad)


def _group_name(mesh: DeviceMesh) -> str:
    assert mesh.ndim == 1, mesh
    return mesh.get_group().group_name


def _find(pieces: Mapping[str, int], name: str) -> int | None:
    return next((count for pattern, count in pieces.items() if matches(name, pattern)), None)


def _plain_linear(name: str, module: nn.Module) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise ValueError(
            f"parallelism.tensor_parallel_degree > 1 cannot split {name}, a {type(module).__name__}: "
            "leave model.converters empty, or share the work by data and context parallelism only"
        )
    return module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
