"""Encodes a batch while the step before it runs, where a GPU can do both."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function as region

from flux.batch import EncodedBatch, RawBatch
from flux.encoders import Encoders

Clock = Callable[[], AbstractContextManager[object]]


class EncodeAhead:
    """Hands out batches with what the frozen encoders make of them, in the order in which they come.

    On a GPU the next batch is fetched and encoded beside the step of the current one, on a stream of its own. A CPU has
    nothing to do it beside: there a batch is encoded when it is taken. All ranks must make the same calls, since they
    may share an encoder.

    Args:
        encoders: of the run; others that use them do so inside of `in_order`.
        enable: False encodes a batch when it is taken on a GPU too.
        waiting, encoding: around what is timed, the wait for data and the encoders' work.
    """

    def __init__(self, encoders: Encoders, enable: bool, waiting: Clock = nullcontext, encoding: Clock = nullcontext):
        self.encoders, self.waiting, self.encoding = encoders, waiting, encoding
        is_possible = enable and encoders.device.type == "cuda"
        self.stream = torch.cuda.Stream(encoders.device) if is_possible else None
        self._next: tuple[RawBatch, EncodedBatch] | None = None

    def take(self, batches: Iterator[RawBatch]) -> tuple[RawBatch, EncodedBatch]:
        """The next batch on the device, and what the encoders make of it. Raises StopIteration after the last."""
        if self._next is None:
            with region("data"), self.waiting():
                raw = next(batches)
            return self.encode(raw)
        assert self.stream is not None
        (raw, encoded), self._next = self._next, None
        current = torch.cuda.current_stream(self.encoders.device)
        current.wait_stream(self.stream)
        # Their memory is the other stream's, which must not write the batch after next into it while it is read here.
        raw.record_stream(current)
        encoded.record_stream(current)
        return raw, encoded

    def look_ahead(self, batches: Iterator[RawBatch]) -> None:
        """Fetches and encodes on a GPU the batch that will be taken next, if there is one. What is wrong with it ends
        the run at once, a step early.

        To be called when the GPU has work: the host may wait for data here.
        """
        if self.stream is None:
            return
        with region("data"), self.waiting():
            raw = next(batches, None)
        if raw is not None:
            with torch.cuda.stream(self.stream):
                self._next = self._encode(raw)

    def encode(self, raw: RawBatch) -> tuple[RawBatch, EncodedBatch]:
        """A batch of validation, say: on the device, and encoded now."""
        with self.in_order():
            return self._encode(raw)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Inside, the encoders work on the current stream, after what was encoded ahead and before what will be: FSDP
        gathers the weights of an encoder into memory that all its passes share.
        """
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.encoders.device)
        current.wait_stream(self.stream)
        yield
        self.stream.wait_stream(current)

    def _encode(self, raw: RawBatch) -> tuple[RawBatch, EncodedBatch]:
        if self.stream is not None:
            raw = raw.pin_memory()  # of other memory the host makes the copy, when the GPU has come that far
        raw = raw.to(self.encoders.device)
        with region("encode"), self.encoding():
            return raw, self.encoders.encode(raw)
