"""Bytes of activations that the transformer keeps from its forward to its backward pass, by formulas.

What autograd keeps was read off tensor by tensor; the tests compare the sums with what torch's memory tracker sees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cache
from typing import Literal, NamedTuple

from flux.model import SHORT_FOR_CPU, TIME_FEATURES, mlp_width
from flux.spec import TransformerConfig

_FLOAT32 = 4  # bytes
# Of what a block keeps elsewhere: so much is here at a time in its backward pass, to which each tensor comes when it is
# needed. Between a fifth and a half, by torch's memory tracker.
_FETCHED = 1 / 3


class Keep(IntEnum):
    """What of a block is kept, from little to much."""

    INPUTS = 0  # the rest is computed again: activation_checkpoint.mode "full"
    PRODUCTS = 1  # of matrices and of attention, and what was communicated: "selective" with option "op"
    COMPILED = 2  # what the compiler chooses by itself: "none" with compile.enable
    ALL = 3  # whatever autograd asks for: "none"


class Block(Enum):
    """The kinds of blocks that a transformer consists of."""

    DOUBLE = "double"
    SINGLE = "single"
    LAST = "last"  # a single one that leaves the text out


@dataclass(frozen=True)
class LocalBatch:
    """What one rank computes in a forward pass.

    Args:
        samples: in it.
        image_tokens, text_tokens: of a sample, this rank's share of them.
        itemsize: bytes of a number in the computation.
        on_cpu: a CPU's kernels keep other things than a GPU's.
        tensor_parallel, context_parallel: ranks that share matrix products, and that share tokens.
        context_parallel_method: how they attend.
    """

    samples: int
    image_tokens: int
    text_tokens: int
    itemsize: int = 2
    on_cpu: bool = False
    tensor_parallel: int = 1
    context_parallel: int = 1
    context_parallel_method: Literal["ulysses", "allgather", "ring"] = "ulysses"

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens


class _Kept(NamedTuple):
    """One tensor of a block, or several alike."""

    first: Keep  # level that keeps it
    per_token: float  # numbers
    itemsize: int
    per_sample: float = 0
    last: Keep = Keep.ALL  # level that does; one that keeps more may have no use for it


def list_blocks(config: TransformerConfig) -> list[Block]:
    """The blocks in the order of the forward pass."""
    singles = [Block.SINGLE] * (config.depth_single - 1) + [Block.LAST] if config.depth_single else []
    return [Block.DOUBLE] * config.depth + singles


@cache
def block_bytes(config: TransformerConfig, batch: LocalBatch, keep: Keep, block: Block) -> int:
    """Bytes that one block keeps for its backward pass, its inputs included."""
    tensors = _double_block(config, batch) if block is Block.DOUBLE else _single_block(config, batch, block)
    per_sample = sum(
        one.itemsize * (batch.tokens * one.per_token + one.per_sample)
        for one in tensors
        if one.first <= keep <= one.last
    )
    return round(batch.samples * per_sample)


def blocks_bytes(config: TransformerConfig, batch: LocalBatch, kept: Sequence[Keep]) -> list[int]:
    """The same of each block, in the order of the forward pass."""
    return [block_bytes(config, batch, keep, block) for keep, block in zip(kept, list_blocks(config), strict=True)]


def inputs_bytes(config: TransformerConfig, batch: LocalBatch) -> int:
    """Bytes that are kept for what comes before the blocks: inputs, conditions, modulation, rotary table.

    The modulation of a block makes room for its gradient, which stays to the end.
    """
    D, pooled = config.hidden_size, config.pooled_dim or 0
    embedders = 1 + config.guidance_embed + bool(pooled)
    conditions = embedders * (TIME_FEATURES + 2 * D) + 4 * D + modulation_width(config)
    inputs = batch.image_tokens * config.in_channels + batch.text_tokens * config.context_dim
    rotary = batch.tokens * config.head_dim
    return batch.samples * (batch.itemsize * (conditions + inputs) + _FLOAT32 * rotary)


def modulation_width(config: TransformerConfig) -> int:
    """Numbers that modulate the blocks, of one sample."""
    return (12 + 3 if config.shared_modulation else 12 * config.depth + 3 * config.depth_single) * config.hidden_size


def outputs_bytes(config: TransformerConfig, batch: LocalBatch) -> int:
    """Bytes that are kept for what comes after the blocks: last layer and loss."""
    given = batch.image_tokens if config.depth_single else batch.tokens  # by the last block
    layer = (given + 2 * batch.image_tokens) * config.hidden_size
    loss = batch.image_tokens * config.in_channels
    return batch.samples * (batch.itemsize * layer + _FLOAT32 * loss)


def backward_bytes(config: TransformerConfig, batch: LocalBatch) -> int:
    """Bytes of gradients in flight in a block's backward pass: of its output, and of what its widest layer made."""
    D, tp = config.hidden_size, batch.tensor_parallel
    per_token = batch.itemsize * (D / 2 + (3 * D + _mlp_in(config)) / tp)
    if batch.on_cpu and batch.itemsize != _FLOAT32:
        per_token += _FLOAT32 * 2 * D / tp  # of queries and keys, which a CPU normalizes in fp32
    return round(batch.samples * batch.tokens * per_token)


