"""Small checkpoints whose values tell step, tensor and place, so that a mixture of two saves is seen."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.checkpointer import Checkpointer
from checkpoint.config import Checkpoint
from checkpoint.dcp import EMA_PREFIX, OPTIMIZER_PREFIX, load_checkpoint
from checkpoint.slices import Slices

# Rows that two processes share unevenly, a bias that only the first has, and numbers that all have.
SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.weight": (8, 24),
    "layers.1.weight": (5, 33),
    "layers.1.bias": (1, 7),
    f"{OPTIMIZER_PREFIX}layers.0.weight.exp_avg": (8, 24),
    f"{OPTIMIZER_PREFIX}layers.0.weight.step": (),
    f"{EMA_PREFIX}layers.0.weight": (8, 24),
}


def make_values(step: int) -> dict[str, Tensor]:
    """The tensors of a step; no two of their numbers are equal, nor equal to any of another step."""
    return {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape) + (step << 32) + (number << 24)
        for number, (name, shape) in enumerate(SHAPES.items())
    }


def make_zeros() -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in SHAPES.items()}


def share(tensors: dict[str, Tensor], rank: int = 0, world: int = 1) -> dict[str, Slices]:
    """One process's parts: some of the rows, in order."""
    shared = {}
    for name, tensor in tensors.items():
        views: list[tuple[tuple[int, ...], Tensor]] = [((), tensor)]
        if tensor.ndim:
            parts = tensor.tensor_split(world)
            start = sum(len(part) for part in parts[:rank])
            views = [((start, *(0,) * (tensor.ndim - 1)), parts[rank])] if len(parts[rank]) else []
        shared[name] = Slices.of_views(tensor.shape, tensor.dtype, views)
    return shared


def build(folder: Path, **keys: Any) -> Checkpointer:
    """The checkpointer of one process."""
    return Checkpointer(folder, Checkpoint(enable=True, **keys), None)


def save(checkpointer: Checkpointer, step: int, rank: int = 0, world: int = 1) -> None:
    checkpointer.save(step, share(make_values(step), rank, world), {"step": step, "samples_seen": 10 * step})


def save_steps(folder: Path, *steps: int, **keys: Any) -> None:
    """A folder with checkpoints of one process."""
    checkpointer = build(folder, **keys)
    for step in steps:
        save(checkpointer, step)
    checkpointer.finish()


def wrong_tensors(path: Path, step: int) -> list[str]:
    """Names of the tensors in a checkpoint that are not those of `step`."""
    loaded = make_zeros()
    load_checkpoint(path, share(loaded))
    return [name for name, values in make_values(step).items() if not torch.equal(loaded[name], values)]
