"""Where the seconds between two logged steps went."""

import contextlib
import time
from collections.abc import Iterator


class StepTimer:
    """Throughput since the last `read`; tells the wait for data apart and leaves out pauses (validation, pictures)."""

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
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
    def paused(self) -> Iterator[None]:
        """Time that is not training."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def count(self, samples: int, flops: float) -> None:
        """One more update of `samples` samples is done, which took `flops` floating-point operations."""
        self._samples += samples
        self._flops += flops

    def read(self) -> dict[str, float]:
        """samples_per_s, tflops (10^12 per second) and data_wait_percent (0..100) since the last call."""
        trained = max(time.perf_counter() - self._started - self._paused, 1e-9)
        values = {
            "samples_per_s": self._samples / trained,
            "tflops": self._flops / trained / 1e12,
            "data_wait_percent": 100 * self._waited / trained,
        }
        self._begin()
        return values
