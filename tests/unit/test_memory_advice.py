"""What is told when memory runs out: options that really help, and by how much."""

import pytest
import torch

from config.job_config import JobConfig
from config.parse import load_config
from estimate import estimate_memory
from memory_advice import GIB, MIB, Remedy, describe_out_of_memory, find_remedies, out_of_memory_told
from parallel.degrees import Degrees
from parallel.mesh import Layout

SHARD, REPLICATE = "parallelism.data_parallel_shard_degree", "parallelism.data_parallel_replicate_degree"
OPTIONS = ["--training.local_batch_size=4", "--training.img_size=64", "--activation_checkpoint.mode=none"]
FULL = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is free."


def config_of(*options: str, world_size: int = 1) -> JobConfig:
    return load_config([*OPTIONS, *options], world_size, quiet=True)


def names(remedies: list[Remedy]) -> str:
    return ", ".join(one.options for one in remedies)


def test_a_remedy_saves_what_the_configuration_with_it_takes_less() -> None:
    config = config_of("--training.local_batch_size=64")
    found = {one.options.partition("=")[0]: one for one in find_remedies(config, Degrees(), "cuda")}
    assert set(found) == {
        "activation_checkpoint.mode",
        "training.local_batch_size",
        "training.enable_cpu_offload",
        "optimizer.state_dtype",
        SHARD,
    }
    before = estimate_memory(config, Degrees(), False, {}).peak
    for remedy, options in (
        (found["activation_checkpoint.mode"], ["--activation_checkpoint.mode=full"]),
        (found["training.local_batch_size"], ["--training.local_batch_size=32", "--training.global_batch_size=64"]),
        (found["training.enable_cpu_offload"], ["--training.enable_cpu_offload=true"]),
        (found["optimizer.state_dtype"], ["--optimizer.state_dtype=8bit"]),
    ):
        after = estimate_memory(config_of("--training.local_batch_size=64", *options), Degrees(), False, {}).peak
        assert remedy.saves == before - after > 0
    order = [one.saves for one in find_remedies(config, Degrees(), "cuda")]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(
    ("degrees", "option"),
    [
        (Degrees(), f"{SHARD}=2 with training.local_batch_size=2 on twice as many GPUs"),
        (Degrees(dp_replicate=4, dp_shard=8), f"{SHARD}=16 with {REPLICATE}=2"),
        (Degrees(dp_replicate=3, dp_shard=2), f"{SHARD}=6 with {REPLICATE}=1"),
    ],
)
def test_weights_split_further(degrees: Degrees, option: str) -> None:
    assert option in names(find_remedies(config_of("--model.flavor=flux-debug"), degrees, "cuda"))


def test_a_remedy_keeps_the_updates_and_the_rules() -> None:
    accumulated = config_of("--training.global_batch_size=16")
    assert f"{SHARD}=2 on twice as many GPUs" in names(find_remedies(accumulated, Degrees(), "cuda"))
    alone = config_of("--training.local_batch_size=1")
    assert SHARD not in names(find_remedies(alone, Degrees(), "cuda")), "one sample cannot be dealt to two ranks"
    halves = config_of("--parallelism.tensor_parallel_degree=2", world_size=2)
    for copies, is_named in ((3, False), (2, True)):  # with tensor parallel, 6 shards do not divide the width of 256
        told = names(find_remedies(halves, Degrees(dp_replicate=copies, dp_shard=2, tp=2), "cuda"))
        assert (SHARD in told) == is_named


def test_what_does_not_fit_before_the_first_step() -> None:
    told = names(find_remedies(config_of(), Degrees(), "cuda", in_step=False))
    assert told.startswith("training.enable_cpu_offload") and "activation_checkpoint" not in told


def test_what_would_not_help_is_not_named() -> None:
    on_cpu = names(find_remedies(config_of(), Degrees(), "cpu"))
    assert "enable_cpu_offload" not in on_cpu and SHARD not in on_cpu
    assert "enable_cpu_offload" not in names(
        find_remedies(config_of("--training.enable_cpu_offload"), Degrees(), "cuda")
    )
    assert "state_dtype" not in names(find_remedies(config_of("--optimizer.state_dtype=8bit"), Degrees(), "cuda"))
    half = config_of("--activation_checkpoint.mode=full", "--activation_checkpoint.ratio=0.5")
    assert "activation_checkpoint.ratio=1" in names(find_remedies(half, Degrees(), "cuda"))
    recomputed = config_of("--activation_checkpoint.mode=full")
    assert "activation_checkpoint" not in names(find_remedies(recomputed, Degrees(), "cuda"))
    assert "local_batch_size" not in names(find_remedies(config_of("--training.local_batch_size=1"), Degrees(), "cuda"))


def test_one_line() -> None:
    remedies = [Remedy("b=2", 41 * GIB), Remedy("c=3", GIB), Remedy("a=1", 300 * MIB)]
    assert describe_out_of_memory(config_of(), FULL, remedies) == (
        "out of memory (tried to allocate 1.50 GiB) with training.local_batch_size=4, training.img_size=64 and "
        'activation_checkpoint.mode="none": on each rank, b=2 saves 41.0 GiB, c=3 saves 1.0 GiB, a=1 saves 300.0 MiB'
    )
    text = describe_out_of_memory(config_of(), "CUDA error: out of memory", [])
    assert text.startswith("out of memory with training.local_batch_size=4, ") and "saves" not in text


@pytest.mark.parametrize(("device", "error"), [("cuda", torch.OutOfMemoryError(FULL)), ("cpu", MemoryError())])
def test_a_step_that_does_not_fit(device: str, error: Exception) -> None:
    layout = Layout(Degrees(), torch.device(device))
    told = pytest.raises(ValueError, match=r'activation_checkpoint.mode="full" saves [0-9.]+ MiB')
    with told as caught, out_of_memory_told(config_of(), layout, in_step=True):
        raise error
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), KeyError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    layout = Layout(Degrees(), torch.device("cuda"))
    with pytest.raises(type(error)) as caught, out_of_memory_told(config_of(), layout, in_step=True):
        raise error
    assert caught.value is error
