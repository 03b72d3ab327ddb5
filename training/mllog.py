"""MLPerf Training's log lines, as FLUX.1 submissions have them: https://github.com/mlcommons/logging.

    :::MLLOG {"namespace": "", "time_ms": 1759781986108, "event_type": "POINT_IN_TIME", "key": "seed", "value": 1, ...

What a log must have stands there in mlperf_logging/compliance_checker/training_6.1.0: common.yaml, closed_common.yaml,
closed_flux1.yaml. Earlier rounds ask for less.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from training.config import LRScheduler, Optimizer

MLLOG_NAME = "mllog.txt"  # in the run folder
ROOT = Path(__file__).resolve().parents[1]
# Our names of number formats -> theirs.
PRECISIONS = {"float32": "fp32", "bfloat16": "bfloat16", "float8": "fp8"}


class MLLogger:
    """Writes lines, each at once.

    Args:
        target: a file, which lines are added to, or an open stream.
    """

    def __init__(self, target: Path | TextIO):
        self._file = target.open("a", encoding="utf-8") if isinstance(target, Path) else target

    def start(self, key: str, value: Any = None, time_ms: int | None = None, **metadata: Any) -> None:
        """An interval begins. `time_ms`: when it did, in milliseconds since 1970; None: now."""
        self._write("INTERVAL_START", key, value, time_ms, metadata)

    def end(self, key: str, value: Any = None, time_ms: int | None = None, **metadata: Any) -> None:
        """An interval ends."""
        self._write("INTERVAL_END", key, value, time_ms, metadata)

    def event(self, key: str, value: Any = None, time_ms: int | None = None, **metadata: Any) -> None:
        """A fact, or something that happens."""
        self._write("POINT_IN_TIME", key, value, time_ms, metadata)

    def close(self) -> None:
        self._file.close()

    def _write(self, event_type: str, key: str, value: Any, time_ms: int | None, metadata: dict[str, Any]) -> None:
        caller = sys._getframe(2)  # of start, end or event
        path = Path(caller.f_code.co_filename)
        file = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
        line = {
            "namespace": "",
            "time_ms": now_ms() if time_ms is None else time_ms,
            "event_type": event_type,
            "key": key,
            "value": value,
            "metadata": {"file": file, "lineno": caller.f_lineno, **metadata},
        }
        self._file.write(f":::MLLOG {json.dumps(line)}\n")
        self._file.flush()


def now_ms() -> int:
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Submission:
    """Who ran this, and on what."""

    org: str
    platform: str
    division: str = "closed"  # or "open"
    status: str = "onprem"  # or "cloud", "research"


def read_submission(environ: Mapping[str, str], platform: str) -> Submission:
    """From the environment variables of MLPerf's launch scripts; a run that is no submission needs none.

    Args:
        platform: such as "8x NVIDIA H200", where the environment does not say.
    """
    return Submission(
        org=environ.get("MLPERF_SUBMISSION_ORG", "none"),
        platform=environ.get("MLPERF_SUBMISSION_PLATFORM", platform),
    )


@dataclass(frozen=True)
class MLPerfRun:
    """What the log tells of a run, beside [optimizer] and [lr_scheduler]."""

    submission: Submission
    config_file: str
    seed: int
    local_batch_size: int
    global_batch_size: int
    accumulation: int
    max_norm: float
    train_samples: int
    eval_samples: int
    eval_steps: int  # from one validation to the next
    target_loss: float | None
    linear_precision: str  # the lowest one that linear layers compute in: a key of PRECISIONS
    attention_precision: str
    communication_precision: str
    tensor_parallel: int = 1
    context_parallel: int = 1


class MLPerfLog:
    """The log of one run: made when the run is set up, told of its steps, validations and end. Rank 0 makes one.

    It is fed by step like every place for metrics: `log` takes the figures of training and of validation.

    Args:
        started_ms: when the program began.
    """

    def __init__(
        self,
        target: Path | TextIO,
        run: MLPerfRun,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        started_ms: int | None = None,
    ):
        self._run, self._log = run, MLLogger(target)
        self._stopped = False
        # Nothing here empties the page cache. Who does so before the run, as the rules ask, logs it in place of this.
        self._log.event("cache_clear", False, started_ms)
        self._log.start("init_start", None, started_ms)
        for key, value in describe_run(run, optimizer, lr_scheduler).items():
            self._log.event(key, value)

    def start_run(self, step: int = 0) -> None:
        """Everything is built; from here on, time counts.

        Args:
            step: finished steps.
        """
        self._log.end("init_stop")
        self._log.start("run_start")
        self._log.start("block_start", **self._at(step))

    def start_validation(self, step: int) -> None:
        self._log.end("block_stop", **self._at(step))
        self._log.start("eval_start", **self._at(step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The loss of training, or the one that ends a validation; MLPerf has no lines for other figures."""
        if "loss" in values:
            self._log.event("tracked_stats", {"train_loss": values["loss"]}, lr=values["lr"], **self._at(step))
        if "validation_loss" in values:
            loss, target = values["validation_loss"], self._run.target_loss
            self._log.event("eval_accuracy", loss, **self._at(step))
            self._log.end("eval_stop", **self._at(step))
            if target is not None and loss <= target:
                self._stop("success")
            else:
                self._log.start("block_start", **self._at(step))

    def close(self) -> None:
        """The run is over: without success, unless a validation loss has reached the target."""
        if not self._stopped:
            self._stop("aborted")
        self._log.close()

    def _stop(self, status: str) -> None:
        self._stopped = True
        self._log.end("run_stop", status=status)

    def _at(self, step: int) -> dict[str, int]:
        return {"samples_count": step * self._run.global_batch_size, "step": step}


def describe_run(run: MLPerfRun, optimizer: Optimizer, lr_scheduler: LRScheduler) -> dict[str, Any]:
    """Every fact that MLPerf wants to know of a FLUX.1 run, in the order of the log."""
    return {
        "submission_benchmark": "flux1",
        "submission_org": run.submission.org,
        "submission_division": run.submission.division,
        "submission_status": run.submission.status,
        "submission_platform": run.submission.platform,
        "target_accuracy": run.target_loss,
        "config_filename": run.config_file,
        "seed": run.seed,
        "global_batch_size": run.global_batch_size,
        "micro_batch_size": run.local_batch_size,
        "gradient_accumulation_steps": run.accumulation,
        "train_samples": run.train_samples,
        "eval_samples": run.eval_samples,
        "evaluation_frequency": run.eval_steps * run.global_batch_size,  # in samples
        "opt_name": optimizer.name.lower(),
        "opt_base_learning_rate": optimizer.lr,
        "opt_learning_rate_warmup_steps": lr_scheduler.warmup_steps,
        "opt_adamw_beta_1": optimizer.beta1,
        "opt_adamw_beta_2": optimizer.beta2,
        "opt_adamw_epsilon": optimizer.eps,
        "opt_adamw_weight_decay": optimizer.weight_decay,
        "opt_gradient_clip_norm": run.max_norm,
        "lowest_numerical_precision_in_linear": PRECISIONS[run.linear_precision],
        "lowest_numerical_precision_in_attn": PRECISIONS[run.attention_precision],
        "lowest_numerical_precision_in_comm": PRECISIONS[run.communication_precision],
        "tensor_parallelism": run.tensor_parallel,
        "pipeline_parallelism": 1,
        "context_parallelism": run.context_parallel,
        "expert_parallelism": 1,
    }
