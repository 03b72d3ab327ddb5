"""scripts/requeue.py: which ends of a run are followed by another start."""

import json

import pytest

from scripts.requeue import count_processes, main

TINY = ["--job.config_file", "train_configs/flux_tiny.toml"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(command, ...) calls main for a resumable run in tmp_path; the exit code and what was said."""
    monkeypatch.setenv("FLUX_EXIT_RECORD", str(tmp_path / "record.json"))
    for name in ("FLUX_GRACE_SECONDS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    settings = [*TINY, "--checkpoint.enable", f"--job.dump_folder={tmp_path / 'run'}"]

    def call(*command, more=()):
        code = main([*command, *settings, *more])
        said = capsys.readouterr()
        return code, said.out.strip(), said.err.strip()

    return call


def write_record(tmp_path, **values):
    (tmp_path / "record.json").write_text(json.dumps({"save_seconds": None, **values}))


def save(tmp_path, *names, folder="run"):
    for name in names:
        (tmp_path / folder / "checkpoint" / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("code", "newest", "again"),
    [
        (0, 9, False),
        (1, 9, True),
        (1, 7, False),
        (2, 9, False),
        (3, 9, False),
        (4, 9, False),
        (5, 9, False),
        (6, 9, True),
        (6, 7, False),
        (75, 9, True),
        (75, 7, True),
        (130, 9, False),
        (143, 9, False),
    ],
)
def test_the_code_and_the_progress_decide(run, tmp_path, code, newest, again):
    save(tmp_path, f"step-{newest}")
    answer = ("again" if again else "", "is started again" if again else "done" if not code else "not started again")
    write_record(tmp_path, code=code, reason="why")
    ended, out, err = run("end", "7")
    assert (ended, out) == (code, answer[0]) and answer[1] in err and "\n" not in err
    # A launcher's exit code, where no record is collected, decides the same.
    (tmp_path / "record.json").unlink()
    assert run("end", "7", "--code", str(code))[:2] == (code, answer[0])


@pytest.mark.parametrize("text", [None, "", "[1]", '{"code": '])
def test_without_a_record_that_can_be_read_it_is_a_fault(run, tmp_path, text):
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    assert run("end", "0")[:2] == (1, "")
    save(tmp_path, "step-5")
    assert run("end", "0")[:2] == (1, "again")


def test_only_whole_checkpoints_count(run, tmp_path):
    assert run("begin") == (0, "0", "")
    save(tmp_path, "step-9", "step-10", ".unfinished-step-11", "damaged-step-12", "step-13-old")
    assert run("begin") == (0, "10", "")


def test_the_run_tells_its_folder(run, tmp_path):
    save(tmp_path, "step-3", folder="run-2")
    (tmp_path / "record.json.folder").write_text(str(tmp_path / "run-2"))
    assert run("end", "2")[:2] == (1, "again")
    assert run("begin")[:2] == (0, "3")
    assert run("begin")[:2] == (0, "0")  # which counted for one start


def test_begin_removes_the_last_record(run, tmp_path):
    write_record(tmp_path, code=75, reason="why")
    run("begin")
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize(("grace", "warned"), [("210", False), ("209", True)])
@pytest.mark.parametrize("place", ["record.json", "run/exit.json"])
def test_a_grace_shorter_than_the_last_save_is_told(run, tmp_path, monkeypatch, grace, warned, place):
    monkeypatch.setenv("FLUX_GRACE_SECONDS", grace)
    (tmp_path / "run").mkdir()
    (tmp_path / place).write_text(json.dumps({"code": 75, "save_seconds": 210.0}))
    code, _, said = run("begin")
    assert code == 0 and ("a save took 210 s" in said and "450 s ahead" in said) == warned
    (tmp_path / place).write_text(json.dumps({"code": 75, "save_seconds": None}))
    assert run("begin")[2] == ""


def test_a_grace_that_is_no_number_is_told(run, monkeypatch):
    monkeypatch.setenv("FLUX_GRACE_SECONDS", "4m")
    assert run("begin")[::2] == (2, "FLUX_GRACE_SECONDS=4m must be a number of seconds: mend or unset it")


def test_a_run_that_cannot_resume_is_told(run):
    assert "checkpoint.enable=false: a stop loses this run" in run("begin", more=["--checkpoint.enable=false"])[2]


def test_a_wrong_configuration_is_answered_before_the_start(run, monkeypatch):
    code, out, said = run("begin", more=["--training.stepz", "5"])
    assert (code, out) == (2, "") and "training.stepz" in said
    monkeypatch.setenv("NGPU", "4")
    monkeypatch.setenv("NNODES", "2")
    assert run("begin", more=["--parallelism.data_parallel_shard_degree", "8"])[0] == 0
    assert run("begin", more=["--parallelism.data_parallel_shard_degree", "4"])[0] == 2


def test_processes_are_counted_over_all_nodes():
    assert count_processes({}) is None
    assert count_processes({"NGPU": "8"}) == 8
    assert count_processes({"NGPU": "8", "NNODES": "4"}) == 32
