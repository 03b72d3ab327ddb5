"""Orders that are computed: every sample once per epoch, in an order of each epoch's own, from any place on."""

import itertools
import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux.data.shuffle import Mixture, Shuffle, permute
from flux.rng import keyed_bits


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutation_has_everything_once(length, key):
    assert sorted(permute(place, length, key) for place in range(length)) == list(range(length))


@pytest.mark.parametrize("length", [2, 3, 4])
def test_all_permutations_are_equally_likely(length):
    """Every one within five standard deviations of its share of 6000 keys."""
    draws = 6000
    seen = Counter(
        tuple(permute(place, length, keyed_bits(0, "test", key)) for place in range(length)) for key in range(draws)
    )
    orders = list(itertools.permutations(range(length)))
    expected = draws / len(orders)
    assert all(abs(seen[order] - expected) < 5 * expected**0.5 for order in orders)


def test_neighbors_land_anywhere():
    """Differences between images of neighbors, in ten equal classes: a chi-square of 9 degrees of freedom below 36."""
    length, pairs = 100_003, 20_000
    classes = Counter(
        (permute(place + 1, length, 7) - permute(place, length, 7)) % length * 10 // length for place in range(pairs)
    )
    chi_square = sum((classes[number] - pairs / 10) ** 2 / (pairs / 10) for number in range(10))
    assert chi_square < 36


def test_a_billion_samples_take_no_memory_and_no_time():
    shuffle = Shuffle([10**9], 0, 0, "train")
    assert len({shuffle.index(10**9 + place) for place in range(2000)}) == 2000


SHARDS = [3, 5, 2, 7, 1, 4, 6]


@pytest.mark.parametrize("window", [0, 1, 2, 3, 7, 100])
def test_every_epoch_has_every_sample_once(window):
    shuffle = Shuffle(SHARDS, window, 5, "train")
    length = sum(SHARDS)
    epochs = [[shuffle.index(epoch * length + place) for place in range(length)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_is_finished_before_the_next_begins(window):
    shuffle = Shuffle(SHARDS, window, 5, "train")
    shard_of = [shard for shard, samples in enumerate(SHARDS) for _ in range(samples)]
    visited = [shard_of[shuffle.index(place)] for place in range(sum(SHARDS))]
    order = list(dict.fromkeys(visited))
    for first in range(0, len(SHARDS), window):
        members = set(order[first : first + window])
        places = [place for place, shard in enumerate(visited) if shard in members]
        assert places == list(range(places[0], places[0] + len(places)))
    if window > 1:
        assert visited != sorted(visited, key=order.index), "shards of a window are mixed"


def test_order_depends_on_seed_and_stream_and_survives_a_pickle():
    orders = {
        tuple(Shuffle(SHARDS, 2, seed, stream).index(place) for place in range(28))
        for seed, stream in [(0, "train"), (1, "train"), (0, "train/source 1")]
    }
    assert len(orders) == 3
    shuffle = Shuffle(SHARDS, 2, 0, "train")
    shuffle.index(0)
    assert pickle.loads(pickle.dumps(shuffle)).index(17) == shuffle.index(17)


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [1, 2, 0.5], [0.7, 0.0, 0.3], [1e-4, 1]])
def test_mixture_is_exact_in_every_block(weights):
    mixture = Mixture(weights, 3, "train")
    places: dict[int, list[int]] = {source: [] for source in range(len(weights))}
    for position in range(2 * Mixture.BLOCK):
        source, place = mixture.locate(position)
        places[source].append(place)
    for source, weight in enumerate(weights):
        assert sorted(places[source]) == list(range(len(places[source]))), "each place of a source once"
        assert abs(len(places[source]) - 2 * Mixture.BLOCK * weight / sum(weights)) <= 2


def test_mixture_refuses_a_weight_that_no_block_can_hold():
    with pytest.raises(ValueError, match=r"data.sources\[1\].weight=1e-06 is less than one sample in 10,000"):
        Mixture([1, 1e-6], 0, "train")
