"""Offload: the same numbers, all that blocks keep goes through the hooks, and no weight does."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh

from parallel import activation_offload
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.activation_offload import apply_activation_offload
from parallel.compile import apply_compile
from parallel.config import Compile
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.test_activation_checkpoint import EAGER, EXACT, NONE, SHARDED, expected
from tests.unit.parallel.tiny_model import (
    CONFIG,
    Result,
    blocks_of,
    build_tiny,
    largest_distance,
    make_inputs,
    run,
    shard,
)

MODES = {"none": NONE, **EAGER}
# What mode "operators" keeps without a compiler is not with autograd, and stays: it is refused with offload.
MOVING = [name for name in MODES if name != "operators"]


class Journey(saved_tensors_hooks):
    """As torch's save_on_cpu to a memory that is another one, which on a CPU there is not."""

    away: ClassVar[list[Tensor]] = []
    returned = 0

    def __init__(self, pin_memory: bool):
        def pack(tensor: Tensor) -> int:
            self.away.append(tensor.detach().clone())
            return len(self.away) - 1

        def unpack(number: int) -> Tensor:
            Journey.returned += 1
            return self.away[number]

        super().__init__(pack, unpack)


@pytest.fixture
def journey(monkeypatch: pytest.MonkeyPatch) -> type[Journey]:
    monkeypatch.setattr(activation_offload, "save_on_cpu", Journey)
    Journey.away, Journey.returned = [], 0
    return Journey


def build(mode: str = "none", backend: str = "") -> nn.Module:
    model = build_tiny()
    apply_activation_checkpoint(blocks_of(model), MODES[mode])
    apply_compile(blocks_of(model), Compile(enable=bool(backend), backend=backend))
    apply_activation_offload(blocks_of(model), pin_memory=False)
    return model


def travelling_weights(model: nn.Module) -> list[str]:
    """Those of the model's matrices that are among what has travelled, in either order of their dims."""
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    away = [one for one in Journey.away if one.ndim == 2]
    return [
        name
        for name, weight in matrices.items()
        if any(torch.equal(one, way) for one in away for way in (weight, weight.T))
    ]


@pytest.mark.parametrize("mode", MOVING)
def test_numbers_are_the_same_to_the_bit(mode):
    assert largest_distance(run(build(mode)), expected()) == EXACT


@pytest.mark.parametrize("mode", MOVING)
def test_what_blocks_keep_travels_and_comes_back(mode, journey):
    model = build(mode)
    assert largest_distance(run(model), expected()) == EXACT
    assert journey.returned >= len(journey.away) > 0
    assert not travelling_weights(model)


def test_with_whole_blocks_recomputed_only_inputs_travel(journey):
    model, inputs = build("full"), make_inputs()
    model(**inputs)
    samples, image = inputs["img_BTC"].shape[:2]
    text, width = inputs["txt_BLE"].shape[1], CONFIG.hidden_size
    found = sorted({tuple(one.shape) for one in journey.away if one.ndim == 3})
    assert found == sorted({(samples, image, width), (samples, text, width), (samples, image + text, width)})
    kept, journey.away = len(journey.away), []
    build("none")(**inputs)
    assert len(journey.away) > 3 * kept


def test_control_numbers_that_change_on_the_way_are_seen(journey):
    model = build()
    loss = model(**make_inputs()).float().square().sum()
    journey.away[7] *= 1 + 1e-3
    loss.backward()
    spoiled = Result(expected().velocity_BTC, {name: p.grad for name, p in model.named_parameters()})
    assert largest_distance(spoiled, expected()) > SHARDED


def test_control_weights_that_travel_are_seen(journey):
    model = build_tiny()
    with Journey(False):
        model(**make_inputs())
    assert len(travelling_weights(model)) > 6


def test_control_without_offload_nothing_travels(journey):
    run(build_tiny())
    assert journey.away == []


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow), "operators"])
def test_what_compiled_blocks_keep_travels(mode, journey):
    torch._dynamo.reset()
    model = build(mode, backend="aot_eager")
    assert largest_distance(run(model), expected()) < SHARDED
    assert journey.returned >= len(journey.away) > 0
    assert not travelling_weights(model)


def _sharded(rank: int, world_size: int, backend: str) -> tuple[float, int, int]:
    activation_offload.save_on_cpu = Journey
    model = build(backend=backend)
    shard(model, init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp_replicate", "fsdp")), torch.float32)
    own = run(model, {name: value[rank : rank + 1] for name, value in make_inputs().items()})
    whole = Result(expected().velocity_BTC[rank : rank + 1], expected().gradients)
    full = Result(own.velocity_BTC, {name: one.full_tensor() for name, one in own.gradients.items()})
    return largest_distance(full, whole), len(Journey.away), len(travelling_weights(build_tiny()))


@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_two_ranks_leave_gathered_weights_to_fsdp(backend):
    for distance, travelled, weights in run_ranks(_sharded, 2, backend):
        assert distance < SHARDED and travelled > 0 and weights == 0


def test_no_name_changes():
    assert [name for name, _ in build("full").named_parameters()] == [
        name for name, _ in build_tiny().named_parameters()
    ]
