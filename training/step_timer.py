"""Where the seconds between two logged steps went."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

Mark = float | torch.cuda.Event  # seconds of the host's clock, or a place in what the GPU has been given to do


@dataclass
class Lap:
    """The time from one logged step to the next, on the device's clock."""

    begin: Mark
    end: Mark = 0.0
    waited: float = 0.0  # seconds of the host
    encoded: list[tuple[Mark, Mark]] = field(default_factory=list)
    paused: list[tuple[Mark, Mark]] = field(default_factory=list)
    samples: int = 0
    flops: float = 0.0

    def wait(self) -> None:
        """Until a GPU has come to the end of the lap, and of what it encodes beside it for the next one."""
        for mark in (self.end, *(end for _, end in self.encoded)):
            if isinstance(mark, torch.cuda.Event):
                mark.synchronize()

    def read(self) -> dict[str, float]:
        """samples_per_s, tflops (10^12 per second), data_wait_percent and encode_percent (0..100).

        Waits for the end.
        """
        self.wait()
        paused = sum(_seconds(begin, end) for begin, end in self.paused)
        trained = max(_seconds(self.begin, self.end) - paused, 1e-9)
        encoded = sum(_seconds(begin, end) for begin, end in self.encoded)
        return {
            "samples_per_s": self.samples / trained,
            "tflops": self.flops / trained / 1e12,
            "data_wait_percent": 100 * self.waited / trained,
            "encode_percent": 100 * encoded / trained,
        }


class StepTimer:
    """Throughput from one logged step to the next; tells the wait for data and the frozen encoders apart, and leaves
    out pauses (validation, pictures, checkpoints).

    Args:
        on_gpu: the GPU's clock counts: it runs behind the host, which need not wait for it.
    """

    def __init__(self, on_gpu: bool = False):
        self._on_gpu = on_gpu
        self._is_paused = False
        self._lap = Lap(self._mark())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent waiting for data."""
        started = time.perf_counter()
        yield
        self._lap.waited += time.perf_counter() - started

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Time spent in the frozen encoders, on the stream that they work on; that of a pause does not count."""
        if self._is_paused:
            yield
        else:
            begin = self._mark()
            yield
            self._lap.encoded.append((begin, self._mark()))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training."""
        self._is_paused, begin = True, self._mark()
        yield
        self._is_paused = False
        self._lap.paused.append((begin, self._mark()))

    def count(self, samples: int, flops: float) -> None:
        """One more update of `samples` samples is done, which took `flops` floating-point operations."""
        self._lap.samples += samples
        self._lap.flops += flops

    def end_lap(self) -> Lap:
        """What was since the last call."""
        lap = self._lap
        lap.end = self._mark()
        self._lap = Lap(lap.end)
        return lap

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float), "marks of one clock"
        return end - begin
    return begin.elapsed_time(end) / 1e3
