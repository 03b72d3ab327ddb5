"""Starts a run on the processes of this machine; run_train.sh calls it.

    NGPU=8 python -m scripts.launch --job.config_file train_configs/flux_dev.toml [--section.key value ...]

It is torchrun for one machine with three things more: a mistake in the configuration is answered before torch is
imported, a failure is told once, by the rank that failed first, and the exit code is the run's own (torchrun makes
every failure a 1).
"""

import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from config.parse import ConfigError, load_config, read_process_count
from runtime import exit_codes
from runtime.exit_record import RECORD_VARIABLE
from runtime.hardware import usable_cores

GRACE_SECONDS = 30  # torchrun kills a rank that has not ended this long after the first failure
# The reasons of a rank count more than the signals that other ranks die of; a traceback may only be their consequence.
REASONED = (exit_codes.CONFIG, exit_codes.DATA, exit_codes.DIVERGED, exit_codes.CHECKPOINT)


@dataclass(frozen=True)
class RankEnd:
    """A rank that did not end well, as seen from outside."""

    exit_code: int  # negative: the signal it died of, as `subprocess` has it
    time: float  # seconds


def main(argv: list[str]) -> int:
    """Returns the exit code; one process takes this one's place."""
    try:
        processes = read_process_count(os.environ) or 1
        config = load_config(argv, processes, quiet=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return exit_codes.CONFIG
    if config.comm.mode == "fake_backend":
        os.execv(sys.executable, [sys.executable, "-m", "scripts.dry_run", "--ranks", str(processes), *argv])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # a job system's: this run is of this machine alone
    if processes == 1:
        os.execv(sys.executable, [sys.executable, "train.py", *argv])
    # The products of one process would otherwise take all cores from the others.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    return run(processes, argv)


def run(processes: int, argv: list[str]) -> int:
    """Trains on that many processes, tells how it ended if it did not end well, and returns the exit code."""
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    for number in handled:  # without a rank to end, a signal just ends this process; imports swallow exceptions
        signal.signal(number, signal.SIG_DFL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main as torchrun

    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "exit.json"
        os.environ[RECORD_VARIABLE] = str(record)
        stop_once = make_handler(SignalException)
        for number in handled:
            signal.signal(number, stop_once)
        failures, stopped = {}, None
        try:
            failures = run_ranks(torchrun, processes, argv)
        except SignalException as error:
            stopped = error.sigval
        code, text = explain(json.loads(record.read_text()) if record.exists() else None, failures, stopped)
    if text:
        print(text, file=sys.stderr)
    return code


def make_handler(exception: type[Exception]) -> Callable[[int, object], None]:
    """A handler that raises what makes torchrun end the ranks, once: a second signal must not leave them behind."""
    last = -math.inf

    def stop_once(number: int, frame: object) -> None:
        nonlocal last
        if time.monotonic() > last + 2 * GRACE_SECONDS:
            last = time.monotonic()
            raise exception("", signal.Signals(number))

    return stop_once


def run_ranks(torchrun: Callable[[list[str]], object], processes: int, argv: list[str]) -> dict[int, RankEnd]:
    """Lets torchrun run train.py on that many processes; the ranks that did not end well, the first one first.

    Raises:
        SignalException: torchrun's, when a signal has ended this process and the ranks.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # its own account of a failure, a page for each
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # the others are handled here
    try:
        torchrun(
            [f"--nproc_per_node={processes}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "train.py", *argv]
        )
    except ChildFailedError as error:
        ends = {rank: RankEnd(failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()}
        return dict(sorted(ends.items(), key=lambda end: end[1].time))
    return {}


def explain(
    record: dict | None, failures: Mapping[int, RankEnd], stopped: signal.Signals | None = None
) -> tuple[int, str]:
    """The exit code of the run and what to tell about its end.

    Args:
        record: of the rank that failed first, or of rank 0's success; None: no rank could write one.
        failures: the ranks that did not end well, the first one first.
        stopped: the signal that ended the run.
    """
    if record is not None and (record["code"] in REASONED or (record["code"] != exit_codes.OK and stopped)):
        return record["code"], record["text"]
    if stopped:
        reason = "interrupted by Ctrl-C" if stopped == signal.SIGINT else f"stopped by {stopped.name}"
        return 128 + stopped, reason
    if not failures:
        return exit_codes.OK, ""
    first = next(iter(failures.values())).time
    for rank, end in failures.items():
        # SIGTERM is what torchrun ends the other ranks with.
        if end.exit_code < 0 and end.exit_code != -signal.SIGTERM and end.time < first + GRACE_SECONDS:
            name = signal.Signals(-end.exit_code).name
            hint = ": did the machine run out of memory?" if name == "SIGKILL" else ""
            return exit_codes.ERROR, f"rank {rank} was ended by {name}{hint}"
    if record is not None and record["code"] == exit_codes.ERROR:
        return exit_codes.ERROR, record["text"]
    rank, end = next(iter(failures.items()))
    died = f"was ended by {signal.Signals(-end.exit_code).name}" if end.exit_code < 0 else f"ended with {end.exit_code}"
    return exit_codes.ERROR, f"rank {rank} {died} and gave no reason"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
