"""How a run ended, in one file: `<dump_folder>/exit.json` with code, reason, step, rank, host, resumable, save_seconds.

Launchers make every failure a 1, so the code that counts is the recorded one (scripts/launch.py and run_slurm.sh read
it).
"""

import json
import os
import re
import socket
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redact import redact
from runtime import exit_codes
from runtime.log import write_stderr
from runtime.stop import Preempted, Terminated, stopped_by_signals

RECORD_NAME = "exit.json"
# A second place for the record, known before the run folder is. Who names one also tells the end: the record there
# holds the text and the run folder too.
RECORD_VARIABLE = "FLUX_EXIT_RECORD"
FOLDER_SUFFIX = ".folder"  # beside it, what names the run folder before there is a record

INTERRUPTED = "interrupted by Ctrl-C"
PROJECT = Path(__file__).resolve().parents[1]


@dataclass
class RunEnd:
    """What the record says beside the code and the reason; the trainer keeps it up to date."""

    rank: int | None
    folder: Path | None = None  # None: there is no run folder yet
    step: int | None = 0  # the last finished step; None: nobody can say
    resumes: bool = False  # started again, the run goes on from what it has saved
    save_seconds: float | None = None  # the longest save
    # Whether this rank says what went wrong, where nobody collects records. Until ranks can talk to each other only
    # rank 0 does: what fails before, the configuration, fails on all of them.
    may_speak: Callable[[], bool] | None = None


@contextmanager
def recorded_exit(rank: int, codes: Mapping[type[Exception], int]) -> Iterator[RunEnd]:
    """Runs the body, records how it ended and leaves the process with the right exit code.

        with recorded_exit(rank, {DataError: exit_codes.DATA, ValueError: exit_codes.CONFIG}) as end:
            end.folder = claim_run_folder(...)

    An error of `codes` that was raised in this project's own code is for the user to mend: its message is told, without
    traceback. Any other exception is a fault of the recipe and keeps its traceback. SIGTERM and SIGUSR1 end the body
    the way Ctrl-C does, unless it handles them. All this is told on stderr, or by the process that named a file for the
    record in $FLUX_EXIT_RECORD: of several ranks that fail, only that one knows which to believe.

    Args:
        rank: of this process, as far as it is known; the body may correct it. Rank 0 records success.
        codes: exit code of each kind of user error; the first that fits counts.

    Raises:
        SystemExit: the body did not end well. A SystemExit of the body itself passes unrecorded.
    """
    end = RunEnd(rank)
    with stopped_by_signals():
        try:
            yield end
        except (Exception, KeyboardInterrupt, Terminated) as error:
            code, reason, text = _explain(error, codes, end.resumes)
            is_told = write_exit_record(end, code, reason, text)
            if not is_told and (end.may_speak() if end.may_speak else end.rank == 0):
                write_stderr(text)
            raise SystemExit(code) from None
        if end.rank == 0:
            write_exit_record(end, exit_codes.OK, "done")


def write_exit_record(
    end: RunEnd, code: int, reason: str, text: str = "", host: str | None = None, replaced: Collection[int] = ()
) -> bool:
    """Writes the record into the run folder and, with the text, to the file that $FLUX_EXIT_RECORD names.

    Of several ranks the first that failed keeps the word: the others mostly fail because of it.

    Args:
        host: of the rank that is told of; None: this one.
        replaced: codes that count less than this one; 0 always does.

    Returns:
        Whether the process that named the file can tell what happened.
    """
    record = {
        "code": code,
        "reason": redact(reason),
        "step": end.step,
        "rank": None if code == exit_codes.PREEMPTED else end.rank,  # all of them were
        "host": host or socket.gethostname(),
        "resumable": code in exit_codes.RESUMABLE,
        "save_seconds": end.save_seconds,
    }
    replaced = {exit_codes.OK, *replaced}
    if end.folder is not None:
        _place(end.folder / RECORD_NAME, record, replaced)
    named = os.environ.get(RECORD_VARIABLE)
    folder = None if end.folder is None else str(end.folder)
    return named is not None and _place(Path(named), {**record, "text": redact(text), "folder": folder}, replaced)


def announce_folder(folder: Path) -> None:
    """Tells the process that named a file for the record which folder the run writes into."""
    if named := os.environ.get(RECORD_VARIABLE):
        note = Path(named + FOLDER_SUFFIX)
        unfinished = note.with_name(f"{note.name}.{socket.gethostname()}.{os.getpid()}")
        unfinished.write_text(str(folder))
        unfinished.replace(note)


def announced_folder(record: Path) -> Path | None:
    """What a run has announced beside the file that was named for its record."""
    note = Path(f"{record}{FOLDER_SUFFIX}")
    return Path(note.read_text()) if note.exists() else None


def forget_exit(record: Path) -> None:
    """Removes the file that was named for the record, and what is beside it: a run would keep an older failure."""
    for file in (record, Path(f"{record}{FOLDER_SUFFIX}")):
        file.unlink(missing_ok=True)


def read_exit_record(place: Path) -> dict[str, Any] | None:
    """The record in a file; None: there is none."""
    try:
        record = json.loads(place.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "code" in record else None


def _place(place: Path, record: dict[str, Any], replaced: Collection[int]) -> bool:
    """Whether the file holds this record now, or an earlier failure that counts more."""
    try:
        before = read_exit_record(place)
        if before is not None and before["code"] not in replaced:
            return True
        unfinished = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}")
        unfinished.write_text(json.dumps(record) + "\n")
        unfinished.replace(place)
    except OSError as error:
        write_stderr(f"warning: {place} could not be written: {error}")
        return False
    return True


def _explain(error: BaseException, codes: Mapping[type[Exception], int], resumes: bool) -> tuple[int, str, str]:
    """The exit code of an error, its reason, and what to tell: the reason, or a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return exit_codes.INTERRUPTED, INTERRUPTED, INTERRUPTED
    if isinstance(error, Terminated):
        reason = f"stopped by {error}"
        return exit_codes.PREEMPTED if resumes else exit_codes.TERMINATED, reason, reason
    if isinstance(error, Preempted):
        return exit_codes.PREEMPTED, str(error), str(error)
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
