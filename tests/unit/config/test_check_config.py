"""The command that run_train.sh asks first."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_config import main

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = str(REPOSITORY / "train_configs" / "flux_tiny.toml")


@pytest.fixture(autouse=True)
def unknown_number_of_processes(monkeypatch):
    monkeypatch.delenv("NGPU", raising=False)


@pytest.mark.parametrize("argv", [[TINY], ["--job.config_file", TINY], [f"--job.config_file={TINY}"]])
def test_a_valid_file_is_summarized(argv, capsys):
    assert main([*argv, "--training.local_batch_size", "4", "--training.global_batch_size", "64"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("ok\n")
    assert "4 per step x 16 accumulated = 64 per update" in output.out
    assert "flux-tiny" in output.out
    assert output.err == ""


@pytest.mark.parametrize(
    ("processes", "options", "layout", "batch", "length"),
    [
        (
            "",
            "",
            "NGPU is not set: what follows is for 1 process",
            "8 per step x 1 accumulated = 8",
            "10 updates x 8 = 80",
        ),
        ("1", "", "1 process", "8 per step x 1 accumulated = 8", "10 updates x 8 = 80"),
        ("4", "", "4 processes = dp_shard 4", "8 per step x 4 groups x 1 accumulated = 32", "10 updates x 32 = 320"),
        (
            "8",
            "--parallelism.data_parallel_replicate_degree=2 --parallelism.context_parallel_degree=2 "
            "--training.global_batch_size=96",
            "8 processes = dp_replicate 2 x dp_shard 2 x cp 2",
            "8 per step x 4 groups x 3 accumulated = 96",
            "10 updates x 96 = 960",
        ),
        (
            "2",
            "--parallelism.tensor_parallel_degree=2 --training.global_batch_size=16",
            "2 processes = tp 2",
            "8 per step x 2 accumulated = 16",
            "10 updates x 16 = 160",
        ),
        (
            "",
            "--parallelism.data_parallel_replicate_degree=2 --training.global_batch_size=32",
            "NGPU is not set: what follows is for 2 processes = dp_replicate 2",
            "8 per step x 2 groups x 2 accumulated = 32",
            "10 updates x 32 = 320",
        ),
    ],
)
def test_the_layout_and_the_batch_are_those_of_the_processes(
    capsys, monkeypatch, processes, options, layout, batch, length
):
    monkeypatch.setenv("NGPU", processes)
    assert main([*options.split(), "--training.local_batch_size=8", "--training.steps=10"]) == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    assert lines["layout"] == layout
    assert lines["batch"] == f"{batch} per update"
    assert lines["length"] == f"{length} samples"


@pytest.mark.parametrize(("processes", "code"), [("", 0), ("6", 0), ("8", 2)])
def test_the_number_of_processes_is_checked_where_it_is_known(capsys, monkeypatch, processes, code):
    monkeypatch.setenv("NGPU", processes)
    assert main([TINY, "--parallelism.data_parallel_replicate_degree=3"]) == code
    assert ("must divide the 8 processes of this run" in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize("processes", ["abc", "-1", "1.5", "0", "\u00b2"])
def test_a_number_of_processes_that_is_none_is_refused(capsys, monkeypatch, processes):
    monkeypatch.setenv("NGPU", processes)
    assert main([TINY]) == 2
    assert capsys.readouterr().err == f"NGPU={processes} must be a number of processes, 1 or more\n"


def test_warnings_are_part_of_the_report(capsys):
    assert main([TINY, "--training.gc_debug"]) == 0
    output = capsys.readouterr()
    assert "warning: these keys have no effect yet: training.gc_debug" in output.out
    assert output.err == ""


def test_errors_go_to_stderr_with_code_2(capsys):
    assert main([TINY, "--training.steps", "0", "--training.img_size", "65"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 2


def test_help_needs_no_file(capsys):
    assert main(["--help"]) == 0
    assert "--training.steps" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "code"), [("--training.steps=1", 0), ("--training.stepz=1", 2), ("--help", 0)])
def test_the_command_answers_without_torch(option, code):
    program = f"""
import sys
from scripts.check_config import main
code = main([{TINY!r}, {option!r}])
heavy = {{"torch", "numpy", "transformers", "PIL"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.check_config", TINY], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok\n")
