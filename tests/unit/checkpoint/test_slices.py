"""Parts of tensors through a checkpoint: any partition is saved, and any other loaded."""

import pytest
import torch
from torch import Tensor

from checkpoint.dcp import load_checkpoint, open_checkpoint, read_train_state, save_checkpoint, save_weights
from checkpoint.lazy import LazyTensor, lazy
from checkpoint.slices import Part, Slices

FULL = torch.arange(96.0).reshape(12, 8)
# Partitions of it into boxes: (offsets, sizes).
PARTITIONS = {
    "whole": [((0, 0), (12, 8))],
    "uneven rows": [((0, 0), (5, 8)), ((5, 0), (5, 8)), ((10, 0), (2, 8))],
    "packed rows": [((0, 0), (2, 8)), ((2, 0), (4, 8)), ((6, 0), (2, 8)), ((8, 0), (4, 8))],
    "columns": [((0, 0), (12, 3)), ((0, 3), (12, 5))],
    "both": [((0, 0), (7, 4)), ((0, 4), (7, 4)), ((7, 0), (5, 8))],
}


def parts(tensor: Tensor, partition: str) -> Slices:
    boxes = PARTITIONS[partition]
    views = [(at, tensor[at[0] : at[0] + size[0], at[1] : at[1] + size[1]]) for at, size in boxes]
    return Slices.of_views(tensor.shape, tensor.dtype, views)


@pytest.mark.parametrize("saved", PARTITIONS)
@pytest.mark.parametrize("loaded", PARTITIONS)
def test_any_partition_is_loaded_from_any_other(tmp_path, saved, loaded):
    save_checkpoint(tmp_path / "step-1", {"a": parts(FULL, saved)}, {"step": 1}, None)
    tensor = torch.zeros(12, 8)
    load_checkpoint(tmp_path / "step-1", {"a": parts(tensor, loaded)})
    assert torch.equal(tensor, FULL)


def test_only_the_parts_that_are_asked_for_are_touched(tmp_path):
    save_checkpoint(tmp_path / "step-1", {"a": parts(FULL, "whole")}, {}, None)
    tensor = torch.zeros(12, 8)
    load_checkpoint(tmp_path / "step-1", {"a": Slices.of_views((12, 8), tensor.dtype, [((3, 2), tensor[3:5, 2:4])])})
    assert torch.equal(tensor[3:5, 2:4], FULL[3:5, 2:4])
    tensor[3:5, 2:4] = 0
    assert not tensor.any()


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3.0), torch.zeros(0, 4), torch.randn(3, 2).bfloat16(), torch.arange(4), torch.tensor([True, False])],
)
def test_shapes_and_dtypes(tmp_path, tensor):
    save_weights(tmp_path / "step-1", {"a": lazy(tensor)}, {})
    opened = open_checkpoint(tmp_path / "step-1")["a"]
    assert (opened.shape, opened.dtype) == (tuple(tensor.shape), tensor.dtype)
    assert torch.equal(opened.read(), tensor)


def test_a_lazy_tensor_is_read_when_it_is_written_and_only_then(tmp_path):
    reads = []

    def read() -> Tensor:
        reads.append(1)
        return FULL

    slices = Slices.of_lazy(LazyTensor((12, 8), torch.float32, read))
    assert reads == []
    save_checkpoint(tmp_path / "step-1", {"a": slices}, {"step": 4}, None)
    assert reads == [1]
    assert read_train_state(tmp_path / "step-1") == {"format": 1, "step": 4}


def test_copies_do_not_follow():
    tensor = FULL.clone()
    copies = parts(tensor, "packed rows").copied(torch.clone)
    tensor.zero_()
    for at, part in copies._parts.items():
        assert torch.equal(part.values(), FULL[at[0] : at[0] + part.sizes[0]])
    assert copies.shape == FULL.shape


@pytest.mark.parametrize("saved", PARTITIONS)
@pytest.mark.parametrize("loaded", PARTITIONS)
def test_what_is_loaded_into_a_copy_is_stored(tmp_path, saved, loaded):
    """Any box of a part may come from another file."""
    save_checkpoint(tmp_path / "step-1", {"a": parts(FULL, saved)}, {"step": 1}, None)
    halves = torch.zeros(12, 8), torch.zeros(12, 8)

    def part(at, size) -> Part:
        views = [half[at[0] : at[0] + size[0], at[1] : at[1] + size[1]] for half in halves]

        def store(first, values) -> None:
            for view in views:
                view[first[0] : first[0] + values.shape[0], first[1] : first[1] + values.shape[1]] = values / 2

        return Part(at, size, lambda: views[0] + views[1], store)

    slices = Slices(FULL.shape, FULL.dtype, [part(at, size) for at, size in PARTITIONS[loaded]])
    load_checkpoint(tmp_path / "step-1", {"a": slices})
    assert torch.equal(halves[0], FULL / 2) and torch.equal(halves[1], FULL / 2)
