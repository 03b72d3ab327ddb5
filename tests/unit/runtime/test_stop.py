"""Signals and a limit on the time, as wishes to stop."""

import os
import signal
import sys
import time

import pytest

from runtime import stop
from runtime.stop import (
    STOP_REASONS,
    STOP_SIGNALS,
    StopRequest,
    Terminated,
    check_grace,
    grace_seconds,
    stopped_by_signals,
)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_the_program_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(Terminated, match=f"^{number.name}$"), stopped_by_signals():
        send(number)
    assert signal.getsignal(number) == before


def test_a_second_signal_does_not_disturb_what_the_first_has_begun():
    with stopped_by_signals():
        with pytest.raises(Terminated):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)


def test_ctrl_c_that_is_told_twice_is_one(monkeypatch):
    monkeypatch.setattr(stop, "SAME_SECONDS", 0.2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stopped_by_signals():
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
            send(signal.SIGINT)
            time.sleep(0.3)
            with pytest.raises(KeyboardInterrupt):  # pressed again
                send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


class Old:
    """A signal arrives while it is thrown away."""

    def __del__(self):
        send(signal.SIGTERM)
        time.sleep(0.01)


def test_a_signal_that_a_destructor_gets_is_not_lost():
    hook = sys.unraisablehook
    with pytest.raises(Terminated, match="SIGTERM"), stopped_by_signals():
        Old()
        time.sleep(5)
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_while_a_run_takes_steps_a_signal_is_noted(number):
    with stopped_by_signals():
        with StopRequest() as request:
            assert request.number == 0
            send(number)
            assert STOP_REASONS[request.number - 1] == number.name
            send(next(other for other in STOP_SIGNALS if other != number))
            assert STOP_REASONS[request.number - 1] == number.name, "the first one counts"
        with pytest.raises(Terminated):  # as it was before
            send(number)


def test_the_time_is_over(monkeypatch):
    request = StopRequest(after_minutes=10)
    monkeypatch.setattr(stop.time, "monotonic", lambda: stop._BEGAN + 599.9)
    assert request.number == 0
    monkeypatch.setattr(stop.time, "monotonic", lambda: stop._BEGAN + 600)
    assert STOP_REASONS[request.number - 1].startswith("reliability.stop_after_minutes")
    assert StopRequest().number == 0, "without a limit it never is"


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 30),
        ({"FLUX_GRACE_SECONDS": "200"}, 200),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, 60),
        ({"FLUX_GRACE_SECONDS": "200", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, 200),
    ],
)
def test_how_long_a_run_has(environment, seconds):
    assert grace_seconds(environment) == seconds


def test_a_grace_that_is_no_number():
    with pytest.raises(ValueError, match="FLUX_GRACE_SECONDS=soon must be a number of seconds: mend or unset it"):
        grace_seconds({"FLUX_GRACE_SECONDS": "soon"})


@pytest.mark.parametrize(("seconds", "warnings"), [(59.0, 0), (61.0, 1)])
def test_a_save_that_takes_longer_than_the_grace_is_warned_of(monkeypatch, caplog, seconds, warnings):
    monkeypatch.setenv("FLUX_GRACE_SECONDS", "60")
    check_grace(seconds)
    assert len(caplog.records) == warnings
    assert all("a save took 61 s" in record.getMessage() for record in caplog.records)
