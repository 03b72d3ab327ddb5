"""What a person sees of a run: the start-up lines, one line per logged step, and on a terminal a progress bar.

Every room logs through Python's `logging`; only what is set up here decides where it goes.
"""

import logging
import os
import sys
import warnings
from collections.abc import Mapping

from tqdm import tqdm

from redact import redact

# Whose lines are told; a library's are not.
LOGGERS = ("__main__", "train", "config", "flux", "parallel", "checkpoint", "training", "runtime")

log = logging.getLogger(__name__)


def write_stderr(text: str) -> None:
    """Prints to stderr, above a progress bar when there is one; secrets are blacked out."""
    tqdm.write(redact(text), file=sys.stderr)
    sys.stderr.flush()


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_stderr(self.format(record))
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    """Plain text; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def setup_logging(rank: int) -> None:
    """The ranks in $LOG_RANK (0) show what the rooms tell, INFO and above, and libraries' warnings; the others, errors.

    All ranks do the same, so one of them tells it all; what goes wrong on a single one is an error.
    """
    shown = str(rank) in os.environ.get("LOG_RANK", "0").split(",")
    handler = _StderrHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING if shown else logging.ERROR, handlers=[handler], force=True)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if shown else logging.ERROR)
    if not shown:
        warnings.simplefilter("ignore")


def log_stage(number: int, total: int, name: str, text: str) -> None:
    """A line of the start-up walk: `[1/6] mesh       1 process on cpu`."""
    log.info("[%d/%d] %-10s %s", number, total, name, text)


class StepLog:
    """Progress of training: a bar on a terminal, elsewhere one line per report.

    Args:
        steps: number of the last step.
        done: steps that an earlier part of the run has taken.
        shown: False on processes that only keep rank 0 company.
    """

    def __init__(self, steps: int, done: int = 0, shown: bool = True):
        self._steps = steps
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Shows of the figures of a logged step: loss, grad_norm, lr, samples_per_s, mfu_percent where it is known,
        data_wait_percent, encode_percent, memory_gib.
        """
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(values))
        else:
            width = max(5, len(str(self._steps)))
            log.info("step %*d/%d  %s", width, step, self._steps, _figures(values))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _figures(values: Mapping[str, float]) -> str:
    rate = values["samples_per_s"]
    mfu = f"mfu {values['mfu_percent']:4.1f} %  " if "mfu_percent" in values else ""
    return (
        f"loss {values['loss']:6.4f}  grad {values['grad_norm']:5.2f}  lr {values['lr']:.1e}  "
        f"{rate:6.{0 if rate >= 100 else 1}f} samples/s  {mfu}data {values['data_wait_percent']:4.1f} %  "
        f"encode {values['encode_percent']:4.1f} %  mem {values['memory_gib']:.1f} GiB"
    )
