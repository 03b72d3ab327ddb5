"""What a configuration will cost on a layout, by arithmetic: bytes of a rank, operations, seconds.

Nothing is built or run: flux/memory.py, flux/flops.py and parallel/estimate.py have the formulas, here they meet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch

from build import DTYPES, compute_dtype
from config.job_config import JobConfig
from flux.data.build import ENCODED
from flux.encoder_costs import EncoderCost, count_encoders
from flux.flops import forward_flops, training_flops
from flux.memory import (
    Keep,
    LocalBatch,
    block_bytes,
    blocks_bytes,
    list_blocks,
    modulation_width,
    peak_bytes,
)
from flux.model import FluxTransformer
from flux.plans import make_plan
from flux.spec import LATENT_STRIDE, SPECS, TransformerConfig
from parallel.activation_checkpoint import recomputed_blocks
from parallel.compile import compiles_model
from parallel.config import parse_selective_option
from parallel.degrees import Degrees
from parallel.estimate import Links, WeightTraffic, local_numel, token_seconds
from parallel.names import matches
from runtime.hardware import Accelerator
from training.compact_adam import has_blocks
from training.config import BLOCK

MOMENTS = 2  # running means of the gradient and of its square
UPDATE_PASSES = 7  # an update reads weight, gradient and both states, and writes all but the gradient
# Of traffic for each element, where weights or means are unpacked and packed again, by the format of the means: counted
# from the operations of training/compact_adam.py and training/number_formats.py.
PACKING_BYTES = {"float32": 100, "bfloat16": 125, "8bit": 220}
# Of what links and matrix units are sold with, what programs get: 788 of an H200's 989 TFLOP/s.
MATMUL_SHARE, LINK_SHARE = 0.8, 0.75
# How often a kept activation is written or read, its gradient included: by fused kernels, and by one kernel for each
# operation. From profiles of a compiled FLUX.1 step; an estimate.
PASSES_FUSED, PASSES = 6, 10
RESERVED = 2 * 2**30  # bytes that the driver, communication buffers and libraries take
USABLE = 0.92  # of the rest; the allocator cannot use every gap
PEAK_ERROR = 0.15  # measured peaks of memory lie no further from the estimated ones
BF16 = 2  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that has most, by part. Gradients come as activations go, so they are not simply added up."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int  # whole weights of blocks at work, and their gradients before they are summed over ranks
    activations: int
    host: int  # what is offloaded to the CPU's memory; of activations at least so much: some are kept twice there
    encoders: int
    encoding: int  # what they hold at work, beside a step where a batch is encoded ahead
    peak: int  # of all of it together


@dataclass(frozen=True)
class Seconds:
    """Time of one update, by part; parts may overlap."""

    compute: float  # matrix products, at the datasheet's speed
    encoders: float
    traffic: float  # to and from the accelerator's own memory, without that of matrix products; an estimate
    weights: float  # between ranks
    tokens: float  # between ranks

    @property
    def floor(self) -> float:
        """Products and links run as fast as they are sold, and hide each other and everything else."""
        return max(self.compute + self.encoders, self.weights + self.tokens)

    @property
    def ceiling(self) -> float:
        """Nothing overlaps, and runs as fast as programs run."""
        return (self.compute + self.encoders) / MATMUL_SHARE + self.traffic + (self.weights + self.tokens) / LINK_SHARE


@cache
def parameter_shapes(transformer: TransformerConfig) -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(one.shape) for name, one in FluxTransformer(transformer).named_parameters()}


def parameter_count(config: JobConfig) -> int:
    return sum(map(prod, parameter_shapes(SPECS[config.model.flavor].transformer).values()))


class Elements(NamedTuple):
    """Of the parameters that a rank holds."""

    blocks: list[int]  # of each, in the order of the forward pass, without its modulation
    modulation: int  # of all blocks: applied at once, and not gathered
    others: int

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.modulation + self.others


@cache
def local_elements(transformer: TransformerConfig, degrees: Degrees) -> Elements:
    """Rank 0's."""
    plan = make_plan(transformer)
    places = {f"double_blocks.{index}": index for index in range(transformer.depth)}
    places |= {f"single_blocks.{index}": transformer.depth + index for index in range(transformer.depth_single)}
    blocks, modulation, others = [0] * len(places), 0, 0
    for name, shape in parameter_shapes(transformer).items():
        count = local_numel(name, shape, degrees, plan.column, plan.row)
        if any(matches(name.rpartition(".")[0], pattern) for pattern in plan.modulation):
            modulation += count
        elif (place := places.get(".".join(name.split(".")[:2]))) is not None:
            blocks[place] += count
        else:
            others += count
    return Elements(blocks, modulation, others)


