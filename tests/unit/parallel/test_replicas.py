"""One flipped bit in one replica is found, and its rank named."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from parallel.config import Comm
from parallel.degrees import Degrees
from parallel.mesh import Layout, build_layout
from parallel.replicas import _INTEGERS, Deviation, checksum, compare_replicas, describe_deviations
from parallel.shards import copy_full_, local_part
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.spread_layers import Layers, build_layers, make_full


@contextmanager
def flipped(tensor: Tensor, place: int, bit: int) -> Iterator[None]:
    """Inside, a bit of a number of this rank's part is another."""
    local = local_part(tensor)
    bits = local.view(_INTEGERS[local.element_size()]).view(-1)
    mask = torch.ones((), dtype=bits.dtype) << bit
    bits[place] ^= mask
    yield
    bits[place] ^= mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.float64])
def test_any_bit_changes_the_checksum(dtype, monkeypatch):
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    whole = checksum(values)
    assert whole.dtype == torch.int64 and whole.shape == ()
    assert whole == checksum(values.t().contiguous().t()) == checksum(values.flip(0))
    monkeypatch.setattr("parallel.replicas._PART", 3)
    assert checksum(values) == whole
    for bit in range(8 * values.element_size()):
        with flipped(values, 11, bit):
            assert checksum(values) != whole
    assert checksum(values[:0]) == 0 and checksum(values.new_ones(())) != 0


def test_bits_are_compared_and_not_numbers():
    zeros, nans = torch.zeros(2), torch.tensor([torch.nan])
    assert checksum(zeros) != checksum(-zeros)
    assert checksum(nans) == checksum(nans.clone())


def deviations_of(rank: int, world: int) -> dict[str, list[Deviation]]:
    """On three replicas of one rank, or on two of two."""
    degrees = Degrees(dp_replicate=3) if world == 3 else Degrees(dp_replicate=2, dp_shard=2)
    layout = build_layout(degrees, Comm(), needs_groups=False)
    layers = build_layers("hsdp_2_2") if world == 4 else Layers()
    tensors: dict[str, Tensor] = dict(layers.named_parameters())
    for name, full in make_full(layers, seed=0).items():
        copy_full_(tensors[name], full)
    tensors["bits"] = torch.full((3,), 7, dtype=torch.int16)  # plain, as remainders of a plain weight are
    found = {}

    def look(what: str, name: str, *wrong: int) -> None:
        is_wrong = rank in wrong and local_part(tensors[name]).numel() > 0
        with flipped(tensors[name], rank, bit=rank) if is_wrong else nullcontext():
            found[what] = compare_replicas(tensors, layout)

    look("none", "rows.weight")
    look("one", "rows.weight", 1)
    look("of the last", "bits", 2)
    look("held by one", "whole.weight", 0, 1)
    look("several", "columns.weight", 0, 1, 2)
    return found


@pytest.mark.parametrize("world", [3, 4])
def test_the_rank_is_named_if_it_can_be(world):
    ranks = run_ranks(deviations_of, world)
    assert all(found == ranks[0] for found in ranks), "every rank knows"
    found = ranks[0]
    assert found["none"] == []  # control
    if world == 3:
        assert found["one"] == [Deviation(1, "rows.weight", True)]
        assert found["of the last"] == [Deviation(2, "bits", True)]
        assert found["held by one"] == [Deviation(rank, "whole.weight", False) for rank in range(3)]
        assert found["several"] == [Deviation(rank, "columns.weight", False) for rank in range(3)]
    else:  # ranks 0 and 2 hold the same part, and so do 1 and 3; the last row of `whole` is on the first two
        assert found["one"] == [Deviation(rank, "rows.weight", False) for rank in (1, 3)]
        assert found["of the last"] == [Deviation(rank, "bits", False) for rank in (0, 2)]
        assert found["held by one"] == [Deviation(rank, "whole.weight", False) for rank in (0, 2)]
        assert found["several"] == [Deviation(rank, "columns.weight", False) for rank in range(4)]


def test_without_replicas_nothing_is_sent():
    with CommDebugMode() as communication:
        assert compare_replicas({"a": torch.ones(2)}, Layout(Degrees(), torch.device("cpu"))) == []
        assert compare_replicas({"a": torch.ones(2)}, Layout(Degrees(dp_shard=4), torch.device("cpu"))) == []
    assert communication.get_total_counts() == 0


def test_what_is_said():
    assert describe_deviations([Deviation(5, "a", True)]) == "rank 5 differs from the other replicas, first in a"
    told = describe_deviations([Deviation(1, "a", False), Deviation(2, "b", True), Deviation(3, "a", False)])
    assert told == (
        "ranks 1, 3 differ from one another, first in a: without a majority, which is wrong cannot be told; "
        "rank 2 differs from the other replicas, first in b"
    )
