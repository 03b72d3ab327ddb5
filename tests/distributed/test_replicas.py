"""Replicas of a real model hold the same bits after several updates, and one flipped bit in one of them is found."""

import tempfile

import pytest

from tests.distributed.layouts import build_trainer
from tests.distributed.ranks import run_ranks

UPDATES = 3
REPLICATE = "--parallelism.data_parallel_replicate_degree={}".format
# name: (processes, replicas, options)
LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "2x1": (2, 2, ()),
    "3x1": (3, 3, ("--training.dtype=bfloat16",)),
    "2x2": (4, 2, ()),
    "2x2, modulation where it lies": (4, 2, ("--parallelism.modulation_parallel",)),
    "2x1 x tp 2": (4, 2, ("--parallelism.tensor_parallel_degree=2",)),
    "2x1 x cp 2": (4, 2, ("--parallelism.context_parallel_degree=2",)),
}


def compare(rank: int, world_size: int, folder: str, options: tuple[str, ...]) -> dict[str, list]:
    """What is found after UPDATES, and with a bit flipped on rank 1 and on the last."""
    import torch

    from parallel.replicas import compare_replicas
    from parallel.shards import local_part
    from training.optimizer import find_remainders

    trainer = build_trainer(rank, world_size, folder, options)
    tensors = dict(trainer.model.named_parameters())
    names = {parameter: name for name, parameter in tensors.items()}
    before = {name: local_part(tensor).clone() for name, tensor in tensors.items()}
    batches = iter(trainer.loader)
    for _ in range(UPDATES):
        trainer.train_step(batches)
    moved = [name for name, tensor in tensors.items() if not torch.equal(local_part(tensor), before[name])]
    tensors |= {f"{name}.remainder": bits for name, bits in find_remainders(trainer.optimizer, names).items()}

    def flip(name: str, wrong: int) -> list:
        local = local_part(tensors[name])
        bits = local.view(torch.int32 if local.element_size() == 4 else torch.int16).view(-1)
        held = layout_has(bits) if rank == wrong else False
        if held:
            bits[-1] ^= 1  # the least that there is
        found = compare_replicas(tensors, trainer.layout)
        if held:
            bits[-1] ^= 1
        return found

    def layout_has(bits: torch.Tensor) -> bool:
        return bits.numel() > 0

    last = list(tensors)[-1]
    return {
        "sound": compare_replicas(tensors, trainer.layout),
        "rank 1": flip("double_blocks.0.img_mod.lin.weight", 1),
        "last": flip(last, world_size - 1),
        "sound again": compare_replicas(tensors, trainer.layout),
        "counts": [len(tensors), len(before), len(moved)],
    }
