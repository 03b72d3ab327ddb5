"""What a run starts from, as far as it can be told without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from build import find_start
from config.parse import load_config
from flux.identify import expected_shapes
from flux.spec import SPECS

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


def test_a_checkpoint_of_another_flavor_is_named():
    with pytest.raises(ValueError, match=r"old/step-3 holds a flux-schnell .* but model\.flavor='flux-tiny'"):
        find_start(config_of(), checkpointer_that_finds("flux-schnell", step=3))
