"""The one global order: which sample stands at a position, and in which shape it is shown.

A position is a sample's place in the endless order of a run. The order follows from the seed and the data alone, so it
is the same on every layout and after every resume, and any position is found at once.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from flux.data.buckets import BucketShuffle, Size
from flux.data.shuffle import Mixture, Shuffle
from flux.rng import keyed_bits

TRIES_IN_BUCKET = 10  # substitutes that come from the bucket of the update


class Place(NamedTuple):
    """What stands at a position."""

    source: int
    number: int  # of the sample in the source
    size: Size  # (width, height) in which it is shown, pixels


class Order(Protocol):
    """Positions -> places."""

    def place(self, position: int, attempt: int = 0) -> Place:
        """`attempt` counts the samples at this position that were bad: from 1 on, a substitute is named.

        A substitute is any sample of the same source and shape, drawn by position and attempt, so that no other
        position moves.
        """
        ...

    def update_samples(self, start: int) -> int:
        """Samples of the update whose first position is `start`."""
        ...


class ShuffledOrder:
    """Training on pictures of one shape: every source is shuffled, and several are mixed sample by sample.

    Args:
        shuffles: of every source.
        mixture: of the sources; None: there is one.
        size: in which all pictures are shown.
        update_size: samples per update.
        seed: key of the substitutes.
    """

    def __init__(self, shuffles: Sequence[Shuffle], mixture: Mixture | None, size: Size, update_size: int, seed: int):
        self.shuffles = shuffles
        self.mixture = mixture
        self.size = size
        self.update_size = update_size
        self.seed = seed

    def place(self, position: int, attempt: int = 0) -> Place:
        source, place = self.mixture.locate(position) if self.mixture else (0, position)
        shuffle = self.shuffles[source]
        index = _draw(self.seed, position, attempt) % shuffle.length if attempt else shuffle.index(place)
        return Place(source, index, self.size)

    def update_samples(self, start: int) -> int:
        return self.update_size


class BucketOrder:
    """Training on pictures of many shapes: every update has one source and one bucket.

    Args:
        shuffles: of every source.
        mixture: of the sources, update by update; None: there is one.
        update_size: positions per update, at least as many as any bucket's batch has samples.
        seed: key of the substitutes.
    """

    def __init__(self, shuffles: Sequence[BucketShuffle], mixture: Mixture | None, update_size: int, seed: int):
        self.shuffles = shuffles
        self.mixture = mixture
        self.update_size = update_size
        self.seed = seed

    def place(self, position: int, attempt: int = 0) -> Place:
        update, number = divmod(position, self.update_size)
        source, bucket, batch = self._locate(update)
        shuffle = self.shuffles[source]
        if attempt:
            draw = _draw(self.seed, position, attempt)
            # A bucket may have only bad ones: then any picture is cut to its shape.
            index = shuffle.member(bucket, draw) if attempt <= TRIES_IN_BUCKET else draw % shuffle.length
        else:
            index = shuffle.index(bucket, batch * shuffle.batch_sizes[bucket] + number)
        return Place(source, index, shuffle.sizes[bucket])

    def update_samples(self, start: int) -> int:
        source, bucket, _ = self._locate(start // self.update_size)
        return self.shuffles[source].batch_sizes[bucket]

    def _locate(self, update: int) -> tuple[int, int, int]:
        source, batch = self.mixture.locate(update) if self.mixture else (0, update)
        return source, *self.shuffles[source].locate(batch)


class PlainOrder:
    """Validation: the samples of all sources as they stand, one source after the other.

    Args:
        lengths: of the sources.
        sizes: (width, height) in which pictures are shown: one for all, or int [sum of the lengths, 2].
        seed: key of the substitutes.
        visits: so many positions in a row have the same sample.
    """

    def __init__(self, lengths: Sequence[int], sizes: Size | np.ndarray, seed: int, visits: int = 1):
        self.lengths = lengths
        self.sizes = np.broadcast_to(sizes, (sum(lengths), 2))
        self.seed = seed
        self.visits = visits

    def place(self, position: int, attempt: int = 0) -> Place:
        position //= self.visits
        index = position % len(self.sizes)
        width, height = map(int, self.sizes[index])
        if attempt:  # from anywhere: neighbors of a bad sample are often bad too
            alike = np.flatnonzero((self.sizes == self.sizes[index]).all(axis=1))
            index = int(alike[_draw(self.seed, position, attempt) % len(alike)])
        for source, length in enumerate(self.lengths):
            if index < length:
                return Place(source, index, (width, height))
            index -= length
        raise AssertionError("the index is below the sum of the lengths")

    def positions_by_size(self, end: int) -> list[np.ndarray]:
        """The positions before `end`, those of pictures of one size together."""
        samples = np.arange(end) // self.visits % len(self.sizes)
        _, numbers = np.unique(self.sizes[samples], axis=0, return_inverse=True)
        return [np.flatnonzero(numbers.ravel() == number) for number in range(numbers.max() + 1)]


def _draw(seed: int, position: int, attempt: int) -> int:
    return keyed_bits(seed, f"substitute/{attempt}", position)
