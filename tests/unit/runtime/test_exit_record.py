import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from runtime import exit_codes
from runtime.exit_record import (
    RECORD_VARIABLE,
    RunEnd,
    announce_folder,
    announced_folder,
    read_exit_record,
    recorded_exit,
    write_exit_record,
)
from runtime.stop import Preempted, Terminated

ROOT = Path(__file__).parents[3]


class Broken(ValueError):
    """Stands for a data error."""


CODES = {Broken: exit_codes.DATA, ValueError: exit_codes.CONFIG}


@pytest.fixture(autouse=True)
def no_second_record(monkeypatch):
    monkeypatch.delenv(RECORD_VARIABLE, raising=False)


def record_of(code, reason, step=7, rank=0, save_seconds=None):
    """What exit.json must hold."""
    return {
        "code": code,
        "reason": reason,
        "step": step,
        "rank": rank,
        "host": socket.gethostname(),
        "resumable": code in (1, 6, 75),
        "save_seconds": save_seconds,
    }


def end_run(folder, error=None, rank=0, step=7, resumes=False):
    """Ends a run with `error` and returns (exit code, record)."""
    code = exit_codes.OK
    try:
        with recorded_exit(rank, CODES) as end:
            end.folder, end.step, end.resumes = folder, step, resumes
            if error is not None:
                raise error
    except SystemExit as stop:
        code = stop.code
    record = folder / "exit.json"
    return code, json.loads(record.read_text()) if record.exists() else None


def test_success(tmp_path, capfd):
    assert end_run(tmp_path) == (0, record_of(0, "done"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ValueError("training.steps=0 must be positive"), 2, "training.steps=0 must be positive"),
        (Broken("a.png does not decode"), 3, "a.png does not decode"),
        (KeyboardInterrupt(), 130, "interrupted by Ctrl-C"),
    ],
)
def test_an_end_that_is_no_fault_of_ours_has_a_message_and_no_traceback(tmp_path, capfd, error, code, reason):
    assert end_run(tmp_path, error) == (code, record_of(code, reason))
    assert capfd.readouterr().err == reason + "\n"


def test_an_unexpected_error_keeps_its_traceback(tmp_path, capfd):
    code, record = end_run(tmp_path, RuntimeError("shapes differ"))
    assert (code, record["reason"]) == (1, "RuntimeError: shapes differ")
    assert "Traceback (most recent call last)" in capfd.readouterr().err


def test_a_value_error_out_of_a_library_is_not_the_users(tmp_path, capfd):
    code = exit_codes.OK
    try:
        with recorded_exit(0, CODES) as end:
            end.folder = tmp_path
            json.loads("{")  # JSONDecodeError is a ValueError, raised outside this project
    except SystemExit as stop:
        code = stop.code
    assert code == exit_codes.ERROR
    assert "Traceback (most recent call last)" in capfd.readouterr().err


