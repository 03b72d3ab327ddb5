"""Data parallel through FSDP2: DDP, FSDP and HSDP are one code path on a mesh of dp_replicate x fsdp ranks.

fsdp = 1 is DDP: every rank keeps all weights and only gradients travel. Gradients are sums over ranks, not means: the
loss of a rank is already divided by the element count of the whole update, so that uneven shards, accumulation and
context parallel need no factor anywhere.
"""

import warnings
from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from parallel.config import Parallelism
from parallel.tensor_parallel import fsdp_placement


def apply_fsdp(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    section: Parallelism,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    cpu_offload: bool,
    ignored: Collection[nn.Parameter] = (),
) -> None:
    """Splits the parameters over the ranks of `mesh`, in place; names stay as they are.

    Args:
        model: on the meta device or materialized.
        blocks: each is one group of communication, in the order of the forward pass; what is left is another.
        mesh: 2-D, dp_replicate x fsdp.
        section: when gathered weights are freed, how far ahead they are gathered.
        param_dtype: dtype of the computation. Inputs are not cast: times and positions stay exact.
        reduce_dtype: dtype in which gradients are summed over ranks.
        cpu_offload: keep parameters, gradients and optimizer states in the CPU's memory.
        ignored: parameters that are spread already, and used without being gathered.
    """
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    offload = _offload(mesh, cpu_offload)

    def shard(module: nn.Module, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=spread_mesh(mesh),
            reshard_after_forward=reshard,
            shard_placement_fn=fsdp_placement,
            mp_policy=precision,
            offload_policy=offload,
            ignored_params=set(ignored),
        )

    when = section.fsdp_reshard_after_forward
    for block in blocks:
        shard(block, reshard=when != "never")
    # The last group's weights are needed at once by the backward pass.
    shard(model, reshard=when == "always")
    for module in _fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to leave out the division
    _prefetch(blocks, section)
    # It warns of in-place operations on a returned view; the loss makes none.
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)


def apply_frozen_fsdp(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, cpu_offload: bool) -> None:
    """Splits a frozen model over the ranks of `mesh`, which may be one; a block's weights are gathered while the one
    before it runs, and freed after its own run.

    Args:
        cpu_offload: they are gathered from the CPU's memory. The model must be given its weights there.
    """
    for module in (*blocks, model):
        fully_shard(
            module, mesh=spread_mesh(mesh), reshard_after_forward=True, offload_policy=_offload(mesh, cpu_offload)
        )
    _prefetch(blocks, Parallelism(fsdp_forward_prefetch=1))


def spread_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks over which weights are spread, of dp_replicate x fsdp: one copy of them needs no axis of copies."""
    return mesh[mesh.mesh_dim_names[1]] if mesh.size(0) == 1 and mesh.mesh_dim_names else mesh


def reshard(model: nn.Module) -> None:
    """Frees gathered weights that a pass without backward has left, so that parameters are the ranks' own parts."""
    for module in _fsdp_modules(model):
        module.reshard()


def _offload(mesh: DeviceMesh, cpu_offload: bool) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _prefetch(blocks: Sequence[nn.Module], section: Parallelism) -> None:
    """Explicit prefetching lets the CPU issue gathers further ahead than one block (FSDP's own way)."""
    for index, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        if ahead := section.fsdp_forward_prefetch:
            block.set_modules_to_forward_prefetch(_sharded(blocks[index + 1 : index + 1 + ahead]))
        if ahead := section.fsdp_backward_prefetch:
            block.set_modules_to_backward_prefetch(_sharded(blocks[max(0, index - ahead) : index][::-1]))


def _sharded(blocks: Sequence[nn.Module]) -> list[FSDPModule]:
    return [block for block in blocks if isinstance(block, FSDPModule)]
