"""THE order in which techniques are applied to a model, all in place and by module name."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.activation_offload import apply_activation_offload
from parallel.attention import apply_attention_backend, check_attention
from parallel.compile import apply_compile, check_compiler, compiles_model
from parallel.config import ActivationCheckpoint, Compile, Parallelism, Quantize
from parallel.context_parallel import apply_context_parallel
from parallel.data_parallel import apply_fsdp
from parallel.mesh import Layout
from parallel.modulation_parallel import apply_modulation_parallel
from parallel.names import find_modules
from parallel.quantize import apply_converters, check_converters
from parallel.tensor_parallel import apply_tensor_parallel

log = logging.getLogger(__name__)


class Plan(Protocol):
    """What must be known of a model, as module-name patterns; flux/plans.py explains the fields."""

    @property
    def blocks(self) -> Sequence[str]: ...
    @property
    def attention(self) -> str: ...
    @property
    def column(self) -> Mapping[str, int]: ...
    @property
    def row(self) -> Mapping[str, int]: ...
    @property
    def head_norms(self) -> Sequence[str]: ...
    @property
    def modulation(self) -> Sequence[str]: ...
    @property
    def modulation_product(self) -> str: ...
    @property
    def quantized(self) -> Sequence[str]: ...
    @property
    def precise_weight_gradients(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Techniques:
    """The settings of everything that parallelize applies."""

    parallelism: Parallelism
    activation_checkpoint: ActivationCheckpoint
    compile: Compile
    quantize: Quantize
    converters: Sequence[str]
    attention_backend: str
    has_mask: bool  # tokens that are not attended to
    param_dtype: torch.dtype  # of the computation
    reduce_dtype: torch.dtype  # in which gradients are summed over ranks
    cpu_offload: bool


def check_techniques(techniques: Techniques, device_type: str) -> None:
    """Asked at the start of a run, since compilers, 8-bit products and kernels would fail only in its first step.

    Raises:
        ValueError: something that this machine has not got.
    """
    check_compiler(techniques.compile, device_type)
    check_converters(techniques.converters, techniques.quantize, device_type)
    check_attention(techniques.attention_backend, device_type, techniques.param_dtype, techniques.has_mask)
    recompute, tp = techniques.activation_checkpoint, techniques.parallelism.tensor_parallel_degree
    whole_blocks = recompute.mode == "full" or (recompute.mode == "selective" and recompute.selective_ac_option != "op")
    if device_type == "cpu" and tp > 1 and whole_blocks and compiles_model(techniques.compile):
        # torch 2.13 miscounts what it saves: it keeps random states for attention behind the mesh of a DTensor.
        raise ValueError(
            f"parallelism.tensor_parallel_degree={tp} with compile.enable=true cannot recompute whole blocks on a CPU: "
            'set activation_checkpoint.mode="none", or "selective" with selective_ac_option="op"'
        )


def parallelize(model: nn.Module, plan: Plan, layout: Layout, techniques: Techniques) -> None:
    """Makes a single-device model on the meta device one that trains on `layout`.

    1. Quantization replaces linear layers, so it comes before whatever looks at them.
    2. Tensor parallel replaces linear layers by parts of them; everything later sees a rank's own part.
    3. The kernel of attention is chosen where attention is computed, within what the next two put around it.
    4. Context parallel replaces attention, which recomputation then repeats or keeps.
    5. Recomputation wraps each block's forward pass, inside of what is compiled, so that the compiler sees both passes.
    6. Compilation takes each block as it is by then, as one graph.
    7. Offload wraps the call of each block, compiled or not: what is compiled has no place for its hooks.
    8. Modulation is split where FSDP follows, which is told to leave it alone: outputs travel, not weights.
    9. FSDP comes last: it gathers a block's weights before and frees them after all of the above runs, in the forward
       pass and once for the backward pass, recomputation included.
    """
    blocks = list(find_modules(model, plan.blocks).values())
    if techniques.converters:
        converted = apply_converters(
            model, techniques.converters, techniques.quantize, plan.quantized, plan.precise_weight_gradients
        )
        log.info("%d linear layers compute in 8 bits (%s)", len(converted), ", ".join(techniques.converters))
    if (tp := layout.axis("tp")) is not None:
        apply_tensor_parallel(model, tp, plan.column, plan.row, plan.head_norms)
    apply_attention_backend(model, plan.attention, techniques.attention_backend, layout.device.type)
    if (cp := layout.axis("cp")) is not None:
        apply_context_parallel(model, plan.attention, cp, techniques.parallelism.context_parallel_method)
    apply_activation_checkpoint(blocks, techniques.activation_checkpoint)
    apply_compile(blocks, techniques.compile)
    if techniques.activation_checkpoint.cpu_offload:
        apply_activation_offload(blocks, pin_memory=layout.device.type == "cuda")
    mixed = any(parameter.dtype != techniques.param_dtype for parameter in model.parameters())
    if layout.degrees.dp * layout.degrees.cp > 1 or mixed or techniques.cpu_offload:
        assert layout.weights is not None
        mesh, dtypes = layout.weights["dp_replicate", "fsdp"], (techniques.param_dtype, techniques.reduce_dtype)
        stationary = apply_modulation_parallel(model, plan.modulation, plan.modulation_product, mesh, *dtypes)
        apply_fsdp(model, blocks, mesh, techniques.parallelism, *dtypes, techniques.cpu_offload, stationary)
