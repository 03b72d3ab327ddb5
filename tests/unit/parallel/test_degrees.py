"""Degrees against the number of processes."""

import itertools

import pytest

from parallel.config import Parallelism
from parallel.degrees import KEYS, Degrees, choices, divisors, read_ranks, resolve_degrees
from parallel.mesh import choose_device


def section(dp_replicate=1, dp_shard=-1, cp=1, tp=1) -> Parallelism:
    return Parallelism(
        data_parallel_replicate_degree=dp_replicate,
        data_parallel_shard_degree=dp_shard,
        context_parallel_degree=cp,
        tensor_parallel_degree=tp,
    )


def refusal(world_size, **degrees) -> str:
    with pytest.raises(ValueError) as caught:
        resolve_degrees(section(**degrees), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("wanted", "world_size", "expected"),
    [
        ({}, 1, Degrees()),
        ({}, 8, Degrees(dp_shard=8)),
        ({"tp": 2}, 8, Degrees(dp_shard=4, tp=2)),
        ({"dp_replicate": 2, "cp": 2, "tp": 2}, 8, Degrees(2, 1, 2, 2)),
        ({"dp_replicate": -1, "dp_shard": 1}, 8, Degrees(dp_replicate=8)),
        ({"dp_replicate": -1, "dp_shard": 4, "cp": 2}, 64, Degrees(8, 4, 2, 1)),
        ({"dp_shard": 3}, 3, Degrees(dp_shard=3)),
    ],
)
def test_what_is_left_is_filled_in(wanted, world_size, expected):
    degrees = resolve_degrees(section(**wanted), world_size)
    assert degrees == expected
    assert degrees.world == world_size


def test_every_layout_of_8_processes_is_found_and_nothing_else():
    sizes = (-1, 1, 2, 3, 4, 8)
    for replicate, shard, cp, tp in itertools.product(sizes, sizes, sizes[1:], sizes[1:]):
        fixed = cp * tp * max(replicate, 1) * max(shard, 1)
        is_open = -1 in (replicate, shard)
        possible = not (replicate == shard == -1) and (8 % fixed == 0 if is_open else fixed == 8)
        if possible:
            assert resolve_degrees(section(replicate, shard, cp, tp), 8).world == 8
        else:
            refusal(8, dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp)


def test_the_axes_that_degrees_stand_for():
    degrees = Degrees(dp_replicate=2, dp_shard=3, cp=5, tp=7)
    assert (degrees.world, degrees.dp, degrees.fsdp) == (210, 6, 15)


def test_where_the_number_of_processes_is_not_known_nothing_is_filled_in():
    assert resolve_degrees(section(), None) == Degrees()
    assert resolve_degrees(section(dp_replicate=3, tp=5), None) == Degrees(dp_replicate=3, tp=5)
    assert "set one of them" in refusal(None, dp_replicate=-1)


@pytest.mark.parametrize(
    ("wanted", "world_size", "message"),
    [
        (
            {"tp": 3},
            8,
            "parallelism.tensor_parallel_degree=3 must divide the 8 processes of this run: use 1, 2, 4 or 8, or a "
            "number of processes that is a multiple of 3",
        ),
        (
            {"tp": 2},
            1,
            "parallelism.tensor_parallel_degree=2 must divide the 1 process of this run: use 1, or a number of "
            "processes that is a multiple of 2",
        ),
        (
            {"dp_replicate": 2, "cp": 3},
            8,
            "parallelism.data_parallel_replicate_degree=2 x parallelism.context_parallel_degree=3 = 6 must divide the "
            "8 processes of this run: use degrees whose product is 1, 2, 4 or 8, or a number of processes that is a "
            "multiple of 6",
        ),
        (
            {"dp_shard": 1},
            8,
            "parallelism.data_parallel_shard_degree=1 must be the number of processes, which is 8: use "
            "parallelism.data_parallel_shard_degree=8 or -1, or 1 process",
        ),
        (
            {"dp_shard": 2, "tp": 2},
            8,
            "parallelism.data_parallel_shard_degree=2 x parallelism.tensor_parallel_degree=2 = 4 must be the number of "
            "processes, which is 8: use parallelism.data_parallel_shard_degree=4 or -1, or 4 processes",
        ),
        (
            {"dp_shard": 2, "tp": 3},
            8,
            "parallelism.data_parallel_shard_degree=2 x parallelism.tensor_parallel_degree=3 = 6 must be the number of "
            "processes, which is 8: use 6 processes",
        ),
        (
            {"dp_replicate": -1},
            8,
            "parallelism.data_parallel_replicate_degree=-1 and parallelism.data_parallel_shard_degree=-1 cannot both "
            "take what is left: set one of them",
        ),
    ],
)
def test_impossible_products(wanted, world_size, message):
    assert refusal(world_size, **wanted) == message


@pytest.mark.parametrize(
    ("degrees", "text"),
    [
        (Degrees(), "1 process"),
        (Degrees(dp_shard=8), "dp_shard 8"),
        (Degrees(2, 2, 2, 1), "dp_replicate 2 x dp_shard 2 x cp 2"),
        (Degrees(2, 3, 5, 7), "dp_replicate 2 x dp_shard 3 x cp 5 x tp 7"),
    ],
)
def test_degrees_as_text(degrees, text):
    assert str(degrees) == text


def test_keys_are_those_of_the_section():
    names = {key.removeprefix("parallelism.") for key in KEYS.values()}
    assert names <= set(Parallelism.__dataclass_fields__) and len(names) == 4


def test_choices():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert choices([7]) == "7" and choices([1, 2]) == "1 or 2" and choices([1, 2, 4]) == "1, 2 or 4"
    many = choices(divisors(3072))
    assert many == "1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ... or 3072"


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [({}, (0, 1)), ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1))],
)
def test_torchrun_tells_rank_and_number(environment, ranks):
    assert read_ranks(environment) == ranks


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "x"}],
)
def test_half_of_it_is_refused(environment):
    with pytest.raises(ValueError, match="use torchrun, or unset them"):
        read_ranks(environment)


def test_more_processes_than_gpus_are_refused_on_every_rank(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(ValueError, match="4 processes must not be more than this machine's 2 GPUs: use NGPU=2"):
            choose_device()
