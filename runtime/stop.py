"""Wishes from outside that a run ends: signals of a job system, and a limit on its time."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from types import FrameType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_REASONS = (*(one.name for one in STOP_SIGNALS), "reliability.stop_after_minutes have passed")
# Seconds from a signal to the kill, for who tells processes of it (scripts/launch.py, run_slurm.sh) ...
GRACE_VARIABLE = "FLUX_GRACE_SECONDS"
# ... and as torchrun knows it, which otherwise kills after 30, however long a job system would wait.
TORCHRUN_GRACE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
DEFAULT_GRACE_SECONDS = 30.0
# Process id of scripts/launch.py, whose children the ranks are.
LAUNCHER_VARIABLE = "FLUX_LAUNCHER"
AGAIN_SECONDS = 0.05
SAME_SECONDS = 2.0  # in which a second SIGINT is the first one again

_BEGAN = time.monotonic()

log = logging.getLogger(__name__)
Handlers = Mapping[signal.Signals, Any]


class Terminated(BaseException):
    """A signal ends the program at once. As KeyboardInterrupt it is no Exception: nothing on the way swallows it."""


class Preempted(Exception):
    """A run was stopped from outside, has saved what it had, and can go on from there."""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside, the first of STOP_SIGNALS raises Terminated with its name, and Ctrl-C KeyboardInterrupt."""
    previous: Handlers = {number: signal.signal(number, _raise_terminated) for number in STOP_SIGNALS}
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not what a shell has put in the background
        previous = {**previous, signal.SIGINT: signal.signal(signal.SIGINT, _interrupter())}
    hook = sys.unraisablehook

    def raise_again(ignored: "sys.UnraisableHookArgs") -> None:
        """Where a destructor runs, Python only prints what is raised: the signal would be lost."""
        error = ignored.exc_value
        if not isinstance(error, Terminated):
            return hook(ignored)
        signal.signal(signal.SIGALRM, lambda number, frame: _raise(error))
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        _restore(previous)


def _raise(error: BaseException) -> None:
    raise error


def _interrupter() -> Callable[[int, FrameType | None], None]:
    """A handler of Ctrl-C that raises once for each time it is pressed: a terminal and a launcher both tell of it."""
    last = -inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() > last + SAME_SECONDS:
            last = time.monotonic()
            raise KeyboardInterrupt

    return interrupt


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    # A second one (a scheduler and a launcher both send one) must not cut off the record of the first.
    for one in STOP_SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    raise Terminated(signal.Signals(number).name)


class StopRequest:
    """While entered, STOP_SIGNALS are only noted: the run looks at `number` where it can leave in good order.

    Args:
        after_minutes: since the program began, the run shall leave too; 0: it has all the time.
    """

    def __init__(self, after_minutes: float = 0.0):
        self._after_seconds = after_minutes * 60
        self._number = 0
        self._previous: Handlers = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        _restore(self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or 1 + STOP_REASONS.index(signal.Signals(number).name)

    @property
    def number(self) -> int:
        """Why this process is asked to leave: from 1 on, its place in STOP_REASONS; 0: it is not."""
        if not self._number and 0 < self._after_seconds <= time.monotonic() - _BEGAN:
            self._number = len(STOP_REASONS)
        return self._number


def grace_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long the processes of a run have from a signal to the kill.

    Raises:
        ValueError: what the environment says is no number.
    """
    for name in (GRACE_VARIABLE, TORCHRUN_GRACE_VARIABLE):
        if text := environment.get(name):
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"{name}={text} must be a number of seconds: mend or unset it") from None
    return DEFAULT_GRACE_SECONDS


def launcher_is_gone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher that has started this process has ended before it: nobody is left to end or to name it."""
    launcher = environment.get(LAUNCHER_VARIABLE)
    return launcher is not None and launcher != str(os.getppid())


def check_grace(save_seconds: float) -> None:
    """Warns when a save takes longer than a run that is asked to stop may have for it."""
    if risk := find_grace_risk(save_seconds, grace_seconds()):
        log.warning("%s", risk)


def find_grace_risk(save: float, grace: float) -> str | None:
    """Why a stop would lose work.

    Args:
        save: seconds that the longest save took.
        grace: seconds that the ranks have after a signal.
    """
    if save <= grace:
        return None
    return (
        f"a save took {save:.0f} s, and {GRACE_VARIABLE}={grace:g} is what the ranks have after a signal: a stop loses "
        f"what was trained since the last checkpoint; let the signal come {2 * save + 30:.0f} s ahead (--signal=TERM@N "
        f"in run_slurm.sh, terminationGracePeriodSeconds of a pod, {TORCHRUN_GRACE_VARIABLE} of torchrun)"
    )


def _restore(previous: Handlers) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
