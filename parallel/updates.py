"""How far an update of the optimizer moves the weights, in relation to their size."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from parallel.names import find_modules
from parallel.norms import square_sums
from parallel.shards import local_part


def middle_blocks(model: nn.Module, blocks: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """Parameters of the middle one of the blocks of each kind, under the name of the module that holds them.

    Args:
        blocks: a pattern for each kind, such as `layers.*`.
    """
    found = {}
    for pattern in blocks:
        modules = list(find_modules(model, [pattern]).values())
        found[pattern.partition(".")[0]] = list(modules[len(modules) // 2].parameters())
    return found


@torch.no_grad()
def copy_parts(groups: Mapping[str, Sequence[Tensor]]) -> dict[Tensor, Tensor]:
    """A copy of what this rank holds of each parameter."""
    return {parameter: local_part(parameter).clone() for group in groups.values() for parameter in group}


@torch.no_grad()
def update_ratios(groups: Mapping[str, Sequence[Tensor]], before: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """Norm of what an update has changed, over the norm of what was there; Adam's is about the learning rate times
    sqrt(elements) over the norm. All ranks must call it.

    Args:
        groups: parameters, after the update.
        before: `copy_parts` of the same, from before it; overwritten.

    Returns:
        The ratio of each group, as plain fp32 `[]` on the parameters' device, the same on all ranks.
    """
    weights = square_sums(list(groups.values()), before.__getitem__)
    torch._foreach_sub_(list(before.values()), [local_part(parameter) for parameter in before])
    changes = square_sums(list(groups.values()), before.__getitem__)
    return dict(zip(groups, (changes / weights).sqrt().float().unbind(), strict=True))
