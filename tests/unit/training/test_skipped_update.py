"""An update that is left out leaves nothing behind: weights, running means and step counts as if nobody had asked."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parallel.shards import local_part, local_views
from tests.distributed.ranks import run_ranks
from tests.unit.training.unread import Unread
from training import compact_adam
from training.config import Optimizer
from training.optimizer import build_optimizer, optimizer_tensors, step_unless

UPDATES, BAD = 5, 2
IMPLEMENTATIONS = ("for-loop", "foreach", "fused")
FORMATS = [
    (torch.float32, {}),
    (torch.float32, {"name": "Adam"}),
    (torch.float32, {"state_dtype": "bfloat16"}),
    (torch.float32, {"state_dtype": "8bit"}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"bf16_rounding": "stochastic", "state_dtype": "bfloat16"}),
    (torch.bfloat16, {"state_dtype": "8bit"}),
]
CASES = [(dtype, how, how_kept) for dtype, how_kept in FORMATS for how in IMPLEMENTATIONS]


def build_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # Whole blocks of 8 bits, of which some have their largest number below zero; and parameters without any.
    return nn.Sequential(nn.Linear(512, 6), nn.Linear(6, 3)).to(dtype)


def train(model: nn.Module, section: Optimizer, bad: float, how: str) -> dict[str, Tensor]:
    """All that updates change, after UPDATES. The one with `bad` gradients is `how`: made, skipped or left out."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        [list(layer.parameters()) for layer in model], section, local_views, lambda parameter: len(names[parameter])
    )
    skip = torch.zeros(())
    for update in range(UPDATES):
        generator = torch.Generator().manual_seed(update)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            gradient = local_part(parameter.grad)
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
            if update == BAD:
                gradient.view(-1)[::2] = bad
        if update != BAD or how == "made":
            optimizer.step() if how == "left out" else step_unless(optimizer, skip)
        elif how == "skipped":
            step_unless(optimizer, skip + 1)
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    tensors = {**dict(model.named_parameters()), **optimizer_tensors(optimizer, names)}
    tensors |= {f"{names[p]}.{kind}": value for p, state in optimizer.state.items() for kind, value in state.items()}
    return {name: local_part(tensor).clone() for name, tensor in tensors.items()}


def differing(some: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    assert set(some) == set(others)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

    def same(name: str) -> bool:
        one, other = (tensors[name].view(bits[tensors[name].element_size()]) for tensors in (some, others))
        return torch.equal(one, other)

    return [name for name in some if not same(name)]


@pytest.mark.parametrize(("dtype", "implementation", "kept"), CASES)
def test_a_skipped_update_is_one_that_never_was(dtype, implementation, kept):
    if kept.get("state_dtype") == "8bit":
        pytest.importorskip("torchao")
    section = Optimizer(lr=1e-2, implementation=implementation, **kept)
    wanted = train(build_model(dtype), section, math.nan, "left out")
    assert wanted["0.weight.step"] == UPDATES - 1
    for bad in (math.nan, math.inf, 1e4):
        assert differing(train(build_model(dtype), section, bad, "skipped"), wanted) == []
    # The control: the same update, made.
    made = train(build_model(dtype), section, math.nan, "made")
    assert made["0.weight"].isnan().any() and made["0.weight.step"] == UPDATES


def test_8_bits_that_are_packed_again_are_others(monkeypatch):
    """Why the codes of a skipped update are chosen rather than computed."""
    pytest.importorskip("torchao")
    section = Optimizer(lr=1e-2, state_dtype="8bit")
    wanted = train(build_model(torch.float32), section, math.nan, "left out")
    monkeypatch.setattr(compact_adam.torch, "where", lambda skip, place, values: values)
    wrong = differing(train(build_model(torch.float32), section, math.nan, "skipped"), wanted)
    assert "0.weight.exp_avg_codes" in wrong


def skip_spread(rank: int, world: int) -> list[list[str]]:
    """Of all cases, what differs on this rank."""
    found = []
    for dtype, implementation, kept in CASES:
        section = Optimizer(lr=1e-2, implementation=implementation, **kept)
        ends = []
        for how in ("left out", "skipped"):
            model = build_model(dtype)
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
            ends.append(train(model, section, math.nan, how))
        found.append(differing(*ends))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_spread_are_skipped_alike(ranks):
    pytest.importorskip("torchao")
    assert run_ranks(skip_spread, ranks) == [[[]] * len(CASES)] * ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_what_cannot_decide_on_the_device_waits_for_it(implementation, dtype):
    model = build_model(dtype)
    section = Optimizer(implementation=implementation)
    optimizer = build_optimizer([list(model.parameters())], section, local_views, lambda _: 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Unread() if implementation == "fused" else pytest.raises(AssertionError, match="waits for"), Unread():
        step_unless(optimizer, torch.ones(()))
