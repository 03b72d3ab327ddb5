"""Whole runs on eight processes: training, validation, pictures, export.

One row goes through run_train.sh and torchrun, the others on forked ranks, which start ten times faster.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks
from tests.integration.short_runs import TINY, Run, resize_tiny

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

THROUGH_RUN_TRAIN = (BATCH(2), REPLICATE(2), SHARD(2), CP(2))
# Of the transformer on forked ranks: it keeps its eight heads, and blocks of both kinds.
SIZES = {"depth": 1, "depth_single": 2}
# name: (options, relative tolerance of the losses)
ON_FORKED_RANKS: dict[str, tuple[tuple[str, ...], float]] = {
    "fsdp 4 x tp 2": ((BATCH(2), TP(2)), LOSS_TOLERANCE),
    "fsdp 8, bf16, recompute by operator": (
        (BATCH(1), BF16, "--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
        0.02,
    ),
    "cp 8, deterministic": ((BATCH(8), CP(8), "--debug.deterministic"), LOSS_TOLERANCE),
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


def run_main(rank: int, world_size: int, argv: list[str], sizes: dict[str, int], told: str) -> None:
    """On every rank; what they say on stderr goes to the file `told`."""
    from train import main

    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    resize_tiny(**sizes)
    main(argv)


def run_forked(folder: Path, world_size: int, sizes: dict[str, int], *options: str) -> tuple[Run, str]:
    """The finished run, and what all ranks told."""
    argv = [*SHORT, *options, f"--job.dump_folder={folder / 'run'}"]
    run_ranks(run_main, world_size, argv, sizes, str(folder / "told"), timeout=240)
    return Run(folder / "run"), (folder / "told").read_text()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Run:
    return run_forked(tmp_path_factory.mktemp("one"), 1, SIZES, BATCH(8))[0]


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


def test_through_run_train(tmp_path):
    """As it is given, with the transformer in its full size."""
    done = subprocess.run(
        ["./run_train.sh", *SHORT[1:], *THROUGH_RUN_TRAIN, f"--job.dump_folder={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"NGPU": "8", "CONFIG_FILE": "train_configs/flux_tiny.toml"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[1/6]") == 1 and "8 ranks" in done.stderr
    (tmp_path / "one").mkdir()
    check(Run(tmp_path / "run"), run_forked(tmp_path / "one", 1, {}, BATCH(8))[0], LOSS_TOLERANCE)


@pytest.mark.parametrize("name", ON_FORKED_RANKS)
def test_on_forked_ranks(one_process, tmp_path, name):
    options, tolerance = ON_FORKED_RANKS[name]
    run, told = run_forked(tmp_path, 8, SIZES, *options)
    assert told.count("[1/6]") == 1 and "8 ranks" in told
    check(run, one_process, tolerance)
