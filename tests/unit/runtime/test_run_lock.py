"""Who holds a run folder: on one machine, after kill -9, and where only the heartbeat can tell."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime import run_lock
from runtime.run_lock import LOCK_NAME, FolderInUse, RunLock

ROOT = Path(__file__).parents[3]
OTHER = {"host": "node7", "boot": "another", "pid": 4711, "job": "123", "time": "2026-01-01T00:00:00+0000"}
HOLD = "import sys, time\nfrom runtime.run_lock import RunLock\nfrom pathlib import Path\n"
HOLD += "lock = RunLock(Path(sys.argv[1]))\n{}\nprint('held', flush=True)\ntime.sleep({})\n"


@pytest.fixture(autouse=True)
def fast_heart(monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.2)


def start_holder(folder, extra="", seconds=60):
    """A process that holds the lock, once it does."""
    command = [sys.executable, "-c", HOLD.format(extra, seconds), str(folder)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def leave_record(folder, owner=OTHER, beat=1):
    (folder / LOCK_NAME).write_text(json.dumps({"owner": owner, "beat": beat}))


def without_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def is_watched(caplog):
    return "watching" in caplog.text


@pytest.fixture
def beating_node(tmp_path):
    """Another machine's run: its record moves."""
    stop = threading.Event()

    def beat():
        number = 1
        while not stop.wait(0.05):
            number += 1
            leave_record(tmp_path, beat=number)

    leave_record(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_a_held_folder_is_refused_with_its_holders_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock = RunLock(tmp_path)
    with pytest.raises(FolderInUse) as caught:
        RunLock(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is in use by job 77 on {os.uname().nodename}, process {os.getpid()}: "
        "wait for it, stop it, or choose another --job.dump_folder"
    )
    lock.release()
    lock.release()
    assert (tmp_path / LOCK_NAME).read_bytes() == b""
    RunLock(tmp_path).release()


def test_kill_9_frees_the_folder_at_once(tmp_path, caplog):
    caplog.set_level("INFO")
    holder = start_holder(tmp_path)
    with pytest.raises(FolderInUse, match=f"a run on .*, process {holder.pid}:"):
        RunLock(tmp_path)
    end(holder)
    RunLock(tmp_path).release()
    assert not is_watched(caplog), "flock knows"


def try_after_the_parents_death(folder, before=""):
    """A run forks a worker and is killed; the worker lives on while the next run starts."""
    # The worker speaks for itself: by then its fork has let go of the lock.
    fork = "if not os.fork():\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(60)"
    body = f"import os\n{before}\n" + HOLD.format(fork, 60)
    command = [sys.executable, "-c", body, str(folder)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(next(found[0] for line in holder.stdout if (found := re.search(r"\d+", line))))  # beside "held"
    end(holder)
    try:
        RunLock(folder).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_worker_that_outlives_its_run_does_not_keep_the_folder(tmp_path):
    try_after_the_parents_death(tmp_path)
    with pytest.raises(FolderInUse):  # what would be without the care for forks
        try_after_the_parents_death(tmp_path, before="os.register_at_fork = lambda **_: None")


def test_of_processes_that_start_at_once_one_gets_the_folder(tmp_path):
    body = "from runtime.run_lock import *\nimport sys, time\nfrom pathlib import Path\nsys.stdin.readline()\n"
    body += "try:\n    RunLock(Path(sys.argv[1]))\n    print('mine', flush=True)\n"
    body += "except FolderInUse:\n    print('refused', flush=True)\nsys.stdin.readline()\n"
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", body, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(6)
    ]
    for process in starters:
        process.stdin.write(b"\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in starters]
    for process in starters:
        process.communicate(b"\n")
    assert sorted(answers) == [b"mine\n"] + [b"refused\n"] * 5


@pytest.mark.parametrize("flock", [True, False])
def test_another_machines_run_that_lives_is_refused(tmp_path, beating_node, monkeypatch, caplog, flock):
    caplog.set_level("INFO")
    if not flock:
        without_flock(monkeypatch)
    with pytest.raises(FolderInUse, match=r"is in use by job 123 on node7, process 4711: wait for it"):
        RunLock(tmp_path)
    assert is_watched(caplog)


@pytest.mark.parametrize("flock", [True, False])
def test_another_machines_run_that_is_dead_gives_way(tmp_path, monkeypatch, caplog, flock):
    caplog.set_level("INFO")
    if not flock:
        without_flock(monkeypatch)
    leave_record(tmp_path)
    lock = RunLock(tmp_path)
    assert f"{tmp_path} was held by job 123 on node7, process 4711: watching 0.5 s for its heartbeat" in caplog.text
    assert json.loads((tmp_path / LOCK_NAME).read_bytes())["owner"]["pid"] == os.getpid()
    lock.release()


def test_what_ended_in_order_is_not_watched(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    without_flock(monkeypatch)
    RunLock(tmp_path).release()
    RunLock(tmp_path).release()
    assert not is_watched(caplog)


def test_half_a_record_is_watched_too(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / LOCK_NAME).write_text('{"owner": {"ho')
    RunLock(tmp_path).release()
    assert "was held by another run: watching" in caplog.text


def test_the_heart_beats(tmp_path):
    lock = RunLock(tmp_path)
    beats = set()
    deadline = threading.Event()
    for _ in range(200):
        beats.add(json.loads((tmp_path / LOCK_NAME).read_bytes())["beat"])
        if len(beats) > 2:
            break
        deadline.wait(0.05)
    lock.release()
    assert len(beats) > 2


def test_who_was_taken_over_while_suspended_stops(tmp_path, monkeypatch, caplog):
    stopped = threading.Event()
    monkeypatch.setattr(
        os, "kill", lambda pid, number: (pid, number) == (os.getpid(), signal.SIGTERM) and stopped.set()
    )
    lock = RunLock(tmp_path)
    leave_record(tmp_path)
    assert stopped.wait(10)
    assert "was taken over by job 123 on node7, process 4711 while this run stood still: it stops" in caplog.text
    lock.release()
    assert json.loads((tmp_path / LOCK_NAME).read_bytes())["owner"] == OTHER, "the new holder's record stays"


def test_a_place_that_cannot_be_written_to_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="missing"):
        RunLock(tmp_path / "missing")
