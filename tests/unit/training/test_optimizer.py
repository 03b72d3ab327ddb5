"""The optimizer follows its section, and its implementations agree."""

import pytest
import torch

from training.config import Optimizer
from training.optimizer import build_optimizer

ROUNDING = 1e-6  # the implementations order their fp32 operations differently


def train(section: Optimizer, steps: int = 20) -> torch.Tensor:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    optimizer = build_optimizer(layer.parameters(), section)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    return layer.weight.detach()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_implementations_agree(name):
    plain = train(Optimizer(name=name, lr=1e-2, implementation="for-loop"))
    for implementation in ("foreach", "fused"):
        other = train(Optimizer(name=name, lr=1e-2, implementation=implementation))
        torch.testing.assert_close(plain, other, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    "change", [{"lr": 2e-2}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 1e-2}, {"weight_decay": 1.0}, {"name": "Adam"}]
)
def test_every_key_reaches_the_optimizer(change):
    usual = {"lr": 1e-2, "name": "AdamW"}
    assert (train(Optimizer(**usual)) - train(Optimizer(**{**usual, **change}))).abs().max() > 10 * ROUNDING
