"""run_train.sh, run_tests.sh and setup_env.sh, with stand-ins for Python and the package index."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["run_train.sh", "run_slurm.sh", "run_tests.sh", "setup_env.sh", ".ci/run"]

# Stands for an environment that serves. It notes each call with NGPU; what it answers is set by variables.
PYTHON = r"""#!/usr/bin/env bash
printf '%s|' "$NGPU" "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
"-m scripts.check_config "*) echo "summary" ;;
"-m scripts.launch "*) exit "${LAUNCH_CODE:-0}" ;;
esac
"""


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the shell scripts and what they call."""
    folder = tmp_path / "a checkout"
    for name in ("scripts", "runtime"):
        (folder / name).mkdir(parents=True)
    shell = ("run_train.sh", "run_tests.sh", "setup_env.sh")
    for name in (*shell, "scripts/check_environment.py", "runtime/requirements.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


class Stage:
    """Runs run_train.sh with a stand-in for Python."""

    def __init__(self, checkout, tmp_path):
        self.checkout, self.programs, self.calls_file = checkout, tmp_path / "programs", tmp_path / "calls"
        write_program(self.programs / "python", PYTHON)
        write_program(self.programs / "nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.environment = {"PATH": f"{self.programs}:/usr/bin:/bin", "CALLS": str(self.calls_file)}

    def command(self, *arguments, cwd="/", **settings):
        return {
            "args": [str(self.checkout / "run_train.sh"), *arguments],
            "cwd": cwd,
            "env": self.environment | settings,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }

    def run(self, *arguments, **settings):
        return subprocess.run(**self.command(*arguments, **settings), timeout=60)

    def launches(self):
        """NGPU and arguments of each launch."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        calls = [line.split("|")[:-1] for line in lines]
        return [(call[0], call[3:]) for call in calls if call[1:3] == ["-m", "scripts.launch"]]


@pytest.fixture
def stage(checkout, tmp_path):
    return Stage(checkout, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    assert os.access(ROOT / script, os.X_OK) or script == "setup_env.sh"


def test_everything_goes_to_the_launcher(stage):
    done = stage.run("--job.description", "two words", CONFIG_FILE="my.toml", NGPU="4")
    assert done.returncode == 0, done.stderr
    assert stage.launches() == [("4", ["--job.config_file", "my.toml", "--job.description", "two words"])]


def test_the_default_run_is_the_tiny_one_on_one_process(stage):
    stage.run()
    assert stage.launches() == [("1", ["--job.config_file", "train_configs/flux_tiny.toml"])]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_does_not_train(stage, flag):
    assert stage.run("--training.steps", "1", flag).stdout == "summary\n"
    assert stage.launches() == []


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_the_launchers_code_is_the_code_of_the_run(stage, code):
    assert stage.run(LAUNCH_CODE=str(code)).returncode == code


@pytest.mark.parametrize(("visible", "processes"), [(None, "3"), ("0,1", "2"), ("0", "1"), ("", "1"), ("-1", "1")])
def test_every_visible_gpu_gets_a_process(stage, visible, processes):
    listing = "".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-{i})\n  MIG 1g.10gb Device 0: x\n" for i in range(3))
    write_program(stage.programs / "nvidia-smi", f"#!/bin/sh\n[ $1 = -L ] && printf '%s' '{listing}'\n")
    stage.run(**({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert [launch[0] for launch in stage.launches()] == [processes]


# --- the environment: real venv and pip, with packages of our own instead of an index ---


def make_wheel(folder, name, version):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def setup(checkout, tmp_path):
    """setup(file) runs setup_env and returns (exit code, chosen Python, what was said)."""
    packages, programs = tmp_path / "packages", tmp_path / "programs"
    packages.mkdir()
    for name, version in [("torch", "2.13.0"), ("torch", "2.14.0"), ("pytest", "9.2.0")]:
        make_wheel(packages, name, version)
    # A `python` that does not run, as version managers leave behind, and the interpreter below the tests' environment.
    write_program(programs / "python", "#!/bin/sh\nexit 127\n")
    write_program(programs / "python3", f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} "$@"\n')
    (checkout / "requirements.txt").write_text("torch==2.13.0  # serves from 2.11\n")
    (checkout / "requirements-dev.txt").write_text("-r requirements.txt\npytest==9.2.0\n")
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(packages),
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHONNOUSERSITE": "1",
    }

    def run(file="requirements.txt", **settings):
        command = f"set -euo pipefail; source setup_env.sh; setup_env {file}; echo $PYTHON"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=checkout,
            env=environment | settings,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout.strip(), done.stderr

    return run


def installed(checkout, name):
    pattern = f".venv/lib/python*/site-packages/{name}-*.dist-info"
    return [path.name.removesuffix(".dist-info").removeprefix(f"{name}-") for path in checkout.glob(pattern)]


@pytest.mark.slow
def test_venv_is_made_once_and_follows_the_requirements(setup, checkout):
    own = str(checkout / ".venv/bin/python")
    code, python, said = setup()
    assert (code, python) == (0, own), said
    assert said.startswith("setting up .venv from requirements.txt, once")
    assert installed(checkout, "torch") == ["2.13.0"]
    assert setup() == (0, own, "")
    # Activated, it is still ours.
    assert setup(VIRTUAL_ENV=str(checkout / ".venv"), PATH=f"{checkout}/.venv/bin:/usr/bin:/bin") == (0, own, "")

    assert "setting up" in setup("requirements-dev.txt")[2]
    assert installed(checkout, "pytest") == ["9.2.0"]
    assert setup("requirements-dev.txt") == setup() == (0, own, "")

    # Changed to what cannot be had: the installation fails, and is not taken for finished afterwards.
    (checkout / "requirements.txt").write_text("torch==2.99.0\n")
    assert setup()[0] != 0
    assert setup()[0] != 0
    (checkout / "requirements.txt").write_text("torch==2.14.0\n")
    assert setup()[:2] == (0, own)
    assert installed(checkout, "torch") == ["2.14.0"]
    assert "setting up" in setup("requirements-dev.txt")[2]

    # A .venv that lost its Python is made anew.
    (checkout / ".venv/bin/python").unlink()
    assert setup()[:2] == (0, own)


@pytest.mark.slow
def test_a_build_of_the_pinned_version_that_is_there_is_kept(setup, checkout, tmp_path):
    subprocess.run([os.path.realpath(sys.executable), "-m", "venv", checkout / ".venv"], check=True)
    make_wheel(tmp_path, "torch", "2.13.0+cpu")
    wheel = tmp_path / "torch-2.13.0+cpu-py3-none-any.whl"
    subprocess.run([checkout / ".venv/bin/python", "-m", "pip", "install", "-q", "--no-index", wheel], check=True)
    code, _, said = setup("requirements-dev.txt")
    assert code == 0, said
    assert installed(checkout, "torch") == ["2.13.0+cpu"]
    assert installed(checkout, "pytest") == ["9.2.0"]

    # An active environment that serves, here this one seen from another checkout, is used as it is.
    other = tmp_path / "other"
    shutil.copytree(checkout, other, ignore=shutil.ignore_patterns(".venv"))
    (other / "requirements.txt").write_text("torch==2.14.0  # serves from 2.11\n")
    done = subprocess.run(
        ["bash", "-c", "source setup_env.sh; setup_env requirements.txt; echo $PYTHON"],
        cwd=other,
        env={"PATH": f"{checkout}/.venv/bin:/usr/bin:/bin", "VIRTUAL_ENV": str(checkout / ".venv")},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("python\n", "")
    assert not (other / ".venv").exists()


def test_without_a_fitting_python_the_answer_says_so(setup, tmp_path):
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        write_program(tmp_path / "programs" / name, "#!/bin/sh\nexit 1\n")
    code, _, said = setup()
    assert code == 2
    assert said == "Python 3.11, 3.12 or 3.13 is needed to set up .venv, and none is on the PATH: install one of them\n"


def test_a_configuration_file_is_found_from_where_the_script_is_called(stage, tmp_path):
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "my run.toml").write_text("")
    done = stage.run(CONFIG_FILE="my run.toml", cwd=tmp_path / "away")
    assert done.returncode == 0, done.stderr
    ((_, arguments),) = stage.launches()
    assert (stage.checkout / arguments[1]).resolve() == tmp_path / "away" / "my run.toml"
