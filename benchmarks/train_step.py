"""Speed and memory of a training step: whole updates of train.py on random data, on the device that is there.

    python -m benchmarks.train_step --model.flavor flux-debug --training.mixed_precision_param bfloat16
    python -m benchmarks.train_step --against naive diffusers --json outputs/step.json
    python -m benchmarks.train_step --variant compile.enable=true --variant "compile.enable=true ema.enable=true"
    torchrun --nproc_per_node=8 -m benchmarks.train_step --job.config_file train_configs/flux_schnell.toml

Options are those of train.py, and the few below. What is compared runs in one process: on a CPU step by step in turns,
so that what disturbs the machine disturbs all and the ratio of neighbors stays comparable; on a GPU one after the
other, so that each has the memory for itself.

    update       a whole update: encoders, forward, loss, backward, clipping, optimizer
    naive        the same without compilation, with every block recomputed and its weights gathered twice
    transformer  forward, loss and backward alone
    diffusers    the same through diffusers' FluxTransformer2DModel with the same weights
    variants     updates with other options, each compared with the first
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import train
from benchmarks.arguments import new_file, split_variant, variant
from benchmarks.clock import Clock, Times, compare, measure
from build import build_run_layout, check_machine, compute_dtype, measure_peaks
from config.job_config import JobConfig
from config.parse import load_config
from estimate import estimate_memory, needed_encoders
from flux import encode_ahead
from flux.batch import RawBatch
from flux.data.random_samples import write_random_samples
from flux.flops import training_flops
from flux.flow import squared_errors
from flux.inputs import make_inputs
from flux.spec import SPECS
from parallel.config import ActivationCheckpoint
from parallel.mesh import Layout, close_layout
from parallel.shards import gather_state_dict, local_part
from runtime.exit_record import recorded_exit
from train import EXIT_CODES, FluxTrainer
from training.metrics import peak_memory_gib

Step = Callable[[], Tensor | None]  # one step; returns the prediction, where there is one to compare
Build = Callable[[JobConfig, Layout, Path], Step]
UPDATE, NAIVE, TRANSFORMER, DIFFUSERS = "update", "naive", "transformer", "diffusers"
COMPARED = {UPDATE: NAIVE, TRANSFORMER: DIFFUSERS}
DEFAULTS = [
    "--job.config_file=train_configs/flux_tiny.toml",
    "--validation.enable=false",
    "--checkpoint.enable=false",
    "--metrics.log_freq=1000000000",
    "--optimizer.lr=1e-6",  # nothing is to be learned from noise
    "--debug.seed=0",
]
NAIVE_OPTIONS = [
    "--compile.enable=false",
    "--activation_checkpoint.mode=full",
    "--activation_checkpoint.ratio=1",
    "--parallelism.fsdp_reshard_after_forward=always",
]
GIB = 2**30
# A CPU's allocator would give large gradients back to the system at every step; run_train.sh sets the same.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


@contextlib.contextmanager
def timed_regions(clock: Clock) -> Iterator[None]:
    """Inside, the clock takes the times of what the profiler shows as regions."""
    original = train.region
    for module in (train, encode_ahead):
        vars(module)["region"] = clock.region
    try:
        yield
    finally:
        for module in (train, encode_ahead):
            vars(module)["region"] = original


def build_trainer(config: JobConfig, layout: Layout, folder: Path) -> FluxTrainer:
    """A trainer with random weights everywhere: fresh ones hold zeros, which no later step sees."""
    trainer = FluxTrainer(config, folder, layout)
    generator = torch.Generator(local_part(next(trainer.model.parameters())).device).manual_seed(layout.rank)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            local_part(parameter).normal_(std=0.6 / parameter.shape[-1] ** 0.5, generator=generator)
    return trainer


def endless(trainer: FluxTrainer) -> Iterator[RawBatch]:
    """The batches of one update again and again, so that none is waited for."""
    batches = itertools.islice(trainer.loader, trainer.accumulation)
    return itertools.cycle([raw.pin_memory() if trainer.device.type == "cuda" else raw for raw in batches])


def build_update(config: JobConfig, layout: Layout, folder: Path) -> Step:
    trainer = build_trainer(config, layout, folder)
    batches = endless(trainer)

    def step() -> None:
        trainer.train_step(batches)

    return step


def build_transformer(config: JobConfig, layout: Layout, folder: Path, by_diffusers: bool = False) -> Step:
    trainer = build_trainer(config, layout, folder)
    raw = next(endless(trainer)).to(trainer.device)
    encoded = trainer.encoders.encode(raw)
    inputs, target_BTC = make_inputs(encoded, raw.draws, trainer.spec, config.training.guidance, trainer.dtype)
    if by_diffusers:
        from benchmarks.diffusers_peer import build_diffusers, predict_by_diffusers

        model = build_diffusers(trainer.spec, gather_state_dict(trainer.model.state_dict(), keep=True)).to(
            layout.device
        )
        mixed = trainer.dtype is not model.dtype
        precision = torch.autocast(layout.device.type, trainer.dtype) if mixed else contextlib.nullcontext()
        return build_step(model, lambda: predict_by_diffusers(model, inputs), squared_errors, target_BTC, precision)
    model = trainer.model
    return build_step(model, lambda: model(**inputs), trainer.loss, target_BTC, contextlib.nullcontext())


def build_step(
    model: nn.Module,
    predict: Callable[[], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    target_BTC: Tensor,
    precision: contextlib.AbstractContextManager,
) -> Step:
    def step() -> Tensor:
        with precision:
            prediction = predict()
        (loss(prediction, target_BTC).sum() / target_BTC.numel()).backward()
        model.zero_grad()
        return prediction.detach()

    return step


def run(args: argparse.Namespace, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Measures; returns what `--json` writes."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = load_config([*DEFAULTS, *options], world_size)
    if args.inputs == "encoded":
        options = [*options, *write_data(config, world_size, folder)]

    def configure(*more: str) -> JobConfig:
        return load_config([*DEFAULTS, *options, *more], world_size, quiet=True)

    builds: dict[str, tuple[JobConfig, Build]] = {UPDATE: (configure(), build_update)}
    if NAIVE in args.against:
        builds[NAIVE] = configure(*NAIVE_OPTIONS), build_update
    if DIFFUSERS in args.against:
        builds[TRANSFORMER] = configure(), build_transformer
        builds[DIFFUSERS] = configure(), partial(build_transformer, by_diffusers=True)
    for keys in args.variant:
        builds[keys] = configure(*split_variant(keys)), build_update
    layouts = {name: build_run_layout(config, world_size) for name, (config, _) in builds.items()}
    layout = layouts[UPDATE]
    for config, _ in builds.values():
        check_machine(config, layout.device.type)
    in_turns = [[name] for name in builds] if layout.device.type == "cuda" else [list(builds)]
    clock, times, predictions = Clock(layout.device), dict[str, Times](), dict[str, Tensor]()
    for names in in_turns:
        steps = {}
        for name in names:
            config, build = builds[name]
            steps[name] = build(config, layouts[name], Path(tempfile.mkdtemp(dir=folder)))
        predictions |= {name: prediction.cpu() for name in names if (prediction := steps[name]()) is not None}
        with timed_regions(clock):
            times |= measure(steps, clock, args.steps, args.warmup)
        if len(names) == 1:  # else nobody knows whose memory it is
            times[names[0]].peak_gib = peak_memory_gib(layout.device.type)
        steps.clear()
        gc.collect()
        if layout.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    abouts = {name: describe(config, layouts[name], args, options) for name, (config, _) in builds.items()}
    result = dict(abouts[UPDATE])
    result["steps"] = {name: summarize(one, abouts[name]) for name, one in times.items()}
    pairs = {**COMPARED, **dict.fromkeys(args.variant, UPDATE)}
    result["ratios"] = {
        f"{name} / {other}": compare(times[name].steps, times[other].steps)
        for name, other in pairs.items()
        if name in times and other in times
    }
    if predictions:
        ours, theirs = (predictions[name].float() for name in (TRANSFORMER, DIFFUSERS))
        result["prediction_difference"] = ((ours - theirs).norm() / theirs.norm()).item()
    for layout in layouts.values():
        close_layout(layout)
    return result


def write_data(config: JobConfig, world_size: int, folder: Path) -> list[str]:
    """Random encoded samples, as many as are needed at once; the options that read them."""
    data = folder / f"data {os.environ.get('RANK', '0')}"
    data.mkdir()
    training, length = config.training, config.encoder.max_t5_encoding_len
    samples = max(training.local_batch_size * world_size, training.global_batch_size)
    path = write_random_samples(data, SPECS[config.model.flavor], training.img_size, length, samples)
    return ["--training.dataset=mlperf", f"--training.dataset_path={path}"]


def describe(config: JobConfig, layout: Layout, args: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    """All that a reader of the figures must know."""
    training, spec = config.training, SPECS[config.model.flavor]
    text = config.encoder.max_t5_encoding_len
    peaks = measure_peaks(layout, compute_dtype(config))
    memory = estimate_memory(config, layout.degrees, layout.device.type == "cpu", needed_encoders(config))
    return {
        "command": " ".join(option for option in options if "dataset" not in option),
        "date": date.today().isoformat(),
        "commit": find_commit(),
        "torch": torch.__version__,
        "hardware": describe_device(layout.device),
        "layout": layout.describe(),
        "flavor": spec.name,
        "dtype": training.mixed_precision_param if training.dtype == "float32" else training.dtype,
        "weights": training.dtype,
        "recompute": describe_recomputation(config.activation_checkpoint),
        "compile": config.compile.enable,
        "inputs": args.inputs,
        "local_batch": training.local_batch_size,
        "samples": training.update_size(layout.degrees.dp),
        "image_tokens": training.img_tokens,
        "text_tokens": text,
        "tflop_per_sample": training_flops(spec.transformer, training.img_tokens, text) / 1e12,
        "matmul_tflops": peaks.matmul,
        "datasheet_tflops": peaks.datasheet,
        "plan_gib": memory.peak / GIB,
        "rounds": args.steps,
        "warmup": args.warmup,
    }


def describe_recomputation(section: ActivationCheckpoint) -> str:
    if section.mode == "selective":
        return f"selective {section.selective_ac_option}"
    return f"full {section.ratio:g}" if section.mode == "full" else section.mode


def summarize(times: Times, about: Mapping[str, Any]) -> dict[str, Any]:
    """Medians, and what follows from them. Of the transformer alone, too, every product of an update is counted."""
    seconds = statistics.median(times.steps)
    samples = about["samples"] if times.regions else about["local_batch"]
    tflops = samples * about["tflop_per_sample"] / seconds
    datasheet = about["datasheet_tflops"]
    return {
        "seconds": seconds,
        "samples_per_s": samples / seconds,
        "tflops": tflops,
        "matmul_percent": 100 * tflops / about["matmul_tflops"],
        "mfu_percent": 100 * tflops / datasheet if datasheet else None,
        "peak_gib": times.peak_gib,
        "region_percent": {name: 100 * part / sum(times.steps) for name, part in times.regions.items()},
    }


def describe_device(device: torch.device) -> str:
    """Such as `NVIDIA H200`, or `2 threads of AMD EPYC 9B14 (AVX512)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{torch.get_num_threads()} threads of {name} ({torch.backends.cpu.get_cpu_capability()})"


def find_commit() -> str | None:
    """Of this folder, with a + when something is not in it; None: it is no repository."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return ask("rev-parse", "--short", "HEAD") + (
            "+" if ask("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def report(result: Mapping[str, Any]) -> str:
    """The same for people."""
    tokens = f"{result['image_tokens']} image + {result['text_tokens']} text tokens"
    lines = [
        f"{result['flavor']}, {result['layout']}, {result['hardware']}, torch {result['torch']}",
        f"{result['dtype']}, weights {result['weights']}, recompute {result['recompute']}, compile {result['compile']}",
        f"{result['samples']} x ({tokens}) per update, {result['tflop_per_sample']:.4g} TFLOP per sample, median of "
        f"{result['rounds']} steps after {result['warmup']}",
        f"{'':<12}{'s/step':>9}{'samples/s':>11}{'TFLOP/s':>10}{'of matmul':>11}{'of datasheet':>14}{'peak GiB':>10}",
    ]
    for name, one in result["steps"].items():
        mfu = "" if one["mfu_percent"] is None else f"{one['mfu_percent']:.1f} %"
        peak = f"{one['peak_gib']:.2f}" if one["peak_gib"] else ""
        lines.append(
            f"{name:<12}{one['seconds']:>9.4f}{one['samples_per_s']:>11.2f}{one['tflops']:>10.3f}"
            f"{one['matmul_percent']:>9.1f} %{mfu:>14}{peak:>10}"
        )
    for name, one in result["steps"].items():
        if regions := one["region_percent"]:
            lines.append(f"{name}: " + ", ".join(f"{region} {percent:.1f} %" for region, percent in regions.items()))
    for name, (low, middle, high) in result["ratios"].items():
        lines.append(f"{name} = {middle:.3f} (median of neighbors; half are in {low:.3f} .. {high:.3f})")
    if "prediction_difference" in result:
        lines.append(f"same weights: predictions differ by {result['prediction_difference']:.1e} of their size")
    lines.append(f"the plan's peak: {result['plan_gib']:.2f} GiB")
    return "\n".join(lines)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the other options are the configuration's
    )
    add = parser.add_argument
    add("--against", nargs="+", choices=list(COMPARED.values()), default=[], help="what else is timed, in turns")
    add(
        "--variant",
        type=variant,
        action="append",
        default=[],
        metavar="KEYS",
        help="time updates with these options too, such as 'compile.enable=true training.dtype=bfloat16'",
    )
    add(
        "--inputs",
        choices=["encoded", "pictures"],
        default="encoded",
        help="encoded: random features, as from a cache; pictures: training.dataset, through the encoders (default: "
        "%(default)s)",
    )
    add("--steps", type=positive, default=20, help="measured steps, whose median is told (default: %(default)s)")
    add("--warmup", type=positive, default=3, help="steps before them that do not count (default: %(default)s)")
    add("--json", type=new_file, metavar="FILE", help="write the figures to this file as well")
    args, options = parser.parse_known_args(argv)
    if DIFFUSERS in args.against and not importlib.util.find_spec("diffusers"):
        parser.error("--against diffusers needs it installed: pip install -r requirements-dev.txt")
    if DIFFUSERS in args.against and os.environ.get("WORLD_SIZE", "1") != "1":
        parser.error("--against diffusers compares on one process: leave it out, or torchrun")
    return args, options


def main(argv: list[str]) -> None:
    args, options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, options, Path(folder))
    if os.environ.get("RANK", "0") == "0":
        print(report(result))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if not torch.cuda.is_available() and not MALLOC.keys() <= os.environ.keys():  # read when a program starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:]], MALLOC | os.environ)
    with recorded_exit(int(os.environ.get("RANK", "0")), EXIT_CODES):
        main(sys.argv[1:])
