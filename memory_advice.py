"""What is told when a run does not fit into memory: which options would make room, and how much on each rank."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from config.job_config import JobConfig
from config.keys import show
from parallel.degrees import KEYS, Degrees
from parallel.mesh import Layout
from parallel.shards import local_bytes
from training.out_of_memory import is_out_of_memory

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Remedy:
    """An option, such as `training.enable_cpu_offload=true`, and the bytes that it saves on each rank."""

    option: str
    saves: int


@contextmanager
def out_of_memory_told(
    config: JobConfig, layout: Layout, model: nn.Module | None = None, activations: Sequence[Remedy] = ()
) -> Iterator[None]:
    """Inside, memory that runs out is an error that the user can mend.

    Args:
        model: the transformer, where there is one already.
        activations: remedies that make activations smaller; of what the weights bring along, they are found here.

    Raises:
        ValueError: the device's memory is too small; one line with what would help, the most helpful first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error, layout.device.type):
            raise
        remedies = list(activations)
        # More ranks of one machine share the memory of its CPU, and offloaded weights are not on the GPU.
        if model is not None and layout.device.type == "cuda" and not config.training.enable_cpu_offload:
            remedies += state_remedies(layout.degrees, state_bytes(model.parameters(), config.ema.enable))
        raise ValueError(describe_out_of_memory(config, str(error), remedies)) from error


def state_bytes(parameters: Iterable[Tensor], with_ema: bool) -> int:
    """What weights bring along on this rank: themselves, gradients, Adam's two means, a running mean in float32."""
    return sum(
        local_bytes(parameter) * 4 + with_ema * local_bytes(parameter) * 4 // parameter.element_size()
        for parameter in parameters
    )


def state_remedies(degrees: Degrees, state: int) -> list[Remedy]:
    """Ways to keep less than `state` bytes of weights, and what comes with them, in the memory of each GPU."""
    shard, replicate = degrees.dp_shard, degrees.dp_replicate
    factor = 2 if replicate % 2 == 0 or replicate == 1 else replicate
    split = f"{KEYS['dp_shard']}={shard * factor}"
    how = f" with {KEYS['dp_replicate']}={replicate // factor}" if replicate > 1 else " on twice as many GPUs"
    return [Remedy("training.enable_cpu_offload=true", state), Remedy(split + how, state - state // factor)]


def describe_out_of_memory(config: JobConfig, error: str, remedies: Iterable[Remedy]) -> str:
    """One line: what did not fit, and what would help, the most helpful first.

    Args:
        error: what the allocator said.
        remedies: in any order; without one, options are named without figures.
    """
    asked = re.search(r"tried to allocate (?:(\d+) bytes|([\d.]+ \w+))", error, re.IGNORECASE)
    amount = asked and (_size(int(asked[1])) if asked[1] else asked[2])
    mode = show(config.activation_checkpoint.mode)
    text = (
        f"out of memory{f' (tried to allocate {amount})' if amount else ''} with "
        f"training.local_batch_size={config.training.local_batch_size}, training.img_size={config.training.img_size} "
        f"and activation_checkpoint.mode={mode}: "
    )
    best_first = sorted(remedies, key=lambda remedy: -remedy.saves)
    if best_first:
        return text + "on each rank, " + ", ".join(f"{one.option} saves {_size(one.saves)}" for one in best_first)
    recompute = 'set activation_checkpoint.mode="full", ' if config.activation_checkpoint.mode != "full" else ""
    return (
        f"{text}lower training.local_batch_size, {recompute}or use more ranks; "
        "python -m scripts.dry_run tells what a rank holds of the weights"
    )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
