"""What a checkpoint holds and whether it is whole, told from outside."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint.safe_metadata
from checkpoint.dcp import save_checkpoint
from checkpoint.slices import Slices
from scripts.inspect_checkpoint import Contents, main

ROOT = Path(__file__).parents[3]
STATE = {
    "samples_seen": 3200,
    "seed": 7,
    "flavor": "flux-tiny",
    "layout": "2 processes",
    "versions": {"torch": "2.13.0"},
}
TENSORS = {
    "block.weight": torch.ones(4, 3, dtype=torch.bfloat16),
    "block.bias": torch.ones(5),
    "optimizer.state.block.weight.exp_avg": torch.ones(4, 3),
    "optimizer.state.block.weight.step": torch.tensor(9.0),
    "ema.block.weight": torch.ones(4, 3),
}
FILES = [".metadata", "__0_0.distcp", "manifest.json", "train_state.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with two checkpoints, made once."""
    run = tmp_path_factory.mktemp("outputs") / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / "config.toml").touch()
    for step in (5, 1000):
        tensors = {name: whole_slices(tensor) for name, tensor in TENSORS.items()}
        save_checkpoint(run / "checkpoint" / f"step-{step}", tensors, {"step": step} | STATE, None)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def whole_slices(tensor):
    return Slices.of_views(tensor.shape, tensor.dtype, [((0,) * tensor.ndim, tensor)])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def inspect(capsys, folder):
    """Exit code, and what was printed without runs of spaces."""
    code = main([str(folder)])
    return code, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_checkpoint_in_full(run, capsys):
    step = run / "checkpoint" / "step-1000"
    code, lines = inspect(capsys, step)
    assert code == 0
    assert lines[:6] == [
        str(step),
        "flavor flux-tiny",
        "step 1,000, 3,200 samples seen",
        "seed 7",
        "saved on 2 processes",
        "torch 2.13.0",
    ]
    assert "model 2 17 44 bfloat16, float32" in lines
    assert "optimizer 2 13 52 float32" in lines
    assert "ema 1 12 48 float32" in lines
    sizes = {line.split()[0]: line.split()[1] for line in lines if line.split()[:1] and line.split()[0] in FILES}
    assert sizes == {name: f"{(step / name).stat().st_size:,}" for name in FILES}
    assert lines[-1] == "whole: all 3 files"


@pytest.mark.parametrize("inner", ["", "checkpoint"])
def test_a_run_on_a_line_each(run, capsys, inner):
    code, lines = inspect(capsys, run / inner)
    assert code == 0
    assert [line.split()[1:6] for line in lines[::2]] == [
        ["step", "5,", "3,200", "samples", "seen,"],
        ["step", "1,000,", "3,200", "samples", "seen,"],
    ]
    assert lines[1::2] == ["whole: all 3 files"] * 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_each_damage_is_named_once(run, capsys, name, damage):
    damage(run / "checkpoint" / "step-5" / name)
    code, lines = inspect(capsys, run / "checkpoint" / "step-5")
    problems = [line for line in lines if line.startswith("damaged: ")]
    assert code == 5
    assert len(problems) == 1 and name in problems[0]
    assert not any(line.startswith("whole") for line in lines)

    code, lines = inspect(capsys, run)
    assert code == 5
    assert sum(line.startswith("damaged: ") for line in lines) == 1 and lines[-1] == "whole: all 3 files"


def test_a_description_with_any_byte_flipped_is_told_as_damage(tmp_path):
    """Most are found when it is read, and names that have changed by the manifest; none makes a traceback."""
    step = tmp_path / "checkpoint" / "step-5"
    save_checkpoint(step, {"block.weight": whole_slices(TENSORS["block.weight"])}, {"step": 5} | STATE, None)
    path = step / ".metadata"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        contents = Contents(step)
        contents.describe()
        assert len(contents.find_problems()) == 1, place


def test_a_step_that_has_lost_everything_is_damaged(run, capsys):
    for name in FILES:
        (run / "checkpoint" / "step-5" / name).unlink()
    code, lines = inspect(capsys, run / "checkpoint" / "step-5")
    assert (code, lines[-1]) == (5, f"damaged: {run / 'checkpoint' / 'step-5' / 'manifest.json'} is missing")


def test_what_the_manifest_does_not_name_is_shown(run, capsys):
    (run / "checkpoint" / "step-5" / "notes.txt").write_text("mine")
    code, lines = inspect(capsys, run / "checkpoint" / "step-5")
    assert code == 0 and "notes.txt 4 not in the manifest" in lines


def test_a_folder_of_another_recipe_is_described_as_far_as_it_can_be(run, capsys):
    step = (run / "checkpoint" / "step-5").rename(run / "theirs")
    for name in ("manifest.json", "train_state.json"):
        (step / name).unlink()
    code, lines = inspect(capsys, step)
    assert code == 0
    assert "not of this recipe: it has no manifest.json, so flipped bytes cannot be found" in lines
    assert "model 2 17 44 bfloat16, float32" in lines and lines[-1] == "its files are there"

    data = step / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:100])
    code, lines = inspect(capsys, step)
    assert code == 5 and lines[-1].startswith(f"damaged: {data} has 100 bytes and must have")


def test_a_disk_that_does_not_answer_is_told(run, capsys, monkeypatch):
    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.safe_metadata, "_Unpickler", fail)
    code, lines = inspect(capsys, run / "checkpoint/step-5")
    assert code == 5
    assert any(".metadata cannot be read: [Errno 5] Input/output error: try again" in line for line in lines)


def test_a_metadata_file_that_would_run_code_is_only_named(run, capsys, tmp_path):
    step = run / "checkpoint" / "step-5"
    # What pickle makes of an object that asks for os.system("touch <file>").
    (step / ".metadata").write_bytes(f"cos\nsystem\n(S'touch {tmp_path / 'ran'}'\ntR.".encode())
    for name in ("manifest.json", "train_state.json"):
        (step / name).unlink()
    code, lines = inspect(capsys, step)
    assert code == 5 and "damaged: " in lines[-1] and "os.system" in lines[-1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "what"), [("empty", "holds no checkpoint"), ("missing", "is no folder")])
def test_no_checkpoint(tmp_path, name, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"{name} {what}: name a checkpoint such as"):
        main([str(tmp_path / name)])


def test_the_verdict_is_the_exit_code_and_nothing_goes_to_stderr(run):
    flip(run / "checkpoint" / "step-5" / "__0_0.distcp")
    command = [sys.executable, "-m", "scripts.inspect_checkpoint", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (5, "")
