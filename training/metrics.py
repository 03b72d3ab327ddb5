"""Where a run's figures go: always `metrics.jsonl`, on wish TensorBoard and Weights & Biases."""

import json
import logging
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from training.config import Metrics
from training.mllog import MLPerfLog

METRICS_NAME, WANDB_ID_NAME = "metrics.jsonl", "wandb_id.txt"  # in the run folder
GIB = 2**30

log = logging.getLogger(__name__)


class _Sink(Protocol):
    """A place for figures beside the JSON lines."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class MetricsLogger:
    """Writes logged steps to every enabled place. One process of a run makes one.

    The JSON lines are the truth, with floats at full precision and non-finite ones as the strings "nan", "inf" and
    "-inf". TensorBoard and wandb are a convenience: one that fails is reported once and dropped, training goes on.

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
        self._sinks: dict[str, _Sink] = {}
        if mllog is not None:
            self._sinks["mllog"] = mllog
        if section.enable_tensorboard:
            self._start("TensorBoard", lambda: _TensorBoard(folder / section.save_tb_folder, done))
        if section.enable_wandb:
            self._start("wandb", lambda: _Wandb(folder, run_config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of `step` and the values."""
        line = {"step": step} | {name: _plain(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            # What could not be flushed stays in the buffer, so a disk that gets room again gets the line too.
            log.warning("step %d is not in metrics.jsonl yet: %s", step, error)
        self._to_sinks(lambda sink: sink.log(step, values))

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Shows a picture file in TensorBoard and wandb."""
        self._to_sinks(lambda sink: sink.log_image(step, name, path))

    def start_run(self, step: int) -> None:
        """Everything is built, after `step` finished steps."""
        self._to_mllog(lambda mllog: mllog.start_run(step))

    def start_validation(self, step: int) -> None:
        self._to_mllog(lambda mllog: mllog.start_validation(step))

    def close(self) -> None:
        self._to_sinks(lambda sink: sink.close())
        self._file.close()

    def _start(self, name: str, build: "Callable[[], _Sink]") -> None:
        try:
            self._sinks[name] = build()
        except Exception as error:
            log.warning("%s is off: %s", name, _one_line(error))

    def _to_mllog(self, action: Callable[[MLPerfLog], None]) -> None:
        self._to_sinks(lambda sink: action(sink) if isinstance(sink, MLPerfLog) else None)

    def _to_sinks(self, action: "Callable[[_Sink], None]") -> None:
        for name, sink in list(self._sinks.items()):
            try:
                action(sink)
            except Exception as error:
                log.warning("%s is off from here on: %s", name, _one_line(error))
                del self._sinks[name]


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


class _TensorBoard:
    def __init__(self, folder: Path, done: int | None):
        from torch.utils.tensorboard import SummaryWriter  # only runs that use it pay for the import

        self._writer = SummaryWriter(log_dir=str(folder), purge_step=None if done is None else done + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        import numpy
        from PIL import Image

        with Image.open(path, formats=("PNG",)) as picture:
            self._writer.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Project and mode come from wandb's own environment variables: WANDB_PROJECT (default "flux"), WANDB_MODE."""

    def __init__(self, folder: Path, run_config: Mapping[str, Any]):
        import wandb

        self._picture = wandb.Image
        identity = folder / WANDB_ID_NAME
        known = identity.read_text().strip() if identity.exists() else None
        self._run = wandb.init(
            # A run that goes on stays one run. Steps that it has already sent are not taken twice; they are the same.
            id=known,
            resume="allow" if known else None,
            project=os.environ.get("WANDB_PROJECT", "flux"),
            name=folder.name,
            dir=str(folder),
            config=dict(run_config),
            # The figures and the configuration are sent; code, patches and the command line stay here.
            settings=wandb.Settings(save_code=False, disable_git=True, x_disable_meta=True, console="off", silent=True),
        )
        identity.write_text(f"{self._run.id}\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._picture(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


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


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
