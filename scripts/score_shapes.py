"""Draws the held-out captions of the shapes data set with a trained run and measures the pictures from their pixels.

python -m scripts.score_shapes --checkpoint outputs/tiny
"""

import argparse
import sys
from pathlib import Path

from flux.data.shape_score import score_pictures
from flux.data.shapes import HELD_OUT_SCENES
from flux.pictures import make_images, save_grid
from runtime.exit_record import recorded_exit
from scripts.sample import load_sampler
from train import EXIT_CODES
from training.config import Metrics
from training.metrics import MetricsLogger


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a finished run")
    parser.add_argument(
        "--count", type=int, default=64, help=f"held-out captions, 1 to {len(HELD_OUT_SCENES)} (default 64)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first picture; the others count up (default 0)"
    )
    parser.add_argument("--out", type=Path, help="write the grid there as a PNG")
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if not 1 <= arguments.count <= len(HELD_OUT_SCENES):
        raise ValueError(f"--count={arguments.count} must be from 1 to {len(HELD_OUT_SCENES)}")
    captions = [scene.caption for scene in HELD_OUT_SCENES[: arguments.count]]
    sampler = load_sampler(arguments.checkpoint)
    images = make_images(sampler.draw(captions, [arguments.seed + number for number in range(len(captions))]))
    scores = score_pictures(images, captions)
    for name, score in scores.items():
        print(f"{name:27s} {score:6.1%}")
    metrics = MetricsLogger(arguments.checkpoint, Metrics(), {})
    metrics.log(sampler.step, scores)
    metrics.close()
    if arguments.out:
        save_grid(images, arguments.out)


if __name__ == "__main__":
    with recorded_exit(0, EXIT_CODES):
        main(sys.argv[1:])
