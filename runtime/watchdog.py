"""Ends a run that stands still: with the stacks of all ranks, and the name of the rank that the others wait for. Asks
one whose launcher is gone to stop.

Every rank says what it is about to do and how long that may take. Ranks that wait for each other reach their limits
together: each writes its stacks to a file, and after a moment looks at those of all. A rank without stacks has been
stopped, or holds Python's lock; else it is one that does not wait inside of a collective. A rank whose lock is held
has no Python to look with: there a thread of `faulthandler`, which needs none, writes the stacks and ends it.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Self, TextIO

from runtime import exit_codes
from runtime.exit_record import PROJECT, RunEnd, write_exit_record
from runtime.log import write_stderr
from runtime.stop import STOP_SIGNALS, launcher_is_gone

STACKS_FOLDER = "stacks"  # in the run folder, while the run lives, and of one that stood still
# Seconds after the limit: until a rank whose lock is held is ended, and until the stacks of all are looked at.
HELD_SECONDS, LOOK_SECONDS = 1.0, 2.0
STEP_FACTOR, LEAST_STEP_SECONDS = 20, 60.0  # a step may take so many times the median one
_REMEMBERED = 100  # steps

# Where a rank is that waits for others; what it called last may be torch's way there.
_IN_COLLECTIVE = ("/torch/distributed/", "/torch/cuda/", f"{PROJECT}/parallel/")
_AT_WORK = "/torch/distributed/checkpoint/"  # what reads and writes; where it waits, others are further in
_ON_THE_WAY = ("/torch/_ops.py",)
_SAVE_WAITS, _SAVE_RUNS = ("background.py", "wait"), ("background.py", "_run")


class Watchdog:
    """Watches one rank.

    Args:
        end: how the run ends; its folder gets the stacks.
        enabled: without it, nothing is watched.
    """

    def __init__(self, end: RunEnd, enabled: bool = True):
        self._end = end
        self._file: TextIO | None = None
        self._what, self._step, self._seconds = "", 0, 0.0
        self._deadline: float | None = None
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._step_began: float | None = None
        self._telling = False
        if not enabled:
            return
        assert end.folder is not None
        folder = end.folder / STACKS_FOLDER
        folder.mkdir(exist_ok=True)
        self._file = (folder / f"rank-{end.rank}.txt").open("w")
        json.dump({"rank": end.rank, "host": socket.gethostname(), "process": os.getpid()}, self._file)
        self._file.write("\n")
        self._file.flush()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._previous = signal.signal(signal.SIGTSTP, self._pause)

    def expect(self, what: str, seconds: float, step: int = 0) -> None:
        """From now on this rank does `what`, after `step` finished steps, which may take so long at most."""
        self._step_began = None
        self._arm(what, seconds, step)

    def rest(self) -> None:
        """What comes now may take any time, until the next word."""
        self._deadline = self._step_began = None
        faulthandler.cancel_dump_traceback_later()

    def expect_step(
        self, step: int, seconds: float, least: float = LEAST_STEP_SECONDS, unmeasured: float = LEAST_STEP_SECONDS
    ) -> float:
        """The same for step `step` + 1. Returns its limit.

        Args:
            seconds: the limit; 0: STEP_FACTOR times the median step, at least `least`.
            unmeasured: the least while there is no step to go by.
        """
        now = time.monotonic()
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        usual = STEP_FACTOR * median(self._steps) if self._steps else unmeasured
        seconds = seconds or max(least, usual)
        self._arm(f"step {step + 1}", seconds, step)
        self._step_began = now
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """The run has ended: there is nothing to watch, and no stacks to keep."""
        if self._telling:  # others have ended meanwhile, and this rank with them: the word is the watchdog's
            for number in STOP_SIGNALS:  # a launcher's, which has seen others end
                signal.signal(number, signal.SIG_IGN)
            self._thread.join()
        self._deadline = self._step_began = None
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGTSTP, self._previous)
        self._closed.set()
        path = Path(self._file.name)
        self._file.close()
        self._file = None
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others have theirs there
            path.parent.rmdir()

    def _arm(self, what: str, seconds: float, step: int) -> None:
        self._what, self._step, self._seconds = what, step, seconds
        if self._file is not None:
            self._deadline = time.monotonic() + seconds
            faulthandler.dump_traceback_later(seconds + HELD_SECONDS, exit=True, file=self._file)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: a run that its user lets wait does not hang."""
        if not self._thread.is_alive():  # a data worker: there `faulthandler` would wait for a thread that is not there
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        is_watched = self._deadline is not None
        self.rest()
        os.kill(os.getpid(), signal.SIGSTOP)
        if is_watched:
            self._arm(self._what, self._seconds, self._step)

    def _watch(self) -> None:
        is_alone = False
        while True:
            deadline = self._deadline
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if deadline is not None and deadline == self._deadline and left <= 0:
                break
            if self._closed.wait(min(max(left, 0.01), 1.0)):
                return
            if not is_alone and launcher_is_gone():
                is_alone = True
                write_stderr(f"rank {self._end.rank}: the launcher is gone, which stops the run as SIGTERM does")
                os.kill(os.getpid(), signal.SIGTERM)
        self._end_run()

    def _end_run(self) -> None:
        self._telling = True
        file = self._file
        if file is None:  # it has just ended by itself
            return
        faulthandler.cancel_dump_traceback_later()
        try:
            self._tell_stacks(file)
        finally:  # whatever the disk says
            os._exit(exit_codes.HANG)

    def _tell_stacks(self, file: TextIO) -> None:
        faulthandler.dump_traceback(file)
        time.sleep(LOOK_SECONDS)
        folder = Path(file.name).parent
        ranks = read_stacks(folder)
        hang = explain_hang(ranks, self._what, self._seconds)
        text = f"{hang.reason}; stacks of all ranks in {folder}"
        end = replace(self._end, rank=hang.rank, step=self._step)
        is_told = write_exit_record(end, exit_codes.HANG, hang.reason, text, hang.host)
        if not is_told and self._end.rank == min((one.rank for one in ranks if one.frames), default=-1):
            write_stderr(text)


