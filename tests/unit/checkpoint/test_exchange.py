"""What lies at a path is recognized by its names; what is not is refused with what is there and what could be."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from checkpoint.adapter import from_native
from checkpoint.dcp import save_weights
from checkpoint.exchange import CHECKPOINT_LAYOUT, DIFFUSERS_STEM, OWN_LAYOUT, Weights, open_weights
from checkpoint.lazy import lazy_all, read_all
from checkpoint.safetensors_file import write_safetensors, write_sharded


@dataclass(frozen=True)
class Rule:
    native: str
    other: tuple[str, ...]
    op: str | None = None


RENAMED = (Rule("in.{leaf}", ("in.{leaf}",)), Rule("norm.weight", ("norm.scale",)), Rule("out.weight", ("out.weight",)))
SPLIT = (
    Rule("in.{leaf}", ("q.{leaf}", "k.{leaf}")),
    Rule("norm.weight", ("norm.gain",)),
    Rule("out.weight", ("head.weight",), "swap"),
)
TABLES = {"renamed": RENAMED, "split": SPLIT}


def native() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"in.weight": (6, 3), "in.bias": (6,), "norm.weight": (3,), "out.weight": (4, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(path: Path, tensors: dict[str, Tensor], layout: str = OWN_LAYOUT, **metadata: str) -> Path:
    lazy = lazy_all(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, from_native(lazy, TABLES[layout]) if layout in TABLES else lazy, None, metadata)
    return path


def write_folder(folder: Path, shard_bytes: int = 100) -> Path:
    folder.mkdir(parents=True)
    write_sharded(folder, DIFFUSERS_STEM, from_native(lazy_all(native()), SPLIT), None, {}, shard_bytes)
    return folder


def refusal(path: Path, part: str = "model") -> str:
    with pytest.raises(ValueError) as raised:
        open_weights(path, TABLES, part)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def holds_native(weights: Weights) -> bool:
    tensors = read_all(weights.tensors)
    return tensors.keys() == native().keys() and all(torch.equal(tensors[name], native()[name]) for name in tensors)


@pytest.mark.parametrize("layout", [OWN_LAYOUT, *TABLES])
def test_files(tmp_path, layout):
    weights = open_weights(write(tmp_path / "x.safetensors", native(), layout, flavor="tiny"), TABLES)
    assert (weights.layout, weights.metadata) == (layout, {"flavor": "tiny"})
    assert holds_native(weights)


def test_the_comparison_sees_a_difference(tmp_path):
    """The halves that a layout exchanges, left as they are."""
    spoiled = native()
    spoiled["out.weight"] = spoiled["out.weight"].roll(2, dims=0)
    assert not holds_native(open_weights(write(tmp_path / "x.safetensors", spoiled, "split"), TABLES))


@pytest.mark.parametrize("place", ["transformer", "."])
@pytest.mark.parametrize("shard_bytes", [100, 10_000])
def test_folders(tmp_path, place, shard_bytes):
    """Of a pipeline, which has its transformer in a folder of that name, or of the transformer alone."""
    write_folder(tmp_path / "folder" / place, shard_bytes)
    weights = open_weights(tmp_path / "folder", TABLES)
    assert weights.layout == "split" and holds_native(weights)


def test_checkpoints(tmp_path):
    average = {name: tensor + 1 for name, tensor in native().items()}
    both = native() | {f"ema.{name}": tensor for name, tensor in average.items()}
    save_weights(tmp_path / "step-3", lazy_all(both), {"step": 3})
    weights = open_weights(tmp_path / "step-3", TABLES)
    assert weights.layout == CHECKPOINT_LAYOUT and holds_native(weights)
    ema = read_all(open_weights(tmp_path / "step-3", TABLES, "ema").tensors)
    assert ema.keys() == native().keys() and all(torch.equal(ema[name], average[name]) for name in ema)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("nested", [False, True], ids=["torchtitan", "MLPerf's reference"])
def test_checkpoints_of_torchtitan(tmp_path, nested):
    """Its weights have their own names; a version, on which MLPerf's reference is built, saved them below `model`."""
    state = {"model": native()} if nested else native()
    dcp.save(state | {"optimizer": {"state.in.weight.exp_avg": torch.ones(6, 3)}}, checkpoint_id=tmp_path / "step-9")
    weights = open_weights(tmp_path / "step-9", TABLES)
    assert weights.layout == CHECKPOINT_LAYOUT and holds_native(weights)
    assert "no average of the weights" in refusal(tmp_path / "step-9", "ema")


