"""A step of a run that is computed once more: the same bits, or the reason why not."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.distributed.jobs import SIZES, Fault, run_job
from tests.distributed.ranks import run_ranks
from tests.integration.short_runs import resize_tiny

OTHER_ORDER = 1e-6  # relative, of a loss in fp32: sums are made in another order
EQUAL = "equal to the last bit"

pytestmark = pytest.mark.slow


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file and folder, with its bytes and the time of its last change."""
    return {
        str(path): (hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def _replay(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    from scripts.replay_step import main

    resize_tiny(**SIZES)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(argv, rank, world_size)
    return code, said.getvalue()


def replay(run: Path, world_size: int, step: int, *options: str) -> tuple[int, str]:
    """Exit code, and what was printed; the run's folder is not touched."""
    before = fingerprint(run)
    ends = run_ranks(_replay, world_size, [str(run), "--step", str(step), *options])
    assert fingerprint(run) == before
    assert {code for code, _ in ends} == {ends[0][0]} and not any(said for _, said in ends[1:])
    return ends[0]


def sample_losses(said: str) -> dict[int, float]:
    """Position -> loss, as the table shows them."""
    return {int(position): float(loss) for position, loss in re.findall(r"^ +(\d+) +(\S+) .* shapes/\d+$", said, re.M)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of two ranks, with checkpoints of steps 3 and 6; in step 5 rank 1 computes what is not in its data."""
    folder = tmp_path_factory.mktemp("job")
    options = ["--training.steps=7", "--checkpoint.enable", "--checkpoint.interval=3"]
    # What is held out of the training data stays so, though a replay does not validate.
    validates = ["--validation.enable=true", "--validation.freq=100"]
    assert run_job(folder, 2, *options, *validates, faults=[Fault("nan", 5)]).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """Of one process, whose first update ruins the weights, so that it gives up after step 4."""
    folder = tmp_path_factory.mktemp("job")
    options = ["--optimizer.lr=1e30", "--lr_scheduler.warmup_steps=0", "--training.steps=9"]
    assert run_job(folder, 1, *options, "--checkpoint.enable", "--checkpoint.enable_first_step_checkpoint").code == 4
    return folder / "run"


@pytest.fixture(scope="module")
def third(run):
    return replay(run, 2, 3, "--start=0")


def test_the_same_bits_from_the_beginning(third):
    code, said = third
    assert code == 0 and f"metrics.jsonl: {EQUAL}" in said
    assert "replayed from step 0 on 2 ranks = dp_shard 2, gloo on cpu" in said
    assert sample_losses(said).keys() == {8, 9, 10, 11}


def test_the_same_bits_and_the_batch(run, tmp_path):
    """From a checkpoint of the run, and with what the step was computed on in a file."""
    code, said = replay(run, 2, 4, f"--save={tmp_path / 'batch.safetensors'}")
    assert code == 0 and f"metrics.jsonl: {EQUAL}" in said and "replayed from step 3" in said
    losses, seen = sample_losses(said), []
    for rank in range(2):
        with safe_open(tmp_path / f"batch-rank-{rank}.safetensors", "pt") as file:
            names, about = set(file.keys()), file.metadata()
            positions = file.get_tensor("0.raw.position_B").tolist()
            assert [f"{loss:.5g}" for loss in file.get_tensor("0.losses_B").tolist()] == [
                f"{losses[position]:.5g}" for position in positions
            ]
        assert {"0.raw.pixels_BCHW", "0.raw.draws.noise_BTC", "0.raw.tokens.t5", "0.inputs.img_BTC"} <= names
        assert (about["step"], about["rank"]) == ("4", str(rank))
        assert [position for position, _ in json.loads(about["samples"])] == positions
        assert all(name in said for _, name in json.loads(about["samples"]))
        seen += positions
    assert sorted(seen) == [12, 13, 14, 15]


def test_a_fault_that_is_gone(run):
    """Nothing in data and weights makes what rank 1 has seen in step 5; what rank 0 has seen is the same."""
    code, said = replay(run, 2, 5)
    assert code == 1
    assert "loss of rank 1 is" in said and "and was nan" in said and "loss of rank 0" not in said
    assert "the sample at" not in said and f"suspect the hardware of rank 1 on {os.uname().nodename}" in said


def test_a_step_after_a_fault_that_is_gone(run):
    """The run has left an update out that the replay makes."""
    code, said = replay(run, 2, 6)
    assert code == 1 and "step 5 differs already, as the first one" in said


def test_control_another_seed(run):
    code, said = replay(run, 2, 1, "--start=0", "--debug.seed=2")
    assert code == 1 and EQUAL not in said


def test_control_another_last_digit(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 4:
            line["grad_norm"] *= 1 + 1e-7
    (copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, said = replay(copy, 2, 4)
    assert code == 1 and "metrics.jsonl: grad_norm is" in said and "(relative difference 1.0e-07)" in said


def test_other_processes(run):
    with pytest.raises(RuntimeError, match=r"step 4 was made by 2 ranks = dp_shard 2, .*--nproc_per_node=2.*--other-l"):
        replay(run, 1, 4)
    code, said = replay(run, 1, 4, "--other-layout")
    assert f"metrics.jsonl: {EQUAL}" in said or "and replayed by 1 process on cpu: sums in another order" in said
    assert code == (EQUAL not in said)
    differences = [float(number) for number in re.findall(r"relative difference (\S+)\)", said)]
    assert max(differences, default=0.0) < OTHER_ORDER


@pytest.mark.parametrize("degree", ["context_parallel_degree", "tensor_parallel_degree"])
def test_the_losses_of_samples_whose_tokens_are_shared(run, third, degree):
    shared = [f"--parallelism.{degree}=2", "--parallelism.data_parallel_shard_degree=1"]
    _, said = replay(run, 2, 3, "--start=0", *shared, "--training.global_batch_size=4")
    assert sample_losses(said) == pytest.approx(sample_losses(third[1]), rel=1e-4)  # of the digits that are shown


def test_numbers_that_the_settings_have_ruined(diverged):
    """On the way are as many updates without numbers as end a run."""
    code, said = replay(diverged, 1, 4)
    assert code == 0 and f"incidents/step-000004.json: {EQUAL}" in said and "no machine has failed" in said
    assert "2 samples, 2 not finite" in said
    code, said = replay(diverged, 1, 1, "--start=0")
    assert code == 0 and f"metrics.jsonl: {EQUAL}" in said