@dataclass(frozen=True)
class RankStacks:
    """What one rank was doing.

    Args:
        frames: (file, line, function) of what held it up, the innermost first; empty: it gave no sign.
    """

    rank: int
    host: str
    frames: list[tuple[str, int, str]]

    @property
    def waits(self) -> bool:
        """Whether it waited for other ranks."""
        inner = next((file for file, _, _ in self.frames if not file.endswith(_ON_THE_WAY)), "")
        return _AT_WORK not in inner and any(part in inner for part in _IN_COLLECTIVE)

    @property
    def place(self) -> str:
        """The innermost line of this project."""
        for file, line, function in self.frames:
            if Path(file).is_relative_to(PROJECT) and "site-packages" not in file:
                return f" at {Path(file).relative_to(PROJECT)}:{line} in {function}"
        return "" if self.frames else ", and gives no sign: it was stopped, or its machine is gone"


@dataclass(frozen=True)
class Hang:
    """Who held up a run, as far as stacks tell; rank None: all wait for each other."""

    reason: str
    rank: int | None
    host: str


def read_stacks(folder: Path) -> list[RankStacks]:
    """What the ranks have written, in their order."""
    ranks = []
    for path in folder.glob("rank-*.txt"):
        header, _, dump = path.read_text().partition("\n")
        with contextlib.suppress(ValueError, KeyError):
            about = json.loads(header)
            ranks.append(RankStacks(about["rank"], about["host"], _frames_that_count(dump)))
    return sorted(ranks, key=lambda one: one.rank)


def find_guilty(ranks: Sequence[RankStacks]) -> list[RankStacks]:
    """The ranks that the others wait for: those that give no sign, or else those that wait for nobody."""
    silent = [one for one in ranks if not one.frames]
    return silent or [one for one in ranks if not one.waits]


def explain_hang(ranks: list[RankStacks], what: str, seconds: float) -> Hang:
    """Says for whom the others wait."""
    guilty = find_guilty(ranks)
    took = f"in {what}, which took longer than {seconds:g} s"
    if not guilty or len(guilty) == len(ranks) > 1:
        done = "are busy" if guilty else "wait for each other"
        return Hang(f"hang: all ranks {done} {took}", None, socket.gethostname())
    first = guilty[0]
    others = f" (and {len(guilty) - 1} more)" if len(guilty) > 1 else ""
    return Hang(
        f"hang: rank {first.rank} on {first.host} stands still{others} {took}{first.place}", first.rank, first.host
    )


def _frames_that_count(dump: str) -> list[tuple[str, int, str]]:
    """Of the main thread, which `faulthandler` writes last; or of the save that it waits for."""
    threads = [
        [
            (file, int(line), function)
            for file, line, function in re.findall(r'^  File "(.+)", line (\d+) in (.+)$', text, re.M)
        ]
        for text in re.split(r"^(?:Current thread|Thread) .*$", dump, flags=re.M)[1:]
    ]
    if not threads:
        return []
    main = threads[-1]
    if _passes(main, _SAVE_WAITS):
        return next((thread for thread in threads if _passes(thread, _SAVE_RUNS)), main)
    return main


def _passes(frames: list[tuple[str, int, str]], place: tuple[str, str]) -> bool:
    return any((Path(file).name, function) == place for file, _, function in frames)
