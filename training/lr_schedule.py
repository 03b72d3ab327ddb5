"""Learning rate over the steps: linear warm-up, constant, decay."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from training.config import LRScheduler

DECAYS = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def lr_factor(section: LRScheduler, steps: int, step: int) -> float:
    """Factor on the base learning rate, torchtitan's shape.

    Warm-up takes (step + 1) / warmup_steps. The last `decay_ratio` of the run decays down to `min_lr_factor`; without
    decay_ratio everything after the warm-up does, and a ratio of 0 keeps the rate constant. The factor reaches
    min_lr_factor one step after the last, so every step of the run learns.

    Args:
        section: `[lr_scheduler]`.
        steps: length of the run in optimizer steps, used where total_steps is not given.
        step: 0-based.
    """
    total = section.total_steps or steps
    warmup = min(section.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    decay = total - warmup if section.decay_ratio is None else min(round(total * section.decay_ratio), total - warmup)
    first_decayed = total - decay
    if decay == 0 or step < first_decayed:
        return 1.0
    progress = min(1.0, (step - first_decayed) / decay)
    return section.min_lr_factor + (1 - section.min_lr_factor) * DECAYS[section.decay_type](progress)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, section: LRScheduler, steps: int, done: int = 0) -> LambdaLR:
    """The schedule as a torch scheduler; step it once after every optimizer step.

    Args:
        done: steps that an earlier part of the run has taken.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, lambda step: lr_factor(section, steps, step), last_epoch=done - 1)