def test_unknown_names(tmp_path):
    many = {f"blocks.{number}.w": torch.ones(1) for number in range(9)}
    told = (
        "holds 9 tensors under unknown names (blocks.0.w, blocks.1.w, blocks.2.w, blocks.3.w, blocks.4.w, ...): "
        "the known names are "
    )
    message = refusal(write(tmp_path / "x.safetensors", many))
    assert told in message and message.endswith(f"renamed, split, {OWN_LAYOUT}")
    save_weights(tmp_path / "step-1", lazy_all(many), {})
    assert told in refusal(tmp_path / "step-1")
    assert "holds 0 tensors" not in told


def test_one_name_too_many_or_too_few(tmp_path):
    """Nothing is dropped, nothing is made up."""
    assert "holds 5 tensors under unknown names" in refusal(
        write(tmp_path / "more.safetensors", native() | {"lora.weight": torch.ones(1)})
    )
    other = read_all(from_native(lazy_all(native()), SPLIT))
    del other["k.weight"]
    message = refusal(write(tmp_path / "less.safetensors", other))
    assert "has the names of split, but in.weight cannot be joined from its parts: state dict lacks k.weight" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantized(tmp_path, dtype):
    quantized = native() | {"in.weight": native()["in.weight"].to(dtype)}
    message = refusal(write(tmp_path / "x.safetensors", quantized))
    assert f"holds in.weight as {str(dtype).removeprefix('torch.')}: quantized weights cannot be used" in message


def test_the_average_is_only_in_checkpoints(tmp_path):
    message = refusal(write(tmp_path / "x.safetensors", native()), "ema")
    assert "is no checkpoint, and only a checkpoint holds an average" in message


def test_nothing_there(tmp_path):
    assert "nowhere is missing: name a checkpoint (step-N)" in refusal(tmp_path / "nowhere")
    assert "holds no weights that are known: name a checkpoint (step-N)" in refusal(tmp_path)


@pytest.mark.parametrize("place", [".", "checkpoint", "run/checkpoint"])
def test_a_folder_of_checkpoints(tmp_path, place):
    """Which of them is meant is not guessed."""
    for step in (5, 10):
        save_weights(tmp_path / place / f"step-{step}", lazy_all(native()), {})
    folder = tmp_path / "run" if place.startswith("run") else tmp_path
    assert f"holds checkpoints: name one of them, such as {tmp_path / place / 'step-10'}" in refusal(folder)


def test_an_incomplete_folder(tmp_path):
    folder = write_folder(tmp_path / "transformer")
    next(folder.glob("*00001-of*")).unlink()
    assert "00001-of-" in refusal(tmp_path) and "is missing" in refusal(tmp_path)
    for file in folder.iterdir():
        file.unlink()
    (folder / "config.json").write_text("{}")
    assert f"must hold {DIFFUSERS_STEM}.safetensors and does not" in refusal(tmp_path)


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", [f"{DIFFUSERS_STEM}.bin", "x.pt", "x.ckpt", "x.safetensors", ".metadata"])
def test_nothing_that_is_loaded_runs(tmp_path, name):
    """Pickles that would make a file, wherever one could be taken for weights."""
    trace, folder = tmp_path / "trace", tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Payload(trace)))
    for path in (folder, folder / name):
        assert refusal(path)
    if name == f"{DIFFUSERS_STEM}.bin":
        assert "only safetensors is safe to open" in refusal(folder)
    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())
    assert trace.exists()  # it would have


def test_an_index_that_leads_elsewhere(tmp_path):
    folder = write_folder(tmp_path / "transformer")
    write(tmp_path / "secret.safetensors", native())
    index = folder / f"{DIFFUSERS_STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: "../secret.safetensors" for name in native()}}))
    assert "is not a plain file name: do not trust this folder" in refusal(tmp_path)
