"""Collectives are counted by kind and size, and nothing else is."""

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from parallel.collectives import CollectiveCounter
from tests.distributed.ranks import run_ranks

ROWS, COLUMNS = 4, 3
SIZE = ROWS * COLUMNS * 4  # bytes of one rank's float32 tensor


def communicate(rank: int, world_size: int) -> tuple[dict, dict, bool]:
    x = torch.full((ROWS, COLUMNS), float(rank))
    group = dist.group.WORLD
    dist.all_reduce(x)  # before: not counted
    with CollectiveCounter() as counter:
        dist.all_reduce(x)
        functional.wait_tensor(functional.all_reduce(x, "sum", group))
        parts = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(parts, x)
        dist.all_gather_into_tensor(torch.empty(world_size * ROWS, COLUMNS), x)
        functional.wait_tensor(functional.all_gather_tensor(x, 0, group))
        dist.reduce_scatter_tensor(torch.empty(ROWS // world_size, COLUMNS), x)
        functional.wait_tensor(functional.reduce_scatter_tensor(x, "sum", 0, group))
        dist.all_to_all_single(torch.empty_like(x), x)
        functional.wait_tensor(functional.all_to_all_single(x, None, None, group))
        y = x @ x.T + 1  # no collective
    dist.all_reduce(x)
    return dict(counter.calls), dict(counter.bytes), bool(y.isfinite().all())


def test_kinds_and_sizes():
    for calls, sizes, computed in run_ranks(communicate, 2):
        assert calls == {"all-reduce": 2, "all-gather": 3, "reduce-scatter": 2, "all-to-all": 2}
        # Of a gather what comes out, of a reduction what goes in.
        assert sizes == {
            "all-reduce": 2 * SIZE,
            "all-gather": 3 * 2 * SIZE,
            "reduce-scatter": 2 * SIZE,
            "all-to-all": 2 * SIZE,
        }
        assert computed


def test_alone_nothing_is_counted():
    with CollectiveCounter() as counter:
        torch.ones(3).sum()
    assert not counter.calls and not counter.bytes
