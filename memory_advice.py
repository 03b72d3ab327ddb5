"""What is told when a run does not fit into memory, or will not: which options make room, and how much on each rank."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeAlias

import torch

from config.checks import find_faults
from config.job_config import JobConfig
from config.keys import show
from estimate import PEAK_ERROR, Memory, estimate_memory, needed_encoders, usable_bytes
from flux.encoder_costs import EncoderCost
from parallel.degrees import KEYS, Degrees, divisors
from parallel.mesh import Layout
from training.out_of_memory import is_out_of_memory

MIB, GIB = 2**20, 2**30
Encoders: TypeAlias = Mapping[str, EncoderCost]
# Gives options as they are told, and the configuration with them.
Change: TypeAlias = Callable[[JobConfig], tuple[str, JobConfig]]

log = logging.getLogger("train")


@dataclass(frozen=True)
class Remedy:
    """Options, such as `training.enable_cpu_offload=true`, and the bytes that they save on each rank."""

    options: str
    saves: int


@dataclass(frozen=True)
class Fitting:
    """Options that together are enough, and the bytes that each rank then needs of its GPU and of the host's memory."""

    options: str
    peak: int
    host: int


@contextmanager
def out_of_memory_told(config: JobConfig, layout: Layout, in_step: bool) -> Iterator[None]:
    """Inside, memory that runs out is an error that the user can mend.

    Args:
        in_step: activations are there; otherwise weights and encoders alone did not fit.

    Raises:
        ValueError: the device's memory is too small; one line with what would help, the most helpful first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error, layout.device.type):
            raise
        remedies = find_remedies(config, layout.degrees, layout.device.type, needed_encoders(config), in_step)
        raise ValueError(describe_out_of_memory(config, str(error), remedies)) from error


def check_memory(config: JobConfig, layout: Layout) -> None:
    """Compares the plan with a GPU's memory, before anything is built; warns where it may be too small. A CPU's memory
    is shared with other ranks and programs, and can be swapped out: there nothing is said.

    Raises:
        ValueError: the plan is larger by more than its error; one line with the nearest options that fit.
    """
    if layout.device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(layout.device)
    encoders = needed_encoders(config)
    peak = estimate_memory(config, layout.degrees, False, encoders).peak
    if peak <= usable_bytes(free):
        return
    fitting = find_fitting(config, layout.degrees, encoders, usable_bytes(free))
    text = describe_lack(config, peak, free, total, fitting)
    # Buckets may have smaller shapes than the plan, and a memory budget keeps less: the figure is a bound there.
    is_bound = config.data.buckets.enable or config.activation_checkpoint.mode == "memory_budget"
    if peak * (1 - PEAK_ERROR) > free and not is_bound:
        raise ValueError(f"does not fit into memory with {text}")
    log.warning("memory may run out with %s", text)


def find_remedies(
    config: JobConfig, degrees: Degrees, device_type: str, encoders: Encoders, in_step: bool = True
) -> list[Remedy]:
    """What makes room without changing the updates, by the formulas of `scripts.plan`, the most helpful first."""
    on_cpu = device_type == "cpu"
    update, peak = config.training.update_size(degrees.dp), estimate_memory(config, degrees, on_cpu, encoders).peak
    found: list[Remedy] = []
    for options, changed, then in _candidates(config, degrees, on_cpu, in_step):
        saves = peak - estimate_memory(changed, then, on_cpu, encoders).peak
        if saves > 0 and _is_valid(changed, then) and changed.training.update_size(then.dp) == update:
            found.append(Remedy(options, saves))
    return sorted(found, key=lambda one: -one.saves)


def find_fitting(config: JobConfig, degrees: Degrees, encoders: Encoders, room: float) -> list[Fitting]:
    """The fewest options that make the same updates in `room` bytes of each GPU: all sets of so many."""

    def memory_of(one: JobConfig) -> Memory:
        return estimate_memory(one, degrees, False, encoders)

    update, local = config.training.update_size(degrees.dp), config.training.local_batch_size
    smaller = [size for size in reversed(divisors(update // degrees.dp)) if size < local]
    useful = [change for change in _CHANGES if memory_of(change(config)[1]).peak < memory_of(config).peak]

    def attempt(changes: Sequence[Change], sizes: Sequence[int]) -> Fitting | None:
        """These changes, with the first of the batch sizes that fits."""
        changed, told = config, list[str]()
        for change in changes:
            option, changed = change(changed)
            told.append(option)
        for size in sizes:
            option, variant = _batch(changed, size, update)
            memory = memory_of(variant)
            if memory.peak <= room and _is_valid(variant, degrees):
                return Fitting(" and ".join([*told, *([option] if size < local else [])]), memory.peak, memory.host)
        return None

    for count in range(1, len(useful) + 2):
        found = [attempt(changes, [local]) for changes in combinations(useful, count)]
        found += [attempt(changes, smaller) for changes in combinations(useful, count - 1)]
        if any(found):
            return [one for one in found if one]
    return []


def _is_valid(config: JobConfig, degrees: Degrees) -> bool:
    return next(iter(find_faults(config, degrees.world)), None) is None


def _recompute(config: JobConfig) -> tuple[str, JobConfig]:
    section = config.activation_checkpoint
    told = "activation_checkpoint." + ("ratio=1" if section.mode == "full" else 'mode="full"')
    return told, replace(config, activation_checkpoint=replace(section, mode="full", ratio=1.0))


def _offload_activations(config: JobConfig) -> tuple[str, JobConfig]:
    section = replace(config.activation_checkpoint, cpu_offload=True)
    return "activation_checkpoint.cpu_offload=true", replace(config, activation_checkpoint=section)


def _encode_in_turn(config: JobConfig) -> tuple[str, JobConfig]:
    return "encoder.encode_ahead=false", replace(config, encoder=replace(config.encoder, encode_ahead=False))


def _offload_t5(config: JobConfig) -> tuple[str, JobConfig]:
    return "encoder.cpu_offload=true", replace(config, encoder=replace(config.encoder, cpu_offload=True))


def _offload_states(config: JobConfig) -> tuple[str, JobConfig]:
    section = replace(config.training, enable_cpu_offload=True)
    return "training.enable_cpu_offload=true", replace(config, training=section)


def _store_in_8_bits(config: JobConfig) -> tuple[str, JobConfig]:
    return 'optimizer.state_dtype="8bit"', replace(config, optimizer=replace(config.optimizer, state_dtype="8bit"))


def _batch(config: JobConfig, samples: int, update: int) -> tuple[str, JobConfig]:
    section = replace(config.training, local_batch_size=samples, global_batch_size=update)
    told = f"training.local_batch_size={samples} with training.global_batch_size={update}"
    return told, replace(config, training=section)


# By what they cost in time, and those of them that help before the first step too.
_CHANGES: Sequence[Change] = (
    *(_encode_in_turn, _recompute, _store_in_8_bits, _offload_t5, _offload_activations, _offload_states),
)
_OF_WEIGHTS = (_offload_t5, _offload_states)


def _candidates(
    config: JobConfig, degrees: Degrees, on_cpu: bool, in_step: bool
) -> Iterator[tuple[str, JobConfig, Degrees]]:
    """Options as they are told, the configuration with them, and its degrees."""
    training, update = config.training, config.training.update_size(degrees.dp)
    half = max(1, training.local_batch_size // 2)
    if in_step:
        for options, changed in (_recompute(config), _batch(config, half, update)):
            yield options, changed, degrees
    if on_cpu:  # ranks of one machine share its memory
        return
    for change in _CHANGES:
        if change in _OF_WEIGHTS or (in_step and change is not _recompute):
            yield *change(config), degrees
    yield from _further_split(config, degrees, half, update)


def _further_split(
    config: JobConfig, degrees: Degrees, half: int, update: int
) -> Iterator[tuple[str, JobConfig, Degrees]]:
    """Weights on twice as many ranks, those of other copies or new ones."""
    training, shard, copies = config.training, degrees.dp_shard, degrees.dp_replicate
    factor = 2 if copies % 2 == 0 or copies == 1 else copies
    then = replace(degrees, dp_shard=shard * factor, dp_replicate=max(1, copies // factor))
    split = f"{KEYS['dp_shard']}={then.dp_shard}"
    if copies > 1:
        told = f"{split} with {KEYS['dp_replicate']}={then.dp_replicate}"
    elif update % (training.local_batch_size * then.dp) == 0:
        told, training = f"{split} on twice as many GPUs", replace(training, global_batch_size=update)
    else:
        told = f"{split} with training.local_batch_size={half} on twice as many GPUs"
        training = replace(training, local_batch_size=half, global_batch_size=-1)
    parallelism = replace(
        config.parallelism,
        data_parallel_shard_degree=then.dp_shard,
        data_parallel_replicate_degree=then.dp_replicate,
    )
    yield told, replace(config, training=training, parallelism=parallelism), then


def describe_lack(config: JobConfig, peak: int, free: int, total: int, fitting: Sequence[Fitting]) -> str:
    """What does not fit, the plan's figure, the device's memory, and what fits."""
    text = (
        f"{_describe_step(config)}: by the plan, which is right to {PEAK_ERROR:.0%}, each rank needs {_size(peak)}, "
        f"and {_size(free)} of this GPU's {_size(total)} are free"
    )
    if not fitting:
        return f"{text}: no option of this layout fits, ask python -m scripts.plan about more GPUs"
    ways = [
        f"{one.options}, which needs {_size(one.peak)}" + (f" and {_size(one.host)} of the host's" if one.host else "")
        for one in fitting
    ]
    return f"{text}: use {', or '.join(ways)}"


def describe_out_of_memory(config: JobConfig, error: str, remedies: Iterable[Remedy]) -> str:
    """One line: what did not fit, and what would help.

    Args:
        error: what the allocator said.
    """
    asked = re.search(r"tried to allocate (?:(\d+) bytes|([\d.]+ \w+))", error, re.IGNORECASE)
    amount = asked and (_size(int(asked[1])) if asked[1] else asked[2])
    text = f"out of memory{f' (tried to allocate {amount})' if amount else ''} with {_describe_step(config)}: "
    told = ", ".join(f"{one.options} saves {_size(one.saves)}" for one in remedies)
    return (
        f"{text}on each rank, {told}" if told else f"{text}no option makes it smaller: use a smaller model or picture"
    )


def _describe_step(config: JobConfig) -> str:
    return (
        f"training.local_batch_size={config.training.local_batch_size}, training.img_size={config.training.img_size} "
        f"and activation_checkpoint.mode={show(config.activation_checkpoint.mode)}"
    )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
