"""What is told when memory runs out: options that really help, and by how much."""

import re

import pytest
import torch

from config.job_config import JobConfig
from config.parse import load_config
from estimate import PEAK_ERROR, estimate_memory, needed_encoders, usable_bytes
from flux.encoder_costs import EncoderCost
from memory_advice import GIB, MIB, Remedy, check_memory, describe_out_of_memory, find_remedies, out_of_memory_told
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
    found = {one.options.partition("=")[0]: one for one in find_remedies(config, Degrees(), "cuda", {})}
    assert set(found) == {
        "activation_checkpoint.mode",
        "activation_checkpoint.cpu_offload",
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
    order = [one.saves for one in find_remedies(config, Degrees(), "cuda", {})]
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
    assert option in names(find_remedies(config_of("--model.flavor=flux-debug"), degrees, "cuda", {}))


def test_a_remedy_keeps_the_updates_and_the_rules() -> None:
    accumulated = config_of("--training.global_batch_size=16")
    assert f"{SHARD}=2 on twice as many GPUs" in names(find_remedies(accumulated, Degrees(), "cuda", {}))
    alone = config_of("--training.local_batch_size=1")
    assert SHARD not in names(find_remedies(alone, Degrees(), "cuda", {})), "one sample cannot be dealt to two ranks"
    halves = config_of("--parallelism.tensor_parallel_degree=2", world_size=2)
    for copies, is_named in ((3, False), (2, True)):  # with tensor parallel, 6 shards do not divide the width of 256
        told = names(find_remedies(halves, Degrees(dp_replicate=copies, dp_shard=2, tp=2), "cuda", {}))
        assert (SHARD in told) == is_named


def test_what_does_not_fit_before_the_first_step() -> None:
    told = names(find_remedies(config_of(), Degrees(), "cuda", {}, in_step=False))
    assert told.startswith("training.enable_cpu_offload") and "activation_checkpoint" not in told


def test_remedies_of_the_encoders() -> None:
    encoders = {"t5": EncoderCost(10**9, 10, 10**7, 10**6), "clip": EncoderCost(10**6, 1, 0, 10**6)}
    found = {one.options: one.saves for one in find_remedies(config_of(), Degrees(), "cuda", encoders)}
    assert found["encoder.cpu_offload=true"] == 2 * (10**9 - 2 * 10**7)
    assert found["encoder.encode_ahead=false"] == 2 * 4 * 10**6
    before = names(find_remedies(config_of(), Degrees(), "cuda", encoders, in_step=False))
    assert "encoder.cpu_offload" in before and "encode_ahead" not in before
    assert "encoder" not in names(find_remedies(config_of(), Degrees(), "cpu", encoders))


def test_what_would_not_help_is_not_named() -> None:
    on_cpu = names(find_remedies(config_of(), Degrees(), "cpu", {}))
    assert "enable_cpu_offload" not in on_cpu and SHARD not in on_cpu
    assert "enable_cpu_offload" not in names(
        find_remedies(config_of("--training.enable_cpu_offload"), Degrees(), "cuda", {})
    )
    assert "state_dtype" not in names(find_remedies(config_of("--optimizer.state_dtype=8bit"), Degrees(), "cuda", {}))
    half = config_of("--activation_checkpoint.mode=full", "--activation_checkpoint.ratio=0.5")
    assert "activation_checkpoint.ratio=1" in names(find_remedies(half, Degrees(), "cuda", {}))
    recomputed = config_of("--activation_checkpoint.mode=full")
    assert "activation_checkpoint" not in names(find_remedies(recomputed, Degrees(), "cuda", {}))
    assert "local_batch_size" not in names(
        find_remedies(config_of("--training.local_batch_size=1"), Degrees(), "cuda", {})
    )


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


BIG = ("--model.flavor=flux-dev", "--training.img_size=1024", "--training.local_batch_size=16", "--training.test_mode")
FSDP = Degrees(dp_shard=8)


def start(monkeypatch: pytest.MonkeyPatch, free_gib: float, *options: str, degrees: Degrees = FSDP) -> None:
    """A run on pretended GPUs of 80 GiB."""
    free = round(free_gib * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 80 * GIB))
    check_memory(config_of(*BIG, *options, world_size=degrees.world), Layout(degrees, torch.device("cuda")))


