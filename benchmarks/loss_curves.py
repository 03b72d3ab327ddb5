"""Whether options that make training faster or smaller change what it learns: the same run with and without them.

    python -m benchmarks.loss_curves --variant training.mixed_precision_param=bfloat16 \
        --variant "training.mixed_precision_param=bfloat16 model.converters=quantize.linear.float8" --training.steps 300

All runs see the same samples at the same times with the same noise, and begin with the same weights, so the curves lie
close together and small differences show. Each variant is told by its loss over the last tenth of the steps and by the
largest distance of the curve, averaged over windows of a tenth of the steps, in relation to the plain run. All other
options are those of train.py.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.arguments import new_file, split_variant, variant
from build import build_run_layout, check_machine
from config.job_config import JobConfig
from config.parse import load_config
from parallel.mesh import Layout, close_layout
from runtime.exit_record import recorded_exit
from train import EXIT_CODES, FluxTrainer

DEFAULTS = [
    "--job.config_file=train_configs/flux_tiny.toml",
    "--training.steps=300",
    "--validation.enable=false",
    "--checkpoint.enable=false",
    "--metrics.log_freq=1000000000",
    "--debug.seed=0",
]
WINDOWS = 10


def train_curve(config: JobConfig, layout: Layout, folder: Path) -> list[float]:
    """The loss of every step."""
    folder.mkdir()
    trainer = FluxTrainer(config, folder, layout)
    batches = iter(trainer.loader)
    # Read at the end: a device need not be waited for at every step.
    steps = tqdm(range(config.training.steps), unit="step", disable=None if layout.rank == 0 else True)
    losses = [trainer.train_step(batches)[0] for _ in steps]
    return [loss.item() for loss in losses]


def smooth(losses: Sequence[float]) -> list[float]:
    """Means over windows of a tenth of the steps, each half a window after the one before."""
    window = max(1, len(losses) // WINDOWS)
    starts = range(0, len(losses) - window + 1, max(1, window // 2))
    return [statistics.fmean(losses[start : start + window]) for start in starts]


def compare(losses: Sequence[float], plain: Sequence[float]) -> dict[str, float]:
    """How far a curve is from the plain one, in percent of that: at the end, and where it is farthest."""
    distances = [100 * (one / other - 1) for one, other in zip(smooth(losses), smooth(plain), strict=True)]
    return {"last_loss": smooth(losses)[-1], "last_percent": distances[-1], "largest_percent": max(map(abs, distances))}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the other options are the configuration's
    )
    add = parser.add_argument
    add(
        "--variant",
        type=variant,
        action="append",
        required=True,
        metavar="OPTIONS",
        help="options of a further run; may be repeated",
    )
    add("--json", type=new_file, metavar="FILE", help="write all curves to this file as well")
    args, options = parser.parse_known_args(argv)
    configs = {
        name: load_config([*DEFAULTS, *options, *split_variant(name)], 1, quiet=True) for name in ["", *args.variant]
    }
    if len({config.training.steps for config in configs.values()}) > 1:
        raise ValueError(
            "curves of different lengths cannot be compared: give training.steps to all, not to a --variant"
        )
    layouts = {name: build_run_layout(config, 1) for name, config in configs.items()}
    for name, config in configs.items():
        check_machine(config, layouts[name].device.type)
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, config) in enumerate(configs.items()):
            curves[name] = train_curve(config, layouts[name], Path(folder) / str(number))
            if name:
                one = compare(curves[name], curves[""])
                print(
                    f"{name}: last loss {one['last_loss']:.4f}, {one['last_percent']:+.2f} %; "
                    f"nowhere farther than {one['largest_percent']:.2f} %",
                    flush=True,
                )
            else:
                print(f"plain: last loss {smooth(curves[''])[-1]:.4f}", flush=True)
    for layout in layouts.values():
        close_layout(layout)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    with recorded_exit(int(os.environ.get("RANK", "0")), EXIT_CODES):
        main(sys.argv[1:])