@cache
def blocked_elements(transformer: TransformerConfig, degrees: Degrees) -> tuple[int, int]:
    """Of the parameters whose running means may be kept in 8 bits, and the blocks of these; on rank 0."""
    plan, elements, blocks = make_plan(transformer), 0, 0
    for name, shape in parameter_shapes(transformer).items():
        if has_blocks(shape):
            elements += local_numel(name, shape, degrees, plan.column, plan.row)
            blocks += local_numel(name, (shape[0], shape[1] // BLOCK), degrees, plan.column, plan.row)
    return elements, blocks


def optimizer_bytes(config: JobConfig, degrees: Degrees) -> int:
    """Of what the optimizer keeps beside the weights, on rank 0: running means, and remainders of bfloat16 weights."""
    section, transformer = config.optimizer, SPECS[config.model.flavor].transformer
    elements = local_elements(transformer, degrees).total
    remainders = 2 * elements if keeps_remainders(config) else 0
    if section.state_dtype != "8bit":
        return remainders + MOMENTS * elements * DTYPES[section.state_dtype].itemsize
    blocked, blocks = blocked_elements(transformer, degrees)
    return remainders + MOMENTS * (4 * (elements - blocked) + blocked + 4 * blocks)


def keeps_remainders(config: JobConfig) -> bool:
    return config.training.dtype == "bfloat16" and config.optimizer.bf16_rounding == "remainder"


def is_stored(config: JobConfig) -> bool:
    """Whether the training data are encoded already."""
    names = [one.dataset for one in config.data.sources if one.weight] or [config.training.dataset]
    return all(name in ENCODED for name in names)


def needed_encoders(config: JobConfig) -> dict[str, EncoderCost]:
    """Those that a run holds; of encoded data they only draw the pictures of validation, and do nothing in a step."""
    costs = count_encoders(
        config.encoder, SPECS[config.model.flavor], config.training.test_mode, config.training.img_size
    )
    if not is_stored(config):
        return costs
    is_drawn = config.validation.enable and config.validation.eval_freq > 0
    return {name: cost._replace(flops=0) for name, cost in costs.items()} if is_drawn else {}


def local_batch(config: JobConfig, degrees: Degrees, on_cpu: bool) -> LocalBatch:
    """What a rank computes in a forward pass of training."""
    training = config.training
    return LocalBatch(
        samples=training.local_batch_size,
        image_tokens=training.img_tokens // degrees.cp,
        text_tokens=config.encoder.max_t5_encoding_len // degrees.cp,
        itemsize=compute_dtype(config).itemsize,
        on_cpu=on_cpu,
        tensor_parallel=degrees.tp,
        context_parallel=degrees.cp,
        context_parallel_method=config.parallelism.context_parallel_method,
    )


def kept_levels(config: JobConfig) -> tuple[list[Keep], Keep]:
    """What each block keeps for its backward pass, and what one holds that is computed again.

    Mode memory_budget is the compiler's choice between the levels INPUTS and COMPILED: its budget says how much.
    """
    section, transformer = config.activation_checkpoint, SPECS[config.model.flavor].transformer
    blocks = transformer.depth + transformer.depth_single
    whole = Keep.COMPILED if compiles_model(config.compile) else Keep.ALL
    by_operator = section.mode == "selective" and parse_selective_option(section.selective_ac_option) is None
    recomputed = set(recomputed_blocks(section, blocks))
    less = Keep.PRODUCTS if by_operator else Keep.INPUTS
    return [less if index in recomputed else whole for index in range(blocks)], whole


def usable_bytes(memory: float) -> float:
    """Of a device's memory, what a rank can plan with."""
    return USABLE * (memory - RESERVED)


def estimate_memory(config: JobConfig, degrees: Degrees, on_cpu: bool, encoders: Mapping[str, EncoderCost]) -> Memory:
    """Bytes of rank 0, which has the most."""
    transformer = SPECS[config.model.flavor].transformer
    local, itemsize = local_elements(transformer, degrees), DTYPES[config.training.dtype].itemsize
    elements, others = local.total, local.modulation + local.others
    gradients = [count * itemsize for count in (*local.blocks, others)]
    batch, (kept, whole) = local_batch(config, degrees, on_cpu), kept_levels(config)
    offloaded = config.activation_checkpoint.cpu_offload
    activations = peak_bytes(transformer, batch, kept, whole, [0] * len(gradients), offloaded)
    together = peak_bytes(transformer, batch, kept, whole, gradients, offloaded)
    if config.training.accumulation(degrees.dp) > 1:
        together = activations + sum(gradients)
    # The last that the backward pass does.
    together = max(together, sum(gradients) + _modulation_product_bytes(config, degrees))
    gathered = _gathered_bytes(config, degrees)
    frozen, encoding = _encoder_bytes(config, degrees, encoders), _encoding_bytes(config, encoders)
    states, average = optimizer_bytes(config, degrees), 4 * elements if config.ema.enable else 0
    standing = elements * itemsize + states + average
    host = sum(blocks_bytes(transformer, batch, kept)) if offloaded else 0
    if config.training.enable_cpu_offload:  # all of them, and gradients, are in the host's memory
        host += standing + sum(gradients)
        standing, together = 0, activations
    if config.encoder.cpu_offload and (t5 := encoders.get("t5")):
        host += -(-t5.parameters // (degrees.fsdp * degrees.tp)) * DTYPES[config.encoder.dtype].itemsize
    at_once = together + encoding if config.encoder.encode_ahead and not on_cpu else max(together, encoding)
    return Memory(
        weights=elements * itemsize,
        gradients=sum(gradients),
        optimizer=states,
        average=average,
        gathered=gathered,
        activations=activations,
        host=host,
        encoders=frozen,
        encoding=encoding,
        peak=standing + gathered + frozen + at_once,
    )


def cached_bytes(config: JobConfig, side: int) -> int:
    """Bytes of one sample in a cache of all parts in bfloat16, without padding left out."""
    spec, grid = SPECS[config.model.flavor], (side // LATENT_STRIDE) ** 2
    text = config.encoder.max_t5_encoding_len * spec.transformer.context_dim + (spec.transformer.pooled_dim or 0)
    return BF16 * (2 * spec.codec.latent_channels * grid + text)


def estimate_seconds(
    config: JobConfig, degrees: Degrees, chip: Accelerator, links: Links, encoders: Mapping[str, EncoderCost]
) -> Seconds:
    """Time of one update on so many accelerators, of products in bfloat16, or 8 bits where converters say so."""
    training, transformer = config.training, SPECS[config.model.flavor].transformer
    passes, ranks = training.accumulation(degrees.dp), degrees.cp * degrees.tp
    batch = local_batch(config, degrees, on_cpu=False)
    tokens = token_seconds(
        activation=batch.samples * batch.tokens * transformer.hidden_size * batch.itemsize,
        attentions=transformer.depth + transformer.depth_single,
        sums=2 * transformer.depth + transformer.depth_single,
        times=2 + recomputed_share(config),
        degrees=degrees,
        method=config.parallelism.context_parallel_method,
        links=links,
    )
    weights = _weight_traffic(config, degrees).seconds(degrees, links)
    if t5 := encoders.get("t5"):
        replica = degrees.fsdp * degrees.tp
        received = t5.parameters * DTYPES[config.encoder.dtype].itemsize * (replica - 1) / replica
        weights += links.seconds(received, 1, replica) if t5.flops else 0.0
    return Seconds(
        compute=passes * batch.samples * _product_seconds(config, chip) / ranks,
        encoders=passes * batch.samples * sum(cost.flops for cost in encoders.values()) / (chip.bf16_tflops * 1e12),
        traffic=_memory_traffic(config, degrees) / (chip.memory_gb_per_s * 1e9),
        weights=passes * weights,
        tokens=passes * tokens,
    )


def recomputed_share(config: JobConfig) -> float:
    """Of the forward pass, that is computed again."""
    kept, _ = kept_levels(config)
    return sum(level is Keep.INPUTS for level in kept) / len(kept)


def flops_per_sample(config: JobConfig) -> float:
    """Of training on one sample, what is computed again included."""
    transformer, tokens = SPECS[config.model.flavor].transformer, config.training.img_tokens
    length = config.encoder.max_t5_encoding_len
    return training_flops(transformer, tokens, length) + recomputed_share(config) * forward_flops(
        transformer, tokens, length
    )


def _product_seconds(config: JobConfig, chip: Accelerator) -> float:
    """Of all products of one sample. Attention is computed in bfloat16 also where linear layers have 8 bits."""
    flops = flops_per_sample(config)
    if not config.model.converters:
        return flops / (chip.bf16_tflops * 1e12)
    if chip.fp8_tflops is None:
        raise ValueError(f"model.converters={config.model.converters} needs 8-bit products, which {chip.name} has not")
    transformer = SPECS[config.model.flavor].transformer
    blocks, tokens = transformer.depth + transformer.depth_single, config.training.img_tokens
    tokens += config.encoder.max_t5_encoding_len
    attention = (3 + recomputed_share(config)) * blocks * 4 * tokens**2 * transformer.hidden_size
    return (attention / chip.bf16_tflops + (flops - attention) / chip.fp8_tflops) / 1e12


def _memory_traffic(config: JobConfig, degrees: Degrees) -> float:
    """Bytes that an update moves to and from a rank's own memory: activations, gathered weights, the update itself."""
    training, transformer = config.training, SPECS[config.model.flavor].transformer
    batch, (kept, whole) = local_batch(config, degrees, on_cpu=False), kept_levels(config)
    activations = 0.0
    for block, keep in zip(list_blocks(transformer), kept, strict=True):
        most, least = (block_bytes(transformer, batch, level, block) for level in (whole, keep))
        activations += most + (most - least) / 3  # the forward pass, a third of it, once more
    activations *= PASSES_FUSED if whole is Keep.COMPILED else PASSES
    elements, itemsize = local_elements(transformer, degrees), DTYPES[training.dtype].itemsize
    local, weights = elements.total, _weight_traffic(config, degrees)
    # Written by a gather, read by products; gradients written, copied to the sum's dtype, summed, and accumulated.
    each_pass = 2 * weights.gathers * weights.gathered + weights.gathered + 2 * weights.reduced + 3 * local * itemsize
    # Modulation is joined and read in both passes.
    each_pass += 2 * elements.modulation * (itemsize + 2 * compute_dtype(config).itemsize)
    is_packed = training.dtype == "bfloat16" or config.optimizer.state_dtype != "float32"
    update = (PACKING_BYTES[config.optimizer.state_dtype] if is_packed else UPDATE_PASSES * itemsize) * local
    return training.accumulation(degrees.dp) * (activations + each_pass) + update


def _weight_traffic(config: JobConfig, degrees: Degrees) -> WeightTraffic:
    transformer, compute = SPECS[config.model.flavor].transformer, compute_dtype(config).itemsize
    whole, reduce = local_elements(transformer, Degrees(tp=degrees.tp)), _reduce_itemsize(config)
    gathered, samples = whole.total - whole.modulation, config.training.local_batch_size
    return WeightTraffic(
        gathered=gathered * compute,
        reduced=gathered * reduce,
        gathers=1 if config.parallelism.fsdp_reshard_after_forward == "never" else 2,
        kept=whole.modulation * reduce,
        inputs=samples * transformer.hidden_size * reduce if whole.modulation else 0,
        outputs=samples * modulation_width(transformer) * compute if whole.modulation else 0,
    )


def _uses_fsdp(config: JobConfig, degrees: Degrees) -> bool:
    training = config.training
    mixed = DTYPES[training.dtype] is not compute_dtype(config)
    return degrees.dp * degrees.cp > 1 or mixed or training.enable_cpu_offload


def _gathered_bytes(config: JobConfig, degrees: Degrees) -> int:
    """Whole weights that FSDP holds at a time, gathered or cast, and gradients of one block before they are summed; of
    all its ranks, what the modulation is made of.
    """
    if not _uses_fsdp(config, degrees):
        return 0
    section, compute, transformer = config.parallelism, compute_dtype(config), SPECS[config.model.flavor].transformer
    blocks, modulation, others = local_elements(transformer, Degrees(tp=degrees.tp))
    ahead = max(1, section.fsdp_forward_prefetch, section.fsdp_backward_prefetch)
    at_once = sum(blocks) if section.fsdp_reshard_after_forward == "never" else max(blocks) * (1 + ahead)
    reduced = max(blocks) * (compute.itemsize + _reduce_itemsize(config))
    conditions = degrees.fsdp * config.training.local_batch_size * transformer.hidden_size if modulation else 0
    return (at_once + others + conditions) * compute.itemsize + reduced


def _modulation_product_bytes(config: JobConfig, degrees: Degrees) -> int:
    """This rank's part of the modulation's weights as they are multiplied, and of their gradients on the way."""
    if not _uses_fsdp(config, degrees):
        return 0
    compute, kept = compute_dtype(config), DTYPES[config.training.dtype]
    each = compute.itemsize + (compute.itemsize if compute is not kept else 0)
    if degrees.dp_replicate > 1:
        each += _reduce_itemsize(config)
    return local_elements(SPECS[config.model.flavor].transformer, degrees).modulation * each


def _reduce_itemsize(config: JobConfig) -> int:
    """Bytes of a number of gradients that are summed over ranks."""
    return DTYPES[config.training.mixed_precision_reduce].itemsize


def _encoder_bytes(config: JobConfig, degrees: Degrees, encoders: Mapping[str, EncoderCost]) -> int:
    """T5 is split over all ranks of a copy of the weights, or in the host's memory; the small ones are neither."""
    itemsize, ranks = DTYPES[config.encoder.dtype].itemsize, degrees.fsdp * degrees.tp
    parameters, offloaded = 0, config.encoder.cpu_offload
    for cost in encoders.values():
        if cost.largest_block and (offloaded or ranks > 1):
            parameters += 2 * cost.largest_block + (0 if offloaded else -(-cost.parameters // ranks))
        else:
            parameters += cost.parameters
    return parameters * itemsize


def _encoding_bytes(config: JobConfig, encoders: Mapping[str, EncoderCost]) -> int:
    """What the encoders hold while they encode a batch, one after the other."""
    numbers = max((cost.at_work for cost in encoders.values() if cost.flops), default=0)
    return config.training.local_batch_size * numbers * DTYPES[config.encoder.dtype].itemsize
