"""Trains flux-tiny on a layout, from weights under which every branch of the model matters, and tells what came out."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests.distributed.ranks import run_ranks
from tests.integration.short_runs import TINY, resize_tiny

if TYPE_CHECKING:
    from torch import Tensor

    from train import FluxTrainer

STEPS = 5
UPDATE = 8  # samples of every update, whatever the layout
# Of the transformer: the smallest with neighbors among the blocks of each kind, as many blocks as are gathered ahead,
# and heads that four ranks can share.
SIZES = {"hidden_size": 128, "num_heads": 4, "depth": 2, "depth_single": 2}
# The recipe's own initialization makes every block the identity and the first prediction zero: 94 of 96 gradients of
# the first step are exactly zero then, and even causal attention goes unseen.
WEIGHT_SCALE = 0.6
OVERRIDES = [
    *TINY,
    "--training.img_size=64",
    f"--training.global_batch_size={UPDATE}",
    f"--training.steps={STEPS}",
    "--training.max_norm=1",
    "--optimizer.lr=1e-4",
    "--lr_scheduler.warmup_steps=0",
    "--validation.enable=false",
]


@dataclass(frozen=True)
class Outcome:
    """What a layout computed."""

    losses: list[float]  # of each step, summed over ranks
    grad_norms: list[float]  # before clipping
    gradients: dict[str, np.ndarray]  # whole, of the first step
    draws: dict[int, tuple[float, bytes]] = field(default_factory=dict)  # position -> time and noise
    local_weights: int = 0  # elements that rank 0 holds


def build_trainer(rank: int, world_size: int, folder: str, overrides: Sequence[str]) -> "FluxTrainer":
    """A trainer on one rank, with weights that matter."""
    # Not above: ranks are forked from a process that has imported all this.
    import torch

    from config.parse import load_config
    from flux.rng import keyed_generator
    from parallel.shards import copy_full_
    from train import FluxTrainer, build_run_layout

    resize_tiny(**SIZES)
    config = load_config([*OVERRIDES, *overrides], world_size, quiet=True)
    trainer = FluxTrainer(config, Path(folder), build_run_layout(config, world_size))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            full = torch.empty(parameter.shape)
            full.normal_(std=WEIGHT_SCALE / full.shape[-1] ** 0.5, generator=keyed_generator(0, "test", name))
            copy_full_(parameter, full + 1 if name.endswith("norm.weight") else full)
    return trainer


def train_layout(
    world_size: int, *overrides: str, fault: str = "", device: str = "cpu", timeout: float = 240
) -> Outcome:
    """Runs STEPS updates of UPDATE samples; ranks that share samples must have drawn alike.

    Args:
        overrides: of the configuration; `training.local_batch_size` must fit the layout.
        fault: name of a function of tests/distributed/faults.py that is called before the trainer is built.
        device: as for run_ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(run_layout, world_size, folder, overrides, fault, timeout=timeout, device=device)
    draws: dict[int, tuple[float, bytes]] = {}
    for outcome in ranks:
        for position, draw in outcome.draws.items():
            assert draws.setdefault(position, draw) == draw, f"ranks differ in the draws of position {position}"
        assert outcome.losses == ranks[0].losses, "ranks differ in the loss"
        assert outcome.grad_norms == ranks[0].grad_norms, "ranks differ in the norm of the gradients"
    first = ranks[0]
    return Outcome(first.losses, first.grad_norms, first.gradients, draws, first.local_weights)


def run_layout(rank: int, world_size: int, folder: str, overrides: tuple[str, ...], fault: str) -> Outcome:
    """On every rank."""
    from parallel.shards import full_tensor, local_bytes
    from tests.distributed import faults

    if fault:
        getattr(faults, fault)()
    trainer = build_trainer(rank, world_size, folder, overrides)
    draws: dict[int, tuple[float, bytes]] = {}

    def recorded(batches):
        for raw in batches:
            for place, position in enumerate(raw.position_B.tolist()):
                noise = raw.draws.noise_BTC[place].numpy().tobytes()
                draws[position] = (raw.draws.t_B[place].item(), noise)
            yield raw

    batches = recorded(iter(trainer.loader))
    losses, norms, gradients = [], [], {}
    clip = trainer.clip_gradients

    def record_gradients():
        if not gradients:
            for name, parameter in trainer.model.named_parameters():
                assert parameter.grad is not None, name
                whole = full_tensor(parameter.grad)
                gradients[name] = whole.float().cpu().numpy().copy() if rank == 0 else None
        return clip()

    trainer.clip_gradients = record_gradients
    for _ in range(STEPS):
        loss, norm = trainer.train_step(batches)
        losses.append(trainer.layout.sum(loss).item())
        norms.append(norm.item())
    held = sum(map(local_bytes, trainer.model.parameters())) // 4
    return Outcome(losses, norms, gradients if rank == 0 else {}, draws, held)


def log_step(trainer: "FluxTrainer", loss: "Tensor", norm: "Tensor") -> dict[str, float]:
    """The figures of a step, on every rank, as they are shown."""
    shown: list[dict[str, float]] = []
    trainer.report._step_log.report = lambda step, values: shown.append(dict(values))
    trainer._log_step(loss, norm, lr=0.0)
    trainer.report.tell()
    return shown[0]
