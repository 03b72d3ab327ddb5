"""Rules about how a run is spread over processes, on a whole JobConfig."""

from collections.abc import Iterator
from dataclasses import replace
from math import gcd

from config.job_config import JobConfig
from config.keys import show
from flux.spec import PIXELS_PER_TOKEN, SPECS
from parallel.config import FLOAT8, SIZE_MULTIPLE, parse_selective_option
from parallel.degrees import KEYS, Degrees, choices, divisors, resolve_degrees
from training.config import BLOCK

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
        if world_size is not None:
            yield from _float8_gather(config, degrees)
    yield from _heads(config, degrees)
    yield from _tokens(config, degrees)
    yield from _states_in_8_bits(config, degrees)
    yield from _products_in_8_bits(config, degrees)


def find_technique_faults(config: JobConfig) -> Iterator[Finding]:
    """Recomputation, compilation and 8-bit products that exclude each other or need one another."""
    yield from _ring(config)
    yield from _cuda_graph(config)
    yield from _recomputation(config)
    yield from _offload(config)
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
        each = f" / {KEYS['tp']}={degrees.tp}" if degrees.tp > 1 else ""
        yield (
            (KEYS["cp"], KEYS["tp"]),
            f"{KEYS['cp']}={degrees.cp} must divide num_heads={heads} of {config.model.flavor}{each}, since ulysses "
            f"gives whole heads to processes: use {choices(divisors(heads // degrees.tp))}, "
            'or parallelism.context_parallel_method="allgather"',
        )
    if degrees.tp > 1 and width % degrees.fsdp:
        yield (
            (KEYS["tp"], KEYS["dp_shard"], KEYS["cp"]),
            f"{KEYS['dp_shard']}={degrees.dp_shard} x {KEYS['cp']}={degrees.cp} must divide hidden_size={width} of "
            f"{config.model.flavor} where {KEYS['tp']}={degrees.tp} splits weights too: use degrees whose product "
            f"is {choices(divisors(width))}",
        )


def _states_in_8_bits(config: JobConfig, degrees: Degrees) -> Iterator[Finding]:
    """Tensor parallel cuts the rows of some matrices, and FSDP then those of the others."""
    width = SPECS[config.model.flavor].transformer.hidden_size
    if config.optimizer.state_dtype != "8bit" or degrees.tp == 1 or width % BLOCK:
        return
    shards = f"{KEYS['dp_shard']}={degrees.dp_shard} x {KEYS['cp']}={degrees.cp}"
    for keys, split, parts, fitting in (
        (("tp",), f"{KEYS['tp']}={degrees.tp}", degrees.tp, ""),
        (("tp", "dp_shard", "cp"), f"{shards} beside {KEYS['tp']}={degrees.tp}", degrees.fsdp, "a product that is "),
    ):
        if width // BLOCK % parts:
            yield (
                ("optimizer.state_dtype", *(KEYS[key] for key in keys)),
                f"{split} cuts hidden_size={width} of {config.model.flavor} into parts that are no multiples of "
                f'{BLOCK}, the blocks of optimizer.state_dtype="8bit": use {fitting}'
                f'{choices(divisors(width // BLOCK))}, or optimizer.state_dtype="bfloat16"',
            )


