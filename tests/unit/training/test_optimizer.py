"""The optimizer follows its section, and its implementations agree."""

import pytest
import torch

from parallel.shards import local_views
from training.config import Optimizer
from training.optimizer import build_optimizer, optimizer_tensors

ROUNDING = 1e-6  # the implementations order their fp32 operations differently


def no_key(parameter: torch.Tensor) -> int:
    raise AssertionError("nothing is rounded stochastically")


def train(section: Optimizer, steps: int = 20) -> torch.Tensor:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    optimizer = build_optimizer([list(layer.parameters())], section, local_views, no_key)
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


def build_pair(section: Optimizer):
    """A model of two groups of parameters and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    optimizer = build_optimizer([list(layer.parameters()) for layer in model], section, local_views, no_key)
    return model, optimizer, {parameter: name for name, parameter in model.named_parameters()}


def update(model, optimizer, seed: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    optimizer.step()


ALL_KINDS = [(name, how) for name in ("Adam", "AdamW") for how in ("for-loop", "foreach", "fused")]


@pytest.mark.parametrize(("name", "implementation"), ALL_KINDS)
def test_what_the_optimizer_will_remember_is_known_before_its_first_step(name, implementation):
    section = Optimizer(name=name, lr=1e-2, weight_decay=0.5, implementation=implementation)
    model, optimizer, names = build_pair(section)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = optimizer_tensors(optimizer, names)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert set(tensors) == {f"{parameter}.{kind}" for parameter in names.values() for kind in kinds}
    assert not any(tensor.any() for tensor in tensors.values())
    # Nothing else is other than before: weights, gradients, settings.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    # And training goes as if nobody had asked.
    other, untouched, _ = build_pair(section)
    for seed in range(3):
        update(model, optimizer, seed)
        update(other, untouched, seed)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "implementation"), ALL_KINDS)
def test_an_optimizer_goes_on_from_what_is_copied_into_its_tensors(name, implementation):
    section = Optimizer(name=name, lr=1e-2, implementation=implementation)
    model, optimizer, names = build_pair(section)
    for seed in range(3):
        update(model, optimizer, seed)
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, names).items()}
    assert all(tensor.any() for tensor in saved.values())

    def resumed(left_out: str = "") -> bool:
        other, fresh, its_names = build_pair(section)
        other.load_state_dict(weights)
        for key, tensor in optimizer_tensors(fresh, its_names).items():
            if not key.endswith(left_out or "nothing"):
                tensor.copy_(saved[key])
        update(other, fresh, 3)
        return all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())

    weights = {key: value.clone() for key, value in model.state_dict().items()}
    update(model, optimizer, 3)
    assert resumed()
    assert not any(resumed(left_out) for left_out in ("exp_avg", "exp_avg_sq", "step"))  # control
