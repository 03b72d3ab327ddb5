"""A run that was stopped goes on as if nothing had happened: compared with a run that was not stopped.

With `RESUME_ROWS=all` in the environment, processes, number formats and modes meet in every combination of three, not
only of two.
"""

from itertools import product
from pathlib import Path

import pytest
import torch

from checkpoint.compare import part_of
from tests.distributed.legs import ALL_ROWS, BF16, OVERRIDES, SIZES, UPDATE, read_metrics, read_tensors, run_leg
from tests.distributed.ranks import run_ranks
from tests.integration.short_runs import resize_tiny

STEPS = 40
DTYPES = {"fp32": [], "bf16": BF16}
EVERY_PAIR = [
    *((1, "fp32", "disabled"), (1, "bf16", "async"), (2, "fp32", "async")),
    *((2, "bf16", "disabled"), (4, "fp32", "disabled"), (4, "bf16", "async")),
]
ROWS = list(product((1, 2, 4), DTYPES, ("disabled", "async"))) if ALL_ROWS else EVERY_PAIR
# Where the first and the second leg end: right after a save, of which the first is that of step 1 and the second lies
# at the end of an epoch (20 pictures, 4 per update); and between saves, whose steps are done again.
AT_SAVES, BETWEEN_SAVES = (1, 20), (13, 27)
PARTS = ["optimizer", "lr_scheduler", "dataloader", "ema"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(pictures, tmp_path_factory):
    """straight(world_size, *overrides): the folder of a run that was not stopped; each runs once."""
    folders = {}

    def run(world_size: int, *overrides: str):
        if (world_size, overrides) not in folders:
            folder = folders[world_size, overrides] = tmp_path_factory.mktemp("straight")
            run_leg(folder, world_size, pictures, *overrides, f"--checkpoint.interval={STEPS}", steps=STEPS)
        return folders[world_size, overrides]

    return run


def shared_by(world_size: int, accumulation: int = 1) -> list[str]:
    """The update as so many processes share it."""
    return [
        f"--training.global_batch_size={UPDATE}",
        f"--training.local_batch_size={UPDATE // world_size // accumulation}",
    ]


def differences(run, other) -> list[str]:
    """What is not the same to the last bit in two finished runs."""
    found = [name for name in ("loss", "grad_norm", "lr") if read_metrics(run, name) != read_metrics(other, name)]
    mine, theirs = (read_tensors(folder / "checkpoint" / f"step-{STEPS}") for folder in (run, other))
    assert mine.keys() == theirs.keys()
    return found + [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize(("world_size", "dtype", "mode"), ROWS)
def test_three_legs_equal_a_straight_run(straight, pictures, tmp_path, world_size, dtype, mode):
    accumulation = 2 if world_size == 2 else 1
    options = [*shared_by(world_size, accumulation), *DTYPES[dtype]]
    stops = AT_SAVES if mode == "disabled" else BETWEEN_SAVES
    more = [pictures, *options, f"--checkpoint.async_mode={mode}", "--checkpoint.enable_first_step_checkpoint"]
    legs = [run_leg(tmp_path, world_size, *more, steps=STEPS, until=until) for until in (*stops, None)]
    assert legs[0].first_step == 0 and 0 < legs[1].first_step < legs[2].first_step, [leg.first_step for leg in legs]
    if mode == "disabled":
        assert tuple(leg.first_step for leg in legs[1:]) == stops
    assert differences(tmp_path, straight(world_size, *options)) == []


@pytest.mark.parametrize("part", PARTS)
def test_control_a_run_that_forgets_something_differs(straight, pictures, tmp_path, part):
    options = shared_by(1)
    run_leg(tmp_path, 1, pictures, *options, steps=STEPS, until=30)
    forgetful = f"--checkpoint.exclude_from_loading={part}"
    assert run_leg(tmp_path, 1, pictures, *options, forgetful, steps=STEPS).first_step == 30
    assert differences(tmp_path, straight(1, *options))


def take_over(rank: int, world_size: int, folder: str, arguments: list[str]) -> None:
    """One process loads the last checkpoint of a run and saves what it has then."""
    from build import build_run_layout
    from checkpoint.dcp import save_checkpoint
    from config.parse import load_config
    from run_state import checkpoint_tensors
    from train import FluxTrainer

    resize_tiny(**SIZES)
    config = load_config([*arguments, f"--training.steps={STEPS}"], 1, quiet=True)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, 1))
    assert trainer.step == STEPS
    tensors = checkpoint_tensors(trainer.model, trainer.optimizer, trainer.ema, to_save=True)
    save_checkpoint(Path(folder) / "taken", tensors, {}, None)


def test_number_formats_of_the_optimizer(straight, pictures, tmp_path):
    """Weights, remainders, 8-bit codes and scales come back to the bit, and go on on one process as they were."""
    pytest.importorskip("torchao")
    options = [*shared_by(2), *BF16, "--training.dtype=bfloat16", "--optimizer.state_dtype=8bit"]
    for until in (7, None):
        run_leg(tmp_path, 2, pictures, *options, steps=STEPS, until=until)
    assert differences(tmp_path, straight(2, *options)) == []
    tensors = read_tensors(tmp_path / "checkpoint" / f"step-{STEPS}")
    assert any(name.endswith("exp_avg_codes") and tensor.any() for name, tensor in tensors.items())
    weights = {name: tensor for name, tensor in tensors.items() if part_of(name) == "model"}
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    run_ranks(take_over, 1, str(tmp_path), [*OVERRIDES, pictures, *shared_by(1), *options[2:]])
    taken = read_tensors(tmp_path / "taken")
    assert taken.keys() == tensors.keys() and all(torch.equal(taken[name], tensors[name]) for name in tensors)


def test_stochastic_rounding(straight, pictures, tmp_path):
    options = [*shared_by(2), *BF16, "--training.dtype=bfloat16", "--optimizer.bf16_rounding=stochastic"]
    for until in (7, None):
        run_leg(tmp_path, 2, pictures, *options, steps=STEPS, until=until)
    assert differences(tmp_path, straight(2, *options)) == []
