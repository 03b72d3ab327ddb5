"""What a run starts from, and what its checkpoints hold, as far as it can be told without one."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from build import export_weights, read_versions
from checkpoint.dcp import load_checkpoint, open_checkpoint, save_checkpoint
from config.parse import load_config
from flux.identify import expected_shapes
from flux.spec import SPECS
from parallel.degrees import Degrees
from parallel.mesh import Layout
from parallel.shards import local_views
from run_state import checkpoint_tensors, find_start, tell_changes
from training.config import Optimizer
from training.ema import build_ema, update_ema
from training.optimizer import ExactWeights
from training.optimizer import build_optimizer as build_section_optimizer

SEED = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]


def checkpointer_that_finds(flavor: str, **train_state: Any) -> Any:
    shapes = expected_shapes(SPECS[flavor].transformer)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = SimpleNamespace(path="old/step-3", train_state=train_state, weights=lambda: tensors)
    return SimpleNamespace(find=lambda: found)


def config_of(*arguments: str):
    return load_config(["--job.config_file=train_configs/flux_tiny.toml", *arguments], quiet=True)


def test_a_seed_is_not_made_of_a_run_that_goes_on():
    with pytest.raises(ValueError, match=r"create_seed_checkpoint saves a start, and this run goes on from old/step-3"):
        find_start(config_of(*SEED), checkpointer_that_finds("flux-tiny", step=3))
    assert find_start(config_of(*SEED), checkpointer_that_finds("flux-tiny"))  # weights alone may be one
    assert find_start(config_of(), checkpointer_that_finds("flux-tiny", step=3))


def test_weights_to_start_from_are_looked_at_before_anything_is_built(tmp_path):
    """Only where a run starts from them: one that goes on has no need of them any more."""
    missing = ["--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={tmp_path / 'flux1.safetensors'}"]
    with pytest.raises(ValueError, match=r"flux1\.safetensors"):
        find_start(config_of(*missing), SimpleNamespace(find=lambda: None))  # type: ignore[arg-type]
    assert find_start(config_of(*missing), checkpointer_that_finds("flux-tiny", step=3))
    assert find_start(config_of(), SimpleNamespace(find=lambda: None)) is None  # type: ignore[arg-type]


def test_a_checkpoint_of_another_flavor_is_named():
    with pytest.raises(ValueError, match=r"old/step-3 holds a flux-schnell .* but model\.flavor='flux-tiny'"):
        find_start(config_of(), checkpointer_that_finds("flux-schnell", step=3))


@pytest.mark.parametrize(
    ("options", "told"), [([], []), (["--optimizer.lr=0.5"], ["not as in the checkpoint: optimizer.lr 0.003 -> 0.5"])]
)
def test_what_is_not_as_in_the_checkpoint_is_told(caplog, options, told):
    saved = {"config": asdict(config_of()), "versions": read_versions(), "update_size": 8}
    tell_changes(config_of(*options), saved, update_size=8)
    assert [record.getMessage() for record in caplog.records] == told


def layer_and_optimizer(dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 5).to(dtype)
    return layer, build_section_optimizer([list(layer.parameters())], Optimizer(lr=0.01), local_views, lambda _: 0)


def update(layer: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for parameter in layer.parameters():
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.grad = gradient.bfloat16().to(parameter.dtype)
    optimizer.step()


def test_a_run_goes_on_with_its_weights_in_another_format_and_loses_no_digit(tmp_path):
    """From float32 to bfloat16 with remainders and back, as if nothing had happened; then export and average."""
    straight, plain = layer_and_optimizer(torch.float32)
    for seed in range(4):
        update(straight, plain, seed)
    layer, optimizer = layer_and_optimizer(torch.float32)
    for step, dtype in enumerate((torch.bfloat16, torch.float32, torch.bfloat16)):
        update(layer, optimizer, step)
        tensors = checkpoint_tensors(layer, optimizer, {}, to_save=True)
        save_checkpoint(tmp_path / f"step-{step}", tensors, {}, None)
        layer, optimizer = layer_and_optimizer(dtype)
        wanted = checkpoint_tensors(layer, optimizer, {}, to_save=False)
        assert {name: one.dtype for name, one in wanted.items()} == {name: one.dtype for name, one in tensors.items()}
        load_checkpoint(tmp_path / f"step-{step}", wanted)
    update(layer, optimizer, 3)
    assert layer.weight.dtype == torch.bfloat16
    weights = ExactWeights(optimizer, dict(layer.named_parameters()))
    assert torch.equal(weights["weight"], straight.weight) and torch.equal(weights["bias"], straight.bias)
    assert not torch.equal(layer.weight.float(), straight.weight)  # control

    file = tmp_path / "x.safetensors"
    export_weights(config_of(), Layout(Degrees(), torch.device("cpu")), file, 1, weights)
    assert torch.equal(load_file(file)["weight"], straight.weight)
    average = build_ema(weights)
    assert torch.equal(average["weight"], straight.weight)
    update_ema(average, weights, 0.5, 10**6, torch.zeros(()))
    assert torch.equal(average["weight"], straight.weight)


def test_weights_stay_exact_without_the_optimizers_state(tmp_path):
    layer, optimizer = layer_and_optimizer(torch.bfloat16)
    update(layer, optimizer, 0)
    tensors = checkpoint_tensors(layer, optimizer, {}, to_save=True, has_states=False)
    assert set(tensors) == {"weight", "bias"}
    save_checkpoint(tmp_path / "step-1", tensors, {}, None)
    exact = ExactWeights(optimizer, dict(layer.named_parameters()))
    opened = open_checkpoint(tmp_path / "step-1")  # as conversion and sampling read it
    assert all(torch.equal(opened[name].read(), value) for name, value in exact.items())
