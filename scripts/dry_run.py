"""Builds a run on pretended processes, takes one step without memory or data, and tells what a rank holds and sends.

    NGPU=1024 ./run_train.sh --comm.mode fake_backend --job.config_file train_configs/flux_dev.toml
    python -m scripts.dry_run --ranks 1024 --job.config_file train_configs/flux_dev.toml [--section.key value ...]

One process of any machine does it: the layout, the model and the step are the real ones, on tensors without content.
What is told is rank 0's, which holds the most when something does not divide.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from build import build_model, build_optimizer, build_run_layout, compute_dtype
from config.job_config import JobConfig
from config.parse import load_config, read_process_count
from flux.batch import TextCond
from flux.flow import squared_errors
from flux.inputs import make_model_inputs
from flux.plans import make_plan
from flux.spec import PIXELS_PER_TOKEN, SPECS
from parallel.collectives import CollectiveCounter
from parallel.context_parallel import shard_sequence
from parallel.gradients import clip_grad_norm_, group_by_module
from parallel.mesh import Layout, close_layout
from parallel.names import find_modules
from parallel.shards import local_bytes
from runtime.exit_record import recorded_exit
from runtime.log import setup_logging
from train import EXIT_CODES

GIB = 2**30


@dataclass(frozen=True)
class DryRun:
    """What one rank holds, in bytes, and what it communicates in a step."""

    layout: Layout
    parameters: int  # of the whole model
    weights: int
    gradients: int
    optimizer_states: int
    largest_block: int  # gathered, in the computation's dtype
    calls: dict[str, int]
    bytes: dict[str, int]


def take_dry_step(config: JobConfig, world_size: int) -> DryRun:
    """One update of rank 0 of `world_size` pretended ranks."""
    # A compiled step communicates the same, and compiling it would take minutes; no kernel of attention communicates.
    config = replace(
        config,
        model=replace(config.model, attention_backend="auto"),
        compile=replace(config.compile, enable=False),
        comm=replace(config.comm, mode="fake_backend"),
    )
    layout, spec = build_run_layout(config, world_size), SPECS[config.model.flavor]
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    try:
        model = build_model(config, spec, layout)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # tensors change their class
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizer = build_optimizer(config, model)
            inputs = make_empty_inputs(config, layout)
            plan = make_plan(spec.transformer)
            kept = {one for layer in find_modules(model, plan.modulation).values() for one in layer.parameters()}
            blocks = find_modules(model, plan.blocks).values()
            largest = max(sum(gathered_size(one) for one in block.parameters() if one not in kept) for block in blocks)
            counter = CollectiveCounter()
            with counter:
                target_BTC = inputs.pop("target_BTC")
                assert target_BTC is not None
                squared_errors(model(**inputs), target_BTC).sum().backward()
                clip_grad_norm_(group_by_module(model), config.training.max_norm)
            optimizer.step()
            parameters = list(model.parameters())
            states = (value for state in optimizer.state.values() for value in state.values() if value.dim())
            return DryRun(
                layout,
                parameters=sum(parameter.numel() for parameter in parameters),
                weights=sum(map(local_bytes, parameters)),
                gradients=sum(local_bytes(parameter.grad) for parameter in parameters if parameter.grad is not None),
                optimizer_states=sum(map(local_bytes, states)),
                largest_block=largest * compute_dtype(config).itemsize,
                calls=dict(counter.calls),
                bytes=dict(counter.bytes),
            )
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        close_layout(layout)


def make_empty_inputs(config: JobConfig, layout: Layout) -> dict[str, torch.Tensor | None]:
    """Arguments of the transformer and its target, of a batch's shapes and without content."""
    spec, batch = SPECS[config.model.flavor], config.training.local_batch_size
    transformer, dtype = spec.transformer, compute_dtype(config)
    side, length = config.training.img_size // PIXELS_PER_TOKEN, config.encoder.max_t5_encoding_len
    x_BTC = torch.empty(batch, side * side, transformer.in_channels)
    pooled_BV = torch.empty(batch, transformer.pooled_dim) if transformer.pooled_dim else None
    text = TextCond(torch.empty(batch, length, transformer.context_dim), pooled_BV)
    inputs = make_model_inputs(x_BTC, torch.empty(batch), text, (side, side), spec, config.training.guidance, dtype)
    inputs["target_BTC"] = torch.empty_like(x_BTC)
    return shard_sequence(inputs, make_plan(transformer).sequence_tensors, layout.axis("cp"))


def gathered_size(parameter: torch.Tensor) -> int:
    """Elements that a rank has while it computes: all, or its part of what tensor parallel splits."""
    if isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ()):
        return parameter.numel() // parameter.device_mesh["tp"].size()
    return parameter.numel()


def describe(run: DryRun, config: JobConfig) -> Iterator[str]:
    """Lines for people."""
    degrees, dtype = run.layout.degrees, str(compute_dtype(config)).removeprefix("torch.")
    yield "mesh        " + (f"{degrees.world} ranks = {degrees}" if degrees.world > 1 else str(degrees))
    yield f"model       {config.model.flavor}, {run.parameters:,} parameters, computing in {dtype}"
    held = {"weights": run.weights, "gradients": run.gradients, "optimizer states": run.optimizer_states}
    yield f"rank 0    {_size(sum(held.values()))} held, without activations and encoders:"
    for name, size in held.items():
        yield f"          {_size(size)} {name}"
    if degrees.fsdp > 1:
        section = config.parallelism
        ahead = max(1, section.fsdp_forward_prefetch, section.fsdp_backward_prefetch)
        stays = section.fsdp_reshard_after_forward == "never"
        when = "which stay until the backward pass" if stays else f"of up to {1 + ahead} at a time"
        yield f"gathered  {_size(run.largest_block)} for the largest block, {when}"
    yield f"per step  forward, backward and gradient norm of {config.training.local_batch_size} samples:"
    for name in sorted(run.calls):
        yield f"          {_size(run.bytes[name])} in {run.calls[name]:4d} x {name}"
    if not run.calls:
        yield "            no communication"


def _size(count: int) -> str:
    return f"{count / GIB:8.2f} GiB" if count >= GIB else f"{count / 2**20:8.2f} MiB"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.dry_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the other options are the configuration's
    )
    ranks = read_process_count(os.environ) or 1
    parser.add_argument("--ranks", type=int, default=ranks, help="number of pretended processes ($NGPU, or 1)")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.ranks < 1:
        raise ValueError(f"--ranks={arguments.ranks} must be at least 1")
    config = load_config(rest, arguments.ranks)
    print("\n".join(describe(take_dry_step(config, arguments.ranks), config)))


if __name__ == "__main__":
    setup_logging(0)
    with recorded_exit(0, EXIT_CODES):
        main(sys.argv[1:])
