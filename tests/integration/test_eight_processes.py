"""Whole runs on eight processes: training, validation, pictures, export.

Four rows go through run_train.sh and torchrun, the others on forked ranks, which start ten times faster.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks
from tests.integration.short_runs import TINY, Run

ROOT = Path(__file__).parents[2]
LOSS_TOLERANCE = 1e-5  # relative; rounding, carried on by four updates of Adam
# Of a weight after four updates of at most 1e-3, on average: where a gradient is all rounding, Adam, which divides by
# its size, makes a whole update of it.
WEIGHT_TOLERANCE = 1e-6
SHORT = [*TINY, "--training.img_size=64", "--training.global_batch_size=8", "--validation.save_img_count=9"]

REPLICATE = "--parallelism.data_parallel_replicate_degree={}".format
SHARD = "--parallelism.data_parallel_shard_degree={}".format
CP = "--parallelism.context_parallel_degree={}".format
TP = "--parallelism.tensor_parallel_degree={}".format
BATCH = "--training.local_batch_size={}".format
BF16 = "--training.mixed_precision_param=bfloat16"
FLOAT8 = ("--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate")

# name: (options, relative tolerance of the losses)
THROUGH_RUN_TRAIN: dict[str, tuple[tuple[str, ...], float]] = {
    "hsdp 2x2 x cp 2": ((BATCH(2), REPLICATE(2), SHARD(2), CP(2)), LOSS_TOLERANCE),
    "fsdp 4 x tp 2": ((BATCH(2), TP(2)), LOSS_TOLERANCE),
    "fsdp 8, bf16, recompute by operator": (
        (BATCH(1), BF16, "--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
        0.02,
    ),
    "cp 8, deterministic": ((BATCH(8), CP(8), "--debug.deterministic"), LOSS_TOLERANCE),
}
ON_FORKED_RANKS: dict[str, tuple[tuple[str, ...], float]] = {
    "ddp 8": ((BATCH(1), REPLICATE(8)), LOSS_TOLERANCE),
    "fsdp 8": ((BATCH(1),), LOSS_TOLERANCE),
    "fsdp 8, cpu offload": ((BATCH(1), "--training.enable_cpu_offload"), LOSS_TOLERANCE),
    "fsdp 4 x cp 2, ring": ((BATCH(2), CP(2), "--parallelism.context_parallel_method=ring"), LOSS_TOLERANCE),
    "fsdp 2 x cp 2 x tp 2": ((BATCH(4), CP(2), TP(2)), LOSS_TOLERANCE),
    "hsdp 2x2 x tp 2, accumulation 2": ((BATCH(1), REPLICATE(2), TP(2)), LOSS_TOLERANCE),
    "tp 8": ((BATCH(8), TP(8)), LOSS_TOLERANCE),
    "fsdp 8, bf16 sums": ((BATCH(1), BF16, "--training.mixed_precision_reduce=bfloat16"), 0.02),
    "fsdp 8, float8": ((BATCH(1), BF16, *FLOAT8), 0.02),
}

pytestmark = pytest.mark.slow


def run_main(rank: int, world_size: int, argv: list[str]) -> None:
    from train import main

    main(argv)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("one")
    run_ranks(run_main, 1, [*SHORT, BATCH(8), f"--job.dump_folder={folder}"])
    return Run(folder)


def check(run: Run, one_process: Run, tolerance: float) -> None:
    assert run.exit["code"] == 0
    for name in ("loss", "validation_loss"):
        assert run.series(name) == pytest.approx(one_process.series(name), rel=tolerance), name
    assert (run.folder / "img/step-000004.png").exists()
    ours, theirs = (load_file(each.folder / "export/transformer.safetensors") for each in (run, one_process))
    assert {name: whole.shape for name, whole in ours.items()} == {name: whole.shape for name, whole in theirs.items()}
    if tolerance == LOSS_TOLERANCE:
        for name, whole in theirs.items():
            assert (ours[name] - whole).abs().mean() < WEIGHT_TOLERANCE, name
            assert not torch.equal(whole, torch.zeros_like(whole)), name


@pytest.mark.parametrize("name", THROUGH_RUN_TRAIN)
def test_through_run_train(one_process, tmp_path, name):
    options, tolerance = THROUGH_RUN_TRAIN[name]
    done = subprocess.run(
        ["./run_train.sh", *SHORT[1:], *options, f"--job.dump_folder={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"NGPU": "8", "CONFIG_FILE": "train_configs/flux_tiny.toml"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[1/6]") == 1 and "8 ranks" in done.stderr
    check(Run(tmp_path / "run"), one_process, tolerance)


@pytest.mark.parametrize("name", ON_FORKED_RANKS)
def test_on_forked_ranks(one_process, tmp_path, name):
    options, tolerance = ON_FORKED_RANKS[name]
    run_ranks(run_main, 8, [*SHORT, *options, f"--job.dump_folder={tmp_path}"], timeout=240)
    check(Run(tmp_path), one_process, tolerance)
