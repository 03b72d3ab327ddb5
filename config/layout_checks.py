"""Rules about how a run is spread over processes, on a whole JobConfig."""

from collections.abc import Iterator
from dataclasses import replace
from math import gcd

from config.job_config import JobConfig
from config.keys import show
from flux.spec import PIXELS_PER_TOKEN, SPECS
from parallel.config import selective_every
from parallel.degrees import KEYS, Degrees, choices, divisors, resolve_degrees

# Names of the keys that a rule is about, and the message with key, value, rule and remedy.
Finding = tuple[tuple[str, ...], str]


def find_layout_faults(config: JobConfig, world_size: int | None) -> Iterator[Finding]:
    """Layouts that do not work out; `world_size` None: the number of processes is not known here."""
    try:
        degrees = resolve_degrees(config.parallelism, world_size)
    except ValueError as error:
        yield tuple(KEYS.values()), str(error)
        degrees = resolve_degrees(replace(config.parallelism, data_parallel_shard_degree=1), None)
    else:
        yield from _batch(config, degrees)
    yield from _heads(config, degrees)
    yield from _tokens(config, degrees)


def find_technique_faults(config: JobConfig) -> Iterator[Finding]:
    """Recomputation, compilation and 8-bit products that exclude each other or need one another."""
    yield from _ring(config)
    yield from _recomputation(config)
    yield from _converters(config)


def _heads(config: JobConfig, degrees: Degrees) -> Iterator[Finding]:
    transformer = SPECS[config.model.flavor].transformer
    heads, width = transformer.num_heads, transformer.hidden_size
    if heads % degrees.tp:
        yield (
            (KEYS["tp"],),
            f"{KEYS['tp']}={degrees.tp} must divide num_heads={heads} of {config.model.flavor}: "
            f"use {choices(divisors(heads))}",
        )
    elif config.parallelism.context_parallel_method == "ulysses" and heads // degrees.tp % degrees.cp:
        each = f" / {degrees.tp} (tensor parallel)" if degrees.tp > 1 else ""
        yield (
            (KEYS["cp"], KEYS["tp"]),
            f"{KEYS['cp']}={degrees.cp} must divide num_heads={heads}{each} of {config.model.flavor}, since ulysses "
            f"gives whole heads to ranks: use {choices(divisors(heads // degrees.tp))}, "
            'or parallelism.context_parallel_method="allgather"',
        )
    if degrees.tp > 1 and width % degrees.fsdp:
        yield (
            (KEYS["tp"], KEYS["dp_shard"], KEYS["cp"]),
            f"dp_shard x cp = {degrees.fsdp} must divide hidden_size={width} of {config.model.flavor} where tensor "
            f"parallel is on: use a product of {choices(divisors(width))}",
        )


def _tokens(config: JobConfig, degrees: Degrees) -> Iterator[Finding]:
    image = (config.training.img_size // PIXELS_PER_TOKEN) ** 2
    text = config.encoder.max_t5_encoding_len
    for names, count, origin in (
        (("training.img_size",), image, f"training.img_size={config.training.img_size} gives {image} image tokens"),
        (("encoder.max_t5_encoding_len",), text, f"encoder.max_t5_encoding_len={text} gives {text} text tokens"),
    ):
        if count % degrees.cp:
            yield (
                (*names, KEYS["cp"]),
                f"{origin}, which {KEYS['cp']}={degrees.cp} must divide: use {choices(divisors(gcd(image, text)))}",
            )


def _batch(config: JobConfig, degrees: Degrees) -> Iterator[Finding]:
    whole, local = config.training.global_batch_size, config.training.local_batch_size
    step = local * degrees.dp
    if whole == -1 or whole % step == 0:
        return
    below = whole - whole % step
    fitting = f"{below}, {below + step}" if below else f"{step}"
    groups = f"training.local_batch_size={local}"
    if degrees.dp > 1:
        groups += f" x {degrees.dp} groups of processes that see different samples = {step}"
    yield (
        ("training.global_batch_size", "training.local_batch_size", *KEYS.values()),
        f"training.global_batch_size={whole} must be a multiple of {groups}: "
        f"use {fitting}, or -1 to update after every forward pass",
    )


def _ring(config: JobConfig) -> Iterator[Finding]:
    if config.parallelism.context_parallel_method != "ring" or config.parallelism.context_parallel_degree == 1:
        return
    method = 'parallelism.context_parallel_method="ring"'
    if config.compile.enable and "model" in config.compile.components:
        yield (
            ("parallelism.context_parallel_method", "compile.enable", "compile.components"),
            f'{method} does not compile: set compile.enable=false, or use "ulysses" or "allgather"',
        )
    if config.encoder.mask_padding:
        yield (
            ("parallelism.context_parallel_method", "encoder.mask_padding"),
            f'{method} hides no tokens, which encoder.mask_padding=true asks for: use "ulysses" or "allgather"',
        )


def _recomputation(config: JobConfig) -> Iterator[Finding]:
    section = config.activation_checkpoint
    option = section.selective_ac_option
    if section.mode == "selective" and selective_every(option) == 0:
        yield (
            ("activation_checkpoint.selective_ac_option",),
            f'activation_checkpoint.selective_ac_option={show(option)} must be a number of at least 1, or "op"',
        )
    if section.mode == "memory_budget" and not (config.compile.enable and "model" in config.compile.components):
        yield (
            ("activation_checkpoint.mode", "compile.enable", "compile.components"),
            'activation_checkpoint.mode="memory_budget" is the compiler\'s work: set compile.enable=true with "model" '
            'among compile.components, or use "selective"',
        )


def _converters(config: JobConfig) -> Iterator[Finding]:
    converters, float8 = config.model.converters, config.quantize.linear.float8
    if len(set(converters)) > 1:
        yield (
            ("model.converters",),
            f"model.converters={show(converters)} would convert the same layers twice: choose one",
        )
    if converters and config.parallelism.tensor_parallel_degree > 1:
        yield (
            ("model.converters", KEYS["tp"]),
            f"model.converters={show(converters)} and {KEYS['tp']}={config.parallelism.tensor_parallel_degree} both "
            "replace linear layers: leave one out",
        )
    if "quantize.linear.float8" not in converters:
        return
    prefix = "quantize.linear.float8"
    if float8.enable_fsdp_float8_all_gather and float8.recipe_name != "tensorwise":
        yield (
            (f"{prefix}.enable_fsdp_float8_all_gather", f"{prefix}.recipe_name"),
            f'{prefix}.enable_fsdp_float8_all_gather=true needs {prefix}.recipe_name="tensorwise": '
            "a gathered weight has one scale",
        )
    if float8.precompute_float8_dynamic_scale_for_fsdp and not float8.enable_fsdp_float8_all_gather:
        yield (
            (f"{prefix}.precompute_float8_dynamic_scale_for_fsdp", f"{prefix}.enable_fsdp_float8_all_gather"),
            f"{prefix}.precompute_float8_dynamic_scale_for_fsdp=true is about the float8 all-gather: "
            f"set {prefix}.enable_fsdp_float8_all_gather=true as well",
        )
