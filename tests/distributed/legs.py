"""Runs training in legs that are interrupted, on any layout, and tells what each leg saw and left."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.ranks import run_ranks
from tests.integration.short_runs import TINY, resize_tiny

ALL_ROWS = os.environ.get("RESUME_ROWS") == "all"  # also those that only repeat what others show in pairs
PICTURES = 20  # an epoch
UPDATE = 4  # samples of every update, whatever the layout
# Of the transformer: the smallest that has blocks of both kinds, and heads that two ranks can share.
SIZES = {"hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single": 2}
WEIGHT_SCALE = 0.6  # as in layouts.py: under the recipe's own initialization most first gradients are zero
OVERRIDES = [
    *TINY,
    "--validation.enable=false",
    "--training.dataset=imagefolder",
    "--optimizer.lr=1e-3",
    "--lr_scheduler.warmup_steps=10",
    "--ema.enable",
    "--ema.decay=0.9",
    "--checkpoint.enable",
    "--checkpoint.interval=10",
    "--checkpoint.keep_latest_k=2",  # 0.15 GB each
]
BF16 = ["--training.mixed_precision_param=bfloat16"]


@dataclass(frozen=True)
class Leg:
    """What one leg did."""

    first_step: int  # before its first update
    positions: list[list[int]]  # of each update, all ranks' together, sorted


class Interrupted(Exception):
    """Ends a leg, as a stop between two steps would."""


def save_pictures(folder: Path) -> None:
    """A data set of PICTURES small pictures with captions."""
    import torch
    from PIL import Image

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(PICTURES):
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")


def run_leg(
    run: Path, world_size: int, *overrides: str, steps: int, until: int | None = None, timeout: float = 300
) -> Leg:
    """Trains in the folder `run` from its newest checkpoint to step `until`, where it is interrupted.

    Args:
        steps: of the whole run, whose update is shared by `world_size` processes as `overrides` say.
        until: None: the leg runs to the end.
    """
    run.mkdir(parents=True, exist_ok=True)
    arguments = [*OVERRIDES, f"--training.steps={steps}", *overrides]
    ranks = run_ranks(_train, world_size, str(run), arguments, until, timeout=timeout)
    by_update = zip(*(updates for _, updates in ranks), strict=True)
    return Leg(ranks[0][0], [sorted({position for part in parts for position in part}) for parts in by_update])


def _train(rank: int, world_size: int, folder: str, arguments: Sequence[str], until: int | None) -> Any:
    """On every rank. Returns the step it began after and the positions of each of its updates."""
    import torch

    from build import build_run_layout
    from config.parse import load_config
    from flux.rng import keyed_generator
    from parallel.shards import copy_full_
    from train import FluxTrainer

    resize_tiny(**SIZES)
    config = load_config(list(arguments), world_size, quiet=True)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, world_size))
    if trainer.step == 0:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                full = torch.empty(parameter.shape)
                full.normal_(std=WEIGHT_SCALE / full.shape[-1] ** 0.5, generator=keyed_generator(0, "test", name))
                copy_full_(parameter, full + 1 if name.endswith("norm.weight") else full)
    first_step, updates, loader, train_step = trainer.step, [], trainer.loader, trainer.train_step

    def recorded_loader():
        for raw in loader:
            updates[-1].extend(raw.position_B.tolist())
            yield raw

    def interrupted_step(batches):
        if trainer.step == until:
            raise Interrupted
        updates.append([])
        return train_step(batches)

    trainer.loader, trainer.train_step = recorded_loader(), interrupted_step
    with suppress(Interrupted):
        trainer.train()
    return first_step, updates


def read_metrics(run: Path, name: str) -> list[float]:
    """A figure of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a step is missing, or there twice"
    return [line[name] for line in lines]


def read_tensors(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint: weights, optimizer, average."""
    import torch

    from checkpoint.dcp import load_checkpoint, tensor_entries
    from checkpoint.safe_metadata import read_metadata
    from checkpoint.slices import Slices

    entries = tensor_entries(read_metadata(checkpoint))
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    whole = {
        name: Slices.of_views(tensor.shape, tensor.dtype, [((0,) * tensor.ndim, tensor)])
        for name, tensor in tensors.items()
    }
    load_checkpoint(checkpoint, whole)
    return tensors
