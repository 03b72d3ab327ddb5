"""The samples of every update and all their draws do not depend on processes, workers, accumulation or resumes."""

import hashlib
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from flux.batch import RawBatch
from flux.config import Buckets, Data, DataLoader, Encoder, Training, Validation
from flux.data.build import Deal, RunData, build_training_loader
from flux.data.dataset import OpenSource
from flux.data.decode import DecodeRules
from flux.data.errors import BadSample
from flux.data.sample import Sample, Shard
from flux.data.tokenizers import build_tokenizer
from flux.spec import SPECS

RULES = DecodeRules(min_side=8, max_aspect=4, max_megapixels=1, background=(255, 255, 255), fast_jpeg=True)
SHAPES = [(48, 48), (80, 48), (48, 80), (96, 96)]
UPDATE, UPDATES = 16, 6
ENCODER = Encoder(max_t5_encoding_len=8)


class Pictures:
    """Noise of several shapes with two captions each, in shards; one is bad."""

    def __init__(self, shard_samples: list[int], salt: int):
        self.salt = salt
        self.shards = [Shard(f"{salt}-{number}", 0, samples) for number, samples in enumerate(shard_samples)]

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def picture_sizes(self) -> np.ndarray:
        return np.array([SHAPES[index % len(SHAPES)] for index in range(len(self))])

    def __getitem__(self, index: int) -> Sample:
        if index == 4:
            raise BadSample("unreadable", "gone", str(index), "shard")
        width, height = SHAPES[index % len(SHAPES)]
        pixels = np.random.default_rng([self.salt, index]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        return Sample(file.getvalue(), (f"one {index}", f"two {index}"), f"{self.salt}/{index}", "shard")


SOURCES = [OpenSource(Pictures([9, 14, 3, 11], 1), RULES), OpenSource(Pictures([8, 7], 2), RULES, random_crop=False)]
BUCKETS = {"enable": True, "step": 16}
ORDERS = {
    "shuffled": (1, Data()),
    "window": (1, Data(shuffle_window=2)),
    "mixture": (2, Data()),
    "buckets": (1, Data(buckets=Buckets(**BUCKETS))),
    "buckets of a mixture": (2, Data(buckets=Buckets(**BUCKETS))),
    "constant tokens": (1, Data(buckets=Buckets(**BUCKETS, img_sizes=[48, 96], constant_tokens=True))),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(ENCODER, test_mode=False)


def trace(
    tokenizer, order: str, world: int = 1, workers: int = 0, accumulation: int = 1, first: int = 0, last: int = UPDATES
) -> list[dict[int, tuple]]:
    """For updates first..last - 1: position -> everything about its sample, gathered from all processes."""
    count, data = ORDERS[order]
    training = Training(
        local_batch_size=UPDATE // (world * accumulation),
        global_batch_size=UPDATE,
        img_size=48,
        classifier_free_guidance_prob=0.3,
        dataloader=DataLoader(num_workers=workers),
    )
    run = RunData(training, Validation(), data, ENCODER, SPECS["flux-tiny"], SOURCES[:count], [2.0, 1.0][:count], [])
    updates: list[dict[int, tuple]] = [{} for _ in range(last - first)]
    for group in range(world):
        loader = build_training_loader(run, tokenizer, Deal(0, group, world), cursor=first * UPDATE)
        for number, raw in enumerate(itertools.islice(loader, (last - first) * accumulation)):
            updates[number // accumulation] |= describe(raw)
    return updates


def describe(raw: RawBatch) -> dict[int, tuple]:
    counts = [True] * len(raw.captions) if raw.counts_B is None else raw.counts_B.bool().tolist()
    return {
        int(raw.position_B[row]): (
            raw.captions[row],
            raw.draws.t_B[row].item(),
            raw.update_samples,
            *(
                hashlib.blake2b(tensor[row].numpy().tobytes()).hexdigest()
                for tensor in (
                    raw.pixels_BCHW,
                    *raw.tokens.values(),
                    raw.draws.noise_BTC,
                    raw.draws.posterior_noise_BTC,
                )
            ),
            tuple(record for record in raw.bad if record.position == raw.position_B[row]),
        )
        for row in range(len(raw.captions))
        if counts[row]
    }


@pytest.fixture(scope="module")
def alone(tokenizer):
    """One process without workers."""
    return {order: trace(tokenizer, order) for order in ORDERS}


LAYOUTS = [(2, 0, 1), (4, 1, 2), (8, 0, 1), (1, 3, 2), (8, 0, 2), (2, 1, 2)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("world", "workers", "accumulation"), LAYOUTS)
def test_on_any_layout(tokenizer, alone, order, world, workers, accumulation):
    assert trace(tokenizer, order, world, workers, accumulation) == alone[order]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stops", [[3], [1, 3], [1, 2, 5]])
def test_after_any_resumes_on_another_layout(tokenizer, alone, order, stops):
    """Each leg on its own number of processes."""
    legs = zip([0, *stops], [*stops, UPDATES], [1, 4, 2, 8], strict=False)
    updates = [update for first, last, world in legs for update in trace(tokenizer, order, world, 0, 1, first, last)]
    assert updates == alone[order]


@pytest.mark.parametrize("order", ORDERS)
def test_epochs_end_within_and_bad_samples_are_among_them(alone, order):
    records = [record for update in alone[order] for sample in update.values() for record in sample[-1]]
    assert records, "the bad sample was met"
    assert sum(map(len, alone[order])) > 37, "more samples than the first source has"
    assert len({sample[0] for update in alone[order] for sample in update.values()}) > 20


def test_the_trace_sees_another_seed_and_another_order(tokenizer, alone):
    """What must not be equal is not."""
    assert alone["shuffled"] != alone["window"] != alone["mixture"]
    assert trace(tokenizer, "shuffled", first=1, last=2) != alone["shuffled"][:1]
    sizes = [len(update) for update in alone["constant tokens"]]
    assert set(sizes) == {UPDATE, UPDATE // 4}, "pictures of four times the area come in quarters"
