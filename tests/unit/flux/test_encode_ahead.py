"""Which batch is encoded when, and on which stream; with stand-ins for a GPU, whose orders are noted."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from flux import batch, encode_ahead
from flux.batch import Draws, EncodedBatch, RawBatch, TextCond
from flux.encode_ahead import EncodeAhead


class Encoders:
    def __init__(self, device: str, orders: list[str]):
        self.device, self.orders = torch.device(device), orders

    def encode(self, raw: "Raw") -> "Raw":
        self.orders.append(f"encode {raw.number} on {Stream.current.name}")
        return Raw(raw.number, self.orders, "features")


class Raw:
    def __init__(self, number: int, orders: list[str], what: str = "batch"):
        self.number, self.orders, self.what = number, orders, what

    def pin_memory(self) -> "Raw":
        return Raw(self.number, self.orders, "pinned batch")

    def to(self, device: torch.device) -> "Raw":
        self.orders.append(f"copy {self.what} {self.number} on {Stream.current.name}")
        return Raw(self.number, self.orders)

    def record_stream(self, stream: "Stream") -> None:
        self.orders.append(f"{self.what} {self.number} used on {stream.name}")


class Stream:
    current: "Stream"

    def __init__(self, _device: object = None, name: str = "side"):
        self.name, self.orders = name, []

    def wait_stream(self, other: "Stream") -> None:
        self.orders.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the pretended GPU is told to do."""
    noted: list[str] = []
    main = Stream(name="main")
    main.orders = noted
    monkeypatch.setattr(Stream, "current", main, raising=False)

    def make(device: object) -> Stream:
        side = Stream(device)
        side.orders = noted
        return side

    @contextmanager
    def on(stream: Stream):
        Stream.current = stream
        yield
        Stream.current = main

    for name, stand_in in (("Stream", make), ("stream", on), ("current_stream", lambda _device: Stream.current)):
        monkeypatch.setattr(encode_ahead.torch.cuda, name, stand_in)
    return noted


def fetched(numbers, orders: list[str]):
    for number in numbers:
        orders.append(f"fetch {number}")
        yield Raw(number, orders)


@pytest.mark.parametrize(("device", "enable"), [("cpu", True), ("cuda", False)])
def test_without_a_gpu_or_the_option_a_batch_is_encoded_when_it_is_taken(orders, device, enable):
    ahead, batches = EncodeAhead(Encoders(device, orders), enable), fetched(itertools.count(), orders)
    for number in range(2):
        raw, encoded = ahead.take(batches)
        assert raw.number == encoded.number == number
        ahead.look_ahead(batches)
    assert orders == [
        *("fetch 0", "copy batch 0 on main", "encode 0 on main"),
        *("fetch 1", "copy batch 1 on main", "encode 1 on main"),
    ]


def test_a_gpu_encodes_the_next_batch_on_a_stream_of_its_own(orders):
    ahead, batches = EncodeAhead(Encoders("cuda", orders), True), fetched(range(2), orders)
    assert ahead.take(batches)[0].number == 0
    assert orders == [
        *("fetch 0", "main waits for side", "copy pinned batch 0 on main", "encode 0 on main", "side waits for main"),
    ]
    orders.clear()
    ahead.look_ahead(batches)
    assert orders == ["fetch 1", "copy pinned batch 1 on side", "encode 1 on side"]
    orders.clear()
    raw, encoded = ahead.take(batches)
    assert raw.number == encoded.number == 1
    assert orders == ["main waits for side", "batch 1 used on main", "features 1 used on main"]
    ahead.look_ahead(batches)  # there is none any more
    with pytest.raises(StopIteration):
        ahead.take(batches)


def test_validation_keeps_its_place_between_what_is_encoded_ahead(orders):
    ahead, batches = EncodeAhead(Encoders("cuda", orders), True), fetched(range(3), orders)
    ahead.look_ahead(batches)
    orders.clear()
    assert ahead.encode(Raw(100, orders))[1].number == 100
    with ahead.in_order():
        orders.append("pictures")
    assert orders == [
        *("main waits for side", "copy pinned batch 100 on main", "encode 100 on main", "side waits for main"),
        *("main waits for side", "pictures", "side waits for main"),
    ]
    assert ahead.take(batches)[0].number == 0, "the batch that was encoded before is not lost"


def test_a_batch_that_cannot_be_fetched_ends_the_step_before_it(orders):
    def broken():
        yield Raw(0, orders)
        raise ValueError("the shard is gone")

    for device, call in (("cuda", "look_ahead"), ("cpu", "take")):
        ahead, batches = EncodeAhead(Encoders(device, orders), True), broken()
        ahead.take(batches)
        with pytest.raises(ValueError, match="the shard is gone"):
            getattr(ahead, call)(batches)


def test_every_tensor_of_a_batch_is_recorded(monkeypatch):
    """An allocator that is not told of one tensor writes the batch after next into it."""
    one = torch.zeros(1)
    raw = RawBatch(
        one, {"t5": one, "clip": one}, ["a"], ["key"], one, Draws(one, one, one), 1, one, one, one, one, one, one
    )
    noted: list[object] = []
    monkeypatch.setattr(batch.Tensor, "record_stream", lambda _tensor, stream: noted.append(stream))
    raw.record_stream("main")
    assert noted == ["main"] * 13
    replace(raw, counts_B=None).record_stream("main")
    assert len(noted) == 13 + 12
    noted.clear()
    EncodedBatch(one, (1, 1), TextCond(one, one, one)).record_stream("main")
    assert noted == ["main"] * 4
