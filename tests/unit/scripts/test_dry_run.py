"""What a rank would hold and send: sizes by arithmetic, collectives by counting blocks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from config.parse import ConfigError, load_config
from flux.spec import SPECS
from scripts.dry_run import DryRun, describe, main, take_dry_step

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "train_configs"
DEV_PARAMETERS = 11_901_408_320
DEV_MODULATION = (19 * 12 + 38 * 3) * 3072 * (3072 + 1)
BLOCKS = 19 + 38  # of flux-dev; the rest is one more group
BYTES = 16  # per parameter: float32 weight, gradient and AdamW's two states
# Each parameter is split on its own and rounded up to whole rows, so that a rank holds a little more than its share.
UNEVEN = 0.02
REPLICATE, CP, TP = (
    f"--parallelism.{name}_degree" for name in ("data_parallel_replicate", "context_parallel", "tensor_parallel")
)


def dry_run(name: str, world_size: int, *options: str) -> DryRun:
    return take_dry_step(
        load_config([f"--job.config_file={CONFIGS / name}.toml", *options], world_size, quiet=True), world_size
    )


def held(run: DryRun) -> int:
    return run.weights + run.gradients + run.optimizer_states


def is_the_share_of(run: DryRun, ranks: int, parameters: int) -> bool:
    return abs(held(run) / (BYTES * parameters / ranks) - 1) <= UNEVEN


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    yield
    assert not dist.is_initialized()
    assert torch.__future__.get_overwrite_module_params_on_conversion() == before


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [8, 64, 1024])
def test_fully_sharded_ranks_hold_their_share_of_flux_dev(world_size):
    run = dry_run("flux_dev", world_size)
    assert run.parameters == DEV_PARAMETERS
    assert is_the_share_of(run, world_size, DEV_PARAMETERS)
    # AdamW keeps two numbers for each weight.
    assert run.weights == run.gradients and run.optimizer_states == 2 * run.weights


@pytest.mark.slow
def test_flux_dev_on_1024_ranks_in_128_copies():
    run = dry_run("flux_dev", 1024, f"{REPLICATE}=128")
    assert is_the_share_of(run, 8, DEV_PARAMETERS)
    assert not is_the_share_of(run, 1024, DEV_PARAMETERS)
    assert run.calls == {
        # Each block once forward and once backward; the rest stays gathered in between. Conditions once.
        "all-gather": 2 * BLOCKS + 1 + 1,
        "reduce-scatter": BLOCKS + 1 + 1,
        # Modulation there, and its gradient back.
        "all-to-all": 2,
        # Copies add up each group of gradients, and the modulation's weights and biases; the norm takes one more.
        "all-reduce": BLOCKS + 1 + 2 + 1,
    }
    # Weights travel in bfloat16, twice but for the rest; gradients in float32 once; those of modulation stay.
    gathered = DEV_PARAMETERS - DEV_MODULATION
    blocks = run.bytes["all-gather"] / 2 - gathered
    assert 0.98 * gathered < blocks < gathered
    assert abs(run.bytes["reduce-scatter"] / (4 * gathered) - 1) <= UNEVEN


@pytest.fixture(scope="module")
def tiny_alone() -> DryRun:
    return dry_run("flux_tiny", 1)


def test_one_process_holds_everything_and_sends_nothing(tiny_alone):
    parameters = tiny_alone.parameters
    assert (tiny_alone.weights, tiny_alone.optimizer_states) == (4 * parameters, 8 * parameters)
    assert sum(tiny_alone.bytes.values()) <= 4 * parameters + 8, "FSDP reduces gradients even with itself"


def test_two_copies_hold_twice_the_share(tiny_alone):
    """The comparison that shows full sharding sees copies."""
    parameters = tiny_alone.parameters
    assert is_the_share_of(dry_run("flux_tiny", 8), 8, parameters)
    copies = dry_run("flux_tiny", 8, f"{REPLICATE}=2")
    assert not is_the_share_of(copies, 8, parameters) and is_the_share_of(copies, 4, parameters)


def test_context_parallel_exchanges_tokens_for_heads_in_every_block(tiny_alone):
    transformer = SPECS["flux-tiny"].transformer
    run = dry_run("flux_tiny", 4, f"{CP}=2")
    blocks = transformer.depth + transformer.depth_single
    # In and out of each attention, forward and backward, and so the modulation of all blocks.
    assert run.calls["all-to-all"] == 4 * blocks + 2
    assert is_the_share_of(run, 4, tiny_alone.parameters), "context parallel ranks hold different parts too"


def test_tensor_parallel_adds_up_partial_products(tiny_alone):
    run = dry_run("flux_tiny", 4, f"{TP}=2")
    transformer = SPECS["flux-tiny"].transformer
    # At least one sum forward and one backward: a double block has four row-split layers, a single block one.
    assert run.calls["all-reduce"] >= 2 * (4 * transformer.depth + transformer.depth_single)
    assert BYTES * tiny_alone.parameters / 4 < held(run) < BYTES * tiny_alone.parameters / 2, "some stay whole over tp"


def test_a_failed_run_leaves_no_processes_behind(monkeypatch):
    monkeypatch.setattr("scripts.dry_run.make_empty_inputs", lambda config, layout: {}["nothing"])
    with pytest.raises(KeyError):
        dry_run("flux_tiny", 2)


def test_what_is_told_is_aligned(tiny_alone):
    config = load_config([f"--job.config_file={CONFIGS / 'flux_tiny.toml'}"], quiet=True)
    lines = list(describe(dry_run("flux_tiny", 2), config))
    assert lines[0] == "mesh        2 ranks = dp_shard 2"
    assert lines[1] == f"model       flux-tiny, {tiny_alone.parameters:,} parameters, computing in float32"
    sizes = [line.index(" MiB") for line in lines if " MiB" in line]
    assert len(sizes) >= 7 and len(set(sizes)) == 1
    weights = next(line for line in lines if line.endswith(" weights"))
    assert abs(float(weights.split()[0]) * 2**20 - 2 * tiny_alone.parameters) <= UNEVEN * 2 * tiny_alone.parameters


def test_the_command_takes_ranks_from_option_or_environment(monkeypatch, capsys):
    options = [f"--job.config_file={CONFIGS / 'flux_tiny.toml'}", "--comm.mode=fake_backend"]
    monkeypatch.setenv("NGPU", "2")
    main(options)
    assert capsys.readouterr().out.startswith("mesh        2 ranks = dp_shard 2\n")
    main([*options, "--ranks=3"])
    assert capsys.readouterr().out.startswith("mesh        3 ranks = dp_shard 3\n")
    with pytest.raises(ValueError, match="--ranks=0 must be at least 1"):
        main([*options, "--ranks=0"])
    with pytest.raises(ConfigError, match="must divide the 3 processes"):
        main([*options, "--ranks=3", f"{CP}=2"])


@pytest.mark.slow
def test_run_train_dry_runs_on_pretended_processes():
    done = subprocess.run(
        [ROOT / "run_train.sh", "--comm.mode", "fake_backend", "--debug.seed=1"],
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "NGPU": "16", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mesh        16 ranks = dp_shard 16\n")
