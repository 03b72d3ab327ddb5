"""How a run ended, in one file: `<dump_folder>/exit.json` with code, reason, step and rank.

torchrun turns every failure into exit code 1, so the code that counts is the recorded one (scripts/launch.py reads it).
"""

import json
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import exit_codes
from runtime.log import write_stderr

RECORD_NAME = "exit.json"
# A second place for the record, known before the run folder is. Who names one also tells the end: the record there
# holds the text too.
RECORD_VARIABLE = "FLUX_EXIT_RECORD"

INTERRUPTED, TERMINATED = "interrupted by Ctrl-C", "stopped by SIGTERM"
PROJECT = Path(__file__).resolve().parents[1]


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt no Exception, so that nothing on the way swallows it."""


@dataclass
class RunEnd:
    """What the record says beside the code and the reason; the trainer keeps it up to date."""

    rank: int
    folder: Path | None = None  # None: there is no run folder yet
    step: int = 0  # the last finished step
    # Whether this rank says what went wrong, where nobody collects records. Until ranks can talk to each other only
    # rank 0 does: what fails before, the configuration, fails on all of them.
    may_speak: Callable[[], bool] | None = None


@contextmanager
def recorded_exit(rank: int, codes: Mapping[type[Exception], int]) -> Iterator[RunEnd]:
    """Runs the body, records how it ended and leaves the process with the right exit code.

        with recorded_exit(rank, {DataError: exit_codes.DATA, ValueError: exit_codes.CONFIG}) as end:
            end.folder = claim_run_folder(...)

    An error of `codes` that was raised in this project's own code is for the user to mend: its message is told, without
    traceback. Any other exception is a fault of the recipe and keeps its traceback. SIGTERM ends the body the way
    Ctrl-C does. All this is told on stderr, or by the process that named a file for the record in $FLUX_EXIT_RECORD: of
    several ranks that fail, only that one knows which to believe.

    Args:
        rank: of this process, as far as it is known; the body may correct it. Rank 0 records success.
        codes: exit code of each kind of user error; the first that fits counts.

    Raises:
        SystemExit: the body did not end well. A SystemExit of the body itself passes unrecorded.
    """
    end = RunEnd(rank)
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        try:
            yield end
        except (Exception, KeyboardInterrupt, Terminated) as error:
            code, reason, text = _explain(error, codes)
            is_told = write_exit_record(end.folder, code, reason, end.step, end.rank, text)
            if not is_told and (end.may_speak() if end.may_speak else end.rank == 0):
                write_stderr(text)
            raise SystemExit(code) from None
        if end.rank == 0:
            write_exit_record(end.folder, exit_codes.OK, "done", end.step, end.rank)
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_exit_record(folder: Path | None, code: int, reason: str, step: int, rank: int, text: str = "") -> bool:
    """Writes the record into the run folder and, with the text, to the file that $FLUX_EXIT_RECORD names.

    Of several ranks the first that failed keeps the word: the others mostly fail because of it.

    Returns:
        Whether the process that named the file can tell what happened.
    """
    record = {"code": code, "reason": reason, "step": step, "rank": rank}
    if folder is not None:
        _place(folder / RECORD_NAME, record)
    named = os.environ.get(RECORD_VARIABLE)
    return named is not None and _place(Path(named), {**record, "text": text})


def _place(place: Path, record: dict[str, Any]) -> bool:
    """Whether the file holds this record now, or an earlier failure."""
    try:
        if place.exists() and json.loads(place.read_text())["code"] != exit_codes.OK:
            return True
        unfinished = place.with_name(f"{place.name}.rank{record['rank']}")
        unfinished.write_text(json.dumps(record) + "\n")
        unfinished.replace(place)
    except OSError as error:
        write_stderr(f"warning: {place} could not be written: {error}")
        return False
    return True


def _raise_terminated(signal_number: int, frame: object) -> None:
    # A second SIGTERM (a scheduler and a launcher both send one) must not cut off the record of the first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _explain(error: BaseException, codes: Mapping[type[Exception], int]) -> tuple[int, str, str]:
    """The exit code of an error, its reason, and what to tell: the reason, or a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return exit_codes.INTERRUPTED, INTERRUPTED, INTERRUPTED
    if isinstance(error, Terminated):
        return exit_codes.TERMINATED, TERMINATED, TERMINATED
    origin, message = _origin_and_message(error)
    known = [code for kind, code in codes.items() if isinstance(error, kind)]
    if known and _is_ours(origin):
        return known[0], message, message
    return exit_codes.ERROR, f"{type(error).__name__}: {message}", "".join(traceback.format_exception(error)).rstrip()


def _origin_and_message(error: BaseException) -> tuple[str, str]:
    """The source file that raised the error, and what the error says."""
    text = str(error)
    if "\nOriginal Traceback (most recent call last):\n" in text:
        # A data loader's worker sent it: the message is the worker's printed traceback, which ends in the real message.
        origin = re.findall(r'^  File "(.+?)", line \d+', text, re.MULTILINE)[-1]
        return origin, re.split(rf"^[\w.]*\b{type(error).__name__}: ", text, flags=re.MULTILINE)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename, text


def _is_ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(PROJECT) and "site-packages" not in path.parts
