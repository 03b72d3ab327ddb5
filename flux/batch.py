"""The dataclasses that walk through a training step, one per stage, and the legend of shapes.

A tensor's name ends in its dims, outermost first. The letters are logical dims, never the local shard:

    B batch           T image tokens            D width           A position axes
    C channels        L text tokens             N heads           E text features
    H W grid or px    S = L + T, text first     K head dim        V pooled text features

Stage words: pixels (-1..1), moments (mean and log-variance), latents (sampled, normalized, token order), tokens (text).
Time: x_t = (1 - t) * latents + t * noise, target = noise - latents, so t = 1 is pure noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor in it changed; what is no tensor stays as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _map(getattr(value, one.name), change) for one in fields(value)})
    return value


def _record_stream(batch: Any, stream: torch.cuda.Stream) -> None:
    def record(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)
        return tensor

    _map(batch, record)


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, keyed by (seed, stream, position) and drawn on the CPU in fp32."""

    t_B: Tensor
    noise_BTC: Tensor
    posterior_noise_BTC: Tensor | None  # None: use the posterior mean


class BadRecord(NamedTuple):
    """A sample that could not be used at its position."""

    position: int
    attempt: int  # 0: the sample that stands there; from 1 on, substitutes that were bad too
    reason: str
    shard: str
    key: str
    detail: str


@dataclass(frozen=True)
class RawBatch:
    """What the loader yields. Pictures come as pixels or as stored moments, prompts as tokens or as stored features."""

    pixels_BCHW: Tensor | None  # fp32 in -1..1; None: moments are there
    tokens: dict[str, Tensor]  # "t5" [B, L] and "clip" [B, 77], int64, of those prompts that are still to be encoded
    captions: list[str]  # before prompt dropout, which all the others have behind them
    keys: list[str]  # name the samples in messages
    position_B: Tensor  # int64, place in the endless global order
    draws: Draws
    update_samples: int  # that count, in the whole update that this is a part of
    uncaptioned_B: Tensor  # bool, T5 reads the empty prompt by prompt dropout
    counts_B: Tensor | None = None  # fp32, 0 for samples that only fill up the batch; None: all count
    moments_BCHW: Tensor | None = None  # mean and log-variance
    t5_BLE: Tensor | None = None
    t5_mask_BL: Tensor | None = None  # bool, rows of t5_BLE that are not padding; None: all are attended
    pooled_BV: Tensor | None = None
    bad: list[BadRecord] = field(default_factory=list)  # what was replaced on the way

    def to(self, device: torch.device | str) -> "RawBatch":
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "RawBatch":
        """In page-locked memory, from which copies to a GPU need no host. The data loader may have done it already."""
        return _map(self, lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that a stream uses the tensors, which another one has made."""
        _record_stream(self, stream)


@dataclass(frozen=True)
class TextCond:
    """What the transformer is told about the prompts."""

    txt_BLE: Tensor
    pooled_BV: Tensor | None = None
    mask_BL: Tensor | None = None  # bool, True = attend; None: padding is attended, as FLUX was trained


@dataclass(frozen=True)
class EncodedBatch:
    """What the frozen encoders make of a RawBatch."""

    latents_BTC: Tensor  # fp32
    grid: tuple[int, int]  # (rows, columns) of image tokens; T = rows * columns
    text: TextCond

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """As RawBatch's."""
        _record_stream(self, stream)
