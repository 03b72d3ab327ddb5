"""Faults that happen to whole jobs, and what an operator sees of them: docs/reliability.md has the table."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from checkpoint.steps import find_steps
from tests.distributed.jobs import Fault, await_job, run_job, start_job
from tests.distributed.legs import read_tensors

DEATH_SECONDS = 10.0  # from the death of a rank to the end of the job
HANG_SECONDS = 5.0  # beyond the limit
STOP_SECONDS = 10.0  # from SIGTERM to the end
LIMIT = 3.0  # of a step
STEPS = 8
SAVES = ["--checkpoint.enable", "--checkpoint.interval=4"]
WATCHED = [f"--reliability.step_limit_seconds={LIMIT:g}", f"--training.steps={STEPS}", *SAVES]

STOPS = int(os.environ.get("STOPS", "20"))
SOAK_STEPS = int(os.environ.get("SOAK_STEPS", "60"))
SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "2"))  # of steps, from one fault to the next, in the mean
SEED = int(os.environ.get("FAULTS_SEED", "0"))

pytestmark = pytest.mark.slow


def last_tensors(folder: Path) -> dict[str, torch.Tensor]:
    steps = find_steps(folder / "run" / "checkpoint")
    return read_tensors(steps[max(steps)])


def differences(folder: Path, other: Path) -> list[str]:
    mine, theirs = last_tensors(folder), last_tensors(other)
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("kill", "rank 1 on {host} was ended by SIGKILL"),
        ("crash", "rank 1 on {host} was ended by SIGSEGV"),
        ("fail", ""),
    ],
)
def test_the_death_of_a_rank(tmp_path, kind, words):
    end = run_job(tmp_path, 2, *WATCHED, faults=[Fault(kind, 6)])
    assert end.code == 1 and end.seconds < DEATH_SECONDS
    assert end.record["rank"] == 1 and end.record["resumable"] and end.record["step"] == 5
    expected = words.format(host=os.uname().nodename) or "RuntimeError: shapes differ"
    assert end.record["reason"].startswith(expected)
    assert expected in end.told
    assert list(find_steps(tmp_path / "run" / "checkpoint")) == [4], "what was saved is there"


@pytest.mark.parametrize("kind", ["hang", "hold", "stop"])
def test_a_rank_that_stands_still(tmp_path, kind):
    end = run_job(tmp_path, 2, *WATCHED, faults=[Fault(kind, 6)])
    assert end.code == 6 and end.record["rank"] == 1 and end.record["resumable"]
    assert end.seconds < LIMIT + HANG_SECONDS
    assert end.told.startswith("hang: rank 1 on ") and end.record["host"] == os.uname().nodename
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").iterdir()}
    assert "all_gather" in stacks["rank-0.txt"] or "all_reduce" in stacks["rank-0.txt"], "the other one waited"
    if kind != "stop":
        assert f" in {kind}" in stacks["rank-1.txt"] and f" in {kind}" in end.told


def test_control_a_slow_rank_ends_nothing(tmp_path):
    end = run_job(tmp_path, 2, *WATCHED, faults=[Fault("dawdle", 6)])
    assert (end.code, end.told) == (0, "") and not (tmp_path / "run" / "stacks").exists()


NAN = ["--training.steps=6", "--ema.enable", "--checkpoint.enable", "--checkpoint.interval=6", "--metrics.log_freq=1"]


def test_numbers_of_one_rank_that_went_bad(tmp_path):
    """The same bits as in a run that leaves out that update and no other."""
    end = run_job(tmp_path / "bad", 2, *NAN, faults=[Fault("nan", 3)])
    assert end.code == 0
    left_out = [Fault("leave_out", 3, rank) for rank in range(2)]
    assert run_job(tmp_path / "without", 2, *NAN, faults=left_out).code == 0
    assert differences(tmp_path / "bad", tmp_path / "without") == []
    assert run_job(tmp_path / "clean", 2, *NAN).code == 0
    assert differences(tmp_path / "bad", tmp_path / "clean"), "control: the update counts"
    record = json.loads((tmp_path / "bad" / "run" / "incidents" / "step-000003.json").read_text())
    assert record["kind"] == "nonfinite" and record["skipped"] and record["loss"] == "nan"
    assert [rank["loss"] == "nan" for rank in record["ranks"]] == [False, True]
    assert [position for rank in record["ranks"] for position, _ in rank["samples"]] == [8, 9, 10, 11]
    assert "not finite on rank 1 of 2" in (tmp_path / "bad" / "log-0").read_text()
    lines = [json.loads(line) for line in (tmp_path / "bad" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [3]


def test_numbers_that_stay_bad(tmp_path):
    faults = [Fault("nan", step) for step in (5, 6, 7)]
    end = run_job(tmp_path, 2, "--training.steps=20", *SAVES, faults=faults)
    assert end.code == 4 and not end.record["resumable"]
    assert end.record["reason"].startswith("step 7: loss or gradients were no numbers in 3 updates in a row")
    assert list(find_steps(tmp_path / "run" / "checkpoint")) == [4], "nothing is saved after it"


def test_a_disk_that_is_full_for_a_while(tmp_path):
    """A save fails, on all ranks, and is told; the next one is whole."""
    faults = [Fault("fill_disk", 4), Fault("empty_disk", 6)]
    end = run_job(tmp_path, 2, "--training.steps=8", *SAVES, faults=faults)
    assert end.code == 0 and list(find_steps(tmp_path / "run" / "checkpoint")) == [8]
    assert "checkpoint of step 4 FAILED: rank 1: " in (tmp_path / "log-0").read_text()


@pytest.mark.parametrize("kind", ["lose_worker", "break_logger"])
def test_what_changes_no_number(tmp_path, kind):
    options = ["--training.steps=6", "--checkpoint.enable", "--checkpoint.interval=6", "--metrics.enable_tensorboard"]
    options += ["--training.dataloader.num_workers=1"]
    rank = 1 if kind == "lose_worker" else 0
    assert run_job(tmp_path / kind, 2, *options, faults=[Fault(kind, 3, rank)]).code == 0
    assert run_job(tmp_path / "clean", 2, *options).code == 0
    assert differences(tmp_path / kind, tmp_path / "clean") == []
    told = (tmp_path / kind / "log-0").read_text() + (tmp_path / kind / "log-1").read_text()
    assert ("is not in metrics.jsonl yet" in told) == (kind == "break_logger")


REPLICAS = ["--parallelism.data_parallel_replicate_degree=3", "--reliability.compare_replicas_freq=4"]


def test_one_wrong_bit_in_one_of_three_replicas(tmp_path):
    end = run_job(tmp_path, 3, "--training.steps=20", *REPLICAS, faults=[Fault("flip", 2)])
    assert end.code == 4 and not end.record["resumable"]
    assert end.record["reason"].startswith("step 4: rank 1 differs from the other replicas, first in ")


def test_a_signal_to_one_rank_stops_all(tmp_path):
    end = run_job(tmp_path, 2, "--training.steps=500", *SAVES, faults=[Fault("term", 6)])
    assert end.code == 75 and end.seconds < STOP_SECONDS
    saved = max(find_steps(tmp_path / "run" / "checkpoint"))
    assert saved in (6, 7) and end.record["step"] == saved
    assert end.record["reason"] == f"SIGTERM: saved step {saved}, the same command goes on from there"
    assert end.record["rank"] is None and end.record["resumable"] and end.record["save_seconds"] > 0


@pytest.mark.parametrize("world", [1, 2])
def test_a_launcher_that_is_killed_leaves_no_rank_behind(tmp_path, world):
    launcher = start_job(tmp_path, world, "--training.steps=100000", *SAVES, "--checkpoint.keep_latest_k=2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    await_file(metrics, 0)
    while not metrics.stat().st_size:
        time.sleep(0.01)
    ranks = [json.loads(path.open().readline())["process"] for path in (tmp_path / "run" / "stacks").iterdir()]
    launcher.kill()
    launcher.join()
    deadline = time.monotonic() + STOP_SECONDS
    while left := [rank for rank in ranks if is_alive(rank)]:
        if time.monotonic() > deadline:
            for rank in left:
                os.kill(rank, signal.SIGKILL)
            pytest.fail("ranks train on")
        time.sleep(0.05)
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    saved = max(find_steps(tmp_path / "run" / "checkpoint"))
    assert (record["code"], record["step"], len(ranks)) == (75, saved, world)


def is_alive(process: int) -> bool:
    """Whether it computes: what nobody collects stays in the table of processes."""
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


def test_a_signal_in_an_evaluation(tmp_path):
    """Ranks hold gathered weights then, which are not what is saved."""
    options = [*SAVES, "--training.steps=4", "--validation.enable=true", "--validation.freq=2", "--validation.steps=8"]
    end = run_job(tmp_path / "stopped", 2, *options, faults=[Fault("term_in_evaluation", 2)])
    assert end.code == 75 and end.record["step"] == 2
    assert run_job(tmp_path / "stopped", 2, *options).code == 0
    assert run_job(tmp_path / "straight", 2, *options).code == 0
    assert differences(tmp_path / "stopped", tmp_path / "straight") == []


def test_the_time_is_over(tmp_path):
    end = run_job(tmp_path, 1, "--training.steps=5000", *SAVES, "--reliability.stop_after_minutes=0.0001")
    assert end.code == 75 and end.record["reason"].startswith("reliability.stop_after_minutes have passed: saved step")


BUSY = [
    *("--lr_scheduler.total_steps=100000", "--lr_scheduler.decay_ratio=0"),  # whatever training.steps is
    *("--checkpoint.enable", "--checkpoint.interval=3", "--checkpoint.keep_latest_k=2"),
    *("--validation.enable=true", "--validation.freq=6", "--validation.eval_freq=12", "--ema.enable"),
]


def await_file(path: Path, since: float) -> None:
    """Until a job has written it."""
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_mtime < since:
        assert time.monotonic() < deadline, f"{path} is not written"
        time.sleep(0.01)


def test_sigterm_at_random_moments(tmp_path):
    """In steps, saves, validation, drawing and the building of the run, and again after each resume."""
    draw, saved, seconds, in_steps = random.Random(SEED), 0, [], 0
    run = tmp_path / "stopped" / "run"
    for stop in range(STOPS):
        mode = f"--checkpoint.async_mode={draw.choice(['disabled', 'async'])}"
        since = time.time()
        launcher = start_job(tmp_path / "stopped", 2, *BUSY, mode, "--training.steps=100000")
        in_build = stop % 5 == 4
        await_file(run / "run.lock" if in_build else run / "metrics.jsonl", since)
        time.sleep(draw.uniform(0, 1))
        os.kill(launcher.pid, signal.SIGTERM)
        began = time.monotonic()
        end = await_job(launcher, tmp_path / "stopped")
        seconds.append(time.monotonic() - began)
        assert end.code == 75 and end.record["resumable"], (end, stop)
        newest = max(find_steps(run / "checkpoint"), default=0)
        assert newest >= saved and end.record["step"] in (newest, 0), end
        in_steps += newest > saved
        saved = newest
    assert max(seconds) < STOP_SECONDS
    assert in_steps >= STOPS / 2, "most signals must come when there is something to save"
    print(f"{STOPS} stops, the last one at step {saved}, longest {max(seconds):.1f} s")
    rest = [*BUSY, f"--training.steps={saved + 5}"]
    assert run_job(tmp_path / "stopped", 2, *rest).code == 0
    assert run_job(tmp_path / "straight", 2, *rest).code == 0
    assert differences(tmp_path / "stopped", tmp_path / "straight") == []


KINDS = ("kill", "crash", "stop", "hang", "hold", "fail", "term", "dawdle")
SOAK = [
    *(f"--training.steps={SOAK_STEPS}", "--training.local_batch_size=1"),
    *("--checkpoint.enable", "--checkpoint.interval=5", "--checkpoint.keep_latest_k=2"),
    f"--reliability.step_limit_seconds={LIMIT:g}",
]


def test_a_soak(tmp_path):
    """A fault of a random kind on a random rank every few seconds, and a job system that starts the run again."""
    draw, codes, world = random.Random(SEED), [], 4
    while not codes or codes[-1] != 0:
        assert codes.count(codes[-1] if codes else 0) < 50, codes
        for mark in (tmp_path / "soaked").glob("fault-*"):
            mark.unlink()
        moments = [SOAK_SECONDS * (number + draw.random()) for number in range(20)]
        faults = [Fault(draw.choice(KINDS), rank=draw.randrange(world), seconds=moment) for moment in moments]
        end = run_job(tmp_path / "soaked", world, *SOAK, faults=faults)
        assert end.code in (0, 1, 6, 75), end
        assert end.code == 0 or end.record["resumable"]
        codes.append(end.code)
    print(f"{len(codes)} starts, codes {codes}")
    assert len(codes) > 2
    assert run_job(tmp_path / "straight", world, *SOAK).code == 0
    assert differences(tmp_path / "soaked", tmp_path / "straight") == []
