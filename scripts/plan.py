"""What a run will cost before it runs: memory, time, GPU hours, and a layout to start with.

    python -m scripts.plan --job.config_file train_configs/flux_dev.toml --gpus 64 --gpu h200 [--section.key value ...]

Everything is arithmetic, so any machine does, without an accelerator, data or weights. Bytes of weights, gradients and
optimizer states are exact, activations right to a few percent. The times are bounds: a floor, at which products or
links run as fast as they are sold and hide all the rest, and what an update takes when nothing overlaps.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from build import compute_dtype
from config.checks import find_faults
from config.job_config import JobConfig
from config.parse import load_config
from estimate import (
    MATMUL_SHARE,
    Memory,
    Seconds,
    cached_bytes,
    estimate_memory,
    estimate_seconds,
    flops_per_sample,
    is_stored,
    needed_encoders,
    parameter_count,
    usable_bytes,
)
from flux.encoder_costs import EncoderCost
from flux.flops import forward_flops, training_flops, with_unit
from flux.spec import SPECS
from parallel.config import ActivationCheckpoint
from parallel.degrees import Degrees, divisors, resolve_degrees
from parallel.estimate import Links
from runtime.exit_record import recorded_exit
from runtime.hardware import ACCELERATORS, Accelerator
from runtime.log import setup_logging
from train import EXIT_CODES

GIB = 2**30
WORTH_CHANGING = 0.97  # a proposal takes at most this share of the configuration's time
RECOMPUTATION = (
    ActivationCheckpoint(mode="none"),
    ActivationCheckpoint(mode="selective", selective_ac_option="op"),
    ActivationCheckpoint(mode="full", ratio=0.25),
    ActivationCheckpoint(mode="full", ratio=0.5),
    ActivationCheckpoint(mode="full"),
)
SHORT_UPDATE = 0.05  # seconds
UNITS = ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
PARTS_OF_TIME = {
    "compute": "matrix products",
    "encoders": "encoders",
    "traffic": "own memory",
    "weights": "weights on links",
    "tokens": "tokens on links",
}


@dataclass(frozen=True)
class Machines:
    """What a run is to run on."""

    chip: Accelerator
    gpus: int
    per_node: int

    @property
    def links(self) -> Links:
        return Links(self.per_node, self.chip.link_gb_per_s, self.chip.network_gb_per_s)

    @property
    def room(self) -> float:
        """Bytes that a rank can use."""
        return usable_bytes(self.chip.memory_gib * GIB)


@dataclass(frozen=True)
class Plan:
    """One way to run a configuration."""

    config: JobConfig
    degrees: Degrees
    memory: Memory
    seconds: Seconds

    @property
    def update_size(self) -> int:
        return self.config.training.update_size(self.degrees.dp)

    def fits(self, machines: Machines) -> bool:
        return self.memory.peak <= machines.room


def make_plan(config: JobConfig, machines: Machines, encoders: Mapping[str, EncoderCost]) -> Plan:
    """The configuration as it stands.

    Raises:
        ValueError: its degrees do not fit the number of GPUs.
    """
    degrees = resolve_degrees(config.parallelism, machines.gpus)
    memory = estimate_memory(config, degrees, False, encoders)
    return Plan(config, degrees, memory, estimate_seconds(config, degrees, machines.chip, machines.links, encoders))


def propose(plan: Plan, machines: Machines, encoders: Mapping[str, EncoderCost]) -> Plan | None:
    """The fastest way that fits to make the same updates, by the time that it takes when nothing overlaps; None: none.

    Tried are: weights split over a part of the ranks and copied, context parallel within a machine, micro-batches, and
    recomputation. Tensor parallel, compilation and number formats stay as configured.
    """
    fitting = [one for one in _variants(plan, machines, encoders) if one.fits(machines)]
    # Of two that are about equally fast, the one that leaves more memory.
    best = min(fitting, key=lambda one: (float(f"{one.seconds.ceiling:.2g}"), one.memory.peak), default=None)
    if best and plan.fits(machines) and best.seconds.ceiling > WORTH_CHANGING * plan.seconds.ceiling:
        return plan
    return best


def _variants(plan: Plan, machines: Machines, encoders: Mapping[str, EncoderCost]) -> Iterator[Plan]:
    config, tp = plan.config, plan.degrees.tp
    for cp in (degree for degree in divisors(machines.gpus // tp) if degree * tp <= machines.per_node):
        for dp_shard in divisors(machines.gpus // tp // cp):
            degrees = Degrees(machines.gpus // (tp * cp * dp_shard), dp_shard, cp, tp)
            for samples in divisors(plan.update_size // degrees.dp if plan.update_size % degrees.dp == 0 else 0):
                for section in RECOMPUTATION:
                    variant = _change(config, degrees, samples, plan.update_size, section)
                    if next(iter(find_faults(variant, machines.gpus)), None) is None:
                        yield make_plan(variant, machines, encoders)


def _change(
    config: JobConfig, degrees: Degrees, samples: int, update_size: int, section: ActivationCheckpoint
) -> JobConfig:
    parallelism = config.parallelism
    if degrees != resolve_degrees(parallelism, degrees.world):
        parallelism = replace(
            parallelism,
            data_parallel_replicate_degree=degrees.dp_replicate,
            data_parallel_shard_degree=degrees.dp_shard,
            context_parallel_degree=degrees.cp,
        )
    is_whole = config.training.global_batch_size == -1 and samples * degrees.dp == update_size
    training = replace(config.training, local_batch_size=samples, global_batch_size=-1 if is_whole else update_size)
    return replace(config, parallelism=parallelism, training=training, activation_checkpoint=section)


def changed_options(before: Plan, after: Plan) -> list[str]:
    """The command-line options that turn one plan into the other."""
    wanted: list[str] = []
    for name in ("parallelism", "training", "activation_checkpoint"):
        old, new = asdict(getattr(before.config, name)), asdict(getattr(after.config, name))
        wanted += [f"--{name}.{key}={value}" for key, value in new.items() if value != old[key]]
    return wanted


def validation_seconds(plan: Plan, chip: Accelerator) -> tuple[float | None, float]:
    """Of one validation loss and of one grid of pictures, all groups of ranks at work; None: it is not known how many
    samples there are.
    """
    config, degrees = plan.config, plan.degrees
    section, transformer = config.validation, SPECS[config.model.flavor].transformer
    flops = forward_flops(transformer, config.training.img_tokens, config.encoder.max_t5_encoding_len)
    speed = degrees.cp * degrees.tp * chip.bf16_tflops * 1e12 * MATMUL_SHARE
    once = (2 if config.ema.enable else 1) * flops / speed
    # Every group takes equally many batches and pictures, filled up.
    samples = -(-section.steps // degrees.dp) * section.local_batch_size
    guided = 2 if section.enable_classifier_free_guidance else 1
    pictures = -(-section.save_img_count // degrees.dp) * section.denoising_steps * guided
    return samples * once if section.steps > 0 else None, pictures * once if section.eval_freq else 0.0


def describe(plan: Plan, proposal: Plan | None, machines: Machines, samples: int) -> Iterator[str]:
    """Lines for people."""
    config, training, length = plan.config, plan.config.training, plan.config.encoder.max_t5_encoding_len
    flops = training_flops(SPECS[config.model.flavor].transformer, training.img_tokens, length)
    again = flops_per_sample(config) / flops - 1
    yield f"model     {config.model.flavor}, {parameter_count(config):,} parameters"
    yield (
        f"sample    {training.img_tokens} image + {length} text tokens, {with_unit(flops)}FLOP to train on"
        + (f", and {again:.0%} to compute again what was not kept" if again else "")
    )
    yield f"machines  {machines.gpus} x {machines.chip.name}, {min(machines.gpus, machines.per_node)} in each"
    yield ""
    changes = changed_options(plan, proposal) if proposal else []
    plans = [plan, proposal] if proposal and changes else [plan]
    columns = [["", *(["as configured", "proposed"][: len(plans)])]]
    columns += [[label, *cells] for label, cells in _rows(plans, machines, samples)]
    widths = [max(len(cells[place]) for cells in columns) for place in range(len(plans) + 1)]
    for cells in columns:
        label, *values = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield "   ".join((label, *values)).rstrip()
    yield ""
    yield from _advice(plan, proposal, changes, machines)
    yield from _extras(plan, machines)
    yield from _caveats(plan)


def _rows(plans: Sequence[Plan], machines: Machines, samples: int) -> Iterator[tuple[str, list[str]]]:
    yield "layout", [str(one.degrees) for one in plans]
    yield "samples", [one.config.training.describe_update(one.degrees.dp) for one in plans]
    yield "recomputation", [_name_recomputation(one.config) for one in plans]
    for name in asdict(plans[0].memory):
        sizes = [getattr(one.memory, name) for one in plans]
        if name == "activations":
            yield f"  {name}", [_activations(one) for one in plans]
        elif any(sizes) and name not in ("host", "peak"):
            yield f"  {name}", [_size(size) for size in sizes]
    room = _size(machines.room)
    verdicts = ["fits" if one.fits(machines) else "DOES NOT FIT" for one in plans]
    yield (
        "memory of a rank",
        [f"{_size(one.memory.peak)} of {room}: {verdict}" for one, verdict in zip(plans, verdicts, strict=True)],
    )
    for name, label in PARTS_OF_TIME.items():
        times = [getattr(one.seconds, name) for one in plans]
        if any(times):
            yield f"  {label}", [f"{seconds:.3g} s" for seconds in times]
    ranges = [(one.seconds.floor, one.seconds.ceiling) for one in plans]
    yield "an update", [f"{low:.3g} to {high:.3g} s" for low, high in ranges]
    rates = [(one.update_size / high, one.update_size / low) for one, (low, high) in zip(plans, ranges, strict=True)]
    yield "samples/s", [f"{_number(low)} to {_number(high)}" for low, high in rates]
    each = [(low / machines.gpus, high / machines.gpus) for low, high in rates]
    yield "  of one GPU", [f"{_number(low)} to {_number(high)}" for low, high in each]
    hours = [(samples / high / 3600, samples / low / 3600) for low, high in each]
    yield f"GPU hours for {_count(samples)} samples", [f"{_number(low)} to {_number(high)}" for low, high in hours]


def _activations(plan: Plan) -> str:
    """With a memory budget the compiler chooses, between what full recomputation keeps and what it keeps by itself."""
    if plan.config.activation_checkpoint.mode != "memory_budget":
        return _size(plan.memory.activations)
    section = replace(plan.config.activation_checkpoint, mode="full", ratio=1.0)
    least = replace(plan.config, activation_checkpoint=section)
    low = estimate_memory(least, plan.degrees, False, {}).activations
    return f"{_size(low)} to {_size(plan.memory.activations)}"


def _advice(plan: Plan, proposal: Plan | None, changes: list[str], machines: Machines) -> Iterator[str]:
    """What to start with, and why."""
    if proposal is None:
        short = plan.memory.peak - machines.room
        yield (
            "nothing fits: even one sample at a time, wholly recomputed and split over all ranks, needs more than "
            f"{_size(machines.room)}; as configured {_size(short)} are missing"
            if short > 0
            else "no other way to make updates of this size fits: keep the configuration"
        )
    elif not changes:
        yield f"keep the configuration: no other way that fits is faster by more than {1 - WORTH_CHANGING:.0%}"
    else:
        gain = plan.seconds.ceiling / proposal.seconds.ceiling
        why = f"{gain:.2f} times as fast" if plan.fits(machines) else "it fits, and is the fastest way that does"
        shards = proposal.degrees.fsdp * proposal.degrees.tp
        where = "of one machine" if shards <= machines.per_node else f"of {-(-shards // machines.per_node)} machines"
        split = f", with weights split over {shards} GPUs {where}" if shards > 1 else ""
        yield f"start with the proposal: {why}{split}:"
        yield "    " + " ".join(changes)


def _extras(plan: Plan, machines: Machines) -> Iterator[str]:
    """What is beside training."""
    config = plan.config
    if not is_stored(config):
        each = cached_bytes(config, config.training.img_size)
        yield f"a cache of encoded samples takes {_size(each)} for each, {_size(each * 10**6)} for a million"
    if config.validation.enable:
        loss, grid = validation_seconds(plan, machines.chip)
        if loss is None:
            times = ", eight times over" if config.validation.all_timesteps else ""
            twice = ", and again for the average" if config.ema.enable else ""
            yield f"a validation loss takes a third of training on all held-out samples{times}{twice}"
        else:
            yield f"a validation loss takes about {_number(loss)} s, every {config.validation.freq} steps"
        if grid:
            yield f"a grid of pictures takes about {_number(grid)} s, every {config.validation.eval_freq} steps"


def _caveats(plan: Plan) -> Iterator[str]:
    """What the figures do not know of this configuration."""
    if in_host := ", ".join(_in_host(plan.config)):
        size = _size(plan.memory.host)
        yield f"note: {size} ({in_host}) of each rank are in the host's memory, which the times leave out"
    if compute_dtype(plan.config) is torch.float32:
        yield "note: the times are of products in bfloat16; in float32 they take many times as long"
    if plan.config.data.buckets.enable:
        yield "note: the figures are of squares of training.img_size, not of the shapes of [data.buckets]"
    if plan.seconds.ceiling < SHORT_UPDATE:
        yield "note: the launching of kernels is not counted, and is most of so short an update"


def _in_host(config: JobConfig) -> Iterator[str]:
    if config.training.enable_cpu_offload:
        yield "weights, gradients and optimizer states"
    if config.activation_checkpoint.cpu_offload:
        yield "activations"
    if config.encoder.cpu_offload:
        yield "T5's weights"


def as_json(plan: Plan, machines: Machines) -> dict[str, Any]:
    """One plan for programs: bytes, seconds, FLOP."""
    return {
        "degrees": asdict(plan.degrees),
        "local_batch_size": plan.config.training.local_batch_size,
        "update_size": plan.update_size,
        "activation_checkpoint": asdict(plan.config.activation_checkpoint),
        "flop_per_sample": flops_per_sample(plan.config),
        "memory": asdict(plan.memory),
        "fits": plan.fits(machines),
        "seconds": {**asdict(plan.seconds), "floor": plan.seconds.floor, "ceiling": plan.seconds.ceiling},
    }


def _name_recomputation(config: JobConfig) -> str:
    section = config.activation_checkpoint
    details = {"selective": section.selective_ac_option, "full": f"ratio {section.ratio:g}"}
    details["memory_budget"] = f"{section.memory_budget:g}"
    return f"{section.mode} {details.get(section.mode, '')}".rstrip()


def _size(count: float) -> str:
    size, unit = next(one for one in UNITS if count >= one[0] or one == UNITS[-1])
    return f"{count / size:.2f} {unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(samples: int) -> str:
    return f"{samples / 1e6:g} million" if samples >= 10**6 else f"{samples:,}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the other options are the configuration's
    )
    add = parser.add_argument
    add("--gpus", type=int, default=8, help="number of GPUs (default: %(default)s)")
    add("--gpu", choices=sorted(ACCELERATORS), default="h100", help="their kind (default: %(default)s)")
    add("--gpus-per-node", type=int, default=8, help="GPUs on one machine (default: %(default)s)")
    add("--samples", type=int, help="samples of the whole training (default: training.steps updates)")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    return parser


def main(argv: list[str]) -> None:
    arguments, options = build_parser().parse_known_args(argv)
    for name in ("gpus", "gpus_per_node", "samples"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
    config = load_config(options, arguments.gpus)
    machines = Machines(ACCELERATORS[arguments.gpu], arguments.gpus, arguments.gpus_per_node)
    encoders = needed_encoders(config)
    plan = make_plan(config, machines, encoders)
    # What the host adds is not known, so nothing can be said to be faster.
    proposal = plan if any(_in_host(config)) else propose(plan, machines, encoders)
    samples = arguments.samples or config.training.steps * plan.update_size
    print("\n".join(describe(plan, proposal, machines, samples)))
    if arguments.json:
        record = {
            "flavor": config.model.flavor,
            "parameters": parameter_count(config),
            "accelerator": asdict(machines.chip),
            "gpus": machines.gpus,
            "samples": samples,
            "cache_bytes_per_sample": cached_bytes(config, config.training.img_size),
            "usable_bytes": machines.room,
            "configured": as_json(plan, machines),
            "proposed": as_json(proposal, machines) if proposal else None,
            "options": changed_options(plan, proposal) if proposal else [],
        }
        try:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--json={arguments.json} cannot be written ({error.strerror}): name another file"
            ) from error


if __name__ == "__main__":
    setup_logging(0)
    with recorded_exit(0, EXIT_CODES):
        main(sys.argv[1:])
