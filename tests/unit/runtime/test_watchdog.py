"""Whom stacks name, and a process that stands still."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import exit_codes
from runtime.exit_record import PROJECT, RunEnd
from runtime.watchdog import STACKS_FOLDER, Watchdog, explain_hang, read_stacks

OURS, TORCH = f"{PROJECT}/train.py", "/lib/site-packages/torch"
COLLECTIVE = [(f"{TORCH}/distributed/distributed_c10d.py", 9, "all_reduce"), (OURS, 5, "train_step")]
THROUGH_OPS = [(f"{TORCH}/_ops.py", 1, "__call__"), *COLLECTIVE]
DATA = [(f"{TORCH}/utils/data/dataloader.py", 7, "_try_get_data"), (OURS, 3, "take")]
SAVE_WAITS = [("/lib/threading.py", 1, "wait"), (f"{PROJECT}/checkpoint/background.py", 2, "wait"), (OURS, 4, "save")]
SAVE_WRITES = [(f"{PROJECT}/checkpoint/dcp.py", 8, "write_data"), (f"{PROJECT}/checkpoint/background.py", 1, "_run")]
SAVE_STORES = [(f"{TORCH}/distributed/checkpoint/filesystem.py", 9, "_write_item"), *SAVE_WRITES]
SAVE_MEETS = [(f"{TORCH}/distributed/distributed_c10d.py", 9, "gather"), *SAVE_WRITES]


def dump(*threads: list[tuple[str, int, str]]) -> str:
    """As faulthandler writes it: the newest thread first."""
    texts = []
    for number, frames in enumerate(threads):
        texts.append(f"{'Current thread' if number == 0 else 'Thread'} 0x00007f{number} (most recent call first):")
        texts += [f'  File "{file}", line {line} in {function}' for file, line, function in frames]
    return "\n".join(texts)


def write(folder: Path, *dumps: str) -> None:
    for rank, text in enumerate(dumps):
        header = json.dumps({"rank": rank, "host": f"node-{rank}", "process": 1})
        (folder / f"rank-{rank}.txt").write_text(f"{header}\n{text}")


def named(folder: Path) -> tuple[int | None, str]:
    hang = explain_hang(read_stacks(folder), "step 7", 60)
    return hang.rank, hang.reason


@pytest.mark.parametrize(
    ("dumps", "rank", "words"),
    [
        ([dump(COLLECTIVE), dump(DATA)], 1, "rank 1 on node-1 stands still in step 7, which took longer than 60 s at"),
        ([dump(DATA), dump(THROUGH_OPS)], 0, "at train.py:3 in take"),
        ([dump(COLLECTIVE), ""], 1, "gives no sign"),
        ([dump(DATA), ""], 1, "gives no sign"),  # the other one may wait for it in a way that is not known
        ([dump(COLLECTIVE), "", ""], 1, "(and 1 more)"),
        ([dump(COLLECTIVE), dump(COLLECTIVE)], None, "all ranks wait for each other"),
        ([dump(DATA), dump(DATA)], None, "all ranks are busy"),
        ([dump(DATA)], 0, "rank 0 on node-0 stands still"),
        # The main thread comes last; of one that waits for a save, that counts.
        ([dump(DATA, COLLECTIVE), dump(COLLECTIVE, DATA)], 1, "rank 1"),
        ([dump(SAVE_MEETS, SAVE_WAITS), dump(SAVE_WRITES, SAVE_WAITS)], 1, "at checkpoint/dcp.py:8 in write_data"),
        ([dump(SAVE_STORES, SAVE_WAITS), dump(SAVE_MEETS, SAVE_WAITS)], 0, "at checkpoint/dcp.py:8 in write_data"),
    ],
)
def test_who_is_named(tmp_path, dumps, rank, words):
    write(tmp_path, *dumps)
    found, reason = named(tmp_path)
    assert found == rank and words in reason, reason


def test_control_with_another_rank_in_the_collective_another_one_is_named(tmp_path):
    write(tmp_path, dump(DATA), dump(COLLECTIVE))
    assert named(tmp_path)[0] == 0
    write(tmp_path, dump(COLLECTIVE), dump(DATA))
    assert named(tmp_path)[0] == 1


def test_what_is_no_stack_is_passed_over(tmp_path):
    (tmp_path / "rank-0.txt").write_text("")
    (tmp_path / "rank-1.txt").write_text("{}\nThread")
    assert read_stacks(tmp_path) == []


def test_a_run_that_ends_leaves_nothing(tmp_path):
    before = signal.getsignal(signal.SIGTSTP)
    with Watchdog(RunEnd(0, tmp_path)) as watchdog:
        watchdog.expect("something", 60)
        assert (tmp_path / STACKS_FOLDER / "rank-0.txt").exists()
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTSTP) == before


def test_without_it_nothing_is_watched(tmp_path):
    with Watchdog(RunEnd(0, tmp_path), enabled=False) as watchdog:
        watchdog.expect("something", 0.01)
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_the_limit_of_a_step_follows_the_median(tmp_path, monkeypatch):
    now = iter([0.0, 10.0, 20.0, 30.0, 130.0])
    with Watchdog(RunEnd(0, tmp_path), enabled=False) as watchdog:
        monkeypatch.setattr("runtime.watchdog.time.monotonic", lambda: next(now))
        limits = [watchdog.expect_step(step, 0) for step in range(5)]
        assert limits == [60, 200, 200, 200, 200], "one slow step changes nothing"
        monkeypatch.setattr("runtime.watchdog.time.monotonic", lambda: 131.0)
        assert watchdog.expect_step(5, 7.5) == 7.5, "what the user wants"
        watchdog.expect("a save", 99)
        monkeypatch.setattr("runtime.watchdog.time.monotonic", lambda: 999.0)
        assert watchdog.expect_step(6, 0) == 200, "what came between is no step"


def test_the_first_steps_may_take_longer_than_there_is_to_go_by(tmp_path):
    with Watchdog(RunEnd(0, tmp_path), enabled=False) as watchdog:
        watchdog.expect("the first step", 600)
        assert watchdog.expect_step(1, 0, unmeasured=600) == 600
        assert watchdog.expect_step(2, 0, unmeasured=600) == 60


PROGRAM = """
import ctypes, os, signal, sys, time
from pathlib import Path
from runtime.exit_record import RunEnd
from runtime.watchdog import Watchdog

