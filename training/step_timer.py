"""Where the seconds between two logged steps went."""

import contextlib
import time
from collections.abc import Iterator

import torch


class StepTimer:
    """Throughput since the last `read`; tells the wait for data and the frozen encoders apart, and leaves out pauses
    (validation, pictures, checkpoints).

    Args:
        on_gpu: the GPU times the encoders: it runs behind the host, which need not wait for it.
    """

    def __init__(self, on_gpu: bool = False):
        self._on_gpu = on_gpu
        self._is_paused = False
        self._encoded_on_gpu: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # begin and end
        self._begin()

    def _begin(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._encoded = 0.0
        self._paused = 0.0
        self._samples = 0
        self._flops = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Time spent in the frozen encoders, on the stream that they work on; that of a pause does not count."""
        if self._is_paused:
            yield
        elif self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._encoded_on_gpu.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._encoded += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training."""
        self._is_paused, started = True, time.perf_counter()
        yield
        self._is_paused = False
        self._paused += time.perf_counter() - started

    def count(self, samples: int, flops: float) -> None:
        """One more update of `samples` samples is done, which took `flops` floating-point operations."""
        self._samples += samples
        self._flops += flops

    def read(self) -> dict[str, float]:
        """samples_per_s, tflops (10^12 per second), data_wait_percent and encode_percent (0..100) since the last call.

        To be called when the GPU has done all steps that it was given. A batch that is still encoded beside them counts
        the next time.
        """
        trained = max(time.perf_counter() - self._started - self._paused, 1e-9)
        done = [pair for pair in self._encoded_on_gpu if pair[1].query()]
        self._encoded_on_gpu = self._encoded_on_gpu[len(done) :]  # they end in the order of the list
        encoded = self._encoded + sum(begin.elapsed_time(end) for begin, end in done) / 1e3
        values = {
            "samples_per_s": self._samples / trained,
            "tflops": self._flops / trained / 1e12,
            "data_wait_percent": 100 * self._waited / trained,
            "encode_percent": 100 * encoded / trained,
        }
        self._begin()
        return values
