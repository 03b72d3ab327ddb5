"""What the launcher makes of the ends of its ranks."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from runtime.exit_record import RECORD_VARIABLE, write_exit_record
from scripts.launch import GRACE_SECONDS, RankEnd, explain, main, make_handler

ROOT = Path(__file__).resolve().parents[3]
TINY = f"--job.config_file={ROOT / 'train_configs' / 'flux_tiny.toml'}"


def record(code, text="the text", rank=0):
    return {"code": code, "reason": "the reason", "step": 3, "rank": rank, "text": text}


def ends(*codes, seconds=0):
    """Ranks 0, 1, ... with these exit codes; each `seconds` after the one before."""
    return {rank: RankEnd(code, 100.0 + rank * seconds) for rank, code in enumerate(codes)}


DONE, RAISED, STOPPED = record(0, ""), record(1, "Traceback ...\nRuntimeError: x"), record(143, "stopped by SIGTERM")


@pytest.mark.parametrize(
    ("written", "failures", "stopped", "expected"),
    [
        (DONE, {}, None, (0, "")),
        (None, {}, None, (0, "")),
        # A rank said why.
        (record(2), ends(2, -15), None, (2, "the text")),
        (record(3, rank=1), ends(-15, 3), None, (3, "the text")),
        (record(4), ends(4, 4), None, (4, "the text")),
        (record(3), ends(3, -9, seconds=GRACE_SECONDS), None, (3, "the text")),  # the other one was stuck
        (record(3), ends(-11, 3), None, (3, "the text")),  # crashed on its way out
        (RAISED, ends(1, 1), None, (1, RAISED["text"])),
        (RAISED, ends(1, -9, seconds=GRACE_SECONDS), None, (1, RAISED["text"])),
        # A rank was killed; what the others say is only that it does not answer.
        (None, ends(-9), None, (1, "rank 0 was ended by SIGKILL: did the machine run out of memory?")),
        (RAISED, ends(1, -9), None, (1, "rank 1 was ended by SIGKILL: did the machine run out of memory?")),
        (STOPPED, ends(-11, 143), None, (1, "rank 0 was ended by SIGSEGV")),
        (STOPPED, ends(-6, -15), None, (1, "rank 0 was ended by SIGABRT")),
        (DONE, ends(-11), None, (1, "rank 0 was ended by SIGSEGV")),  # after it was done
        # Nobody says why.
        (None, ends(1, 1), None, (1, "rank 0 ended with 1 and gave no reason")),
        (STOPPED, ends(7, 143), None, (1, "rank 0 ended with 7 and gave no reason")),
        (STOPPED, ends(-15, 143), None, (1, "rank 0 was ended by SIGTERM and gave no reason")),
        # The run was stopped from outside.
        (None, {}, signal.SIGINT, (130, "interrupted by Ctrl-C")),
        (None, {}, signal.SIGTERM, (143, "stopped by SIGTERM")),
        (STOPPED, {}, signal.SIGTERM, (143, "stopped by SIGTERM")),
        (DONE, {}, signal.SIGTERM, (143, "stopped by SIGTERM")),
        (None, {}, signal.SIGHUP, (129, "stopped by SIGHUP")),
        (record(3), {}, signal.SIGINT, (3, "the text")),  # it had failed before
    ],
)
def test_the_end_of_a_run(written, failures, stopped, expected):
    assert explain(written, failures, stopped) == expected


def test_a_second_signal_does_not_leave_ranks_behind():
    class Ended(Exception):
        def __init__(self, text, number):
            self.number = number

    handler = make_handler(Ended)
    with pytest.raises(Ended) as caught:
        handler(signal.SIGINT, None)
    assert caught.value.number is signal.SIGINT
    handler(signal.SIGINT, None)
    handler(signal.SIGTERM, None)


class Stage:
    """Runs main() with a stand-in for torchrun; programs that would take this one's place are noted."""

    def __init__(self, monkeypatch):
        self.programs, self.arguments, self.environment = [], [], {}
        self.monkeypatch = monkeypatch
        self.behave = lambda: None
        monkeypatch.setattr(os, "execv", self._execv)
        monkeypatch.setattr("torch.distributed.run.main", self._torchrun)
        # What main() sets is put back.
        for name in ("OMP_NUM_THREADS", RECORD_VARIABLE, "TORCHELASTIC_SIGNALS_TO_HANDLE"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    def _execv(self, program, argv):
        self.programs.append(argv)
        raise SystemExit(0)

    def _torchrun(self, arguments):
        self.arguments, self.environment = arguments, dict(os.environ)
        self.behave()

    def run(self, *argv, processes="2"):
        self.monkeypatch.setenv("NGPU", processes)
        return main([TINY, *argv])


@pytest.fixture
def stage(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    level = logging.root.manager.disable
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell puts in the background ignores it
    yield Stage(monkeypatch)
    logging.disable(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def failed(**exit_codes):
    """torchrun's error when these ranks ended so."""
    failures = {
        int(rank.removeprefix("rank")): ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="")
        for rank, code in exit_codes.items()
    }
    return ChildFailedError("train.py", failures)


def test_torchrun_gets_the_processes_and_all_arguments(stage, capfd):
    assert stage.run("--training.steps", "5", processes="4") == 0
    assert "--nproc_per_node=4" in stage.arguments
    assert stage.arguments[stage.arguments.index("train.py") + 1 :] == [TINY, "--training.steps", "5"]
    assert stage.environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 4))
    assert not Path(stage.environment[RECORD_VARIABLE]).parent.exists(), "nothing is left behind"
    assert capfd.readouterr() == ("", "")


