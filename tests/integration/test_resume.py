"""Whole commands that are stopped and given again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.dcp import open_checkpoint
from checkpoint.lazy import read_all
from checkpoint.steps import find_steps
from runtime import exit_codes
from tests.distributed.ranks import CONTEXT
from tests.integration.short_runs import TINY, Run

SMALL = [*TINY, "--validation.enable=false", "--training.local_batch_size=4"]
PATIENCE = 240  # seconds for one start on a busy machine

pytestmark = pytest.mark.slow


class Command:
    """What ./run_train.sh runs, in a process of its own."""

    def __init__(self, folder: Path, *options: str, processes: int = 1):
        environment = {**os.environ, "NGPU": str(processes), "OMP_NUM_THREADS": "1"}
        arguments = [*SMALL, f"--job.dump_folder={folder}", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.launch", *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )

    def wait(self) -> tuple[int, str]:
        """Exit code and what was told."""
        _, told = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, told

    def stop(self, when: Path, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal as soon as something is there."""
        deadline = time.monotonic() + PATIENCE
        while not when.exists() and self.process.poll() is None:
            assert time.monotonic() < deadline, f"{when} did not appear"
            time.sleep(0.02)
        self.process.send_signal(number)
        return self.wait()


def run(folder: Path, *options: str) -> tuple[int, str]:
    """What the command does, in a process that has imported train.py already: that takes longest. As Command.wait."""
    told = folder.with_name(f"{folder.name}.told")
    process = CONTEXT.Process(target=train_forked, args=(str(told), [*SMALL, f"--job.dump_folder={folder}", *options]))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None, f"it hangs, and told {told.read_text()}"
    text = told.read_text()
    told.unlink()
    return process.exitcode, text


def train_forked(told: str, arguments: list[str]) -> None:
    from train import main

    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    main(arguments)


SAVING = ("--checkpoint.enable", "--checkpoint.interval=3", "--training.steps=9")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("straight")
    assert Command(folder, *SAVING).wait()[0] == exit_codes.OK
    return Run(folder)


@pytest.mark.parametrize(("number", "mode"), [(signal.SIGKILL, "disabled"), (signal.SIGTERM, "async")])
def test_the_same_command_again_after_a_stop(straight, tmp_path, number, mode):
    options = (*SAVING, f"--checkpoint.async_mode={mode}")
    code, told = Command(tmp_path, *options).stop(tmp_path / "checkpoint" / ".unfinished-step-6", number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else exit_codes.PREEMPTED), told
    assert "terminate called" not in told
    assert find_steps(tmp_path / "checkpoint")
    code, told = run(tmp_path, *options)
    assert code == exit_codes.OK and "goes on after step" in told
    again = Run(tmp_path)
    assert again.series("loss") == straight.series("loss") and again.exit["code"] == exit_codes.OK
    whole, other = (load_file(folder / "export" / "transformer.safetensors") for folder in (tmp_path, straight.folder))
    assert all(torch.equal(whole[name], other[name]) for name in other)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir() if path.name.startswith(".")] == []


def test_two_processes_that_find_nothing_whole(straight, tmp_path):
    folder = tmp_path / "run"
    assert run(folder, *SAVING, "--training.steps=3")[0] == exit_codes.OK
    shard = folder / "checkpoint" / "step-3" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    options = (*SAVING, "--training.local_batch_size=2")
    # And what another start finds is no empty folder.
    for code, told in (Command(folder, *options, processes=2).wait(), run(folder, *options)):
        assert code == exit_codes.CHECKPOINT, told
        assert told.strip().splitlines()[-1].count("none is whole") == 1
    assert json.loads((folder / "exit.json").read_text())["code"] == exit_codes.CHECKPOINT


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    first = Command(tmp_path, *SAVING, "--training.steps=1000", "--checkpoint.interval=1000")
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "checkpoint").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, told = run(tmp_path, *SAVING)
    first.process.kill()
    first.wait()
    assert code == exit_codes.CONFIG and "is in use by" in told
    assert sorted(path.name for path in tmp_path.parent.iterdir() if path.name.startswith(tmp_path.name)) == [
        tmp_path.name
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_all(open_checkpoint(folder))


def test_where_weights_come_from_and_go_to(straight, tmp_path):
    """A seed, a run from it, what is exported, and runs that start from each export."""
    seed = tmp_path / "seed"
    assert run(seed, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")[0] == exit_codes.OK
    assert list(find_steps(seed / "checkpoint")) == [0]
    code, told = run(seed, *SAVING, "--checkpoint.last_save_in_hf")
    assert code == exit_codes.OK and "step-0" in told
    assert Run(seed).series("loss") == straight.series("loss")
    last = weights(seed / "checkpoint" / "step-9")
    for source, in_hf in (
        (seed / "checkpoint" / "step-9", False),
        (seed / "export" / "diffusers", True),
        (seed / "export" / "transformer.safetensors", True),
    ):
        folder = tmp_path / f"from-{source.name}"
        options = [f"--checkpoint.initial_load_path={source}", f"--checkpoint.initial_load_in_hf={in_hf}"]
        saving = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"] if in_hf else ["--training.steps=1"]
        code, told = run(folder, *options, *saving, "--checkpoint.last_save_model_only=false")
        assert code == exit_codes.OK, told
        if in_hf:  # the seed of such a run is what it was given
            assert all(
                torch.equal(tensor, last[name]) for name, tensor in weights(folder / "checkpoint/step-0").items()
            )
            assert not (folder / "export").exists()
        else:
            assert "with the weights from" in told and Run(folder).series("loss") != straight.series("loss")[:1]
            assert (folder / "export" / "transformer.safetensors").exists()  # the only thing that such a run leaves


def test_a_run_that_goes_on_traces_the_steps_it_would_have_traced(tmp_path):
    traced = ("--profiling.enable_profiling", "--profiling.profile_freq=2", "--profiling.profiler_warmup=1")
    for steps, names in ((1, []), (4, ["step-000004"])):
        assert run(tmp_path / "run", "--checkpoint.enable", f"--training.steps={steps}", *traced)[0] == exit_codes.OK
        assert [path.name for path in (tmp_path / "run").glob("profile_traces/*")] == names
