"""Recomputation: activations that the backward pass makes again instead of keeping them (arXiv 1604.06174).

A block's forward is replaced on the instance: no wrapper module, so no parameter changes its name, the hooks of FSDP
on the block's call stay outside, and compiling the block traces through.
"""

import math
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.config import ActivationCheckpoint, parse_selective_option

# What option "op" keeps: operators that cost far more time than the memory of their results is worth, and all that
# communicates, since a network is slower than any memory. By name, since not every build of torch has all of them.
_KEPT_OPERATORS = (
    ("aten", ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")),
    (
        "aten",
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
            "_scaled_dot_product_attention_math",
            "_flash_attention_forward",
            "_efficient_attention_forward",
            "_cudnn_attention_forward",
        ),
    ),
    (
        "_c10d_functional",
        (
            "all_to_all_single",
            "all_gather_into_tensor",
            "all_gather_into_tensor_coalesced",
            "reduce_scatter_tensor",
            "reduce_scatter_tensor_coalesced",
            "all_reduce",
            "all_reduce_coalesced",
            "broadcast",
        ),
    ),
)


def recomputed_blocks(section: ActivationCheckpoint, count: int) -> list[int]:
    """Which of `count` blocks are recomputed, wholly or, with option "op", in part; memory_budget: none is known."""
    if section.mode == "full":
        # Rounded, since in floating point 100 * 0.29 is less than 29.
        upto = [math.floor(round(number * section.ratio, 6)) for number in range(count + 1)]
        return [index for index in range(count) if upto[index + 1] > upto[index]]
    if section.mode == "selective":
        every = parse_selective_option(section.selective_ac_option) or 1
        return list(range(every - 1, count, every))
    return []


def apply_activation_checkpoint(blocks: Sequence[nn.Module], section: ActivationCheckpoint) -> None:
    """Makes the backward pass of the chosen blocks recompute what their forward pass would have kept.

    Mode memory_budget changes nothing here: it is a setting of the compiler, for all that is compiled after it.

    Raises:
        ValueError: selective_ac_option says nothing.
    """
    budget = section.memory_budget if section.mode == "memory_budget" else 1.0
    torch._functorch.config.activation_memory_budget = budget
    by_operator = section.mode == "selective" and parse_selective_option(section.selective_ac_option) is None
    forward = _forward_keeping_operators if by_operator else _forward_keeping_inputs
    for index in recomputed_blocks(section, len(blocks)):
        block = blocks[index]
        assert "forward" not in vars(block), "the forward of a block is replaced once"
        block.forward = MethodType(forward, block)  # a method, so that a deep copy of the block calls its own


# preserve_rng_state=False: the blocks draw no random numbers, and saving the generator waits for the GPU.


def _forward_keeping_inputs(block: nn.Module, *args: Any) -> Any:
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False)


def _forward_keeping_operators(block: nn.Module, *args: Any) -> Any:
    return checkpoint(
        type(block).forward,
        block,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _keep_costly_operators),
    )


def _find_operators() -> frozenset[Any]:
    found: list[Any] = [torch.ops.higher_order.flex_attention]
    for namespace, names in _KEPT_OPERATORS:
        for name in names:
            packet = getattr(getattr(torch.ops, namespace), name, None)
            if packet is not None:
                found += [getattr(packet, overload) for overload in packet.overloads()]
    return frozenset(found)


_KEPT = _find_operators()


def _keep_costly_operators(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
