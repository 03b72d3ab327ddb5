"""Traces of steps, and snapshots of a GPU's memory."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

from training.config import Profiling
from training.out_of_memory import is_out_of_memory

# Allocations and releases that a snapshot goes back, some steps' worth; each is kept with its stack, kilobytes of it.
HISTORY_ENTRIES = 100_000

log = logging.getLogger(__name__)


class Profiler:
    """Writes the traces and snapshots that [profiling] asks for. Every rank makes one, and files of its own:

        with Profiler(section, folder, rank, "cuda", done=0) as profiler:
            for ...:
                train_step()
                profiler.step()

    `<save_traces_folder>/step-000010/rank0.json.gz` shows the steps up to the tenth of the run, and
    `<save_memory_snapshot_folder>/step-000010/rank0.pickle` the memory after it. When memory runs out,
    `step-000012-out-of-memory/rank0.pickle` shows how, after the last step that did fit.

    Args:
        section: [profiling].
        folder: the run folder.
        device_type: where the model is trained; only "cuda" can tell of its memory.
        done: steps that an earlier part of the run has taken.
    """

    def __init__(self, section: Profiling, folder: Path, rank: int, device_type: str, done: int):
        self._section, self._folder, self._rank, self._device_type = section, folder, rank, device_type
        self._done = done
        self._trace: profile | None = None
        if section.enable_profiling:
            on_gpu = [ProfilerActivity.CUDA] if device_type == "cuda" else []
            self._trace = profile(
                activities=[ProfilerActivity.CPU, *on_gpu],
                schedule=make_schedule(section, done),
                on_trace_ready=self._save_trace,
                record_shapes=True,
            )
            self._trace.step_num = done
            # Each trace is written before the next begins; torch warns, once, that it does not keep them all.
            warnings.filterwarnings("ignore", ".*Profiler clears events", UserWarning)
        self._records_memory = section.enable_memory_snapshot and device_type == "cuda"
        if section.enable_memory_snapshot and not self._records_memory:
            log.warning("profiling.enable_memory_snapshot=true needs a GPU: this run writes no snapshots")

    def __enter__(self) -> "Profiler":
        if self._records_memory:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES, stacks="python")
        if self._trace:
            self._trace.__enter__()
        return self

    def step(self) -> None:
        """One more step is done."""
        self._done += 1
        if self._trace:
            self._trace.step()
        if self._records_memory and self._done % self._section.profile_freq == 0:
            self._save_snapshot()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._records_memory:
            if is_out_of_memory(error, self._device_type):
                self._save_snapshot("-out-of-memory")
            torch.cuda.memory._record_memory_history(None)
        if self._trace:
            self._trace.on_trace_ready = None  # what has begun shows no whole step, or the end of the run
            self._trace.__exit__(kind, error, trace)

    def _save_trace(self, trace: profile) -> None:
        self._save(self._section.save_traces_folder, "", "json.gz", trace.export_chrome_trace)

    def _save_snapshot(self, why: str = "") -> None:
        self._save(self._section.save_memory_snapshot_folder, why, "pickle", torch.cuda.memory._dump_snapshot)

    def _save(self, folder: str, why: str, ending: str, write: Callable[[str], object]) -> None:
        """A file that cannot be written is told, and training goes on."""
        path = self._folder / folder / f"step-{self._done:06d}{why}" / f"rank{self._rank}.{ending}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(str(path))
        except OSError as error:
            log.warning("%s could not be written: %s", path, error)
        else:
            log.info("step %d: %s", self._done, path)


def make_schedule(section: Profiling, done: int) -> Callable[[int], ProfilerAction]:
    """What the profiler does in the step after so many: traces end at the multiples of profile_freq, whenever the run
    began. One whose warm-up would have begun before `done` is left out.
    """
    freq, active, warmup = section.profile_freq, section.profiler_active, section.profiler_warmup
    wait = freq - (active + warmup)
    cycle = schedule(wait=wait, warmup=warmup, active=active)
    first = done if done % freq <= wait else done + -done % freq

    def choose(step: int) -> ProfilerAction:
        step = max(step, done)  # torch asks about the first step as step 0
        return cycle(step) if step >= first else ProfilerAction.NONE

    return choose
