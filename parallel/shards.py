"""A parameter and the part of it that this rank holds, whatever axes of the mesh it is spread over."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard


@torch.no_grad()
def copy_full_(parameter: Tensor, full: Tensor) -> None:
    """Puts this rank's part of a full tensor into a parameter, without communication.

    Every rank gives the same values. What is copied beside them is at most this rank's part.

    Args:
        parameter: a plain tensor, or a DTensor over any of data, context and tensor parallel axes.
        full: plain, of the whole parameter's shape; any dtype and device.
    """
    assert full.shape == parameter.shape, (full.shape, parameter.shape)
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    check_layout(parameter)
    mesh, part = parameter.device_mesh, full
    for axis, placement in enumerate(parameter.placements):
        if (dim := split_dim(placement)) is not None:
            part = _take(part, dim, _pieces(placement), mesh.size(axis), mesh.get_local_rank(axis))
    parameter.to_local().copy_(part)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a parameter or gradient as a plain tensor, on every rank; all ranks of its mesh must call it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    check_layout(tensor)
    mesh, shape, stride = tensor.device_mesh, tensor.shape, tensor.stride()
    # Gathered as if each rank had one piece, then put in order: torch 2.11 cannot gather packed dims itself.
    plain = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]
    gathered = DTensor.from_local(tensor.to_local(), mesh, plain, run_check=False, shape=shape, stride=stride)
    full: Tensor = gathered.full_tensor()
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, _StridedShard):
            dim = placement.dim
            by_rank = full.unflatten(dim, (mesh.size(axis), placement.split_factor, -1))
            full = by_rank.transpose(dim, dim + 1).flatten(dim, dim + 2)
    return full.detach()


def local_views(tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """The boxes of a tensor that this rank holds: where each begins in the whole tensor, and a view of its values.

    One box, or several where packed rows or columns are split piece by piece; none where others hold all of it.
    """
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tensor.detach())]
    check_layout(tensor)
    mesh, segments = tensor.device_mesh, [[(0, size)] for size in tensor.shape]  # of each dim: (start, length)
    for axis, placement in enumerate(tensor.placements):
        if (dim := split_dim(placement)) is not None:
            count, index, (start, length) = mesh.size(axis), mesh.get_local_rank(axis), segments[dim][0]
            piece = length // _pieces(placement)
            part = -(-piece // count)
            first = min(index * part, piece)
            held = min(part, piece - first)
            segments[dim] = [(start + number * piece + first, held) for number in range(_pieces(placement))]
    views: list[tuple[tuple[int, ...], Tensor]] = [((), local_part(tensor))]
    for dim, parts in enumerate(segments):
        views = [
            ((*offsets, start), view.narrow(dim, place * length, length))
            for offsets, view in views
            for place, (start, length) in enumerate(parts)
        ]
    return [(offsets, view) for offsets, view in views if view.numel()]


def is_saver(tensor: Tensor, name: str) -> bool:
    """Whether this rank is the one that saves its part of a tensor, of all that hold the same part.

    Names spread the work over the copies; a tensor that is not spread over a mesh is everybody's.
    """
    if not isinstance(tensor, DTensor):
        return True
    copy, copies = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if split_dim(placement) is None:
            size = tensor.device_mesh.size(axis)
            copy, copies = copy * size + tensor.device_mesh.get_local_rank(axis), copies * size
    return zlib.crc32(name.encode()) % copies == copy


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain one that shares its memory."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    return getattr(local, "_tensor", local)  # a weight that float8 gathers in 8 bits is wrapped by torchao


def local_bytes(tensor: Tensor) -> int:
    """Memory that this rank spends on a tensor."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def split_dim(placement: Placement) -> int | None:
    """The dim that an axis of the mesh splits, packed or not; None: its ranks hold the same."""
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def check_layout(tensor: DTensor) -> None:
    """A packed dim is split once: DTensor puts the rows of two splits together in a wrong order, without a word.

    Raises:
        AssertionError: a dim is split again after another axis split it, and packed.
    """
    split: set[int] = set()
    for placement in tensor.placements:
        dim = split_dim(placement)
        assert dim not in split or _pieces(placement) == 1, f"{tensor.placements} split packed dim {dim} twice"
        split |= set() if dim is None else {dim}


def _pieces(placement: Placement) -> int:
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else 1


def _take(full: Tensor, dim: int, pieces: int, count: int, index: int) -> Tensor:
    """Part `index` of `count`: of the whole dim, or the same part of each of its packed pieces."""
    if pieces > 1:
        return full.unflatten(dim, (pieces, count, -1)).select(dim + 1, index).flatten(dim, dim + 1)
    parts = full.chunk(count, dim)
    return parts[index] if index < len(parts) else full.narrow(dim, full.shape[dim], 0)


def gather_state_dict(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All tensors whole, in the CPU's memory, on ranks that `keep` them; the others only help and get nothing.

    One tensor at a time is whole on the device. All ranks must call it.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor)
        if keep:
            kept[name] = whole.cpu()
    return kept
