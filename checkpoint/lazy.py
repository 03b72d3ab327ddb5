"""A tensor that lies in a file until somebody reads it: what conversion passes on, one tensor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype are known from the start, the values when `read` or `read_rows` is called.

    Args:
        read: gives the values on the CPU; reads anew at every call and keeps nothing.
        rows: gives `read()[start:stop]` without reading the rest, where the file allows it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    rows: Callable[[int, int], Tensor] | None = None

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.rows(start, stop) if self.rows else self.read()[start:stop]


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def lazy_all(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: lazy(tensor) for name, tensor in tensors.items()}


def read_all(tensors: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    """All of them, in memory."""
    return {name: tensor.read() for name, tensor in tensors.items()}


def cast_all(tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Floating tensors in another number format, converted when they are read; None: as they are.

    Reading raises ValueError for a value that is too large for the format: it would become infinite in silence.
    """
    if dtype is None:
        return dict(tensors)
    return {
        name: _cast(name, tensor, dtype) if tensor.dtype.is_floating_point and tensor.dtype != dtype else tensor
        for name, tensor in tensors.items()
    }


def _cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    def read() -> Tensor:
        values = tensor.read().detach()
        # Only what comes from a wider range can overflow; looking costs as much as converting.
        if values.numel() and torch.finfo(dtype).max < torch.finfo(values.dtype).max:
            largest = max(abs(value.item()) for value in values.aminmax())
            if torch.finfo(dtype).max < largest < float("inf"):
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(f"{name} reaches {largest:.4g}, too large for {kind}: take bfloat16 or float32")
        return values.to(dtype)

    return LazyTensor(tensor.shape, dtype, read)
