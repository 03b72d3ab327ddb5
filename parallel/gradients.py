"""What is done to all gradients at once, however they are spread: their global norm, and groups for the optimizer."""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.tensor import DTensor

from parallel.shards import split_dim

_CPU_PART = 2**16  # numbers that one fp32 sum may take on the CPU; the norm is right to 1e-5


def group_by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one call of a fused or foreach optimizer can take: plain ones first, then a list for each mesh.

    Within a list, and from list to list, parameters keep their order.
    """
    groups: dict[Hashable, list[nn.Parameter]] = {None: []}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return [group for group in groups.values() if group]


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most max_norm; as torch.nn.utils.clip_grad_norm_ does.

    Every element counts once, on however many ranks it is. All ranks must call it.

    Returns:
        The norm before clipping: plain fp32 `[]` on the gradients' device, the same on all ranks. Not read by the host.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = _global_norm(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device, local in _by_device(_local(gradient) for gradient in gradients).items():
        torch._foreach_mul_(local, scale.to(device))
    return norm


def _global_norm(gradients: list[Tensor]) -> Tensor:
    """Square sums of this rank's parts, added up over the axes that split them: one collective per axis.

    torch's own get_total_norm refuses gradients of several meshes, and takes the norm of bf16 gradients in bf16. Sums
    are float64, so that the norm does not depend on the order in which a collective adds.
    """
    kinds: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault(_splitting_groups(gradient), []).append(_local(gradient))
    device = _collective_device(gradients)
    sums = {kind: _square_sum(local, device) for kind, local in kinds.items()}
    for group in dict.fromkeys(group for kind in kinds for group in kind):
        mine = [kind for kind in kinds if group in kind]
        added = torch.stack([sums[kind] for kind in mine])
        all_reduce(added, group=group)
        sums |= zip(mine, added.unbind(), strict=True)
    return torch.stack(list(sums.values())).sum().sqrt().float()


def _splitting_groups(gradient: Tensor) -> tuple[ProcessGroup, ...]:
    """Of each axis along which ranks hold different parts of a gradient, this rank's process group."""
    if not isinstance(gradient, DTensor):
        return ()
    assert not any(placement.is_partial() for placement in gradient.placements), gradient.placements
    mesh = gradient.device_mesh
    return tuple(
        mesh.get_group(axis) for axis, placement in enumerate(gradient.placements) if split_dim(placement) is not None
    )


def _collective_device(gradients: list[Tensor]) -> torch.device:
    """Where collectives take place; gradients that are offloaded to the CPU lie elsewhere."""
    meshes = (gradient.device_mesh for gradient in gradients if isinstance(gradient, DTensor))
    mesh = next(meshes, None)
    return gradients[0].device if mesh is None else torch.empty(0, device=mesh.device_type).device


def _square_sum(local: list[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for where, tensors in _by_device(local).items():
        if where.type == "cpu":  # adds one by one: of 33 million numbers at once, the norm was 0.2 % too small
            tensors = [part for tensor in tensors for part in tensor.flatten().split(_CPU_PART)]
        total += torch.stack(torch._foreach_norm(tensors, 2.0, dtype=torch.float32)).double().square().sum().to(device)
    return total


def _by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