def test_threads_that_the_user_chose_stay(stage, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    stage.run()
    assert stage.environment["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("code", "expected"), [(3, (3, "a.png does not decode\n")), (1, (1, "rank 1 was ended by SIGKILL: did the "))]
)
def test_the_recorded_end_counts_and_is_told_once(stage, capfd, code, expected):
    def behave():
        write_exit_record(None, code, "a.png", step=2, rank=0, text="a.png does not decode")
        raise failed(rank0=code, rank1=-9)

    stage.behave = behave
    assert stage.run() == expected[0]
    assert capfd.readouterr().err.startswith(expected[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_ranks_and_gives_its_code(stage, capfd, number, code):
    stage.behave = lambda: os.kill(os.getpid(), number)
    assert stage.run() == code
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_what_runs_in_the_background_does_not_listen_to_ctrl_c(stage):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stage.behave = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert stage.run() == 0


def test_one_process_needs_no_torchrun(stage):
    with pytest.raises(SystemExit):
        stage.run("--training.steps=5", processes="1")
    assert stage.programs == [[sys.executable, "train.py", TINY, "--training.steps=5"]]


def test_without_a_number_of_processes_there_is_one(stage):
    with pytest.raises(SystemExit):
        stage.run(processes="")
    assert stage.programs == [[sys.executable, "train.py", TINY]]


def test_pretended_processes_need_only_one(stage):
    with pytest.raises(SystemExit):
        stage.run("--comm.mode=fake_backend", processes="1024")
    assert stage.programs == [
        [sys.executable, "-m", "scripts.dry_run", "--ranks", "1024", TINY, "--comm.mode=fake_backend"]
    ]


@pytest.mark.parametrize(
    ("argv", "processes", "text"),
    [
        (["--training.stepz=1"], "2", "key 'training.stepz' is unknown"),
        (["--parallelism.tensor_parallel_degree=3"], "8", "must divide num_heads=8 of flux-tiny"),
        (["--parallelism.data_parallel_replicate_degree=3"], "8", "must divide the 8 processes of this run"),
        ([], "three", "NGPU=three must be a number of processes, 1 or more"),
    ],
)
def test_a_mistake_is_answered_once_before_anything_starts(stage, capfd, argv, processes, text):
    assert stage.run(*argv, processes=processes) == 2
    said = capfd.readouterr().err
    assert said.count(text) == 1 and not stage.arguments and not stage.programs


def test_a_mistake_is_answered_without_torch():
    program = """
import sys
from scripts.launch import main
code = main(["--training.stepz=1"])
sys.exit("imported torch" if "torch" in sys.modules else code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"NGPU": "8"}, capture_output=True, text=True
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
