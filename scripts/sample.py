"""Draws pictures with a trained run.

python -m scripts.sample --checkpoint outputs/tiny --prompts "a red circle on a blue background" --seed 7
"""

import argparse
import math
import sys
from pathlib import Path

from tqdm import tqdm

from flux.pictures import make_images
from flux.prompts import load_prompts
from flux.sampling import draw_pictures
from flux.spec import PIXELS_PER_TOKEN
from runtime.exit_record import recorded_exit
from train import EXIT_CODES, load_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER", help="folder of a finished run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", metavar="TEXT", help="one picture is drawn per prompt")
    source.add_argument("--prompts-file", type=Path, metavar="FILE", help="UTF-8 text file with one prompt per line")
    add("--out", type=Path, default=Path("pictures"), metavar="FOLDER", help="where the PNG files go (%(default)s)")
    add("--seed", type=int, default=0, help="of the first picture; the others count up (%(default)s)")
    add("--steps", type=int, help="Euler steps, at least 1 (as in the run's own pictures)")
    add("--cfg-scale", type=float, help="classifier-free guidance, 1 is off (as in the run's own pictures)")
    add("--guidance", type=float, help="value for models that embed guidance (as in training)")
    add("--height", type=int, help="pixels, a multiple of 16 (as in training)")
    add("--width", type=int, help="pixels, a multiple of 16 (as in training)")
    add("--batch-size", type=int, default=8, help="pictures drawn at a time (%(default)s)")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a size or count that cannot be drawn."""
    for name in ("height", "width"):
        value = getattr(arguments, name)
        if value is not None and (value <= 0 or value % PIXELS_PER_TOKEN):
            nearest = max(1, round(value / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN
            raise ValueError(f"--{name}={value} must be a positive multiple of {PIXELS_PER_TOKEN}: use {nearest}")
    for name in ("steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
    for name in ("cfg_scale", "guidance"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be a number of at least 0")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed={arguments.seed} must be from 0 to 2^63 - 1")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out={str(arguments.out)!r} is a file: name a folder")


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    check_arguments(arguments)
    prompts = arguments.prompts or load_prompts(arguments.prompts_file, "--prompts-file")
    run = load_run(arguments.checkpoint)
    if arguments.guidance is not None and not run.spec.transformer.guidance_embed:
        raise ValueError(
            f"--guidance={arguments.guidance:g} has no effect, {run.spec.name} embeds none: use --cfg-scale"
        )
    validation, side = run.config.validation, run.config.training.img_size
    steps = arguments.steps or validation.denoising_steps
    batches = -(-len(prompts) // arguments.batch_size)
    with tqdm(total=batches * steps, desc="drawing", unit="step", disable=None) as bar:
        pixels_BCHW = draw_pictures(
            run.model,
            run.spec,
            run.encoders,
            prompts,
            seeds=[arguments.seed + number for number in range(len(prompts))],
            height=arguments.height or side,
            width=arguments.width or side,
            steps=steps,
            guidance=run.config.training.guidance if arguments.guidance is None else arguments.guidance,
            cfg_scale=validation.cfg_scale if arguments.cfg_scale is None else arguments.cfg_scale,
            batch_size=arguments.batch_size,
            dtype=next(run.model.parameters()).dtype,
            on_step=lambda done: bar.update(done - bar.n),
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, image) in enumerate(zip(prompts, make_images(pixels_BCHW), strict=True)):
        path = arguments.out / f"{number:03d}-seed{arguments.seed + number}.png"
        image.save(path)
        print(f"{path}  {prompt}")


if __name__ == "__main__":
    with recorded_exit(0, EXIT_CODES):
        main(sys.argv[1:])
