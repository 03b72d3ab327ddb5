"""The global order: draws, pixels and tokens of a sample do not depend on who prepares it or in which batch."""

import itertools
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from flux.batch import RawBatch
from flux.config import DataLoader, Encoder
from flux.data.dataset import OpenSource, PositionedDataset, Slot, TrainingDraws, ValidationDraws
from flux.data.decode import DecodeRules
from flux.data.errors import DataError
from flux.data.loader import HeldOutBatches, Loader, PositionBatches
from flux.data.order import PlainOrder, ShuffledOrder
from flux.data.sample import Sample, Shard
from flux.data.shapes import ShapesSource
from flux.data.shuffle import Shuffle
from flux.data.tokenizers import build_tokenizer
from flux.spec import SPECS

SPEC = SPECS["flux-tiny"]
RULES = DecodeRules(min_side=1, max_aspect=100, max_megapixels=1, background=(255, 255, 255), fast_jpeg=True)
DRAWS = TrainingDraws(seed=5, drop_prob=0.5)
POSITIONS = 24


class ShortSource:
    """A few shapes pictures of odd sizes, so that epochs end soon and crops matter."""

    def __init__(self, length: int = 10):
        self.length = length
        self.shapes = ShapesSource("train", 48)

    @property
    def shards(self) -> list[Shard]:
        return [Shard("short", 0, self.length)]

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


def make_dataset(tokenizer, draws=DRAWS, source=None) -> PositionedDataset:
    source = source or ShortSource()
    if isinstance(draws, ValidationDraws):
        order = PlainOrder([len(source)], (32, 32), 5)
    else:
        order = ShuffledOrder([Shuffle([len(source)], 0, draws.seed, "train")], None, (32, 32), 1, draws.seed)
    return PositionedDataset([OpenSource(source, RULES)], order, tokenizer, SPEC, draws)


