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
    assert timer.read() == {
        "samples_per_s": pytest.approx(10),
        "tflops": pytest.approx(2),
        "data_wait_percent": pytest.approx(25),
        "encode_percent": pytest.approx(12.5),
    }
    now[0] += 2
    timer.count(4, 0)
    assert timer.read() == {
        "samples_per_s": pytest.approx(2),
        "tflops": 0,
        "data_wait_percent": 0,
        "encode_percent": 0,
    }


class Event:
    """One of a GPU that works for 0.3 s on whatever it is given, later."""

    gpu = 0.0
    asked = 0
    done = float("inf")  # when the GPU is looked at

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at, Event.gpu = Event.gpu, Event.gpu + 0.3

    def query(self):
        return self.at <= Event.done

    def elapsed_time(self, end):
        assert self.query() and end.query(), "CUDA raises for an event that is not reached"
        Event.asked += 1
        return 1e3 * (end.at - self.at)


def test_a_gpu_times_the_encoders_and_is_asked_only_at_the_end(now, monkeypatch):
    monkeypatch.setattr(step_timer.torch.cuda, "Event", Event)
    timer = StepTimer(on_gpu=True)
    for _ in range(2):
        with timer.encoding():
            now[0] += 0.001  # the host only gives orders
        now[0] += 0.999
    with timer.paused(), timer.encoding():
        now[0] += 5
    assert Event.asked == 0
    assert timer.read()["encode_percent"] == pytest.approx(30)
    now[0] += 1
    assert timer.read()["encode_percent"] == 0


def test_what_is_encoded_ahead_counts_when_it_is_done(now, monkeypatch):
    monkeypatch.setattr(step_timer.torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "gpu", 0.0)
    timer = StepTimer(on_gpu=True)
    for _ in range(2):  # ends at 0.3 and 0.9
        with timer.encoding():
            now[0] += 1
    monkeypatch.setattr(Event, "done", 0.5)
    assert timer.read()["encode_percent"] == pytest.approx(15)
    now[0] += 1
    monkeypatch.setattr(Event, "done", 1.0)
    assert timer.read()["encode_percent"] == pytest.approx(30)
    now[0] += 1
    assert timer.read()["encode_percent"] == 0