def _tokens(config: JobConfig, degrees: Degrees) -> Iterator[Finding]:
    image = (config.training.img_size // PIXELS_PER_TOKEN) ** 2
    text = config.encoder.max_t5_encoding_len
    tokens = f"the {image} image token{'s' if image > 1 else ''} of "
    for key, count, of in (
        (f"training.img_size={config.training.img_size}", image, tokens),
        (f"encoder.max_t5_encoding_len={text}", text, ""),
    ):
        if count % degrees.cp:
            yield (
                (key.partition("=")[0], KEYS["cp"]),
                f"{KEYS['cp']}={degrees.cp} must divide {of}{key}: use {choices(divisors(gcd(image, text)))}",
            )


def _products_in_8_bits(config: JobConfig, degrees: Degrees) -> Iterator[Finding]:
    """Weight gradients add up over the tokens of a forward pass, of which 8-bit matrix units take whole packs."""
    samples = config.training.local_batch_size
    image_key, image_side, buckets = "training.img_size", config.training.img_size, config.data.buckets
    if buckets.enable:  # every shape has a multiple of the tokens of one step's square
        image_key, image_side = "data.buckets.step", buckets.step
    image = (image_side // PIXELS_PER_TOKEN) ** 2
    for converter in config.model.converters:
        pack = SIZE_MULTIPLE[converter]
        for kind, key, tokens in (
            ("image", image_key, image),
            ("text", "encoder.max_t5_encoding_len", config.encoder.max_t5_encoding_len),
        ):
            each, rest = divmod(tokens, degrees.cp)  # tokens of a sample on one process
            any_count = buckets.enable and buckets.constant_tokens  # of samples in a forward pass
            if rest or (1 if any_count else samples) * each % pack == 0:
                continue
            if any_count:
                yield (
                    ("model.converters", "data.buckets.constant_tokens", key, KEYS["cp"]),
                    f"data.buckets.constant_tokens=true changes the number of samples, so {key} must give each of them "
                    f"a multiple of {pack} {kind} tokens on a process for model.converters="
                    f"{show(config.model.converters)}, not {each}: raise it, or set constant_tokens to false",
                )
                continue
            step = pack // gcd(pack, each)
            below = samples - samples % step
            fitting = f"{below} or {below + step}" if below else f"{step}"
            yield (
                ("model.converters", "training.local_batch_size", key, KEYS["cp"]),
                f"training.local_batch_size={samples} x {each} {kind} tokens must be a multiple of {pack} for "
                f"model.converters={show(config.model.converters)}: use training.local_batch_size={fitting}",
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


def _float8_gather(config: JobConfig, degrees: Degrees) -> Iterator[Finding]:
    gathers = f"{FLOAT8}.enable_fsdp_float8_all_gather"
    asked = FLOAT8 in config.model.converters and config.quantize.linear.float8.enable_fsdp_float8_all_gather
    if asked and degrees.fsdp == 1:
        yield (
            (gathers, *KEYS.values()),
            f"{gathers}=true needs weights that are split: leave it out, or use {KEYS['dp_shard']}=2 or more",
        )


def _compiles(config: JobConfig) -> bool:
    return config.compile.enable and "model" in config.compile.components


def _ring(config: JobConfig) -> Iterator[Finding]:
    if config.parallelism.context_parallel_method != "ring" or config.parallelism.context_parallel_degree == 1:
        return
    method = 'parallelism.context_parallel_method="ring"'
    if _compiles(config):
        yield (
            ("parallelism.context_parallel_method", "compile.enable", "compile.components"),
            f'{method} does not compile: set compile.enable=false, or use "ulysses" or "allgather"',
        )
    if config.encoder.mask_padding:
        yield (
            ("parallelism.context_parallel_method", "encoder.mask_padding"),
            f'{method} hides no tokens, which encoder.mask_padding=true asks for: use "ulysses" or "allgather"',
        )


def _cuda_graph(config: JobConfig) -> Iterator[Finding]:
    """A replay repeats what was recorded, where it was recorded, and waits for nobody."""
    if not config.compile.cuda_graph:
        return
    key, float8 = "compile.cuda_graph", config.quantize.linear.float8
    for other, is_set, reason, remedy in (
        ("data.buckets.enable", config.data.buckets.enable, "=true has batches of many shapes", "false"),
        (
            "training.enable_cpu_offload",
            config.training.enable_cpu_offload,
            "=true copies weights and gradients to a CPU that must wait for them",
            "false",
        ),
        (
            "parallelism.fsdp_reshard_after_forward",
            config.parallelism.fsdp_reshard_after_forward == "always",
            '="always" leaves gathers that a recording cannot hold',
            '"default" or "never"',
        ),
        (
            f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp",
            FLOAT8 in config.model.converters and float8.precompute_float8_dynamic_scale_for_fsdp,
            "=true puts scales into a new place after each update",
            "false",
        ),
    ):
        if is_set:
            yield (
                (key, other),
                f"{key}=true replays what it has recorded, and {other}{reason}: set it to {remedy}, or {key}=false",
            )


def _recomputation(config: JobConfig) -> Iterator[Finding]:
    section = config.activation_checkpoint
    try:
        parse_selective_option(section.selective_ac_option)
    except ValueError as error:
        yield ("activation_checkpoint.selective_ac_option",), str(error)
    if section.mode == "memory_budget" and not _compiles(config):
        yield (
            ("activation_checkpoint.mode", "compile.enable", "compile.components"),
            'activation_checkpoint.mode="memory_budget" is the compiler\'s work: set compile.enable=true with "model" '
            'among compile.components, or use "selective"',
        )


def _offload(config: JobConfig) -> Iterator[Finding]:
    section = config.activation_checkpoint
    if not section.cpu_offload:
        return
    key, tp = "activation_checkpoint.cpu_offload", config.parallelism.tensor_parallel_degree
    if section.mode == "selective" and section.selective_ac_option == "op" and not _compiles(config):
        yield (
            (key, "activation_checkpoint.selective_ac_option", "compile.enable", "compile.components"),
            f'{key}=true moves what autograd keeps, and selective_ac_option="op" keeps its products elsewhere: use '
            'activation_checkpoint.mode="full" or "none", selective_ac_option=2, or compile.enable=true',
        )
    for other, value, what in (
        (KEYS["tp"], tp, "parts of tensors" if tp > 1 else ""),
        ("model.converters", show(config.model.converters), "8-bit tensors" if config.model.converters else ""),
    ):
        if what:
            yield (
                (key, other),
                f"{key}=true moves plain tensors, not the {what} of {other}={value}: leave one of them out",
            )


def _converters(config: JobConfig) -> Iterator[Finding]:
    converters, float8 = config.model.converters, config.quantize.linear.float8
    if len(converters) > 1:
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
    if FLOAT8 not in converters:
        return
    prefix = FLOAT8
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
