"""Whole runs that look at themselves, and runs that do not fit."""

import gzip
import json

import pytest
import torch

import train as train_module
from tests.integration.short_runs import TINY, Run
from train import FluxTrainer, main
from training.profiling import Profiler

TRACED = ["--profiling.enable_profiling", "--profiling.profile_freq=2", "--profiling.profiler_warmup=1"]
WALK = {"data", "encode", "inputs", "forward", "loss", "backward", "clip", "optimizer", "ema"}


def read_regions(path) -> list[str]:
    """Names of the regions in a trace, in the order of time."""
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(events, key=lambda event: event["ts"])]


def test_a_trace_shows_the_walk_and_changes_no_bit(train, plain_run):
    run = train(*TRACED, "--ema.enable")
    traces = sorted(run.folder.glob("profile_traces/**/*.*"))
    assert [trace.relative_to(run.folder / "profile_traces").as_posix() for trace in traces] == [
        "step-000002/rank0.json.gz",
        "step-000004/rank0.json.gz",
    ]
    for trace in traces:
        regions = [name for name in read_regions(trace) if name in WALK]
        assert regions == ["data", "encode", "inputs", "forward", "loss", "backward", "clip", "optimizer", "ema"]
    for name in ("loss", "grad_norm", "validation_loss"):
        assert run.series(name) == plain_run.series(name)


def test_micro_batches_and_no_average_show_too(train):
    run = train(*TRACED, "--training.local_batch_size=4", "--training.global_batch_size=8", "--training.steps=2")
    regions = [name for name in read_regions(run.folder / "profile_traces/step-000002/rank0.json.gz") if name in WALK]
    assert regions == [*["data", "encode", "inputs", "forward", "loss", "backward"] * 2, "clip", "optimizer"]


def test_without_the_option_nothing_is_traced(plain_run):
    assert not (plain_run.folder / "profile_traces").exists() and not (plain_run.folder / "memory_snapshot").exists()


def fail_in_step(monkeypatch, tmp_path, capfd, error: Exception, number: int, *options: str) -> tuple[Run, str]:
    """A run whose step of that number raises; what it left, and what it said on stderr."""
    train_step = FluxTrainer.train_step

    def failing_step(trainer, batches):
        if trainer.step == number - 1:
            raise error
        return train_step(trainer, batches)

    monkeypatch.setattr(FluxTrainer, "train_step", failing_step)
    with pytest.raises(SystemExit) as caught:
        main([*TINY, f"--job.dump_folder={tmp_path / 'run'}", "--validation.enable=false", *options])
    run = Run(tmp_path / "run")
    assert run.exit["code"] == caught.value.code
    return run, capfd.readouterr().err


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79 GiB.")


def test_a_step_that_does_not_fit_is_the_configurations_fault(monkeypatch, tmp_path, capfd):
    run, said = fail_in_step(monkeypatch, tmp_path, capfd, FULL, 3)
    assert (run.exit["code"], run.exit["step"]) == (2, 2)
    assert run.exit["reason"].startswith(
        "out of memory (tried to allocate 1.50 GiB) with training.local_batch_size=8, "
    )
    assert run.exit["reason"] in said.splitlines() and "Traceback" not in said


def test_another_error_of_a_step_keeps_its_traceback(monkeypatch, tmp_path, capfd):
    run, said = fail_in_step(monkeypatch, tmp_path, capfd, RuntimeError("device-side assert triggered"), 3)
    assert run.exit["code"] == 1 and "Traceback" in said and "out of memory" not in said


def test_memory_is_written_down_before_the_run_ends(monkeypatch, tmp_path, capfd):
    """With a stand-in for a GPU's memory."""

    def build_for_gpu(section, folder, rank, device_type, done):
        return Profiler(section, folder, rank, "cuda", done)

    monkeypatch.setattr(train_module, "Profiler", build_for_gpu)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *args, **options: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: open(path, "w").close())
    run, _ = fail_in_step(monkeypatch, tmp_path, capfd, FULL, 3, "--profiling.enable_memory_snapshot")
    assert run.exit["code"] == 2
    assert [path.name for path in (run.folder / "memory_snapshot").iterdir()] == ["step-000002-out-of-memory"]


def test_a_model_that_does_not_fit_is_told_too(monkeypatch, tmp_path, capfd):
    def fill(*_):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(train_module, "start_weights", fill)
    with pytest.raises(SystemExit) as caught:
        main([*TINY, f"--job.dump_folder={tmp_path / 'run'}"])
    said = capfd.readouterr().err
    assert caught.value.code == 2 and "out of memory (tried to allocate 1073741824.0 GiB)" in said
    assert "Traceback" not in said


def test_memory_snapshots_on_a_cpu_are_a_warning(train, capfd):
    run = train("--profiling.enable_memory_snapshot", "--training.steps=1", "--validation.enable=false")
    warned = [line for line in capfd.readouterr().err.splitlines() if "enable_memory_snapshot" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: ") and run.exit["code"] == 0
