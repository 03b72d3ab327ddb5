"""A save that fails on one rank is told at once on all, training goes on, and the next save is good."""

import logging
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoint.manifest import read_manifest
from checkpoint.steps import find_steps
from tests.distributed.ranks import run_ranks
from tests.unit.checkpoint.saves import save_steps, wrong_tensors

WORLD = 2
FULL = 512  # bytes a file may have on a disk that is full: less than any shard, more than what gloo writes
MODES = ["disabled", "async"]


def fill_disk(is_full: bool) -> None:
    """For this process. Python ignores the signal, so that a write fails as on a full disk, with another number."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL if is_full else hard, hard))


def train(rank: int, world: int, folder: str, mode: str, steps: int, full_at: dict[int, list[int]]) -> dict[str, Any]:
    """A loop of steps, each of which is saved; on some ranks the disk is full at some of them.

    Args:
        full_at: step of a save -> ranks on which it meets a full disk.
    """
    import torch.distributed as dist

    from checkpoint.checkpointer import Checkpointer
    from checkpoint.config import Checkpoint
    from checkpoint.errors import CheckpointError
    from tests.unit.checkpoint.saves import save

    told: list[tuple[int, str, str]] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append((step, record.levelname, record.getMessage()))

    log = logging.getLogger("checkpoint.checkpointer")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(Recorder())
    step, stopped = 0, ""
    checkpointer = Checkpointer(Path(folder), Checkpoint(enable=True, async_mode=mode), dist.new_group())
    try:
        for step in range(1, 2 * steps + 1):  # every other one is not saved
            checkpointer.poll()
            if step % 2:
                dist.barrier()
                fill_disk(rank in full_at.get(step, []))
                save(checkpointer, step, rank, world)
                while not_done(checkpointer):  # a step that takes longer than a save
                    time.sleep(0.001)
                fill_disk(False)
        checkpointer.finish()
    except CheckpointError as error:
        stopped = str(error)
    fill_disk(False)  # the ranks' own store is a file, which the last of them removes
    visible = {step: wrong_tensors(path, step) for step, path in find_steps(Path(folder)).items()}
    dist.barrier()
    return {"told": told, "stopped": stopped, "visible": visible, "last": step, "all": sorted(os.listdir(folder))}


def not_done(checkpointer: Any) -> bool:
    return checkpointer._save is not None and not checkpointer._save.is_done()


@pytest.mark.parametrize("victim", range(WORLD))
@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_on_one_rank(tmp_path, mode, victim):
    results = run_ranks(train, WORLD, str(tmp_path / "checkpoint"), mode, 3, {3: [victim]})
    for result in results:
        failures = [(step, text) for step, level, text in result["told"] if level == "ERROR"]
        assert len(failures) == 1
        step, text = failures[0]
        assert step - 3 <= (mode == "async"), "told later than one step after"
        assert f"checkpoint of step 3 FAILED: rank {victim}: " in text and "\n" not in text
        assert result["stopped"] == "" and result["last"] == 6
        assert result["visible"] == {1: [], 5: []}  # nothing of the failed one, all of the next
        assert result["all"] == ["step-1", "step-5"], "what has failed takes room on a disk that is full"


@pytest.mark.parametrize("mode", MODES)
def test_three_failed_saves_in_a_row_stop_all_ranks(tmp_path, mode):
    full = {step: [1] for step in (5, 7, 9)}
    for result in run_ranks(train, WORLD, str(tmp_path / "checkpoint"), mode, 6, full):
        assert "3 saves in a row have failed, the last at step 9: rank 1: " in result["stopped"]
        assert "\n" not in result["stopped"]
        assert result["visible"] == {1: [], 3: []}
        assert result["last"] == (9 if mode == "disabled" else 11)


def test_two_failed_saves_and_a_good_one_begin_the_count_anew(tmp_path):
    full = {step: [step % 4 // 2] for step in (1, 3, 7, 9)}
    for result in run_ranks(train, WORLD, str(tmp_path / "checkpoint"), "disabled", 6, full):
        assert result["stopped"] == ""
        assert result["visible"] == {5: [], 11: []}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_whose_last_save_fails_does_not_end_as_if_it_were_safe(tmp_path, mode):
    for result in run_ranks(train, WORLD, str(tmp_path / "checkpoint"), mode, 2, {3: [0]}):
        assert "the last checkpoint could not be saved" in result["stopped"]
        assert result["visible"] == {1: []}


def save_apart(rank: int, world: int, folder: str, is_shared: bool) -> tuple[bool, str]:
    """Each rank has a disk of its own under the same name. Returns whether the checkpoint is there, and the error."""
    import torch.distributed as dist

    import checkpoint.dcp
    from checkpoint.checkpointer import Checkpointer
    from checkpoint.config import Checkpoint
    from checkpoint.dcp import explain
    from tests.unit.checkpoint.saves import save

    checkpoint.dcp.VISIBLE_SECONDS = 0.3
    mine = Path(folder) / ("shared" if is_shared else f"of-{rank}")
    checkpointer = Checkpointer(mine, Checkpoint(enable=True, async_mode="async"), dist.new_group())
    save(checkpointer, 1, rank, world)
    checkpointer._save.wait()
    error = checkpointer._save.error
    return bool(find_steps(mine)), explain(error) if error else ""


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_folder_that_is_not_shared_is_told(tmp_path, is_shared):
    """All have written all, but nowhere is it together: it would be called whole, and never load."""
    for is_there, error in run_ranks(save_apart, WORLD, str(tmp_path), is_shared):
        assert is_there == is_shared
        assert ("__1_0.distcp was written by another process and is not seen here" in error) != is_shared


def look(rank: int, world: int, folder: str, blind: bool) -> tuple[str, list[str]]:
    """The second rank does not see a file that is there. Returns what `find` says and what is in the folder then."""
    import torch.distributed as dist

    import checkpoint.manifest
    from checkpoint.checkpointer import Checkpointer
    from checkpoint.config import Checkpoint
    from checkpoint.errors import CheckpointError

    def miss(path: Path) -> Path:
        raise FileNotFoundError(path)

    checkpointer = Checkpointer(Path(folder), Checkpoint(enable=True), dist.new_group())
    if blind and rank == 1:
        checkpoint.manifest._plain_file = miss
    try:
        found = checkpointer.find()
        told = found.path.name if found else "nothing"
    except CheckpointError as error:
        told = str(error)
    dist.barrier()
    return told, sorted(os.listdir(folder))


@pytest.mark.parametrize("blind", [True, False])
def test_a_file_that_one_rank_does_not_see_is_no_damage(tmp_path, blind):
    save_steps(tmp_path, 1, 2)
    for told, names in run_ranks(look, WORLD, str(tmp_path), blind):
        assert told == "step-2" if not blind else "is the folder shared by all?: nothing was changed" in told
        assert names == ["step-1", "step-2"]


def test_damage_that_only_the_second_rank_looks_at_is_damage(tmp_path):
    save_steps(tmp_path, 1, 2)
    second = sorted(read_manifest(tmp_path / "step-2"))[1]
    path = tmp_path / "step-2" / second
    path.write_bytes(path.read_bytes()[:-1])
    for told, names in run_ranks(look, WORLD, str(tmp_path), False):
        assert told == "step-1" and names == ["damaged-step-2", "step-1"]


def record_calls(rank: int, world: int, folder: str) -> list[tuple[int, str, str]]:
    """(time, what, path) of all that one save writes, waits for and renames."""
    import torch.distributed as dist

    from checkpoint.checkpointer import Checkpointer
    from checkpoint.config import Checkpoint
    from tests.unit.checkpoint.saves import save

    calls: list[tuple[int, str, str]] = []
    checkpointer = Checkpointer(Path(folder), Checkpoint(enable=True), dist.new_group())
    original = os.fsync

    def record(what: str, path: str) -> None:
        if threading.current_thread().name == "checkpoint" and path.startswith(folder):
            calls.append((time.monotonic_ns(), what, path.removeprefix(folder).lstrip("/")))

    def fsync(descriptor: int) -> None:
        original(descriptor)
        record("safe", os.readlink(f"/proc/self/fd/{descriptor}"))

    def audit(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
            record("open", args[0])
        elif event == "os.rename":
            record("rename", args[0])

    os.fsync = fsync
    sys.addaudithook(audit)
    save(checkpointer, 1, rank, world)
    return calls


def find_gaps(order: list[tuple[str, str]], files: list[str]) -> list[str]:
    """What a loss of power could take from a checkpoint that is visible, or leave in it half."""
    new, gaps = ".unfinished-step-1", []

    def place(what: str, path: str) -> int:
        return order.index((what, path)) if (what, path) in order else len(order)

    visible, listed = place("rename", new), place("open", f"{new}/manifest.json")
    for file in files:
        path = f"{new}/{file}"
        safe = place("safe", path)
        if safe > visible:
            gaps.append(f"{file} may be empty")
        if ("open", path) in order[safe:]:
            gaps.append(f"{file} is written to after it was safe")
        if file != "manifest.json" and safe > listed:
            gaps.append(f"{file} is listed before it is safe")
    if not place("safe", f"{new}/manifest.json") < place("safe", new) < visible:
        gaps.append("names in the folder may be missing")
    if [what for what, _ in order[visible:]] != ["rename", "safe"] or order[-1] != ("safe", ""):
        gaps.append("the new name may be lost")
    return gaps


def test_everything_is_on_the_disk_before_it_is_visible(tmp_path):
    """kill -9 says nothing about a loss of power: what counts there is the order of fsync and rename."""
    folder = tmp_path / "checkpoint"
    calls = sorted(call for part in run_ranks(record_calls, WORLD, str(folder)) for call in part)
    order = [(what, path) for _, what, path in calls]
    files = [path.name for path in (folder / "step-1").iterdir()]
    assert sorted(files) == sorted([".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "train_state.json"])
    assert find_gaps(order, files) == []
    # Control: each thing that is waited for is needed, and so is the order.
    for call in {call for call in order if call[0] == "safe"}:
        assert find_gaps([other for other in order if other != call], files) != [], call
    assert find_gaps(order[::-1], files) != []
