"""An exponential moving average of the weights (arXiv 2006.11239, appendix B), spread over ranks as the weights are.

torch's AveragedModel copies the module, and averages bfloat16 weights in bfloat16, in which small moves are lost.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from training.spread import local, spread_like


@torch.no_grad()
def build_ema(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averages by the names of the parameters: float32 copies that begin at the weights of now.

    A DTensor's average is a DTensor of the same layout, so that both are saved and loaded alike. What a rank holds
    of it is a plain tensor even where its part of the weight is of a subclass (torchao's float8 all-gather).
    """
    return {
        name: spread_like(parameter, _copy(local(parameter), torch.float32)) for name, parameter in parameters.items()
    }


def ema_decay(decay: float, step: int) -> float:
    """The share of the average that step `step` (1-based) keeps: little at first, when the weights still run."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(
    ema: Mapping[str, Tensor], parameters: Mapping[str, Tensor], decay: float, step: int, skip: Tensor
) -> None:
    """Moves the averages towards the weights that step `step` (1-based) left, without communication.

    Each element takes the same few operations wherever it lies, so all layouts have the same bits.

    Args:
        skip: float32 `[]` on any device, 1 when the step's update was left out: averages keep their values; else 0.
    """
    moved = (1 - ema_decay(decay, step)) * (1 - skip)
    for name, parameter in parameters.items():
        average = local(ema[name])
        moved = moved.to(average.device)  # waits for a GPU once, where averages are kept in the CPU's memory
        # In float32 also where the weights are in bfloat16, in which a small move would be rounded away.
        average.lerp_(local(parameter).to(torch.float32), moved)


@contextmanager
def ema_weights(
    ema: Mapping[str, Tensor], parameters: Mapping[str, Tensor], on_change: Callable[[], object]
) -> Iterator[None]:
    """Inside, the model holds the averages; afterwards its own weights again, bit for bit.

    Costs this rank's part of the weights once more.

    Args:
        on_change: called each time the weights have changed: frees copies of them and computes anew what follows from
            them (whole weights that were gathered, float8 scales).
    """
    own = {name: _copy(local(parameter), parameter.dtype) for name, parameter in parameters.items()}
    try:
        _put(ema, parameters)
        on_change()
        yield
    finally:
        _put(own, parameters)
        on_change()


@torch.no_grad()
def _put(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        local(parameter).copy_(local(values[name]))


@torch.no_grad()
def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain copy on the same device, also of a subclass."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)
