"""Bad samples move nothing: others stand in for them, and whoever is good stays where it is."""

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flux.batch import RawBatch
from flux.config import DataLoader, Encoder
from flux.data.buckets import Bucket, BucketShuffle
from flux.data.dataset import MAX_ATTEMPTS, OpenSource, PositionedDataset, Slot, TrainingDraws, ValidationDraws, collate
from flux.data.decode import DecodeRules
from flux.data.errors import BadSample, DataError
from flux.data.loader import Loader, PositionBatches
from flux.data.order import BucketOrder, Place, PlainOrder, ShuffledOrder
from flux.data.sample import EncodedSample, Sample, Shard
from flux.data.shuffle import Mixture, Shuffle
from flux.data.tokenizers import build_tokenizer
from flux.spec import SPECS

SPEC = SPECS["flux-tiny"]
RULES = DecodeRules(min_side=8, max_aspect=4, max_megapixels=1, background=(255, 255, 255), fast_jpeg=True)
DRAWS = TrainingDraws(seed=5, drop_prob=0.3)
LENGTH, POSITIONS, BATCH = 20, 60, 4


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(Encoder(max_t5_encoding_len=16), test_mode=False)


class Pictures:
    """PNG files in one color each; some of them are broken in one way or another."""

    def __init__(self, broken: dict[int, str] | None = None, length: int = LENGTH):
        self.broken = broken or {}
        self.length = length

    @property
    def shards(self) -> list[Shard]:
        return [Shard("pictures", 0, self.length)]

    def __len__(self) -> int:
        return self.length

    def picture_sizes(self) -> np.ndarray:
        return np.full((self.length, 2), 40)

    def __getitem__(self, index: int) -> Sample:
        kind = self.broken.get(index)
        if kind == "unreadable":
            raise BadSample("unreadable", "gone", str(index), "pictures")
        if kind == "fatal":
            raise DataError("the data set is lost")
        file = io.BytesIO()
        side = 4 if kind == "too_small" else 40
        Image.new("RGB", (side, side), (10 * index, 0, 0)).save(file, "PNG")
        image = file.getvalue()[:-30] if kind == "damaged" else file.getvalue()
        return Sample(image, (f"picture {index}", f"number {index}"), str(index), "pictures")


def make_dataset(tokenizer, source=None, draws=DRAWS) -> PositionedDataset:
    source = source or Pictures()
    order = ShuffledOrder([Shuffle([len(source)], 0, 5, "train")], None, (32, 32), BATCH, 5)
    return PositionedDataset([OpenSource(source, RULES)], order, tokenizer, SPEC, draws)


