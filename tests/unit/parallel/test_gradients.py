import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from parallel.gradients import clip_grad_norm_, group_by_mesh, group_by_module
from parallel.shards import copy_full_, full_tensor
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.spread_layers import LAYOUTS, Layers, build_layers, make_full, world_size

NORM_TOLERANCE = 1e-5  # relative; square sums are fp32 within a rank
# Of single elements: a vectorized kernel rounds the last elements of a tensor otherwise (one rounding, 1.5e-8), and a
# part ends elsewhere than the whole.
UPDATE_TOLERANCE = 1e-6
STEPS = 10
ADAMW = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def with_gradients(layers: nn.Module, gradients: dict[str, torch.Tensor]) -> list[nn.Parameter]:
    """The parameters, with parts of full gradients; a layer without gradient is among them."""
    for name, parameter in layers.named_parameters():
        if name != "rows.bias":
            parameter.grad = torch.empty_like(parameter)
            copy_full_(parameter.grad, gradients[name])
    return list(layers.parameters())


def norm_of(gradients: dict[str, torch.Tensor], module: str = "") -> float:
    """Of the gradients of one module, or of all."""
    counted = [value for name, value in gradients.items() if name != "rows.bias" and name.startswith(module)]
    return math.sqrt(sum(value.double().square().sum().item() for value in counted))


def all_of(*parameters: nn.Parameter) -> dict[str, list[nn.Parameter]]:
    return {"all": list(parameters)}


def clip_spread(rank: int, world: int, layout: str) -> dict:
    layers = build_layers(layout)
    gradients = make_full(layers, seed=1)
    norm = norm_of(gradients)
    parameters = with_gradients(layers, gradients)
    local_square = sum(p.grad.to_local().square().sum() if isinstance(p.grad, DTensor) else p.grad.square().sum()
                       for p in parameters if p.grad is not None)  # fmt: skip
    dist.all_reduce(local_square)
    with CommDebugMode() as communication:
        measured, by_module = clip_grad_norm_(group_by_module(layers), max_norm=norm / 4)
    off = [
        (full_tensor(p.grad) - gradients[name] / 4).abs().max().item()
        for name, p in layers.named_parameters()
        if p.grad is not None
    ]
    return {
        "type": type(measured),
        "norm": measured.item(),
        "expected": norm,
        "by_module": {name: value.item() for name, value in by_module.items()},
        "expected_by_module": {name: norm_of(gradients, f"{name}.") for name, _ in layers.named_children()},
        "every_copy_counted": local_square.sqrt().item(),
        "collectives": communication.get_total_counts(),
        "off": max(off),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_counts_once_however_it_is_spread(layout):
    results = run_ranks(clip_spread, world_size(layout), layout)
    splitting = [axis for axis in LAYOUTS[layout] if axis != "dp_replicate"]
    for result in results:
        assert result["type"] is torch.Tensor
        assert result["norm"] == results[0]["norm"]
        assert result["norm"] == pytest.approx(result["expected"], rel=NORM_TOLERANCE)
        assert result["by_module"] == results[0]["by_module"]
        assert result["by_module"] == pytest.approx(result["expected_by_module"], rel=NORM_TOLERANCE)
        assert math.hypot(*result["by_module"].values()) == pytest.approx(result["norm"], rel=NORM_TOLERANCE)
        assert result["off"] < NORM_TOLERANCE
        assert result["collectives"] <= len(splitting)
        # The same comparison sees gradients that are counted once for each rank that holds them.
        counted_once = layout == "fsdp_3"
        assert (result["every_copy_counted"] == pytest.approx(result["expected"], rel=NORM_TOLERANCE)) is counted_once


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_plain_gradients_are_clipped_as_torch_does(max_norm):
    layers = Layers()
    gradients = make_full(layers, seed=1)
    ours, theirs = with_gradients(layers, gradients), with_gradients(copy.deepcopy(layers), gradients)
    norm, expected = clip_grad_norm_(all_of(*ours), max_norm)[0], nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected, rtol=NORM_TOLERANCE, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=NORM_TOLERANCE, atol=0)
    assert (ours[0].grad == gradients["packed_rows.weight"]).all() == (max_norm > norm)


def test_no_gradients_have_the_norm_zero():
    assert clip_grad_norm_(all_of(nn.Parameter(torch.ones(2))), 1.0) == (0, {})


