"""The average of the weights: the formula, and the same numbers on every layout."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from parallel.shards import copy_full_, full_tensor
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.spread_layers import LAYOUTS, build_layers, make_full, world_size
from tests.unit.training.unread import Unread
from training.ema import build_ema, ema_decay, ema_weights, update_ema

STEPS, DECAY = 12, 0.5  # from step 8 on, (1 + step) / (10 + step) is above the decay
# float32 against float64: 12 updates round 3 times each, 6e-8 relative a time.
ROUNDING = 3e-6
MADE, SKIPPED = torch.zeros(()), torch.ones(())


def weights_of_step(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in (("a", (4, 3)), ("b", (5,)))}


def average_in_float64(weights, decays):
    average = weights[0].double()
    for weight, decay in zip(weights[1:], decays, strict=True):
        average = decay * average + (1 - decay) * weight.double()
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_the_formulas(dtype):
    history = [weights_of_step(step, dtype) for step in range(STEPS + 1)]
    ema = build_ema(history[0])
    for step in range(1, STEPS + 1):
        update_ema(ema, history[step], DECAY, step, MADE)
    decays = [min(DECAY, (1 + step) / (10 + step)) for step in range(1, STEPS + 1)]
    assert decays[0] < decays[6] < decays[8] == DECAY
    for name, average in ema.items():
        wanted = average_in_float64([weights[name] for weights in history], decays)
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), wanted, rtol=ROUNDING, atol=ROUNDING)
        without_warm_up = average_in_float64([weights[name] for weights in history], [DECAY] * STEPS)
        assert (average - without_warm_up).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_moves_no_average(dtype):
    """Bit by bit the same as without the call, and one that is made as with a number of the host's."""
    ema, wanted = build_ema(weights_of_step(0)), build_ema(weights_of_step(0))
    with Unread():
        for step, skip in enumerate([MADE, SKIPPED, MADE, MADE, SKIPPED], start=1):
            weights = weights_of_step(step, dtype)
            update_ema(ema, weights, 0.999, step, skip)
            for name, average in wanted.items() if skip is MADE else ():
                average.lerp_(weights[name].float(), 1 - ema_decay(0.999, step))
    assert all(torch.equal(ema[name].view(torch.int32), wanted[name].view(torch.int32)) for name in ema)
    update_ema(ema, weights, 0.999, 5, MADE)
    assert not torch.equal(ema["a"], wanted["a"])  # control


def test_early_steps_keep_little_and_late_ones_the_decay():
    assert ema_decay(0.9999, 1) == 2 / 11
    assert ema_decay(0.9999, 90) == 0.91
    assert ema_decay(0.9999, 10**6) == 0.9999
    assert ema_decay(0.0, 5) == 0.0


def test_a_move_too_small_for_bfloat16_is_kept():
    weights = {"a": torch.ones(1, dtype=torch.bfloat16)}
    ema = build_ema(weights)
    weights["a"] = torch.full((1,), 1.0078125, dtype=torch.bfloat16)  # the next number after 1
    update_ema(ema, weights, 0.999, 10**6, MADE)
    assert 1 < ema["a"].item() < 1.00001
    assert ema["a"].bfloat16().item() == 1


def test_the_average_shares_no_memory_with_the_weights():
    weights = weights_of_step(0)
    ema = build_ema(weights)
    before = ema["a"].clone()
    weights["a"].zero_()
    assert torch.equal(ema["a"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_holds_the_averages_inside_only(dtype):
    weights, changes = {name: torch.nn.Parameter(value) for name, value in weights_of_step(0, dtype).items()}, []
    ema = build_ema(weights_of_step(1))
    own = {name: value.detach().clone() for name, value in weights.items()}

    def on_change():
        changes.append(torch.equal(weights["a"], own["a"]))

    with pytest.raises(KeyboardInterrupt), ema_weights(ema, weights, on_change):
        assert all(torch.equal(weights[name], ema[name].to(dtype)) for name in ema)
        raise KeyboardInterrupt
    assert all(torch.equal(weights[name], own[name]) for name in own)
    assert all(weight.requires_grad for weight in weights.values())
    assert changes == [False, True]


def run_spread(rank: int, world: int, layout: str) -> dict:
    layers = build_layers(layout)
    parameters, alone = dict(layers.named_parameters()), {}
    for step in range(4):
        full = make_full(layers, seed=step)
        for name, parameter in parameters.items():
            copy_full_(parameter, full[name])
        with CommDebugMode() as communication:
            if step == 0:
                ema, alone = build_ema(parameters), build_ema(full)
            else:
                update_ema(ema, parameters, 0.9, step, MADE)
                update_ema(alone, full, 0.9, step, MADE)
        assert communication.get_total_counts() == 0
    changes: list[int] = []
    with ema_weights(ema, parameters, lambda: changes.append(1)):
        inside = [name for name in ema if not torch.equal(full_tensor(parameters[name]), full_tensor(ema[name]))]
    return {
        "wrong": [name for name in ema if not torch.equal(full_tensor(ema[name]), alone[name])],
        "moved": min(float((alone[name] - full[name]).abs().max()) for name in ema),
        "layouts": all(ema[name].placements == p.placements for name, p in parameters.items() if is_spread(p)),
        "inside": inside,
        "after": [name for name in ema if not torch.equal(full_tensor(parameters[name]), full[name])],
        "changes": len(changes),
    }


def is_spread(tensor):
    return isinstance(tensor, DTensor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same_average_without_communication(layout):
    for result in run_ranks(run_spread, world_size(layout), layout):
        assert result.pop("moved") > 0.1, "the averages are not just the weights"
        assert result == {"wrong": [], "layouts": True, "inside": [], "after": [], "changes": 2}


def run_float8(rank: int, world: int) -> list[tuple]:
    """Weights that FSDP gathers in float8 are of a subclass, which an average must not be."""
    from torch.distributed.device_mesh import init_device_mesh
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    torch.manual_seed(0)
    model = convert_to_float8_training(torch.nn.Sequential(torch.nn.Linear(16, 32)), config=config)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    parameters = dict(model.named_parameters())
    own = full_tensor(parameters["0.weight"]).clone()
    ema = build_ema(parameters)
    with torch.no_grad():
        parameters["0.weight"].mul_(3)
    update_ema(ema, parameters, 0.0, 1, MADE)
    with ema_weights(ema, parameters, model.reshard):
        drawn = model(torch.ones(1, 16)).detach()
    kind = type(parameters["0.weight"].to_local())
    return [
        type(ema["0.weight"].to_local()) is torch.Tensor and kind is not torch.Tensor,
        torch.equal(full_tensor(ema["0.weight"]), own * 3),
        bool(drawn.isfinite().all()),
    ]


def test_the_average_of_float8_gathered_weights_is_plain():
    pytest.importorskip("torchao")
    assert run_ranks(run_float8, 2) == [[True] * 3] * 2