def load(dataset: PositionedDataset, cursor: int = 0, workers: int = 0) -> list[RawBatch]:
    loader = Loader(dataset, PositionBatches(BATCH, cursor=cursor), DataLoader(num_workers=workers))
    return list(itertools.islice(loader, (POSITIONS - cursor) // BATCH))


def by_position(batches: list[RawBatch]) -> dict[int, dict]:
    return {
        int(position): {
            "pixels": raw.pixels_BCHW[row],
            "t5": raw.tokens["t5"][row],
            "clip": raw.tokens["clip"][row],
            "caption": raw.captions[row],
            "t": raw.draws.t_B[row],
            "noise": raw.draws.noise_BTC[row],
            "posterior": raw.draws.posterior_noise_BTC[row],
        }
        for raw in batches
        for row, position in enumerate(raw.position_B)
    }


def equal(one: dict, other: dict, names=("pixels", "t5", "clip", "caption", "t", "noise", "posterior")) -> bool:
    return all(
        one[name] == other[name] if isinstance(one[name], str) else torch.equal(one[name], other[name])
        for name in names
    )


BROKEN = {3: "unreadable", 7: "damaged", 8: "too_small", 15: "damaged"}


@pytest.mark.parametrize("workers", [0, 2])
def test_all_other_places_stay_as_they_are(tokenizer, workers):
    whole = by_position(load(make_dataset(tokenizer)))
    batches = load(make_dataset(tokenizer, Pictures(BROKEN)), workers=workers)
    mended = by_position(batches)
    records = [record for raw in batches for record in raw.bad]
    moved = {position for position in whole if not equal(whole[position], mended[position])}
    assert moved == {record.position for record in records}
    assert len(moved) == 3 * len(BROKEN), "each of three epochs meets every broken picture once"
    for position in moved:
        assert equal(whole[position], mended[position], ("t", "noise", "posterior")), "the draws are the position's"
    first = [record for record in records if record.attempt == 0]
    assert sorted(record.key for record in first) == sorted(3 * [str(index) for index in BROKEN])
    assert {(int(record.key), record.reason) for record in records} == set(BROKEN.items())
    assert json.loads(json.dumps([record._asdict() for record in records]))[0]["shard"] == "pictures"


@pytest.mark.parametrize("cursor", [4, 20, 40])
def test_substitutes_are_the_same_after_a_resume(tokenizer, cursor):
    dataset = make_dataset(tokenizer, Pictures(BROKEN))
    whole, rest = by_position(load(dataset)), load(dataset, cursor)
    assert all(equal(whole[position], sample) for position, sample in by_position(rest).items())
    records = [record for raw in load(dataset) for record in raw.bad if record.position >= cursor]
    assert [record for raw in rest for record in raw.bad] == records


def test_substitutes_that_are_bad_too_are_counted_and_passed_over(tokenizer):
    """With all but one broken, that one stands everywhere."""
    source = Pictures({index: "unreadable" for index in range(LENGTH) if index != 2})
    items = [make_dataset(tokenizer, source)[Slot(position, True, BATCH)] for position in range(LENGTH)]
    assert {item.caption.split()[-1] for item in items} == {"2"}
    assert max(record.attempt for item in items for record in item.bad) > 3


def test_a_data_set_of_bad_samples_is_a_fault(tokenizer):
    source = Pictures(dict.fromkeys(range(LENGTH), "unreadable"))
    with pytest.raises(
        DataError, match=rf"^{MAX_ATTEMPTS} samples drawn for position 0 are bad, the last one '\d+' of"
    ):
        load(make_dataset(tokenizer, source))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_data_set_comes_without_a_workers_traceback(tokenizer, workers):
    with pytest.raises(DataError) as caught:
        load(make_dataset(tokenizer, Pictures(dict.fromkeys(range(LENGTH), "fatal"))), workers=workers)
    assert str(caught.value) == "the data set is lost"


def test_fillers_of_a_batch_are_not_counted_as_bad(tokenizer):
    dataset = make_dataset(tokenizer, Pictures(dict.fromkeys(range(LENGTH // 2), "unreadable")))
    slots = [Slot(position, position < 2, 2) for position in range(10)]
    raw = collate([dataset[slot] for slot in slots])
    assert {record.position for record in raw.bad} <= {0, 1}
    assert raw.counts_B.tolist() == [1, 1] + 8 * [0]
    assert raw.update_samples == 2


def test_captions_are_drawn_by_position(tokenizer):
    samples = by_position(load(make_dataset(tokenizer, draws=replace(DRAWS, drop_prob=0.0))))
    words = [sample["caption"].split()[0] for sample in samples.values()]
    assert 15 < words.count("number") < 45
    dataset = make_dataset(tokenizer, draws=ValidationDraws(seed=5))
    assert dataset[Slot(0, True, 1)].caption.startswith("picture"), "validation takes the first"


def test_sources_keep_their_own_ways(tokenizer):
    """One source is cut at random places, the other in the middle."""
    wide = Pictures()
    wide.__class__ = type("Wide", (Pictures,), {"__getitem__": lambda self, index: Sample(stripes(), ("a",), "", "")})
    for random_crop in (True, False):
        order = ShuffledOrder([Shuffle([LENGTH], 0, 5, "train")], None, (32, 32), BATCH, 5)
        opened = OpenSource(wide, RULES, random_crop)
        pixels = [
            PositionedDataset([opened], order, tokenizer, SPEC, DRAWS)[Slot(position, True, 1)].pixels_CHW
            for position in range(4)
        ]
        assert torch.equal(pixels[0], pixels[1]) != random_crop


def stripes() -> Image.Image:
    columns = np.arange(96, dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(columns[None, :, None], (32, 96, 3)).copy())


def test_a_bucket_of_bad_samples_shows_others_in_its_shape(tokenizer):
    source = Pictures(dict.fromkeys(range(4), "unreadable"))
    assigned = np.array([1] * 4 + [0] * (LENGTH - 4))
    buckets = [Bucket((32, 32), 32), Bucket((48, 16), 32)]
    shuffle = BucketShuffle(assigned, buckets, [4, 4], 5, "train")
    order = BucketOrder([shuffle], None, 4, 5)
    dataset = PositionedDataset([OpenSource(source, RULES)], order, tokenizer, SPEC, DRAWS)
    items = [dataset[Slot(position, True, 4)] for position in range(LENGTH)]
    shown = [tuple(item.pixels_CHW.shape[:0:-1]) for item in items]
    assert shown.count((48, 16)) == 4 and all(item.bad for item in items if item.pixels_CHW.shape[2] == 48)


def test_a_mixture_draws_from_both(tokenizer):
    sources = [Pictures(), Pictures(length=7)]
    shuffles = [Shuffle([len(source)], 0, 5, f"train/{number}") for number, source in enumerate(sources)]
    order = ShuffledOrder(shuffles, Mixture([3, 1], 5, "train"), (32, 32), BATCH, 5)
    places = [order.place(position) for position in range(10_000)]
    assert sum(place.source == 0 for place in places) == 7500
    assert {place.number for place in places if place.source == 1} == set(range(7))


class Stored:
    """Features of a cache; captions for an encoder that runs in training."""

    def __init__(self, parts=("moments", "t5", "clip"), rows=5):
        self.parts = frozenset(parts)
        self.rows = rows

    def __len__(self) -> int:
        return LENGTH

    def empty(self) -> dict:
        return {"t5": torch.zeros(2, 8), "clip": torch.zeros(4)}

    def __getitem__(self, index: int) -> EncodedSample:
        return EncodedSample(
            torch.full((32, 4, 4), float(index)),
            torch.full((self.rows, 8), 1.0 + index) if "t5" in self.parts else None,
            torch.full((4,), 1.0 + index) if "clip" in self.parts else None,
            f"picture {index}",
            str(index),
            "cache",
            time_step=3,
        )


def stored_dataset(tokenizer, source, draws, text_length=None) -> PositionedDataset:
    order = (
        PlainOrder([LENGTH], (32, 32), 5)
        if isinstance(draws, ValidationDraws)
        else ShuffledOrder([Shuffle([LENGTH], 0, 5, "train")], None, (32, 32), BATCH, 5)
    )
    return PositionedDataset([OpenSource(source, RULES)], order, tokenizer, SPEC, draws, text_length)


def test_stored_features_need_no_tokenizer_and_lose_prompts_by_the_same_draws(tokenizer):
    live = make_dataset(tokenizer)
    stored = stored_dataset(None, Stored(), DRAWS, text_length=7)
    empty = tokenizer([""])
    for position in range(40):
        slot = Slot(position, True, 1)
        item, pictured = stored[slot], live[slot]
        for part, dropped in (("t5", not item.t5_LE.any()), ("clip", not item.pooled_V.any())):
            assert dropped == torch.equal(pictured.tokens[part], empty[part][0])
        assert item.uncaptioned == pictured.uncaptioned == (not item.t5_LE.any())
        assert item.t5_LE.shape == (7, 8)
        assert item.t5_mask_L.sum() == (2 if not item.t5_LE.any() else 5), "rows of padding are hidden"
        assert torch.equal(item.noise_TC, pictured.noise_TC) and item.tokens == {}


def test_what_is_not_stored_is_tokenized(tokenizer):
    draws = replace(DRAWS, drop_prob=0.0)
    item = stored_dataset(tokenizer, Stored(("moments", "clip")), draws)[Slot(0, True, 1)]
    assert item.t5_LE is None and item.pooled_V is not None
    assert item.tokens.keys() == {"t5"} and torch.equal(item.tokens["t5"], tokenizer([item.caption])["t5"][0])


@pytest.mark.parametrize(("midpoints", "t"), [(True, 3.5 / 8), (False, 3 / 8)])
def test_validation_takes_the_times_that_the_data_set_prescribes(midpoints, t):
    item = stored_dataset(None, Stored(), ValidationDraws(5, midpoints=midpoints))[Slot(0, True, 1)]
    assert item.t.item() == t
    dataset = make_dataset(None, Pictures(), ValidationDraws(5, midpoints=midpoints))
    assert [dataset._time(position, (2, 2)).item() for position in (0, 9)] == [
        (0.5 * midpoints) / 8,
        (1 + 0.5 * midpoints) / 8,
    ]


def test_all_times_of_every_sample_whatever_the_data_set_prescribes():
    order = PlainOrder([LENGTH], (32, 32), 5, visits=8)
    draws = ValidationDraws(5, midpoints=False, all_timesteps=True)
    dataset = PositionedDataset([OpenSource(Stored(), RULES)], order, None, SPEC, draws)
    items = [dataset[Slot(position, True, 1)] for position in range(16)]
    assert [item.caption for item in items] == ["picture 0"] * 8 + ["picture 1"] * 8
    assert [item.t.item() for item in items] == 2 * [step / 8 for step in range(8)]
    assert not torch.equal(items[0].noise_TC, items[1].noise_TC), "each visit has noise of its own"


def test_plain_order_goes_through_all_sources():
    order = PlainOrder([2, 3], (32, 32), 5)
    assert [order.place(position)[:2] for position in range(6)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 0)]
    substitutes = {order.place(1, attempt) for attempt in range(1, 40)}
    assert {place[:2] for place in substitutes} == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}, "from anywhere"
    assert isinstance(order.place(1), Place)


def test_plain_order_of_several_sizes():
    sizes = np.array([(32, 32), (48, 32), (32, 32), (48, 32), (32, 48)])
    order = PlainOrder([2, 3], sizes, 5)
    assert [order.place(position).size for position in range(6)] == [tuple(sizes[number % 5]) for number in range(6)]
    assert {order.place(0, attempt)[:2] for attempt in range(1, 40)} == {(0, 0), (1, 0)}, "of the same size"
    assert [part.tolist() for part in order.positions_by_size(8)] == [[0, 2, 5, 7], [4], [1, 3, 6]]
    twice = PlainOrder([2, 3], sizes, 5, visits=2)
    assert [part.tolist() for part in twice.positions_by_size(6)] == [[0, 1, 4, 5], [2, 3]]
    assert [part.tolist() for part in PlainOrder([5], (32, 32), 5).positions_by_size(7)] == [list(range(7))]
