"""Which steps are traced, what a trace shows, and when a GPU's memory is written down."""

import gzip
import json

import pytest
import torch
from torch.profiler import record_function

from training.config import Profiling
from training.profiling import HISTORY_ENTRIES, Profiler


def traced_steps(folder) -> dict[int, list[str]]:
    """Of each trace, the last step of the run in it, and the names of all regions."""
    traces = {}
    for path in sorted(folder.glob("profile_traces/step-*/rank3.json.gz")):
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        regions = sorted(event["name"] for event in events if event.get("cat") == "user_annotation")
        traces[int(path.parent.name.removeprefix("step-"))] = regions
    return traces


def run(folder, section: Profiling, done: int, last: int, device_type="cpu", failing=None) -> None:
    """Steps done + 1 to last, each of which has a region of its number."""
    with Profiler(section, folder, 3, device_type, done) as profiler:
        for step in range(done + 1, last + 1):
            with record_function(f"step {step}"):
                torch.ones(2).sum()
            if step == failing:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            profiler.step()


@pytest.mark.parametrize(
    ("freq", "active", "warmup", "done", "last", "traces"),
    [
        (4, 1, 3, 0, 9, {4: [4], 8: [8]}),
        (5, 2, 1, 0, 10, {5: [4, 5], 10: [9, 10]}),
        (1, 1, 0, 0, 2, {1: [1], 2: [2]}),
        (4, 1, 3, 0, 3, {}),  # ends within the warm-up,
        (4, 2, 1, 0, 3, {}),  # or within a trace
        (10, 1, 2, 7, 10, {10: [10]}),  # gone on with after step 7, when the warm-up is about to begin,
        (10, 1, 3, 7, 20, {20: [20]}),  # or has begun: the next one,
        (10, 1, 3, 6, 10, {10: [10]}),
        (10, 2, 0, 9, 20, {20: [19, 20]}),  # or half of the trace is missing
        (4, 1, 3, 8, 12, {12: [12]}),
    ],
)
def test_traces_end_at_the_multiples_of_profile_freq(tmp_path, freq, active, warmup, done, last, traces):
    section = Profiling(enable_profiling=True, profile_freq=freq, profiler_active=active, profiler_warmup=warmup)
    run(tmp_path, section, done, last)
    numbered = {
        end: [f"ProfilerStep#{step - 1}" for step in steps] + [f"step {step}" for step in steps]  # torch counts from 0
        for end, steps in traces.items()
    }
    assert traced_steps(tmp_path) == {end: sorted(regions) for end, regions in numbered.items()}


def test_nothing_is_written_unasked(tmp_path):
    run(tmp_path, Profiling(profile_freq=1, profiler_warmup=0), 0, 3, "cuda")
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_is_told(tmp_path, caplog):
    (tmp_path / "profile_traces").touch()
    run(tmp_path, Profiling(enable_profiling=True, profile_freq=4), 0, 4)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "profile_traces/step-000004/rank3.json.gz could not be written: " in told


@pytest.fixture
def gpu(monkeypatch) -> list:
    """What is asked of a GPU's memory: calls of recording."""
    calls = []

    def record(enabled="all", **options):
        calls.append((enabled, options))

    def dump(path):
        assert calls[-1][0] == "all", "nothing is recorded"
        with open(path, "w") as file:
            file.write("a snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


def snapshots(folder) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("memory_snapshot/*/rank3.pickle"))


MEMORY = Profiling(enable_memory_snapshot=True, profile_freq=3)


def test_memory_is_written_down_every_profile_freq_steps(tmp_path, gpu):
    run(tmp_path, MEMORY, 0, 7, "cuda")
    assert snapshots(tmp_path) == ["step-000003", "step-000006"]
    assert gpu == [("all", {"max_entries": HISTORY_ENTRIES, "stacks": "python"}), (None, {})]


def test_and_by_the_true_step_of_a_run_that_went_on(tmp_path, gpu):
    run(tmp_path, MEMORY, 7, 10, "cuda")
    assert snapshots(tmp_path) == ["step-000009"]


def test_and_when_it_runs_out(tmp_path, gpu):
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, MEMORY, 0, 7, "cuda", failing=5)
    assert snapshots(tmp_path) == ["step-000003", "step-000004-out-of-memory"]
    assert gpu[-1] == (None, {})


def test_another_failure_is_no_matter_of_memory(tmp_path, gpu):
    with pytest.raises(ZeroDivisionError), Profiler(MEMORY, tmp_path, 3, "cuda", 0):
        raise ZeroDivisionError
    assert snapshots(tmp_path) == [] and gpu[-1] == (None, {})


def test_without_a_gpu_there_are_no_snapshots_and_that_is_said(tmp_path, gpu, caplog):
    run(tmp_path, MEMORY, 0, 7)
    assert (snapshots(tmp_path), gpu) == ([], [])
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "profiling.enable_memory_snapshot=true needs a GPU: this run writes no snapshots"


def test_with_a_gpu_nothing_is_said(tmp_path, gpu, caplog):
    Profiler(MEMORY, tmp_path, 3, "cuda", 0)
    assert caplog.records == []
