"""Shuffling without a list: where a sample stands in an epoch is computed, from any place on, in constant time."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from flux.rng import keyed_bits, keyed_generator

_ROUNDS = 8
_MASK = 2**64 - 1


def permute(place: int, length: int, key: int) -> int:
    """Image of `place` under a random permutation of range(length).

    An alternating Feistel network on a grid of about sqrt(length) x sqrt(length) places (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): what falls outside of the range is sent through again.

    Args:
        place: in range(length).
        length: at least 1.
        key: 64 bits that choose the permutation.
    """
    rows = math.isqrt(length - 1) + 1
    columns = -(-length // rows)
    while True:
        row, column = divmod(place, columns)
        for step in range(_ROUNDS):
            row = (row + _mix(column + key + 2 * step)) % rows
            column = (column + _mix(row + key + 2 * step + 1)) % columns
        place = row * columns + column
        if place < length:
            return place


def _mix(value: int) -> int:
    """Spreads every bit over all 64 (the finalizer of SplitMix64, Steele et al. 2014)."""
    value = (value * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Shuffle:
    """The endless order of a source's samples: each epoch has every one once, in an order of its own.

    Args:
        shard_samples: samples of every shard, in order of index.
        window: so many shards are shuffled together, after the shards; 0: all samples are.
        seed, stream: key of the order.
    """

    def __init__(self, shard_samples: Sequence[int], window: int, seed: int, stream: str):
        self.window = window
        self.seed = seed
        self.stream = stream
        self._sizes = np.asarray(shard_samples, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.length = int(self._sizes.sum())
        # Bound to the object, not to the class, so that it goes with it; made anew in each worker.
        self._epoch_windows = lru_cache(maxsize=2)(self._make_windows)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_epoch_windows"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._epoch_windows = lru_cache(maxsize=2)(self._make_windows)

    def index(self, place: int) -> int:
        """The sample at a place of the endless order."""
        epoch, place = divmod(place, self.length)
        if not self.window:
            return permute(place, self.length, self._key(f"{epoch}"))
        order, ends, window_ends = self._epoch_windows(epoch)
        number = int(np.searchsorted(window_ends, place, side="right"))
        start = int(window_ends[number - 1]) if number else 0
        length = int(window_ends[number]) - start
        place = start + permute(place - start, length, self._key(f"{epoch}/{number}"))
        turn = int(np.searchsorted(ends, place, side="right"))  # in the epoch's order of shards
        shard = order[turn]
        return int(self._starts[shard] + place - (ends[turn] - self._sizes[shard]))

    def _key(self, position: str) -> int:
        return keyed_bits(self.seed, f"{self.stream}/shuffle", position)

    def _make_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's order of shards, the place at which each of them ends, and at which each window ends."""
        generator = keyed_generator(self.seed, f"{self.stream}/shards", epoch)
        order = torch.randperm(len(self._sizes), generator=generator).numpy()
        ends = np.cumsum(self._sizes[order])
        lasts = np.append(np.arange(self.window - 1, len(ends) - 1, self.window), len(ends) - 1)
        return order, ends, ends[lasts]


class Mixture:
    """Deals endless positions to several sources by weight, so that every block of positions has the exact shares.

    Args:
        weights: of the sources, at least one above 0.
        seed, stream: key of who comes when.
        key: configuration key of the weights, for messages.

    Raises:
        ValueError: a weight is too small beside the others.
    """

    BLOCK = 10_000

    def __init__(self, weights: Sequence[float], seed: int, stream: str, key: str = "data.sources"):
        self.seed = seed
        self.stream = stream
        shares = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * self.BLOCK
        counts = np.floor(shares).astype(np.int64)
        # Largest remainders first; of equal ones, the first source's.
        rest = np.argsort(-(shares - counts), kind="stable")[: self.BLOCK - int(counts.sum())]
        counts[rest] += 1
        for number, (weight, count) in enumerate(zip(weights, counts, strict=True)):
            if weight and not count:
                raise ValueError(
                    f"{key}[{number}].weight={weight:g} is less than one sample in {self.BLOCK:,}: raise it, or set 0"
                )
        self.counts = [int(count) for count in counts]
        self._ends = np.cumsum(counts)

    def locate(self, position: int) -> tuple[int, int]:
        """(source, place in that source's endless order) of a position."""
        block, slot = divmod(position, self.BLOCK)
        slot = permute(slot, self.BLOCK, keyed_bits(self.seed, f"{self.stream}/mixture", block))
        source = int(np.searchsorted(self._ends, slot, side="right"))
        count = self.counts[source]
        return source, block * count + slot - (int(self._ends[source]) - count)
