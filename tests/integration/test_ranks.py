"""How a run on several processes ends: one message, the run's own exit code, no process left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.short_runs import TINY
from training.bad_samples import BAD_SAMPLES_NAME

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# Stands for train.py, without torch. What our own code raises is a message for the user.
TRAIN = """
import os, signal, sys, time
from pathlib import Path
from config.parse import read_process_count
from runtime.exit_record import recorded_exit

rank, kind = int(os.environ["RANK"]), sys.argv[-1].partition("=")[2]
with recorded_exit(rank, {ValueError: 3}):
    Path(f"rank{rank}").write_text(str(os.getpid()))
    if kind == "both" or (kind == "one" and rank == 1):
        read_process_count({"NGPU": "no number"})
    if kind == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "fault" and rank == 1:
        raise RuntimeError("shapes differ")
    if kind == "early" and rank == 1:
        os._exit(7)
    if kind != "well":
        time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    """start(kind) launches two stand-ins for train.py."""
    (tmp_path / "train.py").write_text(TRAIN)
    processes = []

    def run(kind: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "scripts.launch", f"--job.description={kind}"]
        environment = os.environ | {"NGPU": "2", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where tests run in the background
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()


def ranks(folder: Path) -> list[int]:
    """Process ids of the ranks that have started."""
    return [int(text) for file in folder.glob("rank?") if (text := file.read_text())]


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def finish(process: subprocess.Popen, folder: Path) -> tuple[int, str]:
    """Exit code and what was said, once it is sure that no rank is left."""
    _, said = process.communicate(timeout=120)
    assert ranks(folder) and not any(map(is_there, ranks(folder)))
    return process.returncode, said


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("well", 0, ""),
        ("both", 3, "NGPU=no number must be a number of processes, 1 or more\n"),
        ("one", 3, "NGPU=no number must be a number of processes, 1 or more\n"),
        ("killed", 1, f"rank 1 on {socket.gethostname()} was ended by SIGKILL: did the machine run out of memory?\n"),
        ("early", 1, "rank 1 ended with 7 and gave no reason\n"),
    ],
)
def test_the_end_is_told_once(start, tmp_path, kind, code, said):
    assert finish(start(kind), tmp_path) == (code, said)


def test_a_fault_has_one_traceback(start, tmp_path):
    code, said = finish(start("fault"), tmp_path)
    assert code == 1 and said.count("Traceback") == 1 and said.endswith("RuntimeError: shapes differ\n")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted by Ctrl-C\n"), (signal.SIGTERM, 143, "stopped by SIGTERM\n")],
)
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_all_ranks(start, tmp_path, number, code, said, times):
    process = start("waits")
    while len(ranks(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(times):  # Ctrl-C goes to the process group
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert finish(process, tmp_path) == (code, said)


@pytest.mark.parametrize(("allowed", "code"), [(0.0, 3), (0.01, 0)])
def test_a_bad_picture_that_only_one_rank_reads_counts_for_all(tmp_path, allowed, code):
    folder, run = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for number in range(24):
        Image.new("RGB", (40, 40), (number * 9, 0, 0)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    (folder / "05.png").write_text("x")
    data = ["--training.dataset=imagefolder", f"--training.dataset_path={folder}", f"--data.max_bad_fraction={allowed}"]
    steps = ["--training.steps=2", "--validation.enable=false", f"--job.dump_folder={run}"]  # 32 samples: all pictures
    done = subprocess.run(
        [ROOT / "run_train.sh", *TINY, *data, *steps],
        env=os.environ | {"NGPU": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    complaints = done.stderr.count("of the last 10,000 samples are bad")
    assert complaints == (1 if code else 0) and "Traceback" not in done.stderr
    records = [json.loads(line) for line in (run / BAD_SAMPLES_NAME).read_text().splitlines()]
    assert {(record["key"], record["reason"]) for record in records} == {("05.png", "damaged")}
