"""Where a run's figures go: always `metrics.jsonl`, on wish TensorBoard and Weights & Biases."""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.config import Metrics
from training.mllog import MLPerfLog
from training.sinks import SinkThread, start_tensorboard, start_wandb

METRICS_NAME = "metrics.jsonl"  # in the run folder
GIB = 2**30
CLOSE_SECONDS = 20.0
HASTY_CLOSE_SECONDS = 5.0  # torchrun kills 30 s after SIGTERM, and the last checkpoint may take 20 of them

log = logging.getLogger(__name__)


class MetricsLogger:
    """Writes logged steps to every enabled place. One process of a run makes one.

    The JSON lines are the truth, with floats at full precision and non-finite ones as the strings "nan", "inf" and
    "-inf". They and MLPerf's, whose times count, are written when a method returns. TensorBoard and wandb are a
    convenience: they get the figures in threads, and one that fails or hangs is reported and dropped.

    Args:
        folder: the run folder.
        section: [metrics].
        run_config: the resolved configuration, for wandb's table of runs.
        done: the step that a run goes on from, 0 for a new one; what it logged after that step before it was stopped
            will be logged again, and is forgotten here. None: nothing is, lines are added to those of a finished run.
        mllog: MLPerf's log, which gets the same figures.
    """

    def __init__(
        self,
        folder: Path,
        section: Metrics,
        run_config: Mapping[str, Any],
        done: int | None = None,
        mllog: MLPerfLog | None = None,
    ):
        if done is not None:
            drop_lines_after(folder / METRICS_NAME, done)
        self._file = (folder / METRICS_NAME).open("a")
        self._mllog = mllog
        self._sinks: list[SinkThread] = []
        if section.enable_tensorboard:
            self._sinks.append(start_tensorboard(folder / section.save_tb_folder, done))
        if section.enable_wandb:
            self._sinks.append(start_wandb(folder, run_config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of `step` and the values."""
        line = {"step": step} | {name: _plain(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            # What could not be flushed stays in the buffer, so a disk that gets room again gets the line too.
            log.warning("step %d is not in metrics.jsonl yet: %s", step, error)
        self._to_mllog(lambda mllog: mllog.log(step, values))
        kept = dict(values)  # the caller may go on with its own
        for sink in self._sinks:
            sink.put(lambda place: place.log(step, kept))

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Shows a picture file in TensorBoard and wandb."""
        for sink in self._sinks:
            sink.put(lambda place: place.log_image(step, name, path))

    def start_run(self, step: int) -> None:
        """Everything is built, after `step` finished steps; from here on, data workers are forked."""
        for sink in self._sinks:
            sink.wait_until_built()
        self._to_mllog(lambda mllog: mllog.start_run(step))

    def start_validation(self, step: int) -> None:
        self._to_mllog(lambda mllog: mllog.start_validation(step))

    def close(self, in_haste: bool = False) -> None:
        """The run is over; a second call does nothing.

        Args:
            in_haste: whether TensorBoard and wandb get less time to finish, since somebody may have ended the run.
        """
        self._to_mllog(lambda mllog: mllog.close())
        self._mllog = None
        deadline = time.monotonic() + (HASTY_CLOSE_SECONDS if in_haste else CLOSE_SECONDS)
        for sink in self._sinks:
            sink.end()
        while self._sinks:
            self._sinks.pop().wait(deadline - time.monotonic())
        try:
            self._file.close()
        except OSError as error:
            log.warning("the last lines are not in metrics.jsonl: %s", error)

    def _to_mllog(self, action: Callable[[MLPerfLog], None]) -> None:
        if self._mllog is None:
            return
        try:
            action(self._mllog)
        except Exception as error:
            log.warning("mllog is off from here on: %s: %s", type(error).__name__, " ".join(str(error).split()))
            self._mllog = None


def drop_lines_after(metrics_jsonl: Path, last: int, field: str = "step") -> None:
    """Drops the lines of later steps and a torn last line, at once or not at all; the others keep every byte.

    Args:
        metrics_jsonl: one JSON object per line; it need not exist.
        last: largest value that is kept.
        field: the one that counts, a whole number.
    """
    if not metrics_jsonl.exists():
        return
    lines = metrics_jsonl.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _number_of(line, field, last) <= last]
    if len(kept) == len(lines):
        return
    shortened = metrics_jsonl.with_suffix(".tmp")
    with shortened.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    shortened.replace(metrics_jsonl)


def _number_of(line: bytes, field: str, other: int) -> int:
    """The number in a field of a line; `other` for what no run has written, which is not ours to drop."""
    try:
        number = json.loads(line)[field]
    except (ValueError, TypeError, KeyError):
        return other
    return number if isinstance(number, int) else other


def peak_memory_gib(device_type: str) -> float:
    """Largest memory use of this process so far: of the GPU's allocator on "cuda", otherwise resident memory."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # macOS counts bytes, Linux KiB


def _plain(value: float) -> float | int | str:
    """A JSON value: JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(float(value))
