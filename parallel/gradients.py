"""What is done to all gradients at once, however they are spread: their norms, and groups for the optimizer."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.norms import square_sums
from parallel.shards import local_part


def group_by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one call of a fused or foreach optimizer can take: plain ones first, then a list for each mesh.

    Within a list, and from list to list, parameters keep their order.
    """
    groups: dict[Hashable, list[nn.Parameter]] = {None: []}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return [group for group in groups.values() if group]


def group_by_module(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """All parameters, under the names of the modules that the model consists of."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(name.partition(".")[0], []).append(parameter)
    return groups


@torch.no_grad()
def clip_grad_norm_(groups: Mapping[str, Sequence[Tensor]], max_norm: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Scales all gradients so that their global 2-norm is at most max_norm; as torch.nn.utils.clip_grad_norm_ does.

    Every element counts once, on however many ranks it is. All ranks must call it.

    Args:
        groups: all parameters.

    Returns:
        The norm before clipping of all gradients, and of those of each group: plain fp32 `[]` on the gradients' device,
        the same on all ranks. Not read by the host.
    """
    grads = [[parameter.grad for parameter in group if parameter.grad is not None] for group in groups.values()]
    if not any(grads):
        return torch.zeros(()), {}
    sums = square_sums(grads)
    norm = sums.sum().sqrt().float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device, local in _by_device(local_part(gradient) for group in grads for gradient in group).items():
        torch._foreach_mul_(local, scale.to(device))
    return norm, dict(zip(groups, sums.sqrt().float().unbind(), strict=True))


def _by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found
