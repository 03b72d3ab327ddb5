"""What a rank holds and sends, by arithmetic: without a model, processes or memory.

Figures are rank 0's, which holds the most where something does not divide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod

from parallel.degrees import Degrees
from parallel.names import matches


def local_numel(
    name: str, shape: Sequence[int], degrees: Degrees, column: Mapping[str, int], row: Mapping[str, int]
) -> int:
    """Elements of a parameter that rank 0 holds: tensor parallel splits it, then FSDP.

    Args:
        name: of the parameter.
        column, row: the linear layers that tensor parallel splits, as `apply_tensor_parallel` takes them.
    """
    sizes, fsdp_dim = list(shape), 0
    layer, _, kind = name.rpartition(".")
    if degrees.tp > 1 and kind == "weight":
        if any(matches(layer, pattern) for pattern in column):
            sizes[0] //= degrees.tp
            fsdp_dim = 1
        elif any(matches(layer, pattern) for pattern in row):
            sizes[1] //= degrees.tp
    sizes[fsdp_dim] = -(-sizes[fsdp_dim] // degrees.fsdp)
    return prod(sizes)


@dataclass(frozen=True)
class Links:
    """How fast ranks reach each other, in one direction.

    Args:
        node: ranks on one machine.
        inside: 10^9 bytes per second of one rank to the others on its machine.
        outside: the same to other machines.
    """

    node: int
    inside: float
    outside: float

    def seconds(self, received: float, first: int, ranks: int) -> float:
        """Time in which each of `ranks` ranks receives so many bytes from the others.

        Args:
            first: distance in rank numbers from one of them to the next; they share the machine's network with the
                other groups of its kind.
        """
        if ranks == 1:
            return 0.0
        neighbors = gcd(ranks, max(1, self.node // first))  # on one machine
        if neighbors == ranks:
            return received / (self.inside * 1e9)
        # A ring of all ranks leaves each machine once, through the network adapters of those on it.
        return received / (min(self.inside, self.outside * neighbors) * 1e9)


@dataclass(frozen=True)
class WeightTraffic:
    """Bytes of one whole copy of the weights, per tensor parallel rank, and how often they travel.

    Args:
        gathered: weights in the dtype of the computation.
        reduced: gradients in the dtype in which they are summed.
        gathers: how often weights are gathered for one forward and backward pass.
        kept: gradients of weights that are not gathered, in the same dtype.
        inputs: of one rank to these, in the same dtype.
        outputs: of these for one rank's samples.
    """

    gathered: int
    reduced: int
    gathers: int
    kept: int
    inputs: int
    outputs: int

    def seconds(self, degrees: Degrees, links: Links) -> float:
        """Of one forward and backward pass."""
        shards, copies = degrees.fsdp, degrees.dp_replicate
        # What is not gathered exchanges inputs and outputs, and in the backward pass their gradients.
        along_shards = (self.gathers * self.gathered + self.reduced + 2 * self.outputs) * (shards - 1) / shards
        along_shards += 2 * self.inputs * (shards - 1)
        along_copies = 2 * (self.reduced + self.kept) / shards * (copies - 1) / copies
        return links.seconds(along_shards, degrees.tp, shards) + links.seconds(
            along_copies, degrees.tp * shards, copies
        )


def token_seconds(
    activation: int, attentions: int, sums: int, times: float, degrees: Degrees, method: str, links: Links
) -> float:
    """Time in which the ranks of a sample exchange what they have.

    Args:
        activation: bytes of this rank's tokens at the model's width.
        attentions: layers in which tokens meet.
        sums: sums over tensor parallel ranks in a forward pass.
        times: forward passes; a backward pass exchanges as much as one.
        method: parallelism.context_parallel_method.
    """
    cp, tp = degrees.cp, degrees.tp
    exchanged = 4 * (cp - 1) / cp if method == "ulysses" else 2 * (cp - 1)
    context = links.seconds(times * attentions * exchanged * activation / tp, tp, cp)
    return context + links.seconds(times * sums * 2 * (tp - 1) / tp * activation, 1, tp)
