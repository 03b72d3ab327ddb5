"""The [parallelism], [activation_checkpoint], [compile], [quantize] and [comm] sections."""

from dataclasses import dataclass, field
from typing import Annotated, Literal


@dataclass(frozen=True)
class Parallelism:
    """How a run is spread over processes; the numbers do not depend on it."""

    data_parallel_replicate_degree: Annotated[
        int, "copies of the model that see different samples; -1: all processes that are left", "-1 or [1, inf)"
    ] = 1
    data_parallel_shard_degree: Annotated[
        int,
        "processes that share one copy of the weights and see different samples; -1: all processes that are left",
        "-1 or [1, inf)",
    ] = -1
    context_parallel_degree: Annotated[int, "processes that share the tokens of one sample", "[1, inf)"] = 1
    tensor_parallel_degree: Annotated[int, "processes that share each matrix product", "[1, inf)"] = 1
    context_parallel_method: Annotated[
        Literal["ulysses", "allgather", "ring"],
        "how context parallel attends: ulysses exchanges tokens for heads, allgather fetches all keys and values, "
        "ring passes them on",
    ] = "ulysses"
    fsdp_reshard_after_forward: Annotated[
        Literal["default", "always", "never"],
        "free gathered weights after the forward pass, which saves memory and gathers them again for the backward "
        "pass; default: yes for blocks, no for the rest",
    ] = "default"
    fsdp_forward_prefetch: Annotated[
        int, "blocks whose weights are gathered ahead in the forward pass; 0: as FSDP does by itself", "[0, inf)"
    ] = 0
    fsdp_backward_prefetch: Annotated[
        int, "blocks whose weights are gathered ahead in the backward pass; 0: as FSDP does by itself", "[0, inf)"
    ] = 0


@dataclass(frozen=True)
class ActivationCheckpoint:
    """What the backward pass computes again, or fetches, instead of keeping it."""

    mode: Annotated[
        Literal["none", "full", "selective", "memory_budget"],
        "none keeps all activations; full recomputes blocks; selective some blocks or operators; memory_budget lets "
        "the compiler choose",
    ] = "selective"
    selective_ac_option: Annotated[
        str, "a number n: every n-th block; op: all but matrix products, attention and communication", "[1, inf)"
    ] = "2"
    ratio: Annotated[float, "share of the blocks that mode full recomputes, spread evenly", "[0, 1]"] = 1.0
    memory_budget: Annotated[
        float, "activations that mode memory_budget may keep: 0 as full, 1 as the compiler alone", "[0, 1]"
    ] = 0.5
    cpu_offload: Annotated[bool, "what blocks keep for the backward pass waits in the CPU's memory"] = False


def parse_selective_option(text: str) -> int | None:
    """The n of "every n-th block"; None: per operator.

    Raises:
        ValueError: neither a number of at least 1 nor "op".
    """
    if text == "op":
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ValueError(
            f'activation_checkpoint.selective_ac_option="{text}" must be "op", or n for every n-th block: '
            'use "op", "1", "2" or a larger number'
        )
    return int(text)


@dataclass(frozen=True)
class Compile:
    """What is made once for all steps: code, by torch.compile, block by block; a record of kernels."""

    enable: Annotated[bool, "compile what components names"] = False
    components: Annotated[list[str], "parts that are compiled: model, loss", ("model", "loss")] = field(
        default_factory=lambda: ["model", "loss"]
    )
    backend: Annotated[str, "backend of torch.compile", "[1, inf)"] = "inductor"
    cuda_graph: Annotated[
        bool,
        "on a GPU, record the kernels of a forward and backward pass once and replay them for all batches, which must "
        "have one shape; also without enable",
    ] = False


FLOAT8, MXFP8 = "quantize.linear.float8", "quantize.linear.mx"  # the names that model.converters may hold
# What 8-bit matrix units can multiply: sizes in multiples of this, tokens included where the weight gradient is 8-bit.
SIZE_MULTIPLE = {FLOAT8: 16, MXFP8: 32}


@dataclass(frozen=True)
class Float8:
    """Matrix products in 8 bits (NVIDIA H100 or newer), through torchao."""

    recipe_name: Annotated[
        Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"],
        "one scale per tensor (fastest) or per row; gw_hp keeps weight gradients in high precision",
    ] = "tensorwise"
    enable_fsdp_float8_all_gather: Annotated[bool, "gather weights in float8 (tensorwise only)"] = False
    precompute_float8_dynamic_scale_for_fsdp: Annotated[
        bool, "compute the scales of all weights at once after each update (with the float8 all-gather)"
    ] = False
    filter_fqns: Annotated[list[str], "parts of names of further linear layers to leave as they are"] = field(
        default_factory=list
    )
    emulate: Annotated[bool, "compute in float32 what float8 would give: runs anywhere, for tests"] = False


@dataclass(frozen=True)
class MX:
    """Matrix products in MXFP8 (NVIDIA B200 or newer), through torchao."""

    recipe_name: Annotated[
        Literal["mxfp8_cublas", "mxfp8_emulated"], "mxfp8_emulated computes in high precision what mxfp8 would give"
    ] = "mxfp8_cublas"
    filter_fqns: Annotated[list[str], "parts of names of further linear layers to leave as they are"] = field(
        default_factory=list
    )


@dataclass(frozen=True)
class QuantizeLinear:
    """What model.converters may do to linear layers."""

    float8: Float8 = field(default_factory=Float8)
    mx: MX = field(default_factory=MX)


@dataclass(frozen=True)
class Quantize:
    """Settings of the converters that model.converters names."""

    linear: QuantizeLinear = field(default_factory=QuantizeLinear)


@dataclass(frozen=True)
class Comm:
    """Communication between processes."""

    init_timeout_seconds: Annotated[int, "limit on a communication before the first step has finished", "[1, inf)"] = (
        300
    )
    train_timeout_seconds: Annotated[int, "limit on a communication after it", "[1, inf)"] = 100
    mode: Annotated[
        Literal["default", "fake_backend"],
        "fake_backend builds the run on NGPU pretended processes in one, prints shard sizes and collectives and exits",
    ] = "default"
