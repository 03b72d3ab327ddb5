"""Conversion by the command: to every layout and back, whole or not at all, and mistakes answered in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint.dcp import read_train_state, save_weights
from checkpoint.exchange import open_weights
from checkpoint.lazy import LazyTensor, lazy_all, read_all
from config.parse import load_config
from flux.model import FluxTransformer
from flux.rules import LAYOUTS
from flux.spec import SPECS
from scripts import convert_checkpoint
from scripts.convert_checkpoint import main
from tests.distributed.ranks import CONTEXT

ROOT = Path(__file__).resolve().parents[3]
LAYOUT_NAMES = ("bfl", "diffusers", "dcp")
TARGETS = {"bfl": "x.safetensors", "diffusers": "folder", "dcp": "start"}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        expected = FluxTransformer(SPECS["flux-tiny"].transformer).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in expected.items()}


@pytest.fixture(scope="module")
def step(weights, tmp_path_factory) -> Path:
    """A checkpoint of a run that keeps an average of its weights."""
    config = load_config([f"--job.config_file={ROOT}/train_configs/flux_tiny.toml"], quiet=True)
    average = {f"ema.{name}": tensor + 1 for name, tensor in weights.items()}
    state = {"flavor": "flux-tiny", "step": 7, "samples_seen": 70, "config": asdict(config)}
    save_weights(tmp_path_factory.mktemp("run") / "checkpoint" / "step-7", lazy_all(weights | average), state)
    return next(tmp_path_factory.getbasetemp().glob("run*/checkpoint/step-7"))


def convert(source: Path, target: Path, to: str, *options: str) -> Path:
    only = ["--transformer-only"] if to == "diffusers" else []
    main(["--to", to, *only, *options, str(source), str(target)])
    return target


def holds(path: Path, weights: dict[str, Tensor]) -> bool:
    tensors = read_all(open_weights(path, LAYOUTS).tensors)
    return tensors.keys() == weights.keys() and all(
        tensors[name].dtype == weights[name].dtype and torch.equal(tensors[name], weights[name]) for name in weights
    )


def refusal(*arguments: object) -> str:
    with pytest.raises(ValueError) as raised:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_to_each_layout(step, weights, tmp_path, to, capsys):
    target = convert(step, tmp_path / "new" / TARGETS[to], to)
    assert holds(target, weights)
    assert not holds(target, {name: tensor + 1 for name, tensor in weights.items()})
    assert list(target.parent.iterdir()) == [target]
    assert str(target) in capsys.readouterr().out


def test_all_the_way_round(step, tmp_path):
    """Through every layout to the first one: the same file, byte by byte."""
    first = convert(step, tmp_path / "first.safetensors", "bfl")
    folder = convert(first, tmp_path / "folder", "diffusers")
    start = convert(folder, tmp_path / "start", "dcp")
    assert convert(start, tmp_path / "last.safetensors", "bfl").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_the_average(step, weights, tmp_path, to):
    average = {name: tensor + 1 for name, tensor in weights.items()}
    assert holds(convert(step, tmp_path / TARGETS[to], to, "--ema"), average)


@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_number_formats(step, weights, tmp_path, to):
    target = convert(step, tmp_path / TARGETS[to], to, "--dtype", "bfloat16")
    assert holds(target, {name: tensor.bfloat16() for name, tensor in weights.items()})


@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_a_value_too_large(weights, tmp_path, to):
    only = ["--transformer-only"] if to == "diffusers" else []
    save_file(weights | {"img_in.bias": torch.full((256,), 1e5)}, tmp_path / "own.safetensors")
    own, target = tmp_path / "own.safetensors", tmp_path / TARGETS[to]
    message = refusal("--to", to, *only, "--dtype", "float16", own, target)
    assert "img_in.bias reaches 1e+05, too large for float16" in message
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]


@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_one_tensor_at_a_time_is_in_memory(step, weights, tmp_path, monkeypatch, to):
    """When one is read, what was read before is gone; so a model need not fit into the memory."""
    seen: list[weakref.ref] = []

    def watched(tensor: LazyTensor) -> LazyTensor:
        def read() -> Tensor:
            assert not any(storage() is not None for storage in seen), "an earlier one is still there"
            values = tensor.read()
            seen.append(weakref.ref(values.untyped_storage()))
            return values

        return LazyTensor(tensor.shape, tensor.dtype, read)

    opened = open_weights(step, LAYOUTS)
    tensors = {name: watched(tensor) for name, tensor in opened.tensors.items()}
    monkeypatch.setattr(convert_checkpoint, "open_weights", lambda *_: replace(opened, tensors=tensors))
    assert holds(convert(step, tmp_path / TARGETS[to], to), weights)
    assert len(seen) >= len(weights)
    kept = next(iter(tensors.values())).read()
    with pytest.raises(AssertionError, match="still there"):  # it would be seen
        next(iter(tensors.values())).read()
    assert kept.numel()


def test_what_a_run_knows_stays_with_its_weights(step, tmp_path):
    """The encoders, above all: a pipeline can be made later."""
    state = read_train_state(convert(step, tmp_path / "start", "dcp"))
    assert (state["flavor"], state["step"], state["samples_seen"]) == ("flux-tiny", 7, 70)
    assert state["config"] == read_train_state(step)["config"]
    plain = convert(tmp_path / "start", tmp_path / "x.safetensors", "bfl")
    assert read_train_state(convert(plain, tmp_path / "again", "dcp"))["step"] == 0


def test_the_complete_pipeline(step, weights, tmp_path):
    main(["--to", "diffusers", str(step), str(tmp_path / "pipeline")])
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    parts = {name for name in index if not name.startswith("_")}
    assert parts == {path.name for path in (tmp_path / "pipeline").iterdir() if path.is_dir()}
    assert {"transformer", "vae", "text_encoder", "text_encoder_2"} <= parts
    assert holds(tmp_path / "pipeline", weights)


def test_a_pipeline_needs_the_encoders_of_a_run(step, tmp_path):
    bare = convert(step, tmp_path / "x.safetensors", "bfl")
    told = "does not say which encoders it was trained with: add --transformer-only"
    assert told in refusal("--to", "diffusers", bare, tmp_path / "folder")
    assert told in refusal("--to", "diffusers", convert(bare, tmp_path / "start", "dcp"), tmp_path / "folder")


def test_an_empty_folder_is_filled(step, weights, tmp_path):
    for to in ("diffusers", "dcp"):
        (tmp_path / to).mkdir()
        assert holds(convert(step, tmp_path / to, to), weights)


@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_nothing_is_replaced(step, tmp_path, to):
    target = tmp_path / TARGETS[to]
    if to == "bfl":
        target.write_text("precious")
    else:
        (target / "precious").mkdir(parents=True)
    assert f"{target} exists already and is not replaced" in refusal("--to", to, "--ema", step, target)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--to", "bfl", "STEP", "T/x.ckpt"],
            "must end in .safetensors, as --to bfl writes one file: use T/x.safetensors",
        ),
        (["--to", "bfl", "T/nowhere", "T/x.safetensors"], "nowhere is missing: name a checkpoint"),
        (
            ["--to", "bfl", "--transformer-only", "STEP", "T/x.safetensors"],
            "--transformer-only has no effect with --to bfl",
        ),
        (["--to", "bfl", "--ema", "T/own.safetensors", "T/x.safetensors"], "only a checkpoint holds an average"),
        (
            ["--to", "dcp", "T/other.safetensors", "T/x"],
            "holds none of flux-dev, flux-schnell, flux-debug, flux-tiny but",
        ),
        (["--to", "dcp", "T/part.safetensors", "T/x"], "does not fit model.flavor='flux-tiny', it lacks img_in.bias"),
        (["--to", "dcp", "--flavor", "flux-dev", "T/own.safetensors", "T/x"], "holds a flux-tiny"),
        (["--to", "dcp", "STEP", "T/own.safetensors/x"], "own.safetensors is a file"),
        (["--to", "bfl", "STEP/..", "T/x.safetensors"], "holds checkpoints: name one of them, such as"),
    ],
)
def test_mistakes(step, weights, tmp_path, arguments, told):
    save_file(weights, tmp_path / "own.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name != "img_in.bias"}, tmp_path / "part.safetensors"
    )
    save_file(
        {name: tensor for name, tensor in weights.items() if "blocks.1." not in name}, tmp_path / "other.safetensors"
    )
    before = sorted(tmp_path.rglob("*"))
    filled = [word.replace("STEP", str(step)).replace("T/", f"{tmp_path}/") for word in arguments]
    assert told.replace("T/", f"{tmp_path}/") in refusal(*filled)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_room(step, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    message = refusal("--to", "bfl", step, tmp_path / "new" / "x.safetensors")
    assert "GB and" in message and "has 0.0 GB: make room" in message


@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_a_write_that_fails(step, weights, tmp_path, monkeypatch, to):
    """The disk is full when half is written: one line, and no trace; once there is room it works."""
    target, sync = tmp_path / TARGETS[to], os.fsync

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    only = ["--transformer-only"] if to == "diffusers" else []
    told = f"{target} cannot be written: [Errno 28] No space left on device"
    assert refusal("--to", to, *only, step, target) == told
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "fsync", sync)
    assert holds(convert(step, target, to), weights)
    assert list(tmp_path.iterdir()) == [target]


def convert_and_die(arguments: list[str]) -> None:
    """In a process of its own."""
    left = iter(range(40))
    tqdm.update = lambda self, size: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL)
    main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("to", LAYOUT_NAMES)
def test_killed_in_the_middle(step, weights, tmp_path, to):
    """Nothing of it can be taken for the target, and the next conversion clears it away."""
    target = tmp_path / TARGETS[to]
    only = ["--transformer-only"] if to == "diffusers" else []
    process = CONTEXT.Process(target=convert_and_die, args=(["--to", to, *only, str(step), str(target)],))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    assert holds(convert(step, target, to), weights)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_the_command(step, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scripts.convert_checkpoint", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)

    done = run("--to", "bfl", step, tmp_path / "x.safetensors")
    assert done.returncode == 0 and len(load_file(tmp_path / "x.safetensors")) == 96, done.stderr
    again = run("--to", "bfl", step, tmp_path / "x.safetensors")
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "exists already" in again.stderr, again.stderr
    assert "SOURCE is recognized by itself" in run("--help").stdout
