"""Speed of one training step of the transformer: forward, loss and backward, on the device that is there.

    python -m benchmarks.train_step --flavor flux-debug --dtype bfloat16

Encoders, data and optimizer are left out, so that the number is the transformer's alone. Where diffusers is installed,
the same step runs through its transformer with the same weights (converted by the checkpoint rules), step by step in
turns: what disturbs the machine disturbs both, and the ratio of each pair stays comparable.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from build import build_model, draw_weights
from checkpoint.adapter import to_hf
from config.job_config import JobConfig
from flux.config import Training
from flux.flops import training_flops
from flux.flow import squared_errors
from flux.model import FluxTransformer
from flux.positions import image_ids, text_ids
from flux.spec import PIXELS_PER_TOKEN, SPECS, ModelSpec
from parallel.config import ActivationCheckpoint
from parallel.degrees import Degrees
from parallel.mesh import Layout
from runtime.config import Debug

Step = Callable[[], Tensor]  # one training step; returns the prediction


@dataclass(frozen=True)
class Batch:
    """Random inputs of one step; the time of a matrix product can depend on the numbers, so none of them is zero."""

    inputs: dict[str, Tensor]
    target_BTC: Tensor


def make_batch(spec: ModelSpec, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Batch:
    config, side = spec.transformer, args.img_size // PIXELS_PER_TOKEN
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(args.batch, *shape, generator=generator).to(device, dtype)

    inputs = {
        "img_BTC": normal(side * side, config.in_channels),
        "img_ids_BTA": image_ids(spec.positions, side, side).expand(args.batch, -1, -1).to(device),
        "txt_BLE": normal(args.text_tokens, config.context_dim),
        "txt_ids_BLA": text_ids(spec.positions, args.text_tokens, side, side).expand(args.batch, -1, -1).to(device),
        "t_B": torch.rand(args.batch, generator=generator).to(device),
    }
    if config.pooled_dim:
        inputs["pooled_BV"] = normal(config.pooled_dim)
    if config.guidance_embed:
        inputs["guidance_B"] = torch.full((args.batch,), 3.5, device=device)
    return Batch(inputs, normal(side * side, config.in_channels))


def build_native(spec: ModelSpec, device: torch.device, dtype: Literal["float32", "bfloat16"]) -> FluxTransformer:
    """The model with random weights everywhere: fresh training weights hold zeros, which no later step sees."""
    config = JobConfig(
        training=Training(dtype=dtype, mixed_precision_param=dtype),
        activation_checkpoint=ActivationCheckpoint(mode="none"),
        debug=Debug(seed=0),
    )
    layout = Layout(Degrees(), device)
    model = build_model(config, spec, layout)
    draw_weights(config, model, layout)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.5, generator=generator)
    return model


def build_diffusers(spec: ModelSpec, native: FluxTransformer) -> nn.Module:
    """Diffusers' transformer of the same sizes with the weights of `native`."""
    from diffusers import FluxTransformer2DModel

    config = spec.transformer
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.pooled_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        )
    weights = {key: value.clone() for key, value in to_hf(native.state_dict(), spec.diffusers_rules).items()}
    model.load_state_dict(weights, assign=True)
    return model.train()


def build_step(model: nn.Module, predict: Callable[[], Tensor], target_BTC: Tensor) -> Step:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        velocity_BTC = predict()
        (squared_errors(velocity_BTC, target_BTC).sum() / target_BTC.numel()).backward()
        return velocity_BTC.detach()

    return step


def native_step(model: FluxTransformer, batch: Batch) -> Step:
    return build_step(model, lambda: model(**batch.inputs), batch.target_BTC)


def diffusers_step(model: nn.Module, batch: Batch) -> Step:
    inputs = batch.inputs

    def predict() -> Tensor:
        return model(
            hidden_states=inputs["img_BTC"],
            encoder_hidden_states=inputs["txt_BLE"],
            pooled_projections=inputs["pooled_BV"],
            timestep=inputs["t_B"],
            guidance=inputs.get("guidance_B"),
            img_ids=inputs["img_ids_BTA"][0],
            txt_ids=inputs["txt_ids_BLA"][0],
            return_dict=False,
        )[0]

    return build_step(model, predict, batch.target_BTC)