with Watchdog(RunEnd(0, Path(sys.argv[1]))) as watchdog:
    watchdog.expect("the test", 1.0, step=3)
    print("ready", flush=True)
    for _ in range(3):  # each in time
        time.sleep(0.5)
        watchdog.expect("the test", 1.0, step=3)
    print("now", flush=True)
    if sys.argv[2] == "hold":
        ctypes.PyDLL(None).sleep(60)
    elif sys.argv[2] == "fork":
        child = os.fork()
        if not child:
            time.sleep(3)
            os._exit(7)
        watchdog.expect("the test", 60)
        time.sleep(0.5)
        os.kill(child, signal.SIGTSTP)
        time.sleep(0.5)
        os.kill(child, signal.SIGCONT)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    elif sys.argv[2] == "sleep":
        time.sleep(60)
    else:
        time.sleep(0.8)
"""


def start(folder: Path, kind: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), kind],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("kind", "code"), [("sleep", exit_codes.HANG), ("hold", 1), ("ends", 0)])
def test_a_process_that_stands_still_is_ended(tmp_path, kind, code):
    process = start(tmp_path, kind)
    assert process.stdout.readline() == "now\n"
    began = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - began < 1.0 + 5
    if kind == "ends":
        assert said == "" and list(tmp_path.iterdir()) == []
        return
    stacks = read_stacks(tmp_path / STACKS_FOLDER)
    assert [one.rank for one in stacks] == [0] and stacks[0].frames[0][0] == "<string>"
    if kind == "sleep":
        record = json.loads((tmp_path / "exit.json").read_text())
        assert record["code"] == 6 and record["resumable"] and record["step"] == 3
        assert record["reason"].startswith("hang: rank 0 on ") and "the test" in record["reason"]
        assert said.startswith(record["reason"]) and str(tmp_path) in said


def test_a_user_may_let_a_run_wait(tmp_path):
    process = start(tmp_path, "ends")
    process.send_signal(signal.SIGTSTP)
    time.sleep(3)  # longer than the limit
    os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")


def test_a_user_may_let_the_data_workers_wait(tmp_path):
    """They inherit the handler of Ctrl-Z, and nothing of what it is about."""
    process = start(tmp_path, "fork")
    try:
        told, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert told == "now\n7\n" and process.returncode == 0
