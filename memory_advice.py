"""What is told when a run does not fit into memory: which options would make room, and how much on each rank."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

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
def out_of_memory_told(config: JobConfig, layout: Layout) -> Iterator[None]:
    """Inside, memory that runs out is an error that the user can mend.

    Raises:
        ValueError: the device's memory is too small; one line with what would help, the most helpful first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error, layout.device.type):
            raise
        remedies = find_remedies(config, layout.degrees, layout.device.type)
        raise ValueError(describe_out_of_memory(config, str(error), remedies)) from error


def find_remedies(config: JobConfig, degrees: Degrees, device_type: str) -> list[Remedy]:
    """What makes room without changing the updates, by the formulas of `scripts.plan`, the most helpful first."""
    on_cpu, training = device_type == "cpu", config.training
    peak = estimate_memory(config, degrees, on_cpu, {}).peak
    found: list[Remedy] = []

    def consider(options: str, then: Degrees = degrees, **sections: Any) -> None:
        saves = peak - estimate_memory(replace(config, **sections), then, on_cpu, {}).peak
        if saves > 0:
            found.append(Remedy(options, saves))

    consider('activation_checkpoint.mode="full"', activation_checkpoint=ActivationCheckpoint(mode="full"))
    half, update = training.local_batch_size // 2, training.update_size(degrees.dp)
    if half and update % (half * degrees.dp) == 0:
        keeps = f" with training.global_batch_size={update}"
        fewer = replace(training, local_batch_size=half, global_batch_size=update)
        consider(f"training.local_batch_size={half}{keeps}", training=fewer)
    if not on_cpu:  # ranks of one machine share its CPU's memory
        consider("training.enable_cpu_offload=true", training=replace(training, enable_cpu_offload=True))
        consider(*_split_further(degrees))
    return sorted(found, key=lambda one: -one.saves)


def _split_further(degrees: Degrees) -> tuple[str, Degrees]:
    """The weights over more ranks: of the copies that there are, or of as many machines again."""
    shard, copies = degrees.dp_shard, degrees.dp_replicate
    factor = 2 if copies % 2 == 0 or copies == 1 else copies
    how = f" with {KEYS['dp_replicate']}={copies // factor}" if copies > 1 else " on twice as many GPUs"
    then = replace(degrees, dp_shard=shard * factor, dp_replicate=max(1, copies // factor))
    return f"{KEYS['dp_shard']}={then.dp_shard}{how}", then


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
