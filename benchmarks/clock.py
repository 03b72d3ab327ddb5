"""Times of steps that are compared, and of the regions inside them."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Clock:
    """Times of steps and of the regions inside them. A GPU is not waited for: it notes itself when it passes by."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []  # name, begin, end

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def region(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self.spans.append((name, begin, self._mark()))

    def read(self) -> list[tuple[str, float]]:
        """Name and seconds of all that has been timed since the last call, in order."""
        spans, self.spans = self.spans, []
        if not self._on_gpu:
            return [(name, end - begin) for name, begin, end in spans]
        torch.cuda.synchronize()
        return [(name, begin.elapsed_time(end) / 1e3) for name, begin, end in spans]


@dataclass
class Times:
    """Seconds of each measured step, and of the regions of all of them together."""

    steps: list[float]
    regions: dict[str, float]
    peak_gib: float = 0.0


def measure(steps: Mapping[str, Callable[[], object]], clock: Clock, rounds: int, warmup: int) -> dict[str, Times]:
    """Each round runs all steps, in an order that turns around from round to round."""
    ran: list[str] = []
    for turn in range(warmup + rounds):
        for name in list(steps) if turn % 2 == 0 else reversed(list(steps)):
            with clock.region("step"):
                steps[name]()
            ran.append(name)
        if turn == warmup - 1:
            clock.read()
            ran.clear()
    times = {name: Times([], {}) for name in steps}
    names = iter(ran)
    inside: dict[str, float] = {}
    for region, seconds in clock.read():
        if region != "step":
            inside[region] = inside.get(region, 0.0) + seconds
            continue
        one = times[next(names)]
        one.steps.append(seconds)
        for name, part in inside.items():
            one.regions[name] = one.regions.get(name, 0.0) + part
        inside.clear()
    return times


def compare(mine: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ratio of neighbors: lower quartile, median, upper quartile."""
    ratios = sorted(one / other for one, other in zip(mine, others, strict=True))
    return [ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]]
