"""The validation loss of weights that are there: of a run, a checkpoint, a safetensors file or a diffusers folder.

    python -m scripts.validate --checkpoint outputs/tiny                                 # as the run validates
    python -m scripts.validate --checkpoint outputs/tiny --ema --validation.all_timesteps
    torchrun --nproc_per_node=8 -m scripts.validate --checkpoint flux.safetensors --job.config_file FILE

The samples, their noise and times are those of [validation] in the run's own configuration, or in the one that is
named; `--section.key value` changes it. The number does not depend on how many processes compute it, nor on the batch
size.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from build import build_run_layout
from checkpoint.config import Checkpoint
from config.job_config import JobConfig
from config.parse import load_config
from config.write import CONFIG_FILE
from flux.identify import check_fits
from flux.spec import SPECS
from parallel.degrees import read_ranks
from parallel.mesh import close_layout
from parallel.shards import copy_full_
from runtime.exit_record import recorded_exit
from runtime.log import setup_logging
from train import EXIT_CODES, FluxTrainer
from trained import Opened, open_trained
from training.validation import describe_loss


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.validate",
        usage="%(prog)s --checkpoint PATH [options] [--job.config_file FILE] [--section.key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="a run's folder, step-N, a file, a pipeline folder",
    )
    add("--ema", action="store_true", help="the average of the weights, which runs and checkpoints may have")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


def check_output(path: Path | None) -> None:
    """Raises ValueError for a file that could not be written in the end."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(
            f"--json={str(path)!r} must be a file in a folder that is there: name another, or make the folder"
        )


def find_config(path: Path, opened: Opened, options: list[str], world_size: int, quiet: bool) -> JobConfig:
    """What the validation of a run is computed with: nothing is saved, averaged or drawn.

    Raises:
        ValueError: nothing says how the weights are validated.
    """
    names_file = any(option.partition("=")[0] == "--job.config_file" for option in options)
    if not names_file and not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path} does not say how it is validated: name a configuration, --job.config_file FILE")
    own = [] if names_file else ["--job.config_file", str(path / CONFIG_FILE)]
    config = load_config([*own, *options], world_size, quiet=quiet)
    validation = config.validation
    if validation.dataset or validation.dataset_path:  # a data set of its own: the training data need not be here
        training = replace(
            config.training,
            dataset=validation.dataset or config.training.dataset,
            dataset_path=validation.dataset_path,
            local_batch_size=1,
            global_batch_size=-1,
        )
        config = replace(config, training=training, data=replace(config.data, sources=[]))
    return replace(
        config,
        debug=config.debug if config.debug.seed is not None else replace(config.debug, seed=0),  # of noise: never drawn
        checkpoint=Checkpoint(),
        ema=replace(config.ema, enable=False),
        metrics=replace(config.metrics, enable_tensorboard=False, enable_wandb=False, enable_mllog=False),
        validation=replace(validation, enable=True, eval_freq=0, target_loss=None),
    )


def validate(trainer: FluxTrainer, opened: Opened) -> dict[str, float]:
    """Puts the weights into the trainer's model, and measures them."""
    assert trainer.evaluator is not None
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            copy_full_(parameter, opened.weights.tensors[name].read())
    trainer.evaluator.weights_changed()
    return trainer.evaluator.validate(opened.step)


def show(opened: Opened, figures: dict[str, float]) -> None:
    print(f"{opened.path}, step {opened.step or 'unknown'}")
    print(f"validation loss  {describe_loss(figures)}")
    for name, value in figures.items():
        if "/t=" in name:
            print(f"  at t = {name.partition('=')[2]:<7} {value:.4f}")


def main(argv: list[str], rank: int = 0, world_size: int = 1) -> None:
    arguments, options = build_parser().parse_known_args(argv)
    check_output(arguments.json)
    opened = open_trained(arguments.checkpoint, "ema" if arguments.ema else "model")
    config = find_config(arguments.checkpoint, opened, options, world_size, quiet=rank > 0)
    check_fits(opened.weights.tensors, SPECS[config.model.flavor], str(opened.path))
    layout = build_run_layout(config, world_size)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = FluxTrainer(config, Path(scratch), layout)
        figures = validate(trainer, opened)
        trainer.checkpointer.close()
        if trainer.metrics:
            trainer.metrics.close()
    if rank == 0:
        show(opened, figures)
        if arguments.json:
            record = {"checkpoint": str(opened.path), "step": opened.step, **figures}
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    close_layout(layout)


if __name__ == "__main__":
    with recorded_exit(0, EXIT_CODES) as end:
        end.rank, ranks = read_ranks(os.environ)
        setup_logging(end.rank)
        main(sys.argv[1:], end.rank, ranks)
