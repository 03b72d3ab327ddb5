"""The tiny transformer with large random weights, on some inputs, and what it gives."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flux.model import FluxTransformer
from flux.plans import make_plan
from flux.positions import image_ids
from flux.spec import SPECS, PositionConfig
from parallel.config import Parallelism
from parallel.data_parallel import apply_fsdp
from parallel.modulation_parallel import apply_modulation_parallel

CONFIG = SPECS["flux-tiny"].transformer
BATCH, ROWS, COLUMNS, LENGTH = 2, 4, 8, 32  # token counts are multiples of 32, as 8-bit products want them


class Result(NamedTuple):
    velocity_BTC: Tensor
    gradients: dict[str, Tensor]


def build_tiny() -> FluxTransformer:
    """Weights large enough that no branch hides: fresh ones have closed gates."""
    model = FluxTransformer(CONFIG)
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.5, generator=generator)


def blocks_of(model: FluxTransformer) -> list[nn.Module]:
    return [*model.double_blocks, *model.single_blocks]


def shard(model: FluxTransformer, mesh: DeviceMesh, param_dtype: torch.dtype) -> None:
    """As parallelize does; the mesh is dp_replicate x fsdp."""
    plan, dtypes = make_plan(CONFIG), (param_dtype, torch.float32)
    stationary = apply_modulation_parallel(model, plan.modulation, plan.modulation_product, mesh, *dtypes)
    apply_fsdp(model, blocks_of(model), mesh, Parallelism(), *dtypes, False, stationary)


def make_inputs(columns: int = COLUMNS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    return {
        "img_BTC": normal(ROWS * columns, CONFIG.in_channels),
        "img_ids_BTA": image_ids(PositionConfig(), ROWS, columns).expand(BATCH, -1, -1),
        "txt_BLE": normal(LENGTH, CONFIG.context_dim),
        "txt_ids_BLA": torch.zeros(BATCH, LENGTH, 3, dtype=torch.int64),
        "t_B": torch.tensor([0.3, 0.8]),
        "pooled_BV": normal(CONFIG.pooled_dim or 1),
    }


def run(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Result:
    model.zero_grad()
    velocity_BTC = model(**(inputs or make_inputs()))
    velocity_BTC.float().square().sum().backward()
    return Result(velocity_BTC.detach(), {name: p.grad.clone() for name, p in model.named_parameters()})


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def largest_distance(a: Result, b: Result) -> float:
    """Relative, over the velocity and every gradient."""
    assert a.gradients.keys() == b.gradients.keys()
    pairs = [(a.velocity_BTC, b.velocity_BTC), *((a.gradients[name], b.gradients[name]) for name in a.gradients)]
    return max(distance(*pair) for pair in pairs)