class BrokenSamples(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            open("/nowhere/a.png")  # noqa: SIM115 -- opening it is what fails
        except OSError as error:
            raise Broken("a.png does not decode: remove it") from error


def test_an_error_in_a_loaders_worker_is_told_like_any_other(tmp_path, capfd):
    torch.set_num_threads(1)
    code = exit_codes.OK
    try:
        with recorded_exit(0, CODES) as end:
            end.folder = tmp_path
            next(iter(DataLoader(BrokenSamples(), num_workers=1)))
    except SystemExit as stop:
        code = stop.code
    assert code == exit_codes.DATA
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "a.png does not decode: remove it"
    assert capfd.readouterr().err == "a.png does not decode: remove it\n"


def test_a_run_that_was_stopped_and_has_saved_can_be_started_again(tmp_path, capfd):
    assert end_run(tmp_path, Preempted("SIGTERM: saved step 7"), rank=2) == (
        75,
        record_of(75, "SIGTERM: saved step 7", rank=None),
    )


@pytest.mark.parametrize(("resumes", "code"), [(True, 75), (False, 143)])
def test_a_run_that_is_stopped_before_its_first_step(tmp_path, capfd, resumes, code):
    assert end_run(tmp_path, Terminated("SIGUSR1"), resumes=resumes)[0] == code
    assert capfd.readouterr().err == "stopped by SIGUSR1\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_recorded(tmp_path, number):
    body = f"""
import time
from pathlib import Path
from runtime.exit_record import recorded_exit
with recorded_exit(0, {{}}) as end:
    end.folder, end.step = Path({str(tmp_path)!r}), 3
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", body], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_codes.TERMINATED
    assert errors == f"stopped by {number.name}\n".encode()
    assert json.loads((tmp_path / "exit.json").read_text()) == record_of(143, f"stopped by {number.name}", step=3)


def test_the_handler_of_before_comes_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    end_run(tmp_path, ValueError("x"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_rank_that_fails_keeps_the_word(tmp_path):
    end_run(tmp_path, Broken("rank 3 cannot read"), rank=3)
    assert end_run(tmp_path, KeyboardInterrupt(), rank=0)[1]["rank"] == 3
    assert end_run(tmp_path, rank=0)[1]["code"] == exit_codes.DATA


def test_success_is_rank_0s_and_a_failure_after_it_replaces_it(tmp_path):
    assert end_run(tmp_path, rank=1)[1] is None
    assert end_run(tmp_path, rank=0)[1]["code"] == exit_codes.OK
    assert end_run(tmp_path, Broken("late"), rank=2)[1] == record_of(3, "late", rank=2)


def test_the_record_is_written_to_the_named_file_too_and_leaves_nothing_else(tmp_path, monkeypatch):
    named = tmp_path / "named.json"
    monkeypatch.setenv(RECORD_VARIABLE, str(named))
    write_exit_record(RunEnd(0), exit_codes.CONFIG, "no folder yet", text="to tell")
    expected = record_of(2, "no folder yet", step=0) | {"text": "to tell", "folder": None}
    assert json.loads(named.read_text()) == expected == read_exit_record(named)
    assert os.listdir(tmp_path) == ["named.json"]


def test_what_a_launcher_knows_replaces_a_failure_that_it_explains(tmp_path):
    end_run(tmp_path, RuntimeError("connection closed by peer"), rank=0)
    killed = RunEnd(3, tmp_path, step=7)
    write_exit_record(killed, exit_codes.ERROR, "rank 3 was ended by SIGKILL", replaced=[exit_codes.ERROR])
    assert read_exit_record(tmp_path / "exit.json")["rank"] == 3
    (tmp_path / "other").mkdir()
    end_run(tmp_path / "other", Broken("a.png"), rank=1)
    write_exit_record(RunEnd(3, tmp_path / "other"), exit_codes.ERROR, "rank 3 was ended", replaced=[exit_codes.ERROR])
    assert read_exit_record(tmp_path / "other" / "exit.json")["code"] == exit_codes.DATA, "a reason counts more"


def test_a_run_announces_its_folder_to_who_named_a_file(tmp_path, monkeypatch):
    named = tmp_path / "named.json"
    announce_folder(tmp_path / "run")
    assert announced_folder(named) is None
    monkeypatch.setenv(RECORD_VARIABLE, str(named))
    announce_folder(tmp_path / "run")
    assert announced_folder(named) == tmp_path / "run"


@pytest.mark.parametrize(
    ("error", "text"), [(Broken("a.png does not decode"), "a.png does not decode"), (RuntimeError("x"), "Traceback (")]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_who_names_a_file_tells_the_end(tmp_path, monkeypatch, capfd, error, text, rank):
    """The ranks keep quiet, whatever they may; the first one's text lies ready."""
    named = tmp_path / "named.json"
    monkeypatch.setenv(RECORD_VARIABLE, str(named))
    end_run(tmp_path, error, rank)
    end_run(tmp_path, Broken("another rank, later"), rank=2)
    assert capfd.readouterr().err == ""
    record = json.loads(named.read_text())
    assert record["text"].startswith(text) and record["rank"] == rank


def test_a_rank_whose_record_cannot_be_placed_speaks_itself(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path / "gone" / "named.json"))
    assert end_run(tmp_path, Broken("a.png does not decode"))[0] == exit_codes.DATA
    said = capfd.readouterr().err
    assert "named.json could not be written" in said and said.endswith("\na.png does not decode\n")


@pytest.mark.parametrize(
    ("rank", "may", "speaks"), [(0, None, True), (1, None, False), (0, False, False), (1, True, True)]
)
@pytest.mark.parametrize("error", [Broken("a.png does not decode"), RuntimeError("shapes differ"), KeyboardInterrupt()])
def test_of_several_ranks_one_speaks(tmp_path, capfd, error, rank, may, speaks):
    with pytest.raises(SystemExit), recorded_exit(rank, CODES) as end:
        end.folder = tmp_path
        end.may_speak = None if may is None else lambda: may
        raise error
    assert bool(capfd.readouterr().err) == speaks
    assert (tmp_path / "exit.json").exists()


def test_a_record_that_cannot_be_written_does_not_hide_the_end(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert end_run(tmp_path / "file", ValueError("the real message")) == (exit_codes.CONFIG, None)
    assert "the real message" in capfd.readouterr().err
