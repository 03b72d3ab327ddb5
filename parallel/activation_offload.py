"""Offload: what blocks keep for their backward pass waits in the CPU's memory.

Torch's own hooks on saved tensors do it, around the whole call of a block: outside of what is compiled, where they have
no place, and outside of recomputation, which keeps a block's inputs alone, so that only these travel.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


def apply_activation_offload(blocks: Sequence[nn.Module], pin_memory: bool) -> None:
    """Applied after compilation, to the blocks as they are by then.

    Args:
        pin_memory: whether the GPU writes to page-locked memory, so that the host need not wait for it.
    """
    for block in blocks:
        call = block._compiled_call_impl or block._call_impl
        block._compiled_call_impl = partial(_call_offloading, block, call, pin_memory)


def _call_offloading(block: nn.Module, call: Callable[..., Any], pin_memory: bool, *args: Any) -> Any:
    offload, own = save_on_cpu(pin_memory), set[int]()

    def pack(tensor: Tensor) -> Any:
        """Weights stay where they are: FSDP frees them and gathers them again into the same memory."""
        if not own:  # asked here, when they are gathered
            own.update(parameter.untyped_storage()._cdata for parameter in block.parameters())
        return tensor if tensor.untyped_storage()._cdata in own else offload.pack_hook(tensor)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else offload.unpack_hook(kept)

    with saved_tensors_hooks(pack, unpack):
        return call(*args)