def seconds_of(step: Step, device: torch.device) -> float:
    """Wall time of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(steps: dict[str, Step], rounds: int, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step. Each round runs all of them, in an order that turns around from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name in list(steps) if turn % 2 == 0 else reversed(list(steps)):
            elapsed = seconds_of(steps[name], device)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def run(args: argparse.Namespace) -> dict:
    """Measures and prints; returns what `--json` writes."""
    device, dtype, spec = torch.device(args.device), getattr(torch, args.dtype), SPECS[args.flavor]
    image_tokens = (args.img_size // PIXELS_PER_TOKEN) ** 2
    flops = training_flops(spec.transformer, image_tokens, args.text_tokens)
    batch = make_batch(spec, args, device, dtype)
    native = build_native(spec, device, args.dtype)
    steps = {"this": native_step(native, batch)}
    print(
        f"{args.flavor}, {sum(p.numel() for p in native.parameters()):,} parameters, {args.dtype}, torch "
        f"{torch.__version__}, {device_words(device)}\n"
        f"batch {args.batch} x ({image_tokens} image + {args.text_tokens} text tokens), {flops / 1e12:.4g} TFLOP per "
        f"training sample, median of {args.steps} steps after {args.warmup}"
    )
    result: dict = {**vars(args), "torch": torch.__version__, "hardware": device_words(device)}
    result["tflop_per_sample"] = flops / 1e12
    if args.against == "diffusers":
        steps["diffusers"] = diffusers_step(build_diffusers(spec, native), batch)
        ours, theirs = (step().float() for step in steps.values())
        result["prediction_difference"] = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"same weights; predictions differ by {result['prediction_difference']:.1e} of their size")

    seconds = measure(steps, args.steps, args.warmup, device)
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = args.batch / median
        result[name] = {"seconds_per_step": median, "samples_per_s": rate, "tflop_per_s": rate * flops / 1e12}
        print(f"{name:<10} {median:9.4f} s/step {rate:10.2f} samples/s {rate * flops / 1e12:9.3f} TFLOP/s")
    if args.against == "diffusers":
        ratios = sorted(ours / theirs for ours, theirs in zip(*seconds.values(), strict=True))
        result["time_ratio"] = statistics.median(ratios)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(
            f"this takes {result['time_ratio']:.3f} of its time (median of pairs; half are in {low:.3f} .. {high:.3f})"
        )
    return result


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def picture_side(text: str) -> int:
    side = positive(text)
    if side % PIXELS_PER_TOKEN:
        nearest = max(1, round(side / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN
        raise argparse.ArgumentTypeError(f"{side} is not a multiple of {PIXELS_PER_TOKEN}: use {nearest}")
    return side


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--flavor", choices=sorted(SPECS), default="flux-tiny", help="model size (default: %(default)s)")
    add(
        "--against",
        choices=["diffusers", "none"],
        default="diffusers" if importlib.util.find_spec("diffusers") else "none",
        help="also time this library's transformer with the same weights (default here: %(default)s)",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of weights, activations and gradients (default: %(default)s)",
    )
    add("--batch", type=positive, default=32, help="samples per step (default: %(default)s)")
    add(
        "--img-size",
        type=picture_side,
        default=64,
        help=f"side of a square picture in pixels; each {PIXELS_PER_TOKEN} x {PIXELS_PER_TOKEN} of them are one image "
        "token (default: %(default)s)",
    )
    add(
        "--text-tokens",
        type=positive,
        default=24,
        help="tokens of text; FLUX.1-schnell was trained with 256, dev with 512 (default: %(default)s)",
    )
    add("--steps", type=positive, default=20, help="measured steps, whose median is printed (default: %(default)s)")
    add("--warmup", type=positive, default=3, help="steps before them that do not count (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    args = parser.parse_args(argv)
    if args.against == "diffusers" and not importlib.util.find_spec("diffusers"):
        parser.error("--against diffusers needs it installed: pip install -r requirements-dev.txt")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU here; use --device cpu")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    result = run(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