def peak_bytes(
    config: TransformerConfig,
    batch: LocalBatch,
    kept: Sequence[Keep],
    at_most: Keep,
    gradients: Sequence[int],
    offloaded: bool = False,
) -> int:
    """Largest number of bytes that activations, and gradients with them, take at a time.

    Args:
        kept: what each block keeps, in the order of the forward pass.
        at_most: what a block that is computed again holds by then.
        gradients: bytes of the gradients of each block's weights, then of all others, modulation too: they come as
            activations go.
        offloaded: what blocks keep is elsewhere until it is needed.
    """
    blocks = list_blocks(config)
    held = [0] * len(kept) if offloaded else blocks_bytes(config, batch, kept)
    inputs, in_flight = inputs_bytes(config, batch), backward_bytes(config, batch)
    peak = max(inputs + sum(held) + outputs_bytes(config, batch), sum(gradients))
    for index in reversed(range(len(kept))):
        whole = max(block_bytes(config, batch, keep, blocks[index]) for keep in (kept[index], at_most))
        if offloaded and kept[index] is not Keep.INPUTS:
            whole = round(_FETCHED * whole)
        come = sum(gradients[index + 1 : -1])
        # At first nothing of the block's own gradients is there, in the end nothing of its activations.
        peak = max(peak, inputs + sum(held[:index]) + come + max(whole + in_flight, gradients[index]))
    return peak


def _mlp_in(config: TransformerConfig) -> int:
    return (2 if config.swiglu else 1) * mlp_width(config)


def _double_block(config: TransformerConfig, batch: LocalBatch) -> Iterator[_Kept]:
    D, tp, item = config.hidden_size, batch.tensor_parallel, batch.itemsize
    yield _Kept(Keep.INPUTS, D, item)
    # A CPU keeps copies of the parts of qkv that it normalizes in fp32, and then not the whole.
    yield _Kept(Keep.PRODUCTS, 3 * D / tp, item, last=Keep.COMPILED if batch.on_cpu and item != _FLOAT32 else Keep.ALL)
    yield _Kept(Keep.PRODUCTS, D + _mlp_in(config) / tp + D, item)  # out of attention, into and out of MLP
    if tp > 1:
        yield _Kept(Keep.PRODUCTS, D + D, item, last=Keep.PRODUCTS)  # the same before they are summed over ranks
    # Twice modulated, into the last layers of attention and MLP.
    yield _Kept(Keep.COMPILED, 2 * D + (D if batch.samples > 1 else 0) / tp + mlp_width(config) / tp, item)
    yield _Kept(Keep.COMPILED, 4, _FLOAT32)  # mean and deviation of two norms
    yield _Kept(Keep.ALL, 2 * D + D, item, 4 * D)  # twice normalized, between attention and MLP; 1 + scale
    yield from _attention(config, batch, separate_values=True)


def _single_block(config: TransformerConfig, batch: LocalBatch, block: Block) -> Iterator[_Kept]:
    D, tp, item = config.hidden_size, batch.tensor_parallel, batch.itemsize
    read = batch.image_tokens / batch.tokens if block is Block.LAST else 1  # share of the tokens that come out
    yield _Kept(Keep.INPUTS, D, item)
    mlp_in = _mlp_in(config) * (read if tp == 1 else 1)  # a part of linear1 computes all that it can
    yield _Kept(Keep.PRODUCTS, (3 * D + mlp_in) / tp + read * D, item)  # out of linear1 and linear2
    if tp > 1:
        yield _Kept(Keep.PRODUCTS, read * D, item, last=Keep.PRODUCTS)
    yield _Kept(Keep.COMPILED, D + read * (D + mlp_width(config)) / tp, item)  # modulated, into linear2
    yield _Kept(Keep.COMPILED, 2, _FLOAT32)
    yield _Kept(Keep.ALL, D, item, D)  # normalized; 1 + scale
    yield from _attention(config, batch, separate_values=False)


def _attention(config: TransformerConfig, batch: LocalBatch, separate_values: bool) -> Iterator[_Kept]:
    """Norms of queries and keys, rotation, attention.

    Args:
        separate_values: values are a tensor of their own, not a part of the product that made them.
    """
    tp, cp, item = batch.tensor_parallel, batch.context_parallel, batch.itemsize
    D, heads = config.hidden_size / tp, config.num_heads / tp
    method = batch.context_parallel_method if cp > 1 else "alone"
    # For few tokens a CPU attends in fp32 what is bf16 (flux.model.Attention); ring calls its kernel itself.
    few = batch.on_cpu and method != "ring" and batch.tokens * cp <= SHORT_FOR_CPU
    short = few and item != _FLOAT32
    precise = _FLOAT32 if short else item
    yield _Kept(Keep.PRODUCTS, D, precise)  # the result
    yield _Kept(Keep.PRODUCTS, heads, _FLOAT32)  # log of the sum of exponentials
    yield _Kept(Keep.COMPILED, 2 * heads, _FLOAT32)  # sizes of queries and keys
    if method in ("ulysses", "allgather"):
        received = 3 if method == "ulysses" else 2 * cp
        yield _Kept(Keep.PRODUCTS, received * D, item, last=Keep.PRODUCTS if short else Keep.ALL)
        if short:
            yield _Kept(Keep.COMPILED, received * D, precise)
    if method == "ulysses":
        yield _Kept(Keep.PRODUCTS, D, item, last=Keep.PRODUCTS)  # exchanged back
    elif method == "allgather":
        yield _Kept(Keep.COMPILED, D, precise)  # queries
    else:
        yield _Kept(Keep.COMPILED, (3 if separate_values or short else 2) * D, precise)
    if method == "ring":  # keys and values of the others, and what they gave
        yield _Kept(Keep.PRODUCTS, (cp - 1) * 3 * D, item, last=Keep.PRODUCTS)
    if batch.on_cpu:  # which has no kernel for RMSNorm: the steps of its computation are kept
        yield _Kept(Keep.ALL, (2 if item == _FLOAT32 else 4) * D, _FLOAT32)
