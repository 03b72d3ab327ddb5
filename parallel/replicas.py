"""Do the replicas of the weights hold the same bits? A machine that computes wrong numbers says nothing of it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.mesh import Layout, all_gather_single
from parallel.shards import local_part

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_PART = 2**24  # numbers that are 64 bits wide at a time


class ReplicasDiffer(RuntimeError):
    """Replicas of the weights have not the same bits."""


class Deviation(NamedTuple):
    """A rank whose part of a tensor has other bits than the same part in other replicas."""

    rank: int
    name: str  # of the first such tensor
    is_outvoted: bool  # more than half of the replicas agree on other bits; else any of those that differ may be wrong


@torch.no_grad()
def compare_replicas(tensors: Mapping[str, Tensor], layout: Layout) -> list[Deviation]:
    """Compares what this rank holds of each tensor with what the ranks in its place of other replicas hold.

    Two collectives, of a number for each tensor and of two for each rank. Without replicas there is nothing to do. All
    ranks must call it with the same names, and wait for the device.

    Args:
        tensors: by name, plain or DTensors, that every replica computes for itself: weights, and with them what an
            optimizer keeps of them.

    Returns:
        The same on all ranks, by rank; empty: all replicas agree.
    """
    if layout.degrees.dp_replicate == 1:
        return []
    assert layout.weights is not None
    axis, names = layout.weights["dp_replicate"], list(tensors)
    own = torch.stack([checksum(tensor).to(layout.device) for tensor in tensors.values()])
    gathered = own.new_empty(axis.size() * len(names))
    all_gather_single(gathered, own, group=axis.get_group())
    replicas = gathered.view(axis.size(), -1).cpu()
    # What more than half agree on is the median; whether they do is counted.
    agreed = replicas == replicas.median(dim=0).values
    has_majority = 2 * agreed.sum(dim=0) > len(replicas)
    differs = ~(agreed[axis.get_local_rank()] & has_majority)
    first = int(differs.int().argmax()) if differs.any() else -1
    verdict = torch.tensor([first, int(has_majority[first])], device=layout.device)
    verdicts: list[list[int]] = layout.gather(verdict).flatten(0, -2).tolist()
    return [Deviation(rank, names[number], bool(out)) for rank, (number, out) in enumerate(verdicts) if number >= 0]


def checksum(tensor: Tensor) -> Tensor:
    """Int64 `[]`, the sum of the bits of each number of this rank's part, as integers: any flipped bit changes it.

    It is the same for the same bits, in whatever order they are added.
    """
    local = local_part(tensor)
    bits = local.view(_INTEGERS[local.element_size()]).flatten()
    # In parts: torch makes a copy of 64 bits of what it adds up.
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_PART)]).sum()


def describe_deviations(deviations: Sequence[Deviation]) -> str:
    """Such as `rank 5 differs from the other replicas, first in a.weight`."""
    by_kind: dict[tuple[str, bool], list[int]] = {}
    for deviation in deviations:
        by_kind.setdefault((deviation.name, deviation.is_outvoted), []).append(deviation.rank)
    return "; ".join(_describe(ranks, *kind) for kind, ranks in by_kind.items())


def _describe(ranks: Sequence[int], name: str, is_outvoted: bool) -> str:
    told = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
    if is_outvoted:
        return f"{told} from the other replicas, first in {name}"
    return f"{told} from one another, first in {name}: without a majority, which is wrong cannot be told"