def load(tokenizer, *, count=POSITIONS, batch=4, workers=0, draws=DRAWS, source=None, cursor=0, rank=0, degree=1):
    """position -> (caption, pixels, draws, tokens) of the first `count` positions from the cursor."""
    batches = PositionBatches(batch * degree, 1, rank, degree, cursor)
    loader = Loader(make_dataset(tokenizer, draws, source), batches, DataLoader(num_workers=workers))
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
@pytest.mark.parametrize("lengths", [(1,), (8,), (10,), (24,), (23, 1), (5, 9, 2)])
def test_ranks_get_equally_many_full_batches(ranks, lengths):
    """They wait for each other; of each size, the last position fills up the last batches."""
    end = sum(lengths)
    by_size = np.split(np.random.default_rng(0).permutation(end), np.cumsum(lengths)[:-1])
    dealt = [list(HeldOutBatches(by_size, 4, rank, ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    assert all(len(batch) == 4 for batches in dealt for batch in batches)
    slots = [slot for batches in dealt for batch in batches for slot in batch]
    assert sorted(slot.position for slot in slots if slot.counts) == list(range(end))
    assert len(slots) < end + 4 * ranks * len(lengths), "no round without a position that counts"
    size_of = {position: number for number, part in enumerate(by_size) for position in part.tolist()}
    for together in zip(*dealt, strict=True):
        assert len({size_of[slot.position] for batch in together for slot in batch}) == 1
    for given in (0, 1, 3):
        assert list(HeldOutBatches(by_size, 4, 0, ranks).rest(1).rest(given)) == dealt[0][1 + given :]


def dealt_positions(updates: int, size: int, accumulation: int, ranks: int, samples=None) -> list[list[int]]:
    """The positions that count, of every update."""
    parts = [iter(PositionBatches(size, accumulation, rank, ranks, 12, samples)) for rank in range(ranks)]
    dealt = []
    for _ in range(updates):
        batches = [next(part) for part in parts for _ in range(accumulation)]
        assert len({len(batch) for batch in batches}) == 1, "ranks wait for each other"
        dealt.append(sorted(slot.position for batch in batches for slot in batch if slot.counts))
    return dealt


@pytest.mark.parametrize(("accumulation", "ranks"), [(1, 1), (2, 1), (1, 2), (2, 3), (1, 8), (3, 4)])
def test_every_update_uses_the_same_positions_on_any_layout(accumulation, ranks):
    assert dealt_positions(3, 24, accumulation, ranks) == [list(range(12 + 24 * k, 36 + 24 * k)) for k in range(3)]


@pytest.mark.parametrize(("accumulation", "ranks"), [(1, 1), (2, 2), (1, 8), (3, 4)])
def test_updates_of_fewer_samples_than_slots_are_filled_up(accumulation, ranks):
    """Larger pictures come in smaller updates, which need not divide by the ranks."""
    sizes = {12: 24, 36: 7, 60: 1}
    dealt = dealt_positions(3, 24, accumulation, ranks, sizes.__getitem__)
    assert dealt == [list(range(start, start + size)) for start, size in sizes.items()]


@pytest.mark.parametrize("given", range(8))
def test_what_follows_after_some_batches(given):
    batches = PositionBatches(24, 3, 1, 2, 12)
    expected = list(itertools.islice(batches, given, given + 5))
    assert list(itertools.islice(batches.rest(given), 5)) == expected
    assert list(itertools.islice(batches.rest(1).rest(given), 4)) == expected[1:]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_samples_beyond_the_source_fill_up(tokenizer, ranks):
    """A source of 3 is dealt in batches of 3: positions 3 and on show its pictures again, at other times."""
    dataset = make_dataset(tokenizer, ValidationDraws(seed=5), ShortSource(3))
    loaders = [Loader(dataset, HeldOutBatches([np.arange(8)], 3, rank, ranks), DataLoader()) for rank in range(ranks)]
    samples = {}
    for loader in loaders:
        assert loader.end == 8
        for raw in loader:
            samples |= by_position(raw)
    assert set(range(8)) == samples.keys()
    for position, sample in samples.items():
        assert (sample["caption"],) == ShortSource(3)[position % 3].captions
        assert sample["t"].item() == (position % 8 + 0.5) / 8
    assert not torch.equal(samples[0]["noise"], samples[3]["noise"])


def test_training_has_no_end(tokenizer):
    assert Loader(make_dataset(tokenizer), PositionBatches(4), DataLoader()).end is None


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
    loader = Loader(make_dataset(tokenizer, ValidationDraws(seed=5)), HeldOutBatches([np.arange(10)], 4), DataLoader())
    first, second = ([*loader], [*loader])
    assert [len(raw.captions) for raw in first] == [4, 4, 4] and loader.end == 10
    samples, again = ({k: v for raw in passes for k, v in by_position(raw).items()} for passes in (first, second))
    assert_bit_equal(samples, again)
    assert sorted(samples) == list(range(10))
    assert [samples[position]["t"].item() for position in range(10)] == [(k % 8 + 0.5) / 8 for k in range(10)]
    assert [samples[p]["caption"] for p in range(10)] == [ShortSource()[index].captions[0] for index in range(10)]


def test_validation_draws_are_not_training_draws(tokenizer):
    dataset = make_dataset(tokenizer, ValidationDraws(seed=5))
    assert not torch.equal(dataset[Slot(0, True, 1)].noise_TC, load(tokenizer, count=4)[0]["noise"])


def test_posterior_mean_needs_no_noise(tokenizer):
    dataset = make_dataset(tokenizer, replace(DRAWS, sample_posterior=False))
    raw = next(iter(Loader(dataset, PositionBatches(2), DataLoader())))
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
    dataset = make_dataset(tokenizer, replace(DRAWS, sample_posterior=False))
    raw = next(iter(Loader(dataset, PositionBatches(2), DataLoader()))).to("meta")
    assert raw.pixels_BCHW.device.type == raw.tokens["t5"].device.type == raw.draws.t_B.device.type == "meta"
    assert raw.captions and raw.draws.posterior_noise_BTC is None


class Trouble(ShortSource):
    """Lets the worker that asks for one sample die or hang, as often as there are names of files to make."""

    def __init__(self, folder, kind: str, times: int):
        super().__init__()
        self.marks = [folder / f"{number}" for number in range(times)]
        self.kind = kind

    def __getitem__(self, index: int) -> Sample:
        if index == 3 and (mark := next((mark for mark in self.marks if not mark.exists()), None)):
            mark.touch()
            if self.kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return super().__getitem__(index)


@pytest.mark.parametrize(("kind", "workers", "timeout"), [("die", 1, 60), ("die", 3, 60), ("hang", 3, 6)])
def test_workers_that_fail_are_replaced_once_at_the_same_batch(tokenizer, tmp_path, caplog, kind, workers, timeout):
    dataset = make_dataset(tokenizer, source=Trouble(tmp_path, kind, 1))
    loader = Loader(dataset, PositionBatches(4), DataLoader(num_workers=workers), worker_timeout=timeout)
    samples = {}
    for raw in itertools.islice(loader, POSITIONS // 4):
        samples |= by_position(raw)
    assert_bit_equal(load(tokenizer), samples)
    reason = "DataLoader worker" if kind == "die" else "no batch in data.worker_timeout_seconds=6"
    assert caplog.text.count(f"data workers are replaced: {reason}") == 1


def test_workers_that_fail_again_end_the_run(tokenizer, tmp_path):
    dataset = make_dataset(tokenizer, source=Trouble(tmp_path, "die", 2))
    loader = Loader(dataset, PositionBatches(4), DataLoader(num_workers=1), worker_timeout=60)
    with pytest.raises(DataError, match=r"data workers failed twice \(DataLoader worker \(pid"):
        list(itertools.islice(loader, POSITIONS // 4))


def test_a_dying_worker_does_not_interrupt_what_runs_meanwhile(tokenizer, tmp_path):
    """torch's own handler raises wherever the main process is; here the death is met where a batch is waited for."""
    dataset = make_dataset(tokenizer, source=Trouble(tmp_path, "die", 1))
    batches = iter(
        Loader(dataset, PositionBatches(1), DataLoader(num_workers=1, prefetch_factor=12), worker_timeout=60)
    )
    next(batches)
    deadline = time.monotonic() + 20
    while not (tmp_path / "0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert [raw.position_B.item() for raw in itertools.islice(batches, 9)] == list(range(1, 10))


def test_a_pass_after_a_replacement_is_a_whole_one(tokenizer, tmp_path):
    dataset = make_dataset(tokenizer, ValidationDraws(seed=5), Trouble(tmp_path, "die", 1))
    loader = Loader(dataset, HeldOutBatches([np.arange(10)], 2), DataLoader(num_workers=1), worker_timeout=60)
    first, second = (sorted(int(position) for raw in loader for position in raw.position_B) for _ in range(2))
    assert (tmp_path / "0").exists() and first == second == list(range(10))


def test_a_worker_that_is_killed_with_batches_in_its_queue_is_replaced(tokenizer):
    loader = Loader(make_dataset(tokenizer), PositionBatches(4), DataLoader(num_workers=1), worker_timeout=60)
    batches = iter(loader)
    samples = by_position(next(batches))
    time.sleep(2)  # for the next batches to be queued
    for child in multiprocessing.active_children():
        child.kill()
    for raw in itertools.islice(batches, POSITIONS // 4 - 1):
        samples |= by_position(raw)
    assert_bit_equal(load(tokenizer), samples)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_systems_signal_leaves_the_workers_at_work(tokenizer, caplog, number):
    loader = Loader(make_dataset(tokenizer), PositionBatches(4), DataLoader(num_workers=2), worker_timeout=60)
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    samples = by_position(next(batches)) | by_position(next(batches))  # one of each worker: both are at work
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    for raw in itertools.islice(batches, POSITIONS // 4 - 2):
        samples |= by_position(raw)
    assert_bit_equal(load(tokenizer), samples)
    assert all(worker.is_alive() for worker in workers) and not caplog.text


def test_control_a_worker_that_is_asked_twice_ends(tokenizer, caplog):
    loader = Loader(make_dataset(tokenizer), PositionBatches(4), DataLoader(num_workers=1), worker_timeout=60)
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    for _ in range(2):
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.5)
    worker.join(timeout=10)
    assert worker.exitcode == -signal.SIGTERM
