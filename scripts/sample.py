"""Draws pictures with a trained run.

python -m scripts.sample --checkpoint outputs/tiny --prompts "a red circle on a blue background" --seed 7
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from checkpoint.export import EXPORT_FILE, load_export
from config.job_config import JobConfig
from config.parse import load_config
from flux.data.tokenizers import build_tokenizer
from flux.encoders import Encoders
from flux.model import FluxTransformer
from flux.pictures import make_images
from flux.prompts import load_prompts
from flux.sampling import draw_pictures
from flux.spec import PIXELS_PER_TOKEN, SPECS, ModelSpec
from runtime.exit_record import recorded_exit
from train import CONFIG_FILE, EXIT_CODES, EXPORT_FOLDER, build_device, build_encoders, build_model


@dataclass(frozen=True)
class Sampler:
    """A trained model with its encoders, loaded once."""

    config: JobConfig
    spec: ModelSpec
    model: FluxTransformer
    encoders: Encoders
    step: int

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        cfg_scale: float | None = None,
        guidance: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """pixels_BCHW; what is None comes from the run's flavor, `size` (height, width) from its training pictures."""
        defaults = self.spec.sample
        height, width = size or (self.config.training.img_size, self.config.training.img_size)
        steps = steps or defaults.steps
        batches = -(-len(prompts) // batch_size)
        with tqdm(total=batches * steps, desc="drawing", unit="step", disable=None) as bar:
            return draw_pictures(
                self.model,
                self.spec,
                self.encoders,
                prompts,
                seeds,
                height=height,
                width=width,
                steps=steps,
                cfg_scale=defaults.cfg_scale if cfg_scale is None else cfg_scale,
                guidance=defaults.guidance if guidance is None else guidance,
                batch_size=batch_size,
                dtype=next(self.model.parameters()).dtype,
                on_step=lambda done: bar.update(done - bar.n),
            )


def load_sampler(run: Path) -> Sampler:
    """Loads the final export of a run.

    Raises:
        ValueError: not the folder of a finished run.
    """
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(
            f"--checkpoint={str(run)!r} has no config.toml: give the folder of a finished run, such as outputs/tiny"
        )
    config = load_config(["--job.config_file", str(run / CONFIG_FILE)])
    spec, device = SPECS[config.model.flavor], build_device()
    if device.type == "cuda":
        config = replace(config, training=replace(config.training, dtype=config.training.mixed_precision_param))
    encoders = build_encoders(config, spec, build_tokenizer(config.encoder, config.training.test_mode), device)
    model = build_model(config, spec, device)
    metadata = load_export(run / EXPORT_FOLDER / EXPORT_FILE, model, spec.name)
    return Sampler(config, spec, model.eval(), encoders, int(metadata["step"]))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a finished run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", help="one picture is drawn per prompt")
    source.add_argument("--prompts-file", type=Path, help="UTF-8 text file with one prompt per line")
    parser.add_argument(
        "--out", type=Path, default=Path("pictures"), help="folder for the PNG files (default pictures/)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first picture; the others count up (default 0)"
    )
    parser.add_argument("--steps", type=int, help="Euler steps (default: the flavor's)")
    parser.add_argument("--cfg-scale", type=float, help="classifier-free guidance, 1 is off (default: the flavor's)")
    parser.add_argument("--guidance", type=float, help="value for models that embed guidance (default: the flavor's)")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: the training size)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: the training size)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures drawn at a time (default 8)")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("height", "width"):
        value = getattr(arguments, name)
        if value is not None and (value <= 0 or value % PIXELS_PER_TOKEN):
            nearest = max(1, round(value / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN
            raise ValueError(f"--{name}={value} must be a positive multiple of {PIXELS_PER_TOKEN}: use {nearest}")
    for name in ("steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    check_arguments(arguments)
    prompts = arguments.prompts or load_prompts(arguments.prompts_file, "--prompts-file")
    sampler = load_sampler(arguments.checkpoint)
    side = sampler.config.training.img_size
    pixels_BCHW = sampler.draw(
        prompts,
        [arguments.seed + number for number in range(len(prompts))],
        size=(arguments.height or side, arguments.width or side),
        steps=arguments.steps,
        cfg_scale=arguments.cfg_scale,
        guidance=arguments.guidance,
        batch_size=arguments.batch_size,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, image) in enumerate(zip(prompts, make_images(pixels_BCHW), strict=True)):
        path = arguments.out / f"{number:03d}-seed{arguments.seed + number}.png"
        image.save(path)
        print(f"{path}  {prompt}")


if __name__ == "__main__":
    with recorded_exit(0, EXIT_CODES):
        main(sys.argv[1:])
