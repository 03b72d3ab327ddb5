import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.run_folder import claim_run_folder, closed_to_others
from runtime.run_lock import LOCK_NAME, FolderInUse

ROOT = Path(__file__).parents[3]
CLAIM = """
import sys
from runtime.run_folder import claim_run_folder
from runtime.run_lock import FolderInUse
try:
    print(claim_run_folder(sys.argv[1], "checkpoint").name, flush=True)
    sys.stdin.readline()
except FolderInUse:
    print("in use", flush=True)
"""


def test_a_free_name_is_taken_and_parents_are_made(tmp_path):
    folder = claim_run_folder(tmp_path / "outputs" / "tiny")
    assert folder == tmp_path / "outputs" / "tiny"
    assert folder.is_dir()


def test_a_used_folder_leads_to_the_next_free_name(tmp_path):
    wanted = tmp_path / "tiny"
    assert [claim_run_folder(wanted).name for _ in range(3)] == ["tiny", "tiny-2", "tiny-3"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    assert claim_run_folder(tmp_path / "old").name == "old-2"
    assert (tmp_path / "old" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "mounted").mkdir()
    assert claim_run_folder(tmp_path / "mounted") == tmp_path / "mounted"


def test_processes_that_claim_at_once_get_different_folders(tmp_path):
    (tmp_path / "run").mkdir()
    with multiprocessing.get_context("fork").Pool(8) as pool:
        folders = pool.map(claim_run_folder, [tmp_path / "run"] * 32, chunksize=1)
    assert len(set(folders)) == 32


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for wanted in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"job\.dump_folder='.*file.*' must be a folder.*--job\.dump_folder"):
            claim_run_folder(wanted)


def test_a_run_that_ended_before_its_first_step_leaves_its_name_free(tmp_path):
    folder = claim_run_folder(tmp_path / "run")
    (folder / "exit.json").write_text("{}")
    assert claim_run_folder(tmp_path / "run") == folder
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "exit.json").write_text("{}")
    assert claim_run_folder(tmp_path / "run").name == "run-2"


def test_the_folder_it_is_called_in_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert claim_run_folder(".") == tmp_path / "here"
    assert claim_run_folder(".") == tmp_path / "here-2"


def test_the_root_is_refused():
    with pytest.raises(ValueError, match=r"job\.dump_folder='/' must be a folder"):
        claim_run_folder("/")


def start_resumable(wanted):
    """A process that claims a folder and lives until it reads a line or is killed."""
    command = [sys.executable, "-c", CLAIM, str(wanted)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def claim_and_end(wanted):
    return start_resumable(wanted).communicate("\n", timeout=60)[0].strip()


def test_a_resumable_run_goes_on_in_its_folder(tmp_path):
    assert claim_and_end(tmp_path / "run") == "run"
    assert (tmp_path / "run" / "checkpoint").is_dir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "exit.json").write_text('{"code": 1}')
    (tmp_path / "run" / "stacks").mkdir()
    (tmp_path / "run" / "stacks" / "rank-7.txt").touch()
    assert claim_and_end(tmp_path / "run") == "run"
    assert not (tmp_path / "run" / "exit.json").exists(), "how it ended the last time is no longer true"
    assert not (tmp_path / "run" / "stacks").exists(), "there may be fewer ranks now, and none of them a seventh"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_resumable_run_passes_by_what_is_not_its_own(tmp_path):
    claim_run_folder(tmp_path / "run")
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "notes.txt").write_text("mine")
    assert claim_and_end(tmp_path / "run") == "run-3"
    assert claim_and_end(tmp_path / "run") == "run-3"
    assert not (tmp_path / "run" / LOCK_NAME).exists() and not (tmp_path / "run-2" / LOCK_NAME).exists()


def test_a_resumable_run_takes_the_name_of_one_that_ended_before_its_first_step(tmp_path):
    folder = claim_run_folder(tmp_path / "run")
    (folder / "exit.json").write_text("{}")
    assert claim_and_end(tmp_path / "run") == "run"
    assert not (folder / "exit.json").exists()


def test_a_run_without_checkpoints_leaves_a_resumable_one_alone(tmp_path):
    assert claim_and_end(tmp_path / "run") == "run"
    (tmp_path / "run" / "exit.json").write_text("{}")  # before its first step, so it is resumed
    assert claim_run_folder(tmp_path / "run") == tmp_path / "run-2"
    assert claim_and_end(tmp_path / "run") == "run"


def test_a_resumable_folder_in_use_is_refused_and_free_after_kill_9(tmp_path):
    first = start_resumable(tmp_path / "run")
    assert first.stdout.readline() == "run\n"
    with pytest.raises(FolderInUse, match=rf"run is in use by a run on .*, process {first.pid}: wait for it"):
        claim_run_folder(tmp_path / "run", "checkpoint")
    first.kill()
    first.communicate()
    assert claim_and_end(tmp_path / "run") == "run"


def test_resumable_runs_that_start_at_once_never_share_a_folder(tmp_path):
    runs = [start_resumable(tmp_path / "run") for _ in range(6)]
    answers = [run.stdout.readline().strip() for run in runs]
    for run in runs:
        run.communicate("\n", timeout=60)
    assert sorted(answers) == ["in use"] * 5 + ["run"]


def test_a_run_killed_while_it_claimed_is_found(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).touch()
    assert claim_run_folder(tmp_path / "run") == tmp_path / "run-2"
    assert claim_and_end(tmp_path / "run") == "run"


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o640, 0o750), (0o002, 0o660, 0o770), (0o077, 0o600, 0o700)]
)
def test_files_are_closed_to_others_and_open_to_the_group_as_its_owner_wants(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        with pytest.raises(SystemExit), closed_to_others():
            (claim_run_folder(tmp_path / "run") / "x").touch()
            raise SystemExit
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "run").stat().st_mode & 0o777 == folder
    assert (tmp_path / "run" / "x").stat().st_mode & 0o777 == file
