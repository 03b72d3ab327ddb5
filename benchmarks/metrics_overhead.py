"""What the figures of logged steps cost training, on the device that is there.

    python -m benchmarks.metrics_overhead
    python -m benchmarks.metrics_overhead --job.config_file train_configs/flux_debug.toml --training.test_mode

Three kinds of steps take turns in one process, so that what disturbs the machine disturbs all: without any figures, a
step between two lines (which only adds losses up), and a logged one. Of each turn the cost of a line after every step
and after every tenth follows; what is told is the median over the turns and the range of their middle half. Options are
those of train.py.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from build import build_run_layout
from config.parse import load_config
from flux.batch import RawBatch
from train import FluxTrainer
from training.loss_parts import LossParts

DEFAULTS = ["--job.config_file=train_configs/flux_tiny.toml", "--validation.enable=false"]
TURNS = 100
FREQUENCIES = (1, 10)


class Turn(NamedTuple):
    """Seconds of one step of each kind."""

    plain: float
    between: float
    logged: float

    def overhead(self, frequency: int) -> float:
        """Of a line after every `frequency` steps, as a share of a step without figures."""
        return ((frequency - 1) * self.between + self.logged) / (frequency * self.plain) - 1


class NoParts(LossParts):
    """Adds nothing up."""

    def add(self, *_: Tensor | None) -> None:
        pass

    def end_update(self, skip: Tensor) -> None:
        pass


def measure(trainer: FluxTrainer) -> list[Turn]:
    batches, kinds, turns = iter(trainer.loader), Turn._fields, []
    for turn in range(TURNS + 1):
        order = kinds[turn % 3 :] + kinds[: turn % 3]  # so that each is first in some turns
        turns.append(Turn(**{kind: time_step(trainer, batches, kind) for kind in order}))
    return turns[1:]


def time_step(trainer: FluxTrainer, batches: Iterator[RawBatch], kind: str) -> float:
    frequency = 1 if kind == "logged" else sys.maxsize
    trainer.config = replace(trainer.config, metrics=replace(trainer.config.metrics, log_freq=frequency))
    trainer.loss_parts = (NoParts if kind == "plain" else LossParts)(trainer.device, by_caption=True)
    waited_for = iter([next(batches) for _ in range(trainer.accumulation)])
    started = now(trainer)
    loss, grad_norm = trainer.train_step(waited_for)
    if kind == "logged":
        trainer._log_step(loss, grad_norm, lr=0.0)
    return now(trainer) - started


def now(trainer: FluxTrainer) -> float:
    """Seconds: on a GPU when it has done all that it was given, else of work, to which other programs do not add."""
    if trainer.device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def report(turns: list[Turn]) -> str:
    lines = [f"median step without figures {statistics.median(turn.plain for turn in turns) * 1e3:.0f} ms"]
    for frequency in FREQUENCIES:
        low, middle, high = statistics.quantiles([turn.overhead(frequency) for turn in turns], n=4)
        lines.append(f"a line every {frequency:>2} steps: {middle:+.2%} ({low:+.2%} .. {high:+.2%})")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metrics_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the options are the configuration's
    )
    _, argv = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([*DEFAULTS, *argv, f"--job.dump_folder={folder}"], 1)
        trainer = FluxTrainer(config, Path(folder), build_run_layout(config, 1))
        print(report(measure(trainer)))


if __name__ == "__main__":
    main(sys.argv[1:])
