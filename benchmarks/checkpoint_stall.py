"""What saving a checkpoint costs training, on the device that is there, as shares of a training step.

    python -m benchmarks.checkpoint_stall
    python -m benchmarks.checkpoint_stall --job.config_file train_configs/flux_debug.toml --training.test_mode

Trains in short cycles of one save and some steps after it, with each mode in turn in one process, so that what disturbs
the machine disturbs all. The stall is how long training stands still in the call that saves; what the writing beside
training costs shows in the steps after it. Options are those of train.py.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from build import build_checkpointer, build_run_layout
from config.parse import load_config
from train import FluxTrainer

MODES: dict[str, Literal["disabled", "async", "async_with_pinned_mem"] | None] = {
    "no save": None,
    "disabled": "disabled",
    "async": "async",
    "async_with_pinned_mem": "async_with_pinned_mem",
}
DEFAULTS = ["--job.config_file=train_configs/flux_tiny.toml", "--validation.enable=false", "--checkpoint.enable"]
CYCLES, STEPS = 4, 5  # of each mode; steps after a save


@dataclass
class Times:
    """Seconds, over all cycles of a mode."""

    stalls: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def measure(trainer: FluxTrainer) -> dict[str, Times]:
    times, batches = {mode: Times() for mode in MODES}, iter(trainer.loader)
    checkpointers = {}
    for mode, async_mode in MODES.items():
        section = replace(trainer.config.checkpoint, async_mode=async_mode or "disabled", keep_latest_k=1)
        config = replace(trainer.config, checkpoint=section)
        checkpointers[mode] = build_checkpointer(config, trainer.folder / mode, trainer.layout)
    for _ in range(2):
        trainer.train_step(batches)
    for _ in range(CYCLES):
        for mode in MODES:
            trainer.checkpointer = checkpointers[mode]
            started = now(trainer)
            if MODES[mode]:
                trainer.save()
            times[mode].stalls.append(now(trainer) - started)
            for _ in range(STEPS):
                started = now(trainer)
                trainer.train_step(batches)
                times[mode].steps.append(now(trainer) - started)
            trainer.checkpointer.finish()
    return times


def now(trainer: FluxTrainer) -> float:
    """Seconds, once the device has done all that it was given."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(times: dict[str, Times]) -> str:
    plain = statistics.median(times["no save"].steps)
    lines = [
        f"median step without saving {plain * 1e3:.0f} ms",
        f"{'mode':<23}{'stall':>10}{'of a step':>12}{'steps after it':>17}",
    ]
    for mode, seconds in times.items():
        stall, after = statistics.median(seconds.stalls), statistics.fmean(seconds.steps)
        slower = after / statistics.fmean(times["no save"].steps)
        lines.append(f"{mode:<23}{stall * 1e3:>7.0f} ms{stall / plain:>10.0%}{slower:>15.2f} x")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_stall",
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
