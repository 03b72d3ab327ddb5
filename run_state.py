"""The state of a run: what its checkpoints hold, and how a run goes on from one."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from build import open_initial_weights, read_versions
from checkpoint.checkpointer import Checkpointer, Found
from checkpoint.dcp import EMA_PREFIX, OPTIMIZER_PREFIX
from checkpoint.slices import Part, Slices
from config.job_config import JobConfig
from config.resume import find_changes, find_version_changes
from flux.data.build import find_data_change
from flux.identify import check_fits
from flux.model import FluxTransformer
from flux.spec import SPECS
from parallel.mesh import Layout
from parallel.shards import is_saver, local_views
from redact import redact_values
from training.ema import build_ema
from training.number_formats import merge, split_into
from training.optimizer import find_remainders, optimizer_tensors

log = logging.getLogger("train")


def find_start(config: JobConfig, checkpointer: Checkpointer) -> Found | None:
    """The whole checkpoint that a run starts from, of its own flavor; None: it starts from other weights.

    Raises:
        ValueError: it cannot be started from.
        CheckpointError: the run has checkpoints, and none is whole.
    """
    found, spec = checkpointer.find(), SPECS[config.model.flavor]
    if found:
        check_fits(found.weights(), spec, str(found.path))
        if config.checkpoint.create_seed_checkpoint and found.train_state:
            raise ValueError(
                f"checkpoint.create_seed_checkpoint saves a start, and this run goes on from {found.path}: "
                "leave it out, or choose another job.dump_folder"
            )
    elif config.checkpoint.initial_load_in_hf:
        open_initial_weights(config, spec)  # said now, and not when the encoders have been built
    return found


def check_shards(
    config: JobConfig, saved: Mapping[str, Any], shards: Sequence[Sequence[Sequence]], update_size: int
) -> None:
    """Raises ValueError for a checkpoint whose positions mean other samples."""
    size = saved.get("update_size", update_size)
    if config.data.buckets.enable and size != update_size:
        raise ValueError(f"training.global_batch_size must stay {size}: buckets cut the data into such updates")
    if change := find_data_change(saved.get("shards", shards), shards):
        raise ValueError(
            f"training.dataset is not what the checkpoint was trained on: {change}: give the same shards (and keep "
            "validation.enable), or begin anew with its weights: checkpoint.initial_load_path"
        )


def take_over(
    config: JobConfig,
    checkpointer: Checkpointer,
    found: Found | None,
    model: FluxTransformer,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Fills model and optimizer from a checkpoint, if there is one. Returns the average of the weights.

    Args:
        weights: the model's, in full precision.
    """
    ema: dict[str, Tensor] = {}
    if config.ema.enable and found and found.holds("ema"):
        ema = build_ema(weights)  # room for it
    if found:
        checkpointer.load(found, checkpoint_tensors(model, optimizer, ema, False, found.holds("optimizer")))
    return ema or (build_ema(weights) if config.ema.enable else {})


def tell_changes(config: JobConfig, saved: Mapping[str, Any], update_size: int) -> None:
    """Tells which settings and versions are not those that the checkpoint was saved with."""
    changes = find_changes(saved, config, update_size) + find_version_changes(saved, read_versions())
    if changes:
        log.warning("not as in the checkpoint: %s", ", ".join(changes))


def checkpoint_tensors(
    model: FluxTransformer,
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor],
    to_save: bool,
    has_states: bool = True,
) -> dict[str, Slices]:
    """This rank's parts of all tensors of a checkpoint, by the names that they have in it. Without copies.

    A weight whose remaining bits the optimizer keeps is there in float32, as a run of float32 weights has it.

    Args:
        ema: average of the weights by their names; may be empty.
        to_save: of the parts that several ranks hold, each is given by one of them only.
        has_states: whether what the optimizer remembers is among them.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    names = {parameter: name for name, parameter in tensors.items()}
    remainders = find_remainders(optimizer, names)
    states = optimizer_tensors(optimizer, names) if has_states else {}
    tensors |= {OPTIMIZER_PREFIX + name: tensor for name, tensor in states.items()}
    tensors |= {EMA_PREFIX + name: tensor for name, tensor in ema.items()}
    slices = {}
    for name, tensor in tensors.items():
        views = local_views(tensor) if not to_save or is_saver(tensor, name) else []
        if name in remainders:
            others = local_views(remainders[name])[: len(views)]
            parts = [
                Part(offsets, tuple(view.shape), partial(merge, view, other), partial(split_into, view, other))
                for (offsets, view), (_, other) in zip(views, others, strict=True)
            ]
            slices[name] = Slices(tensor.shape, torch.float32, parts)
        else:
            slices[name] = Slices.of_views(tensor.shape, tensor.dtype, views)
    return slices


def weight_bits(model: FluxTransformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All weights, and the digits that the optimizer keeps of them. Without copies."""
    weights = dict(model.named_parameters())
    remainders = find_remainders(optimizer, {weight: name for name, weight in weights.items()})
    return {**weights, **{f"{name} (remainder)": bits for name, bits in remainders.items()}}


def describe_run(
    config: JobConfig, layout: Layout, shards: Sequence[Sequence[Sequence]], update_size: int
) -> dict[str, Any]:
    """What all checkpoints of a run know of it, beside its tensors."""
    return {
        "seed": config.debug.seed,
        "update_size": update_size,
        "shards": shards,
        "flavor": config.model.flavor,
        "layout": layout.describe(),
        "versions": read_versions(),
        "config": redact_values(asdict(config)),
    }
