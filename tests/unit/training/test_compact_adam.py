"""Weights and running means in fewer bits: what they do to the numbers, on one process and spread over ranks."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parallel.gradients import group_by_mesh
from parallel.shards import copy_full_, full_tensor, local_views
from parallel.tensor_parallel import apply_tensor_parallel, fsdp_placement
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.spread_layers import Layers, build_layers, make_full
from training import compact_adam
from training.compact_adam import CompactAdam
from training.config import BLOCK, Optimizer
from training.number_formats import split
from training.optimizer import ExactWeights, build_optimizer, check_optimizer

IMPLEMENTATIONS = ("for-loop", "foreach", "fused")
SIZES = (512, 37)  # a matrix of whole blocks; its bias and the matrix after it have none
# Distance of weights after STEPS updates from those of float32, as a share of the distance that they have gone.
STEPS, ROUNDED = 100, {"8bit": 0.05, "bfloat16": 0.02}


def build_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.Linear(SIZES[1], 3)).bfloat16()
    return model.to(dtype)  # both begin at the same numbers


def train(dtype: torch.dtype, section: Optimizer, steps: int = STEPS, seed: int = 0) -> tuple[nn.Module, CompactAdam]:
    """With gradients that every dtype can hold."""
    model = build_model(dtype)
    names = {parameter: number for number, parameter in enumerate(model.parameters())}
    optimizer = build_optimizer(
        [list(model.parameters())], section, local_views, lambda parameter: 10**9 * seed + names[parameter]
    )
    generator = torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / STEPS))
    for _ in range(steps):
        for parameter in model.parameters():
            mean = torch.linspace(-1, 1, parameter.shape[-1])
            gradient = mean + torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.bfloat16().to(dtype)
        optimizer.step()
        schedule.step()
    return model, optimizer


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def exact_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    weights = ExactWeights(optimizer, dict(model.named_parameters()))
    assert len(weights) == 4 and all(weight.dtype == torch.float32 for weight in weights.values())
    return torch.cat([weight.detach().double().flatten() for weight in weights.values()])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_weight_with_its_remainder_is_torchs_float32_weight(name, implementation, monkeypatch):
    section = Optimizer(name=name, lr=1e-3, implementation=implementation)
    reference, plain = train(torch.float32, section)
    assert type(plain) is {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    model, optimizer = train(torch.bfloat16, section)
    assert torch.equal(exact_weights(model, optimizer), weights_of(reference))
    assert torch.equal(exact_weights(reference, plain), weights_of(reference))
    # The control: the same remainders beside weights that are rounded to even.
    monkeypatch.setattr(compact_adam, "split", lambda exact: (exact.bfloat16(), split(exact)[1]))
    assert not torch.equal(exact_weights(*train(torch.bfloat16, section)), weights_of(reference))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("state_dtype", ROUNDED)
def test_rounded_means_go_the_same_way(state_dtype, implementation):
    if state_dtype == "8bit":
        pytest.importorskip("torchao")
    section = Optimizer(lr=1e-3, implementation=implementation)
    reference, start = weights_of(train(torch.float32, section)[0]), weights_of(build_model(torch.float32))
    compact = Optimizer(lr=1e-3, implementation=implementation, state_dtype=state_dtype)
    for dtype in (torch.float32, torch.bfloat16):
        distance = (exact_weights(*train(dtype, compact)) - reference).norm() / (reference - start).norm()
        assert 0 < distance < ROUNDED[state_dtype]


def test_what_is_stored_of_each_parameter():
    pytest.importorskip("torchao")
    model, optimizer = train(torch.bfloat16, Optimizer(state_dtype="8bit"), steps=1)
    first, bias, second, _ = (optimizer.state[parameter] for parameter in model.parameters())
    told = {name: (value.dtype, tuple(value.shape)) for name, value in first.items()}
    means = ("exp_avg", "exp_avg_sq")
    assert told == {
        **{f"{mean}_codes": (torch.uint8, (37, 512)) for mean in means},
        **{f"{mean}_scales": (torch.float32, (37, 2)) for mean in means},
        "remainder": (torch.int16, (37, 512)),
        "step": (torch.float32, ()),
    }
    for state in (bias, second):  # no whole blocks
        assert {state[mean].dtype for mean in means} == {torch.float32}
    _, halves = train(torch.bfloat16, Optimizer(state_dtype="bfloat16", bf16_rounding="stochastic"), steps=1)
    for state in halves.state.values():
        assert {name: value.dtype for name, value in state.items() if value.dim()} == dict.fromkeys(
            means, torch.bfloat16
        )


def test_small_updates_reach_bfloat16_weights_in_the_mean():
    """At a hundredth of a unit of the weights an update; rounded to nearest, none would arrive."""
    moved = {}
    for rounding in ("remainder", "stochastic"):
        parameter = nn.Parameter(torch.ones(1, 4096, dtype=torch.bfloat16))
        section = Optimizer(lr=2**-7 / 100, weight_decay=0.0, bf16_rounding=rounding)
        optimizer = build_optimizer([[parameter]], section, local_views, lambda _: 3)
        for _ in range(100):
            parameter.grad = -torch.ones_like(parameter)
            optimizer.step()
        moved[rounding] = (parameter.float().mean() - 1).item() / 2**-7
    assert moved["remainder"] == pytest.approx(1, abs=0.01)
    # 4096 walks that have gone a unit in the mean, with a variance of below one.
    assert moved["stochastic"] == pytest.approx(1, abs=5 / 4096**0.5)
    parameter = torch.ones(4096, dtype=torch.bfloat16)
    for _ in range(100):
        parameter += 2**-7 / 100
    assert torch.equal(parameter, torch.ones_like(parameter))  # control


def test_noise_is_of_the_step_the_parameter_and_the_seed():
    section = Optimizer(lr=1e-3, bf16_rounding="stochastic")
    once, again, other = (weights_of(train(torch.bfloat16, section, 3, seed)[0]) for seed in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, other)
    pair = [nn.Parameter(torch.ones(8, 64, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = build_optimizer([pair], section, local_views, lambda parameter: 1 + (parameter is pair[1]))
    moves = []
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in pair]
        for parameter in pair:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moves.append([(parameter - old).detach() for parameter, old in zip(pair, before, strict=True)])
    assert not torch.equal(moves[0][0], moves[0][1]) and not torch.equal(moves[0][0], moves[1][0])


def test_the_size_of_parts_does_not_change_the_numbers(monkeypatch):
    sections = [Optimizer(lr=1e-3, bf16_rounding="stochastic"), Optimizer(lr=1e-3)]
    whole = [weights_of(train(torch.bfloat16, section, 5)[0]) for section in sections]
    monkeypatch.setattr(compact_adam, "CPU_PART", 1100)
    model, optimizer = train(torch.bfloat16, sections[0], 5)
    first, *_ = model.parameters()
    assert [part.rows.stop - part.rows.start for part in optimizer._parts[first]] == [2] * 18 + [1]
    assert torch.equal(weights_of(model), whole[0])
    assert torch.equal(weights_of(train(torch.bfloat16, sections[1], 5)[0]), whole[1])


def test_a_parameter_without_gradient_stays():
    pair = [nn.Parameter(torch.ones(2, 8, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = build_optimizer([pair], Optimizer(lr=0.1), local_views, lambda _: 0)
    optimizer.step()
    pair[0].grad = torch.ones_like(pair[0])
    optimizer.step()
    assert not torch.equal(pair[0], torch.ones(2, 8)) and torch.equal(pair[1], torch.ones(2, 8))
    assert [optimizer.state[parameter]["step"].item() for parameter in pair] == [1, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_parameter_that_lies_transposed_gets_the_same_bits(implementation):
    values, gradient = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    pair = [nn.Parameter(values.clone()), nn.Parameter(values.t().contiguous().t())]
    for parameter in pair:
        optimizer = build_optimizer(
            [[parameter]], Optimizer(lr=0.1, implementation=implementation), local_views, lambda _: 0
        )
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(*pair) and not torch.equal(pair[0], values)


SPREAD = [
    Optimizer(lr=0.1, implementation="foreach"),
    Optimizer(lr=0.1, implementation="foreach", bf16_rounding="stochastic"),
]
BLOCKS = Optimizer(lr=0.1, implementation="foreach", state_dtype="8bit")


def update_all(layers: nn.Module, section: Optimizer) -> dict[str, np.ndarray]:
    """The exact weights after three updates with the same gradients wherever they lie."""
    names = {parameter: name for name, parameter in layers.named_parameters()}
    for name, value in make_full(layers, seed=0).items():
        copy_full_(layers.get_parameter(name), value)
    optimizer = build_optimizer(
        group_by_mesh(layers.parameters()), section, local_views, lambda parameter: len(names[parameter])
    )
    for step in range(3):
        for name, value in make_full(layers, seed=step + 1).items():
            parameter = layers.get_parameter(name)
            parameter.grad = torch.zeros_like(parameter)
            copy_full_(parameter.grad, value)
        optimizer.step()
    exact = ExactWeights(optimizer, dict(layers.named_parameters()))
    return {name: full_tensor(weight).float().numpy() for name, weight in exact.items()}


def update_layout(rank: int, world: int) -> list[dict[str, np.ndarray]]:
    """Packed rows and columns, split on both dims."""
    return [update_all(build_layers("fsdp_2_tp_2").bfloat16(), section) for section in SPREAD]


class Blocks(nn.Module):
    """Of matrices, which stay whole on 3 ranks of FSDP (7 rows: 3, 3, 1), and on 2 beside tensor parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(2 * BLOCK, 7)
        self.packed_rows = nn.Linear(2 * BLOCK, 3 * 4)
        self.packed_columns = nn.Linear(5 * 2 * BLOCK, 4)


