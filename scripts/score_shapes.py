"""Draws held-out captions of the shapes data set with a trained run and measures the pictures from their pixels.

    python -m scripts.score_shapes --checkpoint outputs/tiny

The shares are printed and added to the run's metrics.jsonl.
"""

import argparse
import sys
from pathlib import Path

from flux.data.shape_score import score_pictures
from flux.data.shapes import HELD_OUT_SCENES
from flux.pictures import make_images, save_grid
from flux.sampling import draw_pictures
from runtime.exit_record import recorded_exit
from train import EXIT_CODES
from trained import load_run
from training.config import Metrics
from training.metrics import MetricsLogger


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.score_shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER", help="folder of a run; its newest weights count")
    add("--count", type=int, default=64, help=f"held-out captions, 1 to {len(HELD_OUT_SCENES)} (%(default)s)")
    add("--seed", type=int, default=0, help="of the first picture; the others count up (%(default)s)")
    add("--steps", type=int, help="Euler steps, at least 1 (as in the run's own pictures)")
    add("--cfg-scale", type=float, help="classifier-free guidance, 1 is off (as in the run's own pictures)")
    add("--out", type=Path, metavar="FILE", help="also write the pictures there as one PNG")
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if not 1 <= arguments.count <= len(HELD_OUT_SCENES):
        raise ValueError(f"--count={arguments.count} must be from 1 to {len(HELD_OUT_SCENES)}")
    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"--steps={arguments.steps} must be at least 1")
    captions = [scene.caption for scene in HELD_OUT_SCENES[: arguments.count]]
    run = load_run(arguments.checkpoint)
    validation, side = run.config.validation, run.config.training.img_size
    pixels_BCHW = draw_pictures(
        run.model,
        run.spec,
        run.encoders,
        captions,
        seeds=[arguments.seed + number for number in range(len(captions))],
        height=side,
        width=side,
        steps=arguments.steps or validation.denoising_steps,
        guidance=run.config.training.guidance,
        cfg_scale=validation.cfg_scale if arguments.cfg_scale is None else arguments.cfg_scale,
        batch_size=32,
        dtype=next(run.model.parameters()).dtype,
    )
    images = make_images(pixels_BCHW)
    scores = score_pictures(images, captions)
    for name, score in scores.items():
        print(f"{name:25s} {score:6.1%}")
    metrics = MetricsLogger(arguments.checkpoint, Metrics(), {})
    metrics.log(run.step, scores)
    metrics.close()
    if arguments.out:
        save_grid(images, arguments.out)


if __name__ == "__main__":
    with recorded_exit(0, EXIT_CODES):
        main(sys.argv[1:])
