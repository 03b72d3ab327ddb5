"""Replicas of a real model hold the same bits after several updates, and one flipped bit in one of them is found."""

import tempfile

import pytest

from tests.distributed.layouts import UPDATE, build_trainer
from tests.distributed.ranks import run_ranks

UPDATES = 3
SPLIT = "double_blocks.0.img_mod.lin.weight"  # over all ranks of a replica; FSDP leaves it alone
HALVES = ["--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16"]
# name: (processes, replicas, options)
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    "3x1, bfloat16": (3, 3, HALVES),
    "2x2": (4, 2, []),
    "2x1 x tp 2": (4, 2, ["--parallelism.tensor_parallel_degree=2"]),
    "2x1 x cp 2": (4, 2, ["--parallelism.context_parallel_degree=2"]),
}


def compare(rank: int, world_size: int, folder: str, options: list[str]) -> dict[str, list]:
    """What is found after UPDATES, as they are and with one bit flipped on rank 1."""
    import torch

    from parallel.replicas import compare_replicas
    from parallel.shards import local_part
    from training.optimizer import find_remainders

    trainer = build_trainer(rank, world_size, folder, options)
    weights = dict(trainer.model.named_parameters())
    names = {parameter: name for name, parameter in weights.items()}
    before = {name: local_part(weight).clone() for name, weight in trainer.weights.items()}
    batches = iter(trainer.loader)
    for _ in range(UPDATES):
        trainer.train_step(batches)
    still = [name for name, weight in trainer.weights.items() if torch.equal(local_part(weight), before[name])]
    remainders = find_remainders(trainer.optimizer, names)
    tensors = weights | {f"{name}.remainder": remainder for name, remainder in remainders.items()}

    def compare_flipped(name: str) -> list:
        local = local_part(tensors[name])
        bits = local.view(torch.int32 if local.element_size() == 4 else torch.int16).view(-1)
        bits[-1] ^= int(rank == 1)
        found = compare_replicas(tensors, trainer.layout)
        bits[-1] ^= int(rank == 1)
        return found

    return {
        "split": compare_flipped(SPLIT),
        "last": compare_flipped(list(tensors)[-1]),
        "sound": compare_replicas(tensors, trainer.layout),
        "counts": [len(weights), len(remainders), len(still)],
        "last name": list(tensors)[-1:],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_replicas_stay_alike_and_a_flipped_bit_is_found(name):
    world_size, replicas, options = LAYOUTS[name]
    samples = UPDATE // 2 * replicas  # of an update
    dp = world_size // (2 if "x tp" in name or "x cp" in name else 1)
    sizes = [f"--training.global_batch_size={samples}", f"--training.local_batch_size={samples // dp}"]
    options = [*sizes, f"--parallelism.data_parallel_replicate_degree={replicas}", *options]
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(compare, world_size, folder, options)
    found = ranks[0]
    weights, remainders, still = found["counts"]
    assert still == 0 and remainders == (weights if name.endswith("bfloat16") else 0)
    assert all(other["sound"] == [] for other in ranks)
    named = [1] if replicas == 3 else sorted([1, (1 + world_size // 2) % world_size])  # with two, both
    for what, flipped in (("split", SPLIT), ("last", found["last name"][0])):
        assert all(other[what] == found[what] for other in ranks), "every rank knows"
        assert found[what] == [(rank, flipped, replicas == 3) for rank in named]
