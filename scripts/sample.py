"""Draws pictures with trained weights.

    python -m scripts.sample --checkpoint outputs/tiny --prompts "a red circle on a blue background" --seed 7
    python -m scripts.sample --checkpoint outputs/tiny/checkpoint/step-1000 --ema --prompts-file prompts.txt
    torchrun --nproc-per-node 8 -m scripts.sample --checkpoint FLUX.1-schnell --prompts-file prompts.txt

Weights are the folder of a run (the newest that it has left), a checkpoint, a safetensors file of this recipe or of
Black Forest Labs, or a diffusers folder. What the command line does not say, [inference], [validation] and [training]
of the run's configuration do; weights without one are drawn with the defaults, or as --config FILE says. Under
torchrun every process holds the whole model and draws its share of the prompts.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from build import DTYPES
from config.job_config import JobConfig
from flux.config import Inference
from flux.pictures import make_images
from flux.prompts import load_prompts
from flux.sampling import draw_pictures
from flux.spec import PIXELS_PER_TOKEN, ModelSpec
from parallel.degrees import read_ranks
from runtime.exit_record import recorded_exit
from runtime.log import setup_logging
from train import EXIT_CODES
from trained import TrainedRun, load_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="the weights: see above")
    add(
        "--ema",
        action="store_true",
        help="take the average of the weights that a run or a checkpoint holds beside them",
    )
    add("--config", type=Path, metavar="FILE", help="configuration with encoders and settings (that of the run)")
    add("--dtype", choices=tuple(DTYPES), help="number format of the transformer (as in the weights)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", nargs="+", metavar="TEXT", help="one picture is drawn per prompt")
    source.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="text file, one prompt per line (inference.prompts_path)"
    )
    add("--out", type=Path, metavar="FOLDER", help="where the PNG files go (inference.save_img_folder)")
    add("--seed", type=int, default=0, help="of the first picture; the others count up (%(default)s)")
    add("--steps", type=int, help="Euler steps, at least 1 (as in the run's own pictures)")
    add("--cfg-scale", type=float, help="classifier-free guidance, 1 is off (as in the run's own pictures)")
    add("--guidance", type=float, help="value for models that embed guidance (as in training)")
    add("--height", type=int, help="pixels, a multiple of 16 (inference.img_size, else as in training)")
    add("--width", type=int, help="pixels, a multiple of 16 (inference.img_size, else as in training)")
    add("--batch-size", type=int, help="pictures drawn at a time (inference.local_batch_size)")
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
    if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out={str(arguments.out)!r} is a file: name a folder")


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Those of the command line, if any. Raises ValueError for a file that cannot be used."""
    return arguments.prompts or (
        load_prompts(arguments.prompts_file, "--prompts-file") if arguments.prompts_file else []
    )


def configured_prompts(section: Inference) -> list[str]:
    """Raises ValueError if there are none, or the file of them cannot be used."""
    if section.prompts_path is None:
        raise ValueError("no prompts are given: use --prompts or --prompts-file, or set inference.prompts_path")
    return load_prompts(section.prompts_path, "inference.prompts_path")


class Settings(NamedTuple):
    """How pictures are drawn: as the command line says, else the configuration."""

    height: int
    width: int
    steps: int
    guidance: float
    cfg_scale: float
    batch_size: int

    def describe(self, spec: ModelSpec) -> str:
        guidance = f", guidance {self.guidance:g}" if spec.transformer.guidance_embed else ""
        return f"{self.width} x {self.height} px, {self.steps} steps, cfg {self.cfg_scale:g}{guidance}"


def choose_settings(arguments: argparse.Namespace, config: JobConfig) -> Settings:
    inference, validation, training = config.inference, config.validation, config.training
    side = training.img_size if inference.img_size == -1 else inference.img_size
    return Settings(
        height=arguments.height or side,
        width=arguments.width or side,
        steps=arguments.steps or validation.denoising_steps,
        guidance=training.guidance if arguments.guidance is None else arguments.guidance,
        cfg_scale=validation.cfg_scale if arguments.cfg_scale is None else arguments.cfg_scale,
        batch_size=arguments.batch_size or inference.local_batch_size,
    )


def choose_folder(arguments: argparse.Namespace, inference: Inference) -> Path:
    """Raises ValueError if somebody's checkpoint would choose a place that the user has not."""
    out = arguments.out or Path(inference.save_img_folder)
    if not (arguments.out or arguments.config) and (out.is_absolute() or ".." in out.parts):
        raise ValueError(f"inference.save_img_folder={str(out)!r} of {arguments.checkpoint} leads away: give --out")
    return out


def draw_share(
    run: TrainedRun, settings: Settings, prompts: list[str], seed: int, out: Path, rank: int, world_size: int
) -> None:
    """Draws every `world_size`-th prompt and saves it under its number among all of them."""
    mine = range(len(prompts))[rank::world_size]
    if not mine:
        return
    total = -(-len(mine) // settings.batch_size) * settings.steps
    with tqdm(total=total, desc="drawing", unit="step", disable=True if rank else None) as bar:
        pixels_BCHW = draw_pictures(
            run.model,
            run.spec,
            run.encoders,
            [prompts[number] for number in mine],
            seeds=[seed + number for number in mine],
            **settings._asdict(),
            dtype=next(run.model.parameters()).dtype,
            on_step=lambda done: bar.update(done - bar.n),
        )
    out.mkdir(parents=True, exist_ok=True)
    for number, image in zip(mine, make_images(pixels_BCHW), strict=True):
        path = out / f"{number:03d}-seed{seed + number}.png"
        image.save(path)
        print(f"{path}  {prompts[number]}", flush=True)


def main(argv: list[str], rank: int = 0, world_size: int = 1) -> None:
    arguments = build_parser().parse_args(argv)
    check_arguments(arguments)
    prompts = read_prompts(arguments)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    run = load_run(arguments.checkpoint, "ema" if arguments.ema else "model", arguments.config, dtype)
    if arguments.guidance is not None and not run.spec.transformer.guidance_embed:
        raise ValueError(
            f"--guidance={arguments.guidance:g} has no effect, {run.spec.name} embeds none: use --cfg-scale"
        )
    prompts = prompts or configured_prompts(run.config.inference)
    settings, out = choose_settings(arguments, run.config), choose_folder(arguments, run.config.inference)
    if rank == 0:
        after = f" after {run.step} steps" if run.step else ""
        print(f"{run.path}: {run.spec.name}{after}\n{settings.describe(run.spec)}", flush=True)
    draw_share(run, settings, prompts, arguments.seed, out, rank, world_size)


if __name__ == "__main__":
    with recorded_exit(0, EXIT_CODES) as end:
        end.rank, world_size = read_ranks(os.environ)
        setup_logging(end.rank)
        main(sys.argv[1:], end.rank, world_size)
