"""Layers whose weights stay on their ranks: outputs and gradients are those of one process, and little travels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from parallel.collectives import CollectiveCounter
from parallel.config import Parallelism
from parallel.data_parallel import apply_fsdp
from parallel.modulation_parallel import apply_modulation_parallel
from parallel.shards import copy_full_, full_tensor, local_bytes
from tests.distributed import faults
from tests.distributed.ranks import run_ranks

TOLERANCE = 1e-6  # relative; fp32 sums in another order
BF16_TOLERANCE = 2e-2  # relative; products of 8 bits, rounded before they are summed over copies
SAMPLES, WIDTH, OUTPUTS = (
    8,
    5,
    (7, 7, 3),
)  # which neither two nor four ranks divide; of four, one has no row of the last
NAMES = ["embed.weight", "embed.bias", *(f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias"))]


class Product(nn.Module):
    def forward(self, x_BD: Tensor, layers: list[nn.Linear]) -> list[Tensor]:
        return [layer(x_BD) for layer in layers]


class Model(nn.Module):
    """What makes the input of the layers is an ordinary layer of FSDP's."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, width, bias=bias) for width in OUTPUTS)
        self.product = Product()

    def forward(self, x_BD: Tensor) -> Tensor:
        return torch.cat(self.product(F.silu(self.embed(x_BD)), list(self.layers)), dim=1)


def make_values(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(one.shape, generator=generator) for name, one in model.named_parameters()}


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def build_split(copies: int, world: int, dtype: torch.dtype, bias: bool, cpu_offload: bool = False) -> Model:
    with torch.device("meta"):
        model = Model(bias)
    mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("dp_replicate", "fsdp"))
    stationary = apply_modulation_parallel(model, ["layers.*"], "product", mesh, dtype, torch.float32)
    assert stationary == {parameter for layer in model.layers for parameter in layer.parameters()}
    apply_fsdp(model, [], mesh, Parallelism(), dtype, torch.float32, cpu_offload, stationary)
    model.to_empty(device="cpu")
    return model


def compare(
    rank: int, world: int, copies: int, fault: str = "", dtype: torch.dtype = torch.float32, bias: bool = True
) -> dict[str, float]:
    """Distance from one process of the outputs of this rank's samples and of every gradient, after two passes."""
    if fault:
        getattr(faults, fault)()
    alone = Model(bias)
    values = make_values(alone)
    model = build_split(copies, world, dtype, bias)
    for one, split in zip(alone.named_parameters(), model.named_parameters(), strict=True):
        assert one[0] == split[0]
        copy_full_(one[1], values[one[0]])
        copy_full_(split[1], values[one[0]])
    x_BD = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))
    factors = torch.randn(SAMPLES, sum(OUTPUTS), generator=torch.Generator().manual_seed(2))
    mine = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    for _ in range(2):
        expected = alone(x_BD)
        (expected * factors).sum().backward()
        y = model(x_BD[mine].to(dtype))
        (y * factors[mine]).sum().backward()
    found = {"output": distance(y, expected[mine])}
    for (name, one), split in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert split.grad.dtype is torch.float32 and split.grad.placements == split.placements
        found[name] = distance(full_tensor(split.grad), one.grad)
    return found


LAYOUTS = pytest.mark.parametrize(
    ("world", "copies"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)], ids=["one", "fsdp 2", "fsdp 4", "ddp 2", "hsdp 2x2"]
)


@LAYOUTS
def test_outputs_and_gradients_are_those_of_one_process(world, copies):
    for found in run_ranks(compare, world, copies):
        assert len(found) == 1 + len(NAMES)
        assert {name: value for name, value in found.items() if not value < TOLERANCE} == {}


def test_without_bias():
    for found in run_ranks(compare, 2, 1, "", torch.float32, False):
        assert max(found.values()) < TOLERANCE and len(found) == 1 + 2 + 3


def test_in_bf16():
    for found in run_ranks(compare, 4, 2, "", torch.bfloat16):
        assert TOLERANCE < max(found.values()) < BF16_TOLERANCE


@pytest.mark.parametrize(
    ("fault", "copies"),
    [("modulation_stays_in_its_copy", 2), ("modulation_gradients_are_means", 1), ("modulation_of_other_samples", 1)],
)
def test_a_fault_is_seen(fault, copies):
    for found in run_ranks(compare, 4, copies, fault):
        assert min(found[name] for name in NAMES if name.startswith("layers")) > 100 * TOLERANCE


def describe(rank: int, world: int, copies: int) -> dict:
    model = build_split(copies, world, torch.bfloat16, bias=True)
    for parameter in model.parameters():
        copy_full_(parameter, torch.ones(parameter.shape))
    weight = model.layers[0].weight
    with CollectiveCounter() as counter:
        model(torch.ones(2, WIDTH, dtype=torch.bfloat16)).float().sum().backward()
    return {
        "same mesh": weight.device_mesh == model.embed.weight.device_mesh,
        "placements": [weight.placements == model.embed.weight.placements, weight.placements],
        "bytes": dict(counter.bytes),
        "calls": dict(counter.calls),
        "held": local_bytes(weight),
    }


def test_parameters_lie_as_those_of_fsdp_do():
    for world, copies, placements in ((4, 1, (Shard(0),)), (4, 2, (Replicate(), Shard(0)))):
        for told in run_ranks(describe, world, copies):
            assert told["same mesh"] and told["placements"] == [True, placements]
    assert [told["held"] for told in run_ranks(describe, 4, 1)] == [
        2 * WIDTH * 4,
        2 * WIDTH * 4,
        2 * WIDTH * 4,
        WIDTH * 4,
    ]


def test_outputs_travel_and_weights_do_not():
    (told, *_) = run_ranks(describe, 2, 1)
    rows = sum(-(-width // 2) for width in OUTPUTS)
    inputs = 2 * 2 * WIDTH * 4  # of two ranks, in the sum's dtype
    assert told["calls"] == {"all-gather": 2, "reduce-scatter": 2, "all-to-all": 2}
    assert told["bytes"]["all-to-all"] == 2 * (2 * 2 * rows * 2), "there and back, in bf16"
    padded = 6 * WIDTH + 6  # of FSDP's own layer, whose rows are rounded up
    assert told["bytes"]["all-gather"] == padded * 2 + inputs and told["bytes"]["reduce-scatter"] == padded * 4 + inputs
    (copied, *_) = run_ranks(describe, 2, 2)
    assert "all-to-all" not in copied["calls"]
    assert copied["bytes"]["all-reduce"] == 4 * (WIDTH + sum(OUTPUTS)) * (WIDTH + 1), "gradients of everything, in fp32"


def test_nothing_is_done_to_a_model_without_such_layers():
    model = Model()
    product = model.product
    assert apply_modulation_parallel(model, [], "product", None, torch.float32, torch.float32) == set()
    assert model.product is product
