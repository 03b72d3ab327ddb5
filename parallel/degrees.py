"""How many ranks share what: the degrees of a layout, checked against the number of processes. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from parallel.config import Parallelism

KEYS = {
    "dp_replicate": "parallelism.data_parallel_replicate_degree",
    "dp_shard": "parallelism.data_parallel_shard_degree",
    "cp": "parallelism.context_parallel_degree",
    "tp": "parallelism.tensor_parallel_degree",
}


@dataclass(frozen=True)
class Degrees:
    """Sizes of the four axes of a layout; their product is the number of ranks.

    Ranks count through tp first, then cp, dp_shard and dp_replicate, so that those who talk most are neighbors.
    """

    dp_replicate: int = 1  # copies of the weights
    dp_shard: int = 1  # ranks that share the weights of one copy and see different samples
    cp: int = 1  # ranks that share the tokens of a sample
    tp: int = 1  # ranks that share a matrix product

    @property
    def world(self) -> int:
        return self.dp_replicate * self.fsdp * self.tp

    @property
    def dp(self) -> int:
        """Groups of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks that one copy of the weights is split over; context parallel ranks hold different parts of it too."""
        return self.dp_shard * self.cp

    def __str__(self) -> str:
        """Such as `dp_replicate 2 x dp_shard 2 x cp 2`."""
        sizes = {name: getattr(self, name) for name in KEYS}
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 process"


def read_ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun tells them; (0, 1) without it.

    Raises:
        ValueError: only one of them is set, as by a job system, or they make no sense.
    """
    given = {name: environment[name] for name in ("RANK", "WORLD_SIZE") if name in environment}
    if not given:
        return 0, 1
    if len(given) == 2 and all(text.isascii() and text.isdecimal() for text in given.values()):
        rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
        if rank < world_size:
            return rank, world_size
    told = ", ".join(f"{name}={text}" for name, text in given.items())
    raise ValueError(
        f"{told} in the environment must be a rank below a number of processes: use torchrun, or unset them"
    )


def resolve_degrees(section: Parallelism, world_size: int | None) -> Degrees:
    """The degrees of a run.

    Args:
        section: [parallelism]; -1 stands for all processes that are left.
        world_size: number of processes. None: not known yet, so -1 counts as 1 and the product is not compared.

    Raises:
        ValueError: two degrees are -1, or the product is not the number of processes.
    """
    wanted = {
        "dp_replicate": section.data_parallel_replicate_degree,
        "dp_shard": section.data_parallel_shard_degree,
        "cp": section.context_parallel_degree,
        "tp": section.tensor_parallel_degree,
    }
    open_axes = [name for name, degree in wanted.items() if degree == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"{' and '.join(f'{KEYS[name]}=-1' for name in open_axes)} cannot both take what is left: set one of them"
        )
    fixed = prod(degree for degree in wanted.values() if degree != -1)
    if world_size is None:
        return Degrees(**{name: max(degree, 1) for name, degree in wanted.items()})
    named = [f"{KEYS[name]}={degree}" for name, degree in wanted.items() if degree > 1] or [f"{KEYS['dp_shard']}=1"]
    product = " x ".join(named) + (f" = {fixed}" if len(named) > 1 else "")
    if open_axes:
        if world_size % fixed:
            what = "degrees whose product is " if len(named) > 1 else ""
            raise ValueError(
                f"{product} must divide the {_processes(world_size)} of this run: "
                f"use {what}{choices(divisors(world_size))}, or a number of processes that is a multiple of {fixed}"
            )
        wanted[open_axes[0]] = world_size // fixed
    elif fixed != world_size:
        left = wanted["dp_replicate"] * wanted["cp"] * wanted["tp"]
        fitting = f"{KEYS['dp_shard']}={world_size // left} or -1, or " if world_size % left == 0 else ""
        raise ValueError(
            f"{product} must be the number of processes, which is {world_size}: use {fitting}{_processes(fixed)}"
        )
    return Degrees(**wanted)


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def choices(numbers: list[int]) -> str:
    """Such as `1, 2, 4 or 8`; a long list is cut in the middle."""
    texts = [str(number) for number in numbers]
    if len(texts) > 12:
        texts = [*texts[:10], "...", texts[-1]]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
