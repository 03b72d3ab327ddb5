"""What ranks tell each other outside of the model."""

import pytest
import torch

from parallel.config import Comm
from parallel.degrees import Degrees
from parallel.mesh import Layout, build_layout, close_layout
from tests.distributed.ranks import run_ranks


def talk(rank: int, world_size: int) -> dict:
    layout = build_layout(Degrees(dp_shard=2, cp=2), Comm(), needs_groups=False)
    told = {
        "dp_rank": layout.dp_rank,
        "sum": layout.sum(torch.tensor(float(10**rank))).item(),
        "gathered": layout.gather_samples(torch.full((2,), float(layout.dp_rank))).tolist(),
        "all": layout.gather(torch.tensor([rank, 10 * rank])).tolist(),
        "shared": layout.from_rank_0("word", lambda: f"of rank {rank}"),
        "axes": (layout.axis("tp"), layout.axis("cp").size()),
        "described": layout.describe(),
        "any": [layout.any(rank == 3), layout.any(False)],
        "texts": layout.gather_texts("words", f"rank {rank}" if rank else ""),
        "in time": layout.gather_texts("in time", "rank 0", 1.0) if rank == 0 else late_texts(layout, rank),
    }
    aside = layout.make_cpu_group(700)
    layout.set_timeout(60)
    groups = (torch.distributed.group.WORLD, layout.samples["dp"].get_group(), aside)
    told["timeouts"] = [group._get_backend(torch.device("cpu")).options._timeout.seconds for group in groups]
    try:
        layout.from_rank_0("failing", fail)
    except (ValueError, SystemExit) as error:
        told["failure"] = repr(error)
    told["first"] = layout.is_first_to_fail()
    return told


def late_texts(layout: Layout, rank: int) -> list[str]:
    return [] if rank == 2 else layout.gather_texts("in time", f"rank {rank}", 1.0)


def fail() -> str:
    raise ValueError("no folder")


def test_four_ranks():
    ranks = run_ranks(talk, 4)
    assert [told["dp_rank"] for told in ranks] == [0, 0, 1, 1]
    for told in ranks:
        assert told["sum"] == 1111 and told["gathered"] == [0, 0, 1, 1]
        assert told["all"] == [[[[0, 0]], [[1, 10]]], [[[2, 20]], [[3, 30]]]]  # dp, cp, tp
        assert told["shared"] == "of rank 0" and told["axes"] == (None, 2)
        assert told["described"] == "4 ranks = dp_shard 2 x cp 2, gloo on cpu"
        assert told["timeouts"] == [60, 60, 700]  # training's own groups only
    assert all(told["any"] == [True, False] for told in ranks)
    assert [told["texts"] for told in ranks] == [["", "rank 1", "rank 2", "rank 3"], [], [], []]
    assert [told["in time"] for told in ranks] == [["rank 0", "rank 1", "", "rank 3"], [], [], []]
    assert [told["failure"] for told in ranks] == ["ValueError('no folder')"] + ["SystemExit(1)"] * 3
    assert sorted(told["first"] for told in ranks) == [False, False, False, True]


def tensor_parallel_sum(rank: int, world_size: int) -> tuple[int, float]:
    layout = build_layout(Degrees(tp=2), Comm(), needs_groups=False)
    return layout.dp_rank, layout.sum(torch.tensor(3.0)).item()


def test_tensor_parallel_ranks_hold_the_same_loss():
    assert run_ranks(tensor_parallel_sum, 2) == [(0, 3.0), (0, 3.0)]


def test_one_process_needs_nobody():
    layout = build_layout(Degrees(), Comm(), needs_groups=False)
    assert layout.weights is None and not torch.distributed.is_initialized()
    assert layout.gather(torch.tensor([5, 6])).tolist() == [[[[5, 6]]]]
    assert layout.sum(torch.tensor(2.0)).item() == 2 and layout.gather_samples(torch.ones(1)).tolist() == [1]
    assert layout.from_rank_0("word", lambda: "mine") == "mine" and layout.is_first_to_fail()
    assert layout.describe() == "1 process on cpu"
    assert layout.make_cpu_group(700) is None
    close_layout(layout)


def test_one_process_makes_groups_of_itself_for_mixed_precision():
    layout = build_layout(Degrees(), Comm(), needs_groups=True)
    try:
        assert layout.weights is not None and layout.weights.size() == 1
        assert layout.encoder is None, "nobody to share the text encoder with"
    finally:
        close_layout(layout)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("rank", "group"), [(0, 0), (3, 0), (4, 1), (15, 3)])
def test_groups_of_samples_count_over_those_who_share_them(rank, group):
    assert Layout(Degrees(dp_replicate=2, dp_shard=2, cp=2, tp=2), torch.device("cpu"), rank=rank).dp_rank == group
