"""What is told when a run does not fit into memory: which options would make room, and how much on each rank."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from config.checks import find_faults
from config.job_config import JobConfig
from config.keys import show
from estimate import estimate_memory
from parallel.config import ActivationCheckpoint
from parallel.degrees import KEYS, Degrees
from parallel.mesh import Layout
from training.out_of_memory import is_out_of_memory

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Remedy:
    """Options, such as `training.enable_cpu_offload=true`, and the bytes that they save on each rank."""

    options: str
    saves: int


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
        remedies = find_remedies(config, layout.degrees, layout.device.type, in_step)
        raise ValueError(describe_out_of_memory(config, str(error), remedies)) from error


def find_remedies(config: JobConfig, degrees: Degrees, device_type: str, in_step: bool = True) -> list[Remedy]:
    """What makes room for the same updates, by the formulas of `scripts.plan`, the most helpful first."""
    on_cpu = device_type == "cpu"
    update, peak = config.training.update_size(degrees.dp), estimate_memory(config, degrees, on_cpu, {}).peak
    found: list[Remedy] = []
    for options, change, then in _candidates(config, degrees, on_cpu, in_step):
        parallelism = replace(
            config.parallelism,
            data_parallel_shard_degree=then.dp_shard,
            data_parallel_replicate_degree=then.dp_replicate,
        )
        changed = replace(config, parallelism=parallelism, **change)
        is_valid = next(iter(find_faults(changed, then.world)), None) is None
        saves = peak - estimate_memory(changed, then, on_cpu, {}).peak
        if is_valid and saves > 0 and changed.training.update_size(then.dp) == update:
            found.append(Remedy(options, saves))
    return sorted(found, key=lambda one: -one.saves)


def _candidates(
    config: JobConfig, degrees: Degrees, on_cpu: bool, in_step: bool
) -> Iterator[tuple[str, dict[str, Any], Degrees]]:
    """Options as they are told, sections that they replace, and the degrees with them."""
    training, update = config.training, config.training.update_size(degrees.dp)
    half = replace(training, local_batch_size=max(1, training.local_batch_size // 2), global_batch_size=update)
    halved = f"training.local_batch_size={half.local_batch_size}"
    if in_step:
        again = "ratio=1" if config.activation_checkpoint.mode == "full" else 'mode="full"'
        full = ActivationCheckpoint(mode="full")
        yield f"activation_checkpoint.{again}", {"activation_checkpoint": full}, degrees
        yield f"{halved} with training.global_batch_size={update}", {"training": half}, degrees
    if on_cpu:  # ranks of one machine share its memory
        return
    offloaded = replace(training, enable_cpu_offload=True)
    yield "training.enable_cpu_offload=true", {"training": offloaded}, degrees
    eight_bit = replace(config.optimizer, state_dtype="8bit")
    yield 'optimizer.state_dtype="8bit"', {"optimizer": eight_bit}, degrees
    shard, copies = degrees.dp_shard, degrees.dp_replicate
    factor = 2 if copies % 2 == 0 or copies == 1 else copies
    then = replace(degrees, dp_shard=shard * factor, dp_replicate=max(1, copies // factor))
    split = f"{KEYS['dp_shard']}={then.dp_shard}"
    if copies > 1:
        yield f"{split} with {KEYS['dp_replicate']}={then.dp_replicate}", {}, then
    elif update % (training.local_batch_size * then.dp) == 0:
        yield f"{split} on twice as many GPUs", {"training": replace(training, global_batch_size=update)}, then
    else:
        yield f"{split} with {halved} on twice as many GPUs", {"training": replace(half, global_batch_size=-1)}, then


def describe_out_of_memory(config: JobConfig, error: str, remedies: Iterable[Remedy]) -> str:
    """One line: what did not fit, and what would help.

    Args:
        error: what the allocator said.
    """
    asked = re.search(r"tried to allocate (?:(\d+) bytes|([\d.]+ \w+))", error, re.IGNORECASE)
    amount = asked and (_size(int(asked[1])) if asked[1] else asked[2])
    text = (
        f"out of memory{f' (tried to allocate {amount})' if amount else ''} with "
        f"training.local_batch_size={config.training.local_batch_size}, training.img_size={config.training.img_size} "
        f"and activation_checkpoint.mode={show(config.activation_checkpoint.mode)}: "
    )
    told = ", ".join(f"{one.options} saves {_size(one.saves)}" for one in remedies)
    return (
        f"{text}on each rank, {told}" if told else f"{text}no option makes it smaller: use a smaller model or picture"
    )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
