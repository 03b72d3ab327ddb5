"""The command that run_train.sh asks first."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_config import main

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = str(REPOSITORY / "train_configs" / "flux_tiny.toml")


@pytest.mark.parametrize("argv", [[TINY], ["--job.config_file", TINY], [f"--job.config_file={TINY}"]])
def test_a_valid_file_is_summarized(argv, capsys):
    assert main([*argv, "--training.local_batch_size", "4", "--training.global_batch_size", "64"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("ok\n")
    assert "4 per step x 16 accumulated = 64 per update" in output.out
    assert "flux-tiny" in output.out
    assert output.err == ""


def test_warnings_are_part_of_the_report(capsys):
    assert main([TINY, "--compile.enable"]) == 0
    output = capsys.readouterr()
    assert "warning: these keys have no effect yet: compile.enable" in output.out
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
