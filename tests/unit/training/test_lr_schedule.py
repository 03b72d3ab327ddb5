"""The learning rate over the steps."""

import math

import pytest
import torch

from training.config import LRScheduler
from training.lr_schedule import build_lr_scheduler, lr_factor


def factors(steps: int, **section) -> list[float]:
    return [lr_factor(LRScheduler(**section), steps, step) for step in range(steps)]


def test_warmup_then_constant():
    curve = factors(10, warmup_steps=4, decay_ratio=0.0)
    assert curve == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6


def test_without_decay_ratio_all_after_the_warmup_decays():
    curve = factors(10, warmup_steps=2)
    assert curve[:3] == [0.5, 1.0, 1.0]
    assert curve[2:] == pytest.approx([1 - k / 8 for k in range(8)])
    assert min(curve) > 0


def test_decay_ratio_is_the_share_at_the_end():
    curve = factors(100, warmup_steps=10, decay_ratio=0.2)
    assert curve[10:81] == [1.0] * 71 and curve[81] == pytest.approx(0.95) and curve[99] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "decay_type, halfway", [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)], ids=str
)
def test_decay_shapes_and_floor(decay_type, halfway):
    section = {"warmup_steps": 0, "decay_ratio": 1.0, "decay_type": decay_type}
    assert factors(10, **section)[5] == pytest.approx(halfway)
    assert factors(10, **section, min_lr_factor=0.2)[5] == pytest.approx(0.2 + 0.8 * halfway)


def test_total_steps_stretches_the_schedule_beyond_the_run():
    assert lr_factor(LRScheduler(warmup_steps=0, total_steps=100), 10, 9) == pytest.approx(0.91)
    assert lr_factor(LRScheduler(warmup_steps=0, total_steps=5, min_lr_factor=0.1), 10, 9) == pytest.approx(0.1)


def test_warmup_longer_than_the_run_only_rises():
    assert factors(4, warmup_steps=4000) == [1 / 4, 2 / 4, 3 / 4, 1.0]


def test_the_first_update_uses_the_first_factor():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=2.0)
    scheduler = build_lr_scheduler(optimizer, LRScheduler(warmup_steps=4), steps=8)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == [0.5, 1.0, 1.5, 2.0]
