"""Starts the ranks of one machine and tells how they ended; run_train.sh and run_slurm.sh call it.

    NGPU=8 python -m scripts.launch --job.config_file train_configs/flux_dev.toml [--section.key value ...]

On several machines the same command runs on each, with NNODES (their number), NODE_RANK (0, 1, ...) and MASTER_ADDR
(the name of the first); they may say MASTER_PORT (29500).

torchrun does this too, but kills ranks 30 seconds after a signal whatever a job system grants, gives those whose peer
is dead as long, and makes every failure a 1. Here a mistake in the configuration is answered before torch is imported,
a dead rank ends the others at once, on all machines, and is named; a run that is asked to stop has $FLUX_GRACE_SECONDS
(30) to save; and the exit code is the run's own.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from config.parse import ConfigError, load_config, read_number, read_process_count
from runtime import exit_codes
from runtime.exit_record import (
    INTERRUPTED,
    RECORD_NAME,
    RECORD_VARIABLE,
    RunEnd,
    announced_folder,
    forget_exit,
    read_exit_record,
    write_exit_record,
)
from runtime.hardware import usable_cores
from runtime.stop import GRACE_VARIABLE, LAUNCHER_VARIABLE, STOP_SIGNALS, grace_seconds
from runtime.watchdog import STACKS_FOLDER, RankStacks, find_guilty, read_stacks

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOK_SECONDS = 0.1
NOTICE_SECONDS = 0.5  # from one look at what other machines say to the next
# For the others once a rank is dead: to say what they know, and no more. It is longer than a watchdog's look at stacks.
PEER_SECONDS = 5.0
MEET_SECONDS = 300.0  # for machines to find each other
ASK_SECONDS = 2.0  # for one question whether machine 0 is there
# For the others when the first one has left a run that was asked to stop: it may have to wait for TensorBoard or wandb.
LEAVE_SECONDS = 20.0
STOPPED = (exit_codes.PREEMPTED, exit_codes.TERMINATED)
# The reasons of a rank count more than the signals that other ranks die of; a traceback may only be their consequence.
REASONED = (exit_codes.CONFIG, exit_codes.DATA, exit_codes.DIVERGED, exit_codes.CHECKPOINT, exit_codes.HANG)


class Rank(Protocol):
    """A process, as `subprocess.Popen` is one."""

    @property
    def returncode(self) -> Any: ...

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...


@dataclass(frozen=True)
class RankEnd:
    """A rank that did not end well, as seen from outside."""

    exit_code: int  # negative: the signal it died of, as `subprocess` has it
    is_ours: bool = False  # it was ended by the launcher, since others had failed or the time was over


@dataclass(frozen=True)
class Machine:
    """One machine of a run."""

    processes: int
    nodes: int = 1
    node: int = 0
    address: str = "localhost"
    port: int = 0  # 0: any that is free


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    try:
        machine = read_machine(os.environ)
        config = load_config(argv, machine.processes * machine.nodes, quiet=True)
        grace = grace_seconds()
    except ValueError as error:
        print(error, file=sys.stderr)
        return exit_codes.CONFIG
    if config.comm.mode == "fake_backend":
        ranks = str(machine.processes * machine.nodes)
        os.execv(sys.executable, [sys.executable, "-m", "scripts.dry_run", "--ranks", ranks, *argv])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(os.environ.setdefault(RECORD_VARIABLE, f"{folder}/{RECORD_NAME}"))
        if machine.node == 0:  # before any rank is there
            forget_exit(place)
        command = [sys.executable, "train.py", *argv]
        launcher = Launcher(machine, grace, place, config.checkpoint.saves)
        try:
            return launcher.run(lambda environment: subprocess.Popen(command, env=environment))
        except OSError as error:  # machines that do not meet, or no room for one more process
            print(error, file=sys.stderr)
            return exit_codes.ERROR


def read_machine(environment: Mapping[str, str]) -> Machine:
    """This machine among those of the run.

    Raises:
        ConfigError: the environment does not say it.
    """
    processes = read_process_count(environment) or 1
    nodes = read_number(environment, "NNODES", 1, least=1)
    if nodes == 1:
        return Machine(processes)
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name)]
    if missing:
        raise ConfigError(f"NNODES={nodes} needs {' and '.join(missing)} too: set them, or unset NNODES")
    node = read_number(environment, "NODE_RANK", 0, least=0)
    if node >= nodes:
        raise ConfigError(f"NODE_RANK={node} must be below NNODES={nodes}")
    port = read_number(environment, "MASTER_PORT", 29500, least=1)
    return Machine(processes, nodes, node, environment["MASTER_ADDR"], port)


class Launcher:
    """The ranks of one machine, from start to end.

    Args:
        grace: seconds that they have after a signal.
        place: where a rank that fails leaves its record.
        resumes: started again, the run goes on from what it has saved.
    """

    def __init__(self, machine: Machine, grace: float, place: Path, resumes: bool = False):
        self._machine, self._grace, self._place, self._resumes = machine, grace, place, resumes
        self._failed: dict[int, RankEnd] = {}  # the first one first
        self._stopped: signal.Signals | None = None
        self._forward: signal.Signals | None = None  # has arrived, and is not passed on yet
        self._killed_at = float("inf")  # when those that are still there are killed
        self._store: TCPStore | None = None
        self._elsewhere = False  # another machine has failed
        self._looked = 0.0

    def run(self, start: Callable[[dict[str, str]], Rank]) -> int:
        """Starts every rank in its environment, tells what went wrong, and returns the exit code.

        Raises:
            OSError: they cannot be started, or the machines do not meet.
        """
        with self._signals():
            environment, running = self._prepare(), dict[int, Rank]()
            try:
                for local in range(0 if self._stopped else self._machine.processes):
                    rank = self._machine.node * self._machine.processes + local
                    own = {"RANK": str(rank), "LOCAL_RANK": str(local)} if "WORLD_SIZE" in environment else {}
                    running[rank] = start(environment | own)
                while running:
                    time.sleep(LOOK_SECONDS)
                    self._look(running)
            finally:  # a machine without room for one more process leaves none behind
                _send(running, signal.SIGKILL)
            code, text = self._conclude()
            self._leave()
        if text:
            print(text, file=sys.stderr)
        return code

    def _prepare(self) -> dict[str, str]:
        """The environment of the ranks; what a job system says of them is replaced."""
        machine = self._machine
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {GRACE_VARIABLE: f"{self._grace:g}", LAUNCHER_VARIABLE: str(os.getpid())}
        world = machine.processes * machine.nodes
        if world == 1:
            return environment
        # The products of one process would otherwise take all cores from the others.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // machine.processes)))
        self._store = self._meet()
        if self._store is None:
            return environment
        return environment | {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(machine.processes),
            "GROUP_RANK": str(machine.node),
            "MASTER_ADDR": machine.address,
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for a store that is there already
        }

    def _meet(self) -> "TCPStore | None":
        """What the ranks meet at: here and not in rank 0, whose death would leave the others without a word. None: a
        signal has come before machine 0 has answered.
        """
        from torch.distributed import TCPStore

        machine, deadline = self._machine, time.monotonic() + MEET_SECONDS
        is_first, once = machine.node == 0, timedelta(seconds=ASK_SECONDS)
        while not self._stopped:
            try:
                return TCPStore(machine.address, machine.port, is_master=is_first, wait_for_workers=False, timeout=once)
            except RuntimeError as error:
                if not is_first and time.monotonic() < deadline:
                    continue
                what = "cannot be listened at" if is_first else "does not answer"
                rule = "it must be a name of machine 0, and a port that is free there and can be reached"
                place = f"MASTER_ADDR={machine.address}, MASTER_PORT={machine.port}"
                raise ConnectionError(f"{place} {what}: {str(error).splitlines()[0]}: {rule}") from None
        return None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        handled = [one for one in (signal.SIGINT, *STOP_SIGNALS) if signal.getsignal(one) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._note) for number in handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self._stopped is None:  # a second one changes nothing
            self._stopped = self._forward = signal.Signals(number)
            self._killed_at = min(self._killed_at, time.monotonic() + self._grace)

    def _look(self, running: dict[int, Rank]) -> None:
        """Takes out of `running` what has ended, and ends the others where that is due."""
        now = time.monotonic()
        for rank in [rank for rank, process in running.items() if process.poll() is not None]:
            code = running.pop(rank).returncode
            if code:
                is_ours = now >= self._killed_at or (code == -signal.SIGTERM and bool(self._failed or self._elsewhere))
                self._failed[rank] = RankEnd(code, is_ours)
                if len(self._failed) > 1:
                    continue
                if self._stopped or code == exit_codes.PREEMPTED:  # the others must be about to leave too
                    self._killed_at = min(self._killed_at, now + LEAVE_SECONDS)
                else:
                    self._tell_others("failed")
                    self._end_peers(running, now)
        if self._forward is not None:
            # A terminal has told the ranks of Ctrl-C already.
            if self._forward != signal.SIGINT or now > self._killed_at - self._grace + 1:
                _send(running, self._forward)
                self._forward = None
        elif self._hears_of_failure(now) and not self._failed and not self._elsewhere:
            self._elsewhere = True
            if not self._stopped:
                self._end_peers(running, now)
        if now >= self._killed_at:
            _send(running, signal.SIGKILL)

    def _end_peers(self, running: dict[int, Rank], now: float) -> None:
        """A rank has failed: the others can only wait for it."""
        record = read_exit_record(self._place)
        hangs = record is not None and record["code"] == exit_codes.HANG  # all that can be told is told
        self._killed_at = now + (LOOK_SECONDS if hangs else PEER_SECONDS)
        _send(running, signal.SIGTERM)

    def _tell_others(self, word: str) -> None:
        if self._machine.nodes > 1 and self._store is not None:
            try:
                self._store.set(word, "1")
            except RuntimeError:  # the first machine is gone
                self._elsewhere = True

    def _hears_of_failure(self, now: float) -> bool:
        if self._machine.nodes == 1 or now < self._looked + NOTICE_SECONDS:
            return False
        self._looked = now
        try:
            return self._store.check(["failed"])  # type: ignore[union-attr]
        except RuntimeError:
            return True

    def _leave(self) -> None:
        """The first machine holds what the others meet at: it leaves last."""
        self._tell_others(f"left/{self._machine.node}")
        if self._machine.nodes > 1 and self._machine.node == 0 and self._store is not None:
            names = [f"left/{node}" for node in range(self._machine.nodes)]
            deadline = time.monotonic() + 2 * PEER_SECONDS
            while time.monotonic() < deadline and not self._store.check(names):
                time.sleep(LOOK_SECONDS)

    def _conclude(self) -> tuple[int, str]:
        """The exit code and what to tell; the record says the same where the ranks could not write it."""
        record, folder = read_exit_record(self._place), announced_folder(self._place)
        stacks = read_stacks(folder / STACKS_FOLDER) if folder else []
        end = explain(record, self._failed, self._stopped, self._grace, self._resumes, stacks, self._elsewhere)
        if end.is_news:
            told = RunEnd(end.rank, folder, record["step"] if record else None)
            write_exit_record(told, end.code, end.text, end.text, replaced=(exit_codes.ERROR, *STOPPED))
        return end.code, end.text


@dataclass(frozen=True)
class End:
    """How a run ended: its exit code, what to tell, and where only the launcher knows it, of which rank."""

    code: int
    text: str = ""
    rank: int | None = None
    is_news: bool = False


def explain(
    record: Mapping[str, Any] | None,
    failed: Mapping[int, RankEnd],
    stopped: signal.Signals | None = None,
    grace: float = 0.0,
    resumes: bool = False,
    stacks: Sequence[RankStacks] = (),
    elsewhere: bool = False,
) -> End:
    """What the ends of the ranks of this machine mean.

    Args:
        record: of the rank that failed first, or of rank 0's success; None: no rank could write one.
        failed: the ranks that did not end well, the first one first.
        stopped: the signal that ended the run; `grace` seconds later ranks are killed.
        resumes: started again, the run goes on.
        stacks: of the ranks, where they stood still.
        elsewhere: another machine of the run has failed.
    """
    if record is not None and record["code"] in REASONED:
        return End(record["code"], record["text"])
    if stopped:
        return _explain_stop(record, failed, stopped, grace, resumes)
    first_code = next(iter(failed.values())).exit_code if failed else exit_codes.OK
    if record is not None and record["code"] in STOPPED and (elsewhere or record["code"] != first_code):
        record = None  # of a rank that the launcher has stopped since another one had failed
    for rank, end in failed.items():
        if end.exit_code < 0 and not end.is_ours:
            name = signal.Signals(-end.exit_code).name
            hint = ": did the machine run out of memory?" if name == "SIGKILL" else ""
            return End(exit_codes.ERROR, f"rank {rank} on {socket.gethostname()} was ended by {name}{hint}", rank, True)
    if failed and (held := [one for one in find_guilty(stacks) if one.frames and one.rank in failed]):
        first = held[0]
        return End(
            exit_codes.HANG, f"hang: rank {first.rank} on {first.host} stands still{first.place}", first.rank, True
        )
    if record is not None and record["code"] != exit_codes.OK:
        return End(record["code"], record["text"])
    if elsewhere:
        return End(exit_codes.ERROR, "another machine of the run has failed: see what was told there")
    if not failed:
        return End(exit_codes.OK)
    rank, end = next(iter(failed.items()))
    if end.exit_code < 0:
        return End(exit_codes.ERROR, f"rank {rank} was ended by {signal.Signals(-end.exit_code).name}", rank, True)
    return End(exit_codes.ERROR, f"rank {rank} ended with {end.exit_code} and gave no reason", rank, True)


def _explain_stop(
    record: Mapping[str, Any] | None,
    failed: Mapping[int, RankEnd],
    stopped: signal.Signals,
    grace: float,
    resumes: bool,
) -> End:
    if record is not None and (record["code"] != exit_codes.OK or not failed):
        return End(record["code"], record.get("text", ""))
    if failed and all(end.exit_code == -signal.SIGKILL for end in failed.values()):
        text = f"stopped by {stopped.name}, and killed {grace:g} s later, before it had saved: give it longer with "
        return End(exit_codes.ERROR, text + GRACE_VARIABLE, next(iter(failed)), is_news=True)
    if stopped == signal.SIGINT:
        return End(exit_codes.INTERRUPTED, INTERRUPTED)
    if resumes:  # before a rank could say so
        return End(exit_codes.PREEMPTED, f"stopped by {stopped.name}", is_news=True)
    return End(exit_codes.TERMINATED, f"stopped by {stopped.name}")


def _send(ranks: Mapping[int, Rank], number: signal.Signals) -> None:
    for process in ranks.values():
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
