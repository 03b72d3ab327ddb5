"""Aspect-ratio buckets, computed instead of buffered: which samples make an update follows from its number alone.

Every bucket has an endless order of its samples, cut into batches of one update each. An epoch has those batches that
the buckets have filled by its end: what remains of a bucket is carried over to its next epoch, so no sample is dropped
and none is seen more often than the others. The batches of an epoch are shuffled.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flux.data.shuffle import Shuffle, permute
from flux.rng import keyed_bits
from flux.spec import PIXELS_PER_TOKEN

Size = tuple[int, int]  # (width, height) in pixels


class Bucket(NamedTuple):
    """One shape in which pictures are shown."""

    size: Size
    img_size: int  # side of the square that has about its area

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1] // PIXELS_PER_TOKEN**2


def make_buckets(img_sizes: Sequence[int], step: int, max_aspect: float) -> list[Bucket]:
    """All shapes with sides of multiples of `step`, no larger than their square and as large as that allows.

    Args:
        img_sizes: sides of the squares, multiples of `step`.
        step: pixels, a multiple of 16.
        max_aspect: longest shape, long side by short side.
    """
    buckets = []
    for img_size in sorted(set(img_sizes)):
        for width in range(step, int(img_size * math.sqrt(max_aspect)) + step, step):
            height = img_size**2 // width // step * step
            if height and max(width, height) <= max_aspect * min(width, height):
                buckets.append(Bucket((width, height), img_size))
    return buckets


def assign_buckets(sizes: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Number of the bucket of every picture: of the largest area that it fills, the nearest shape.

    Args:
        sizes: (width, height) of the pictures, int [len, 2]; (0, 0) is not known and counts as a small square.
        buckets: of `make_buckets`.
    """
    squares = np.array(sorted({bucket.img_size for bucket in buckets}))
    known = sizes.min(axis=1) > 0
    width, height = np.where(known, sizes[:, 0], 1).astype(np.float64), np.where(known, sizes[:, 1], 1)
    level = np.searchsorted(squares.astype(np.float64) ** 2, width * height, side="right") - 1
    level = np.maximum(level, 0)  # small pictures are enlarged to the smallest
    aspect = np.log(width / height)
    numbers = np.empty(len(sizes), dtype=np.int32)
    for place, square in enumerate(squares):
        members = [number for number, bucket in enumerate(buckets) if bucket.img_size == square]
        chosen = level == place
        shapes = np.array([math.log(buckets[number].size[0] / buckets[number].size[1]) for number in members])
        order = np.argsort(shapes)
        middles = (shapes[order][1:] + shapes[order][:-1]) / 2
        numbers[chosen] = np.array(members, dtype=np.int32)[order][np.searchsorted(middles, aspect[chosen])]
    return numbers


class BucketShuffle:
    """The endless order of a source's batches.

    Args:
        assigned: bucket of every sample.
        buckets: the shapes.
        batch_sizes: samples of an update of each bucket.
        seed, stream: key of the order.
    """

    def __init__(
        self, assigned: np.ndarray, buckets: Sequence[Bucket], batch_sizes: Sequence[int], seed: int, stream: str
    ):
        counts = np.bincount(assigned, minlength=len(buckets))
        used = [number for number in range(len(buckets)) if counts[number]]
        self.sizes = [buckets[number].size for number in used]
        self.batch_sizes = [batch_sizes[number] for number in used]
        self.counts = [int(counts[number]) for number in used]
        self.seed, self.stream = seed, stream
        self.length = len(assigned)
        by_bucket = np.argsort(assigned, kind="stable").astype(np.uint32 if len(assigned) < 2**32 else np.int64)
        self._members = np.split(by_bucket, np.cumsum(self.counts)[:-1])
        self._shuffles = [
            Shuffle([count], 0, seed, f"{stream}/bucket {width}x{height}")
            for count, (width, height) in zip(self.counts, self.sizes, strict=True)
        ]

    def locate(self, batch: int) -> tuple[int, int]:
        """(bucket in use, number of the batch in that bucket's endless order) of a batch of the endless order."""
        epoch = self._epoch(batch)
        before, after = self._filled(epoch), self._filled(epoch + 1)
        start, length = sum(before), sum(after) - sum(before)
        turn = permute(batch - start, length, keyed_bits(self.seed, f"{self.stream}/batches", epoch))
        for bucket, (first, end) in enumerate(zip(before, after, strict=True)):
            if turn < end - first:
                return bucket, first + turn
            turn -= end - first
        raise AssertionError("the batches of an epoch are those of its buckets")

    def index(self, bucket: int, place: int) -> int:
        """The sample at a place of the endless order of a bucket in use."""
        return int(self._members[bucket][self._shuffles[bucket].index(place)])

    def member(self, bucket: int, draw: int) -> int:
        """Any sample of a bucket in use, by a random number."""
        return int(self._members[bucket][draw % self.counts[bucket]])

    def _filled(self, epoch: int) -> list[int]:
        """Batches that each bucket has filled before an epoch."""
        return [epoch * count // size for count, size in zip(self.counts, self.batch_sizes, strict=True)]

    def _epoch(self, batch: int) -> int:
        """The epoch that a batch belongs to: the last one before which at most `batch` batches were filled."""
        low, high = 0, 1
        while sum(self._filled(high)) <= batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._filled(middle)) <= batch else (low, middle)
        return low
