"""Shares of time, on clocks that the test moves."""

import pytest

from training import step_timer
from training.step_timer import StepTimer


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """Seconds on the host's clock."""
    seconds = [0.0]
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_waits_encoders_and_pauses_are_told_apart(now):
    timer = StepTimer()
    with timer.waiting():
        now[0] += 1
    with timer.encoding():
        now[0] += 0.5
    now[0] += 2.5
    timer.count(40, 8e12)
    with timer.paused():
        now[0] += 60
        with timer.encoding():  # of validation
            now[0] += 40
    assert timer.end_lap().read() == {
        "samples_per_s": pytest.approx(10),
        "tflops": pytest.approx(2),
        "data_wait_percent": pytest.approx(25),
        "encode_percent": pytest.approx(12.5),
    }
    now[0] += 2
    timer.count(4, 0)
    assert timer.end_lap().read() == {
        "samples_per_s": pytest.approx(2),
        "tflops": 0,
        "data_wait_percent": 0,
        "encode_percent": 0,
    }


class Event:
    """One of a GPU that works for 0.3 s on whatever lies between two of them, later."""

    gpu = 0.0
    waited = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at, Event.gpu = Event.gpu, Event.gpu + 0.3

    def synchronize(self):
        Event.waited += 1

    def elapsed_time(self, end):
        assert Event.waited, "what the GPU has not done yet has no time"
        return 1e3 * (end.at - self.at)


def test_a_gpu_times_by_its_own_clock_and_is_waited_for_only_at_the_end(now, monkeypatch):
    monkeypatch.setattr(step_timer.torch.cuda, "Event", Event)
    timer = StepTimer(on_gpu=True)
    for _ in range(2):
        with timer.encoding():
            now[0] += 0.001  # the host only gives orders
        now[0] += 0.999
    with timer.waiting():
        now[0] += 0.3
    with timer.paused(), timer.encoding():
        now[0] += 5
    timer.count(3, 0)
    lap = timer.end_lap()
    timer.count(100, 0)  # of the next lap, which has begun
    assert Event.waited == 0
    # Of the seven parts between marks, each of 0.3 s, two are in the encoders and one is a pause.
    assert lap.read() == {
        "samples_per_s": pytest.approx(3 / 1.8),
        "tflops": 0,
        "data_wait_percent": pytest.approx(100 * 0.3 / 1.8),
        "encode_percent": pytest.approx(100 * 0.6 / 1.8),
    }
    assert Event.waited == 3, "for the end, and for what was encoded beside the steps"
    assert timer.end_lap().read()["samples_per_s"] == pytest.approx(100 / 0.3)