def test_a_number_that_is_none_makes_the_norm_so():
    parameter, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    parameter.grad, other.grad = torch.tensor([1.0, torch.nan]), torch.tensor([3.0, 4.0])
    norm, by_module = clip_grad_norm_({"a": [parameter], "b": [other]}, 1.0)
    assert norm.isnan() and by_module["a"].isnan() and by_module["b"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_numbers_is_exact(dtype):
    parameter = nn.Parameter(torch.zeros(2**22, dtype=dtype))
    parameter.grad = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = parameter.grad.double().norm().item()
    summed_at_once = torch.linalg.vector_norm(parameter.grad).item()
    assert clip_grad_norm_(all_of(parameter), 1e9)[0].item() == pytest.approx(expected, rel=NORM_TOLERANCE)
    assert summed_at_once != pytest.approx(expected, rel=NORM_TOLERANCE)


def test_gradients_of_two_dtypes_are_clipped_together():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    assert clip_grad_norm_(all_of(*parameters), 1.0)[0].item() == pytest.approx(28**0.5)
    assert parameters[1].grad.dtype is torch.bfloat16
    assert parameters[1].grad[0].item() == pytest.approx(2 / 28**0.5, rel=2**-8)  # as exact as bf16 is


def update(layers: nn.Module, initial: dict, option: str) -> None:
    """Ten steps of AdamW, one parameter group for each mesh."""
    for name, parameter in layers.named_parameters():
        copy_full_(parameter, initial[name])
    groups = [{"params": group} for group in group_by_mesh(layers.parameters())]
    optimizer = torch.optim.AdamW(groups, **ADAMW, **{option: True})
    for step in range(STEPS):
        with_gradients(layers, make_full(layers, seed=10 + step))
        optimizer.step()


def update_spread(rank: int, world: int, layout: str) -> dict:
    layers, alone = build_layers(layout), Layers()
    initial, off = make_full(alone, seed=0), {}
    for option in ("fused", "foreach"):
        update(layers, initial, option)
        update(alone, initial, option)
        pairs = zip(layers.parameters(), alone.parameters(), strict=True)
        off[option] = max((full_tensor(a) - b).abs().max().item() for a, b in pairs)
    with_gradients(alone, make_full(alone, seed=99))
    torch.optim.AdamW(alone.parameters(), **(ADAMW | {"lr": 1e-4})).step()
    pairs = zip(layers.parameters(), alone.parameters(), strict=True)
    off["one small step more"] = max((full_tensor(a) - b).abs().max().item() for a, b in pairs)
    return off


@pytest.mark.parametrize("layout", ["hsdp_2_2", "tp_2", "fsdp_2_tp_2"])
def test_adamw_updates_parts_as_it_does_the_whole(layout):
    for off in run_ranks(update_spread, world_size(layout), layout):
        assert off["fused"] < UPDATE_TOLERANCE and off["foreach"] < UPDATE_TOLERANCE
        assert off["one small step more"] > UPDATE_TOLERANCE


def group_spread(rank: int, world: int, layout: str) -> list[list[str]]:
    layers = build_layers(layout)
    names = {parameter: name for name, parameter in layers.named_parameters()}
    return [[names[parameter] for parameter in group] for group in group_by_mesh(layers.parameters())]


def test_groups_are_those_of_one_mesh_in_the_order_of_the_model():
    order = [name for name, _ in Layers().named_parameters()]
    weights = ["packed_rows.weight", "packed_columns.weight", "rows.weight", "columns.weight"]
    rest = [name for name in order if name not in weights]
    assert run_ranks(group_spread, 2, "tp_2") == [[rest, weights]] * 2
    assert run_ranks(group_spread, 3, "fsdp_3") == [[order]] * 3
    assert run_ranks(group_spread, 4, "fsdp_2_tp_2") == [[weights, rest]] * 4


def test_groups_of_modules_hold_every_parameter_once():
    layers = Layers()
    groups = group_by_module(layers)
    assert list(groups) == [name for name, _ in layers.named_children()]
    assert [id(one) for group in groups.values() for one in group] == [id(one) for one in layers.parameters()]


def test_plain_parameters_are_one_group():
    parameters = list(Layers().parameters())
    assert group_by_mesh(iter(parameters)) == [parameters]
    assert group_by_mesh([]) == []
