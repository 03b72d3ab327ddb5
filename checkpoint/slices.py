"""The parts of a tensor that one process holds, as torch's distributed checkpoint (DCP) reads and writes them.

DCP knows DTensors, but none whose packed rows are split piece by piece, of which a process holds several separate
parts. Through its `_Checkpointable` protocol any object can say which parts it has; this one says it for every tensor
alike: whole, sharded, packed, or still in a file.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from checkpoint.lazy import LazyTensor


@dataclass(frozen=True)
class Part:
    """A box of a tensor: where it begins, its size, and how to get at its values.

    Args:
        store: where `values` gives a copy: takes what has been loaded, and where in the box that begins.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    values: Callable[[], Tensor]
    store: Callable[[Sequence[int], Tensor], None] | None = None

    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=torch.Size(self.sizes))


class Slices:
    """What one process holds of a tensor; DCP saves these parts, or loads into them.

    Args:
        shape, dtype: of the whole tensor.
        parts: none where other processes hold everything. Several processes may hold the same part.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, parts: Iterable[Part]):
        self.shape, self.dtype = torch.Size(shape), dtype
        self._parts = {part.offsets: part for part in parts}

    @classmethod
    def of_views(cls, shape: Sequence[int], dtype: torch.dtype, views: Iterable[tuple[tuple[int, ...], Tensor]]):
        """From (offsets, values) pairs; what is loaded goes into the values."""
        return cls(shape, dtype, [Part(offsets, tuple(view.shape), partial(_same, view)) for offsets, view in views])

    @classmethod
    def of_lazy(cls, tensor: LazyTensor):
        """A whole tensor that is read when it is written."""
        return cls(tensor.shape, tensor.dtype, [Part((0,) * len(tensor.shape), tensor.shape, tensor.read)])

    def copied(self, copy: Callable[[Tensor], Tensor]) -> "Slices":
        """The same parts with copies of their values."""
        views = [(part.offsets, copy(part.values())) for part in self._parts.values()]
        return Slices.of_views(self.shape, self.dtype, views)

    # What follows is DCP's protocol, torch/distributed/_checkpointable.py.

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(part.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=part.chunk(), properties=properties, size=self.shape),
            )
            for part in self._parts.values()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [part.chunk() for part in self._parts.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._part(index).values()

    def store(self, index: MetadataIndex, first: Sequence[int], values: Tensor) -> None:
        """To be called with what has been loaded into a part, or into a box of it that begins at `first`."""
        if (store := self._part(index).store) is not None:
            store(first, values)

    def _part(self, index: MetadataIndex) -> Part:
        assert index.offset is not None, index
        return self._parts[tuple(index.offset)]


def _same(values: Tensor) -> Tensor:
    return values
