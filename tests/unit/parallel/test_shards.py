import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from parallel.shards import copy_full_, full_tensor, is_saver, local_bytes, local_views
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.spread_layers import LAYOUTS, Layers, build_layers, make_full, world_size


def copy_and_gather(rank: int, world: int, layout: str) -> dict:
    layers = build_layers(layout)
    full = make_full(layers, seed=0)
    with CommDebugMode() as communication:
        for name, parameter in layers.named_parameters():
            copy_full_(parameter, full[name])
    return {
        "wrong": [name for name, p in layers.named_parameters() if not torch.equal(full_tensor(p), full[name])],
        "plain": all(type(full_tensor(p)) is torch.Tensor for p in layers.parameters()),
        "collectives": communication.get_total_counts(),
        "bytes": {name: local_bytes(p) for name, p in layers.named_parameters()},
        "full_bytes": {name: local_bytes(value) for name, value in full.items()},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_copied_comes_back_whole_on_every_rank(layout):
    results = run_ranks(copy_and_gather, world_size(layout), layout)
    for result in results:
        assert result["wrong"] == [] and result["plain"]
        assert result["collectives"] == 0
    copies = LAYOUTS[layout].get("dp_replicate", 1)
    for name, full_bytes in results[0]["full_bytes"].items():
        held = sum(result["bytes"][name] for result in results)
        alike = "tp" in LAYOUTS[layout] and (name.endswith(("bias", "norm.weight")) or name.startswith("whole"))
        assert held == full_bytes * copies * (LAYOUTS[layout]["tp"] if alike else 1), name


def gather_as_placed_by_default(rank: int, world: int) -> dict:
    """FSDP splits rows, as it does by default, that tensor parallelism has split already."""
    layers = build_layers("fsdp_2_tp_2", placement=lambda parameter: Shard(0))
    full = make_full(layers, seed=0)
    wrong, refused = [], []
    for name, parameter in layers.named_parameters():
        try:
            copy_full_(parameter, full[name])
        except AssertionError:
            refused.append(name)
            piece_rows = full[name].unflatten(0, (3, 2, -1))[:, world_rank("tp")].flatten(0, 1)
            parameter.detach().to_local().copy_(piece_rows.chunk(2)[world_rank("fsdp")])
        if not torch.equal(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter, full[name]):
            wrong.append(name)
    return {"wrong": wrong, "refused": refused}


def world_rank(axis: str) -> int:
    return {"fsdp": dist.get_rank() // 2, "tp": dist.get_rank() % 2}[axis]


def test_packed_rows_that_fsdp_splits_again_are_wrong_and_refused():
    for result in run_ranks(gather_as_placed_by_default, 4):
        assert result == {"wrong": ["packed_rows.weight"], "refused": ["packed_rows.weight"]}


def gather_gradient_like_placements(rank: int, world: int) -> list[bool]:
    """Gradients may be placed otherwise than their parameters."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    full = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    equal = []
    for placements in ([Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(0), Shard(0)], [Shard(1), Shard(0)]):
        tensor = DTensor.from_local(full, mesh, [Replicate(), Replicate()]).redistribute(placements=placements)
        equal.append(torch.equal(full_tensor(tensor), full))
        copied = torch.zeros_like(tensor)
        copy_full_(copied, full)
        equal.append(torch.equal(copied.to_local(), tensor.to_local()))
    return equal


def test_other_placements_agree_with_dtensor():
    for equal in run_ranks(gather_gradient_like_placements, 4):
        assert all(equal) and equal


Boxes = list[tuple[tuple[int, ...], np.ndarray]]  # tensors do not travel between processes that end


def view_layers(rank: int, world: int, layout: str) -> dict[str, Boxes]:
    layers = build_layers(layout)
    full = make_full(layers, seed=0)
    for name, parameter in layers.named_parameters():
        copy_full_(parameter, full[name])
    return {name: boxes(parameter) for name, parameter in layers.named_parameters()}


def boxes(tensor: torch.Tensor) -> Boxes:
    return [(offsets, view.numpy().copy()) for offsets, view in local_views(tensor)]


def put_together(ranks: list[Boxes], shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor from all ranks' boxes, each of which counts once however many ranks hold it; and who wrote where."""
    whole, writes = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    distinct = {(offsets, values.shape): values for rank in ranks for offsets, values in rank}
    for (offsets, sizes), values in distinct.items():
        box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        whole[box] = torch.from_numpy(values)
        writes[box] += 1
    return whole, writes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_views_make_the_tensor_exactly_once(layout):
    ranks = run_ranks(view_layers, world_size(layout), layout)
    for name, full in make_full(Layers(), seed=0).items():
        whole, writes = put_together([rank[name] for rank in ranks], full.shape)
        assert torch.equal(writes, torch.ones_like(writes)), name
        assert torch.equal(whole, full), name
    packed = max(len(rank["packed_rows.weight"]) for rank in ranks)
    assert packed == (3 if "tp" in LAYOUTS[layout] else 1)  # pieces that lie apart
    if layout == "fsdp_3":
        assert [len(rank["whole.weight"]) for rank in ranks] == [1, 0, 0]  # nothing to hold, nothing to save
        assert [rank["columns.weight"][0][1].shape[0] for rank in ranks] == [2, 2, 1]


def view_savers(rank: int, world: int, layout: str) -> dict[str, list[tuple]]:
    layers = build_layers(layout)
    named = layers.named_parameters()
    return {name: [offsets for offsets, _ in local_views(p)] if is_saver(p, name) else [] for name, p in named}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_is_saved_by_one_copy_and_all_have_work(layout):
    held, saved = (run_ranks(function, world_size(layout), layout) for function in (view_layers, view_savers))
    for name in held[0]:
        parts = {offsets for rank in held for offsets, _ in rank[name]}
        saves = [offsets for rank in saved for offsets in rank[name]]
        assert set(saves) == parts, name
        if "tp" not in layout:  # whose ranks do not know of each other where a parameter stays whole
            assert len(saves) == len(parts), name
    assert all(any(rank.values()) for rank in saved)
    assert "copies" not in layout or sum(map(count, saved)) < sum(map(count, held))


def count(parts: dict[str, list]) -> int:
    return sum(len(offsets) for offsets in parts.values())


def view_placements(rank: int, world: int) -> list[Boxes]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    full = torch.arange(35.0).reshape(7, 5)
    replicated = DTensor.from_local(full, mesh, [Replicate(), Replicate()])
    return [boxes(replicated.redistribute(placements=placements)) for placements in PLACEMENTS]


PLACEMENTS = (
    [Replicate(), Shard(0)],
    [Shard(1), Replicate()],
    [Shard(0), Shard(0)],
    [Shard(1), Shard(0)],
    [Replicate(), Replicate()],
)


def test_views_of_uneven_parts_in_two_dims():
    ranks, full = run_ranks(view_placements, 4), torch.arange(35.0).reshape(7, 5)
    for number, placements in enumerate(PLACEMENTS):
        whole, writes = put_together([rank[number] for rank in ranks], full.shape)
        assert torch.equal(writes, torch.ones_like(writes)) and torch.equal(whole, full), placements
    lost = put_together([rank[3] for rank in ranks[:3]], full.shape)[1]
    assert (lost == 0).any()  # control: a rank that is left out is missed


def fill_views(rank: int, world: int) -> bool:
    layers = build_layers("fsdp_2_tp_2")
    full = make_full(layers, seed=0)
    for name, parameter in layers.named_parameters():
        for offsets, view in local_views(parameter):
            view.copy_(full[name][tuple(slice(start, start + n) for start, n in zip(offsets, view.shape, strict=True))])
    return all(torch.equal(full_tensor(p), full[name]) for name, p in layers.named_parameters())


def test_what_is_put_into_the_views_is_in_the_parameters():
    assert run_ranks(fill_views, 4) == [True] * 4


def test_the_view_of_a_plain_tensor_is_the_tensor():
    for shape in ((), (3,), (2, 3)):
        parameter = nn.Parameter(torch.zeros(shape))
        ((offsets, view),) = local_views(parameter)
        assert offsets == (0,) * len(shape) and not view.requires_grad
        view.fill_(1.0)
        assert parameter.eq(1).all()


def test_plain_tensors_need_no_processes():
    parameter, full = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16)), torch.randn(2, 3)
    copy_full_(parameter, full)
    assert torch.equal(full_tensor(parameter), full.bfloat16())
    assert not full_tensor(parameter).requires_grad
    assert local_bytes(parameter) == 12


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(AssertionError):
        copy_full_(nn.Parameter(torch.zeros(2, 3)), torch.zeros(3))
