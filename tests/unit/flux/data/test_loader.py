"""The global order: draws, pixels and tokens of a sample do not depend on who prepares it or in which batch."""

import itertools
from dataclasses import replace

import pytest
import torch

from flux.batch import RawBatch
from flux.config import DataLoader, Encoder
from flux.data.errors import DataError
from flux.data.loader import Loader, PositionBatches, PositionedDataset, TrainingDraws, ValidationDraws
from flux.data.sample import Sample
from flux.data.shapes import ShapesSource
from flux.data.tokenizers import build_tokenizer
from flux.spec import SPECS

SPEC = SPECS["flux-tiny"]
DRAWS = TrainingDraws(seed=5, drop_prob=0.5)
POSITIONS = 24


class ShortSource:
    """A few shapes pictures of odd sizes, so that epochs end soon and crops matter."""

    def __init__(self, length: int = 10):
        self.length = length
        self.shapes = ShapesSource("train", 48)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        sample = self.shapes[index]
        return sample._replace(image=sample.image.resize((48 + 8 * index, 40)))


class FaultySource(ShortSource):
    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            raise DataError("broken.jpg does not decode")
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(Encoder(max_t5_encoding_len=16), test_mode=False)


def load(tokenizer, *, count=POSITIONS, batch=4, workers=0, draws=DRAWS, source=None, cursor=0, rank=0, degree=1):
    """position -> (caption, pixels, draws, tokens) of the first `count` positions from the cursor."""
    dataset = PositionedDataset(source or ShortSource(), tokenizer, SPEC, 32, draws)
    loader = Loader(dataset, PositionBatches(cursor, batch, rank, degree), DataLoader(num_workers=workers))
    samples = {}
    for raw in itertools.islice(loader, count // batch):
        samples.update(by_position(raw))
    return samples


def by_position(raw: RawBatch) -> dict:
    posterior = raw.draws.posterior_noise_BTC
    return {
        int(position): {
            "caption": raw.captions[row],
            "pixels": raw.pixels_BCHW[row],
            "t": raw.draws.t_B[row],
            "noise": raw.draws.noise_BTC[row],
            "posterior": posterior[row],
            **{key: ids[row] for key, ids in raw.tokens.items()},
        }
        for row, position in enumerate(raw.position_B)
    }


def assert_bit_equal(samples: dict, others: dict) -> None:
    assert samples.keys() == others.keys()
    for position, name in itertools.product(samples, next(iter(samples.values()))):
        one, other = samples[position][name], others[position][name]
        assert one == other if isinstance(one, str) else torch.equal(one, other), (position, name)


@pytest.mark.parametrize("change", [{"batch": 2}, {"batch": 12}, {"workers": 1}, {"workers": 2, "batch": 3}])
def test_batch_size_and_workers_change_nothing(tokenizer, change):
    assert_bit_equal(load(tokenizer), load(tokenizer, **change))


def test_ranks_share_out_the_same_samples(tokenizer):
    shared = {}
    for rank in range(3):
        shared |= load(tokenizer, count=POSITIONS // 3, batch=4, rank=rank, degree=3)
    assert_bit_equal(load(tokenizer), {position: shared[position] for position in sorted(shared)})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("cursor", "end"), [(0, 1), (0, 8), (0, 10), (0, 23), (0, 24), (5, 23), (7, 8), (9, 9)])
def test_ranks_get_equally_many_full_batches(ranks, cursor, end):
    """They wait for each other; what lies beyond the end only fills up the last batches."""
    dealt = [list(PositionBatches(cursor, 4, rank, ranks, end)) for rank in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    assert all(len(batch) == 4 for batches in dealt for batch in batches)
    positions = sorted(position for batches in dealt for batch in batches for position in batch)
    assert [position for position in positions if position < end] == list(range(cursor, end))
    assert len(positions) == len(set(positions)) < end - cursor + 4 * ranks, "no round without a position that counts"


def test_every_update_uses_the_next_positions_on_any_layout():
    """Two accumulated forward passes of 3 ranks are the same 24 positions as six of one."""
    chain = itertools.chain.from_iterable
    alone = chain(itertools.islice(PositionBatches(12, 4), 6))
    shared = chain(chain(itertools.islice(PositionBatches(12, 4, rank, 3), 2) for rank in range(3)))
    assert sorted(alone) == sorted(shared) == list(range(12, 36))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_samples_beyond_the_source_fill_up(tokenizer, ranks):
    """A source of 3 is dealt in batches of 4: positions 3 and on show its pictures again, at other times."""
    dataset = PositionedDataset(ShortSource(3), tokenizer, SPEC, 32, ValidationDraws(seed=5))
    loaders = [Loader(dataset, PositionBatches(0, 4, rank, ranks, end=8), DataLoader()) for rank in range(ranks)]
    samples = {}
    for loader in loaders:
        assert loader.end == 8
        for raw in loader:
            samples |= by_position(raw)
    assert set(range(8)) <= samples.keys()
    for position, sample in samples.items():
        assert sample["caption"] == ShortSource(3)[position % 3].caption
        assert sample["t"].item() == (position % 8 + 0.5) / 8
    assert not torch.equal(samples[0]["noise"], samples[3]["noise"])


def test_training_has_no_end(tokenizer):
    dataset = PositionedDataset(ShortSource(), tokenizer, SPEC, 32, DRAWS)
    assert Loader(dataset, PositionBatches(0, 4), DataLoader()).end is None


def test_a_cursor_continues_the_order(tokenizer):
    everything = load(tokenizer)
    rest = load(tokenizer, count=12, cursor=12)
    assert_bit_equal({position: everything[position] for position in range(12, 24)}, rest)


def test_another_seed_is_another_run(tokenizer):
    with pytest.raises(AssertionError):
        assert_bit_equal(load(tokenizer), load(tokenizer, draws=replace(DRAWS, seed=6)))


def test_each_epoch_is_a_new_permutation_with_new_draws(tokenizer):
    samples = load(tokenizer, count=20)
    first, second = ([samples[position]["caption"] for position in range(start, start + 10)] for start in (0, 10))
    assert sorted(first) == sorted(second) and first != second
    position, again = 0, 10 + second.index(first[0])
    for name in ("t", "noise", "posterior", "pixels"):
        assert not torch.equal(samples[position][name], samples[again][name]), name


def test_prompt_dropout_per_encoder_or_joint(tokenizer):
    empty = tokenizer([""])

    def dropped(joint: bool) -> list[tuple[bool, bool]]:
        draws = replace(DRAWS, drop_jointly=joint)
        samples = load(tokenizer, count=400, batch=40, draws=draws).values()
        return [tuple(torch.equal(sample[key], empty[key][0]) for key in ("t5", "clip")) for sample in samples]

    independent, joint = dropped(False), dropped(True)
    assert set(independent) == {(False, False), (True, False), (False, True), (True, True)}
    assert set(joint) == {(False, False), (True, True)}
    for outcomes, column in itertools.product((independent, joint), (0, 1)):
        assert 150 < sum(outcome[column] for outcome in outcomes) < 250


def test_no_dropout_keeps_every_prompt(tokenizer):
    samples = load(tokenizer, draws=replace(DRAWS, drop_prob=0.0))
    for sample in samples.values():
        assert torch.equal(sample["t5"], tokenizer([sample["caption"]])["t5"][0])


def test_validation_is_the_same_at_every_pass(tokenizer):
    dataset = PositionedDataset(ShortSource(), tokenizer, SPEC, 32, ValidationDraws(seed=5))
    loader = Loader(dataset, PositionBatches(0, 4, end=10), DataLoader())
    first, second = ([*loader], [*loader])
    assert [len(raw.captions) for raw in first] == [4, 4, 4] and loader.end == 10
    samples, again = ({k: v for raw in passes for k, v in by_position(raw).items()} for passes in (first, second))
    assert_bit_equal(samples, again)
    assert sorted(samples) == list(range(12))
    assert [samples[position]["t"].item() for position in range(10)] == [(k % 8 + 0.5) / 8 for k in range(10)]
    assert [samples[p]["caption"] for p in range(10)] == [ShortSource()[index].caption for index in range(10)]


def test_validation_draws_are_not_training_draws(tokenizer):
    dataset = PositionedDataset(ShortSource(), tokenizer, SPEC, 32, ValidationDraws(seed=5))
    assert not torch.equal(dataset[0].noise_TC, load(tokenizer, count=4)[0]["noise"])


def test_posterior_mean_needs_no_noise(tokenizer):
    dataset = PositionedDataset(ShortSource(), tokenizer, SPEC, 32, replace(DRAWS, sample_posterior=False))
    raw = next(iter(Loader(dataset, PositionBatches(0, 2), DataLoader())))
    assert raw.draws.posterior_noise_BTC is None


def test_resolution_shift_moves_the_same_draws_towards_noise(tokenizer):
    plain = load(tokenizer)
    shifted = load(tokenizer, draws=replace(DRAWS, shift_by_resolution=True))
    moved = [shifted[position]["t"] > plain[position]["t"] for position in plain]
    assert all(moved)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_sample_is_named_without_a_workers_traceback(tokenizer, workers):
    with pytest.raises(DataError) as caught:
        load(tokenizer, source=FaultySource(), workers=workers)
    assert str(caught.value) == "broken.jpg does not decode"


def test_moving_a_batch_keeps_what_is_no_tensor(tokenizer):
    dataset = PositionedDataset(ShortSource(), tokenizer, SPEC, 32, replace(DRAWS, sample_posterior=False))
    raw = next(iter(Loader(dataset, PositionBatches(0, 2), DataLoader()))).to("meta")
    assert raw.pixels_BCHW.device.type == raw.tokens["t5"].device.type == raw.draws.t_B.device.type == "meta"
    assert raw.captions and raw.draws.posterior_noise_BTC is None
