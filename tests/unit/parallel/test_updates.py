"""Ratios of update to weight are those of whole tensors, however these are spread."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from parallel.gradients import group_by_module
from parallel.shards import copy_full_, full_tensor, local_part
from parallel.updates import copy_parts, middle_blocks, update_ratios
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.spread_layers import LAYOUTS, Layers, build_layers, make_full, world_size

RATIO_TOLERANCE = 1e-5  # relative; square sums are fp32 within a rank
DIRECTIONS = make_full(Layers(), seed=3)  # in which an update moves each parameter


def norm(tensors: list[torch.Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


def move(layers: nn.Module, step: float) -> None:
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            copy_full_(parameter, full_tensor(parameter) + step * DIRECTIONS[name])


def measure(layers: nn.Module, step: float) -> dict[str, float]:
    groups = group_by_module(layers)
    before = copy_parts(groups)
    move(layers, step)
    return {name: ratio.item() for name, ratio in update_ratios(groups, before).items()}


def measure_spread(rank: int, world: int, layout: str) -> dict:
    layers, whole = build_layers(layout), make_full(Layers(), seed=0)
    for name, parameter in layers.named_parameters():
        copy_full_(parameter, whole[name])
    groups = group_by_module(layers)
    before = copy_parts(groups)
    held = sum(part.numel() for part in before.values())
    move(layers, 0.01)
    with CommDebugMode() as communication:
        ratios = {name: ratio.item() for name, ratio in update_ratios(groups, before).items()}
    expected, own = {}, {}
    for module, parameters in groups.items():
        names = [name for name in whole if name.startswith(f"{module}.")]
        expected[module] = 0.01 * norm([DIRECTIONS[name] for name in names]) / norm([whole[name] for name in names])
        size = norm([local_part(parameter) for parameter in parameters])
        own[module] = norm([before[parameter] for parameter in parameters]) / size if size else 0.0
    return {
        "ratios": ratios,
        "expected": expected,
        "own": own,  # of this rank's parts alone
        "held": held,
        "collectives": communication.get_total_counts(),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_counts_once_however_it_is_spread(layout):
    results = run_ranks(measure_spread, world_size(layout), layout)
    splitting = [axis for axis in LAYOUTS[layout] if axis != "dp_replicate"]
    for result in results:
        assert result["ratios"] == results[0]["ratios"]
        assert result["ratios"] == pytest.approx(result["expected"], rel=RATIO_TOLERANCE)
        assert result["own"] != pytest.approx(result["expected"], rel=100 * RATIO_TOLERANCE)
        assert result["collectives"] <= 2 * len(splitting)
        assert result["held"] < sum(value.numel() for value in DIRECTIONS.values()), "copies are of a rank's own part"


def test_half_a_step_is_half_the_ratio_and_no_step_is_none():
    layers = Layers()
    halves, whole = measure(copy.deepcopy(layers), 0.005), measure(layers, 0.01)
    assert {name: 2 * ratio for name, ratio in halves.items()} == pytest.approx(whole, rel=RATIO_TOLERANCE)
    assert set(measure(layers, 0.0).values()) == {0.0}


def test_bf16_weights_are_measured_as_they_are_stored():
    parameter = nn.Parameter(torch.full((2**10,), 1.0, dtype=torch.bfloat16))
    before = copy_parts({"all": [parameter]})
    with torch.no_grad():
        parameter += 2**-7
    assert update_ratios({"all": [parameter]}, before)["all"] == 2**-7
    before = copy_parts({"all": [parameter]})
    with torch.no_grad():
        parameter += 2**-12  # rounded away: nothing was learned
    assert update_ratios({"all": [parameter]}, before)["all"] == 0


def test_the_middle_one_of_each_kind_is_watched():
    model = nn.Module()
    model.thick = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model.thin = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    found = middle_blocks(model, ("thick.*", "thin.*"))
    assert [id(one) for one in found["thick"]] == [id(one) for one in model.thick[1].parameters()]
    assert [id(one) for one in found["thin"]] == [id(one) for one in model.thin[2].parameters()]
    with pytest.raises(ValueError, match=r"no module of Module is called wide\.\*"):
        middle_blocks(model, ("wide.*",))
