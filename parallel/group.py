"""What the ranks of one axis of the mesh tell each other within a forward or backward pass."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName

_all_gather = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd  # old name


@dataclass(frozen=True)
class Group:
    """Ranks in words that torch.compile can trace. A group of one sends nothing."""

    name: "GroupName"
    size: int
    rank: int  # this process's place among them

    def exchange(self, x: Tensor) -> Tensor:
        """The i-th part of dim 0 goes to rank i; the parts that arrive follow each other in the order of ranks."""
        if self.size == 1:
            return x
        return wait(funcol.all_to_all_single_autograd(x.contiguous(), None, None, self.name))

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's dim 0, one after the other; the gradient is summed and scattered back."""
        return x if self.size == 1 else wait(_all_gather(x.contiguous(), 0, self.name))

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks' x, on all of them. No autograd."""
        return x if self.size == 1 else wait(funcol.all_reduce(x.contiguous(), "sum", self.name))

    def start_passing_on(self, x: Tensor) -> Tensor:
        """Sends x to the next rank and returns what the previous one sends, to be waited on. No autograd."""
        to, source = [0] * self.size, [0] * self.size
        to[(self.rank + 1) % self.size] = source[(self.rank - 1) % self.size] = x.shape[0]
        return funcol.all_to_all_single(x.contiguous(), source, to, self.name)


def make_group(mesh: DeviceMesh) -> Group:
    """The ranks of a one-dimensional mesh."""
    assert mesh.ndim == 1, f"a group is one axis of the mesh, not {mesh}"
    return Group(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())


def wait(x: Tensor) -> Tensor:
    """A collective's result as a plain tensor, with its values there."""
    return funcol.wait_tensor(x)