def update_blocks(rank: int, world: int) -> list[dict[str, np.ndarray]]:
    with torch.device("meta"):
        layers = Blocks().bfloat16()
    if world == 3:
        fully_shard(layers, mesh=init_device_mesh("cpu", (3,)))
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        apply_tensor_parallel(layers, mesh["tp"], {"packed_rows": 3}, {"packed_columns": 5}, [])
        fully_shard(layers, mesh=mesh["fsdp"], shard_placement_fn=fsdp_placement)
    layers.to_empty(device="cpu")
    return [update_all(layers, section) for section in (BLOCKS, SPREAD[1])]


def are_equal(some: list[dict[str, np.ndarray]], others: list[dict[str, np.ndarray]]) -> bool:
    return all(
        np.array_equal(one[name], other[name]) for one, other in zip(some, others, strict=True) for name in other
    )


def test_the_same_bits_however_a_parameter_is_spread():
    alone = [update_all(Layers().bfloat16(), section) for section in SPREAD]
    assert not are_equal(alone, alone[::-1])  # control
    assert all(are_equal(found, alone) for found in run_ranks(update_layout, 4))


@pytest.mark.parametrize("ranks", [3, 4])
def test_the_same_8_bits_however_matrices_are_split(ranks):
    pytest.importorskip("torchao")
    alone = update_blocks(0, 1)
    assert all(are_equal(found, alone) for found in run_ranks(update_blocks, ranks))


def test_what_a_run_says_of_it():
    assert Optimizer(lr=1e-4).describe("float32") == "AdamW, lr 0.0001"
    told = Optimizer(lr=1e-4, state_dtype="8bit").describe("bfloat16")
    assert told == "AdamW, lr 0.0001, 8bit means, bfloat16 weights with remainders"
    stochastic = Optimizer(bf16_rounding="stochastic")
    assert stochastic.describe("bfloat16").endswith("bfloat16 weights rounded stochastically")
    assert "weights" not in stochastic.describe("float32")


def test_8_bits_without_torchao(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r'optimizer\.state_dtype="8bit" needs torchao: install it with'):
        check_optimizer(Optimizer(state_dtype="8bit"))
    with pytest.raises(ValueError, match="needs torchao"):
        build_optimizer([[nn.Parameter(torch.ones(2))]], Optimizer(state_dtype="8bit"), local_views, lambda _: 0)
    check_optimizer(Optimizer(state_dtype="bfloat16"))
