"""Buckets without buffers: shapes, who is in which, and batches of one shape that leave nobody out."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux.data.buckets import Bucket, BucketShuffle, assign_buckets, make_buckets
from flux.data.order import BucketOrder
from flux.data.shuffle import Mixture


@pytest.mark.parametrize(
    ("img_size", "step", "max_aspect", "sizes"),
    [
        (256, 64, 2.0, {(192, 320), (256, 256), (320, 192)}),
        (64, 16, 2.0, {(48, 80), (64, 64), (80, 48)}),
        (64, 16, 1.0, {(64, 64)}),
        (64, 64, 2.0, {(64, 64)}),
    ],
)
def test_shapes_of_about_one_area(img_size, step, max_aspect, sizes):
    assert {bucket.size for bucket in make_buckets([img_size], step, max_aspect)} == sizes


@given(st.integers(4, 64), st.sampled_from([16, 32, 64]), st.floats(1, 4))
def test_shapes_keep_the_rules(units, step, max_aspect):
    img_size = units * step
    buckets = make_buckets([img_size], step, max_aspect)
    assert (img_size, img_size) in {bucket.size for bucket in buckets}
    assert len({bucket.size for bucket in buckets}) == len(buckets)
    for (width, height), _ in buckets:
        assert width % step == height % step == 0
        assert width * height <= img_size**2 < width * (height + step), "as large as the area allows"
        assert max(width, height) <= max_aspect * min(width, height)


def test_pictures_go_to_the_nearest_shape_of_the_area_that_they_fill():
    buckets = make_buckets([256, 512], 64, 2.0)
    pictures = np.array([[300, 300], [320, 190], [190, 320], [511, 511], [512, 512], [2000, 1000], [100, 60], [0, 0]])
    shown = [buckets[number] for number in assign_buckets(pictures, buckets)]
    assert [bucket.size for bucket in shown] == [
        *[(256, 256), (320, 192), (192, 320), (256, 256), (512, 512), (640, 384), (320, 192), (256, 256)]
    ]
    assert [bucket.img_size for bucket in shown] == [256, 256, 256, 256, 512, 512, 256, 256]


BUCKETS = [Bucket((64, 64), 64), Bucket((80, 48), 64), Bucket((48, 80), 64)]


def shuffle_of(counts: list[int], batch_sizes: list[int]) -> BucketShuffle:
    assigned = np.repeat(np.arange(len(counts)), counts)[np.random.default_rng(0).permutation(sum(counts))]
    return BucketShuffle(assigned, BUCKETS[: len(counts)], batch_sizes, 3, "train")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=3))
def test_nobody_is_left_out_and_nobody_comes_more_often(pairs):
    """Over many epochs each bucket's batches come one after the other, so that every sample is seen equally often."""
    counts, batch_sizes = zip(*pairs, strict=True)
    shuffle = shuffle_of(list(counts), list(batch_sizes))
    epochs = 6
    batches = sum(epochs * count // size for count, size in pairs)  # those that six epochs fill
    seen: dict[int, list[int]] = {bucket: [] for bucket in range(len(pairs))}
    for batch in range(batches):
        bucket, number = shuffle.locate(batch)
        seen[bucket].append(number)
    for bucket, (count, size) in enumerate(pairs):
        assert sorted(seen[bucket]) == list(range(epochs * count // size))
        samples = Counter(shuffle.index(bucket, place) for place in range(len(seen[bucket]) * size))
        visits = [samples[sample] for sample in range(sum(counts)) if sample in samples]
        assert not visits or max(visits) - min(visits) <= 1


def test_batches_of_an_epoch_are_shuffled():
    shuffle = shuffle_of([40, 40], [4, 4])
    buckets = [shuffle.locate(batch)[0] for batch in range(20)]
    assert Counter(buckets) == {0: 10, 1: 10}
    assert len(list(itertools.groupby(buckets))) > 4


def test_every_update_has_one_source_and_one_shape():
    order = BucketOrder([shuffle_of([9, 20], [6, 4]), shuffle_of([30], [6])], Mixture([1, 2], 3, "train"), 6, 3)
    sources = Counter()
    for update in range(60):
        samples = order.update_samples(6 * update)
        places = [order.place(6 * update + number) for number in range(samples)]
        assert len({(place.source, place.size) for place in places}) == 1
        assert samples == (4 if places[0].size == (80, 48) else 6)
        sources[places[0].source] += 1
    assert 10 <= sources[0] <= 30, "a third of the updates"


def test_a_substitute_has_the_shape_of_its_update():
    order = BucketOrder([shuffle_of([9, 20], [6, 6])], None, 6, 3)
    for position, attempt in itertools.product(range(36), range(1, 4)):
        place = order.place(position)
        assert order.place(position, attempt).size == place.size
    assert len({order.place(7, attempt).number for attempt in range(30)}) > 5


def test_found_far_away_at_once():
    shuffle = shuffle_of([40, 3, 17], [8, 8, 8])
    bucket, number = shuffle.locate(10**12)
    assert 0 <= shuffle.index(bucket, 8 * number) < 60
