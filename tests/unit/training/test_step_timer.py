"""Shares of time, on a clock that the test moves."""

import pytest

from training import step_timer
from training.step_timer import StepTimer


def test_waits_and_pauses_are_told_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: now[0])
    timer = StepTimer()
    with timer.waiting():
        now[0] += 1
    now[0] += 3
    timer.count(40, 8e12)
    with timer.paused():
        now[0] += 100
    assert timer.read() == {
        "samples_per_s": pytest.approx(10),
        "tflops": pytest.approx(2),
        "data_wait_percent": pytest.approx(25),
    }
    now[0] += 2
    timer.count(4, 0)
    assert timer.read() == {"samples_per_s": pytest.approx(2), "tflops": 0, "data_wait_percent": 0}