def read_options(told: str) -> list[list[str]]:
    """The command lines that a message names."""
    ways = told.partition(": use ")[2].split(", or ")
    return [
        [f"--{option}".replace('"', "") for option in re.split(" with | and ", way.partition(", which")[0])]
        for way in ways
    ]


def plan_peak(*options: str) -> int:
    config = config_of(*BIG, *options, world_size=8)
    return estimate_memory(config, FSDP, False, needed_encoders(config)).peak


def test_a_run_that_cannot_fit_ends_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"does not fit into memory with training\.local_batch_size=16") as caught:
        start(monkeypatch, 79)
    told = str(caught.value)
    needed = plan_peak() / GIB
    assert f"each rank needs {needed:.1f} GiB, and 79.0 GiB of this GPU's 80.0 GiB are free: use " in told
    assert "\n" not in told
    for options in read_options(told):
        config = config_of(*BIG, *options, world_size=8)
        assert config.training.update_size(8) == config_of(*BIG, world_size=8).training.update_size(8)
        peak = plan_peak(*options)
        assert peak <= usable_bytes(79 * GIB) and f"{peak / GIB:.1f} GiB" in told
        offload = any("offload" in option for option in options)
        assert (f"{peak / GIB:.1f} GiB and" in told) == offload, "what the host must hold is told"
        start(monkeypatch, 79, *options)  # is content


def test_the_largest_batch_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    full = "--activation_checkpoint.mode=full"
    with pytest.raises(ValueError, match="does not fit") as caught:
        start(monkeypatch, 40, full)
    (batch,) = [way for way in read_options(str(caught.value)) if len(way) == 2 and "local_batch_size" in way[0]]
    size = int(batch[0].partition("=")[2])
    assert batch == [f"--training.local_batch_size={size}", "--training.global_batch_size=128"]
    assert plan_peak(full, *batch) <= usable_bytes(40 * GIB)
    larger = [f"--training.local_batch_size={2 * size}", "--training.global_batch_size=128"]
    assert plan_peak(full, *larger) > usable_bytes(40 * GIB)


def test_within_the_plans_error_a_run_is_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peak = plan_peak() / GIB
    start(monkeypatch, peak * (1 - PEAK_ERROR) + 0.1)
    assert "memory may run out with training.local_batch_size=16" in caplog.text and ": use " in caplog.text
    with pytest.raises(ValueError, match="does not fit"):
        start(monkeypatch, peak * (1 - PEAK_ERROR) - 0.1)
    caplog.clear()
    start(monkeypatch, peak / 0.92 + 2.1)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "options", [("--data.buckets.enable",), ("--compile.enable", "--activation_checkpoint.mode=memory_budget")]
)
def test_what_the_plan_only_bounds_is_not_refused(options, monkeypatch, caplog) -> None:
    start(monkeypatch, 10, *options)
    assert "memory may run out" in caplog.text


def test_where_no_option_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"are free: no option of this layout fits, ask python -m scripts.plan"):
        start(monkeypatch, 3)


def test_several_options_where_one_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = "--parallelism.data_parallel_shard_degree=1"
    with pytest.raises(ValueError, match="does not fit") as caught:
        start(monkeypatch, 60, alone, degrees=Degrees())
    ways = read_options(str(caught.value))
    assert all(len(way) > 1 and "--training.enable_cpu_offload=true" in way for way in ways), (
        "the states alone are 178 GiB"
    )


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: pytest.fail("asked"))
    check_memory(config_of(*BIG), Layout(Degrees(), torch.device("cpu")))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), KeyError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    layout = Layout(Degrees(), torch.device("cuda"))
    with pytest.raises(type(error)) as caught, out_of_memory_told(config_of(), layout, in_step=True):
        raise error
    assert caught.value is error
