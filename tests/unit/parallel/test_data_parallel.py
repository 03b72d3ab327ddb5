"""What the options of FSDP do: when weights are gathered, freed and fetched ahead, and how gradients travel."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from parallel.collectives import CollectiveCounter
from parallel.config import Parallelism
from parallel.data_parallel import apply_fsdp, reshard
from parallel.shards import local_bytes
from tests.distributed.ranks import run_ranks

BLOCKS = 4
DEFAULTS = Parallelism()


def build() -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    blocks = [nn.Linear(8, 8) for _ in range(BLOCKS)]
    return nn.Sequential(*blocks, nn.Linear(8, 8)), blocks


def options_of_fsdp(rank: int, world_size: int, section: Parallelism, dtypes: tuple[str, str]) -> dict:
    model, blocks = build()
    param_dtype, reduce_dtype = (getattr(torch, name) for name in dtypes)
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp_replicate", "fsdp"))
    apply_fsdp(model, blocks, mesh, section, param_dtype, reduce_dtype, cpu_offload=False)
    x = torch.ones(2, 8, dtype=param_dtype)
    counter = CollectiveCounter()
    with counter:
        model(x).float().sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
    ahead = [block._get_fsdp_state()._states_to_forward_prefetch for block in blocks]
    behind = [block._get_fsdp_state()._states_to_backward_prefetch for block in blocks]
    with torch.no_grad():
        model(x)
    left = sum(map(local_bytes, model.parameters()))
    reshard(model)
    return {
        "calls": dict(counter.calls),
        "bytes": dict(counter.bytes),
        "ahead": list(map(len, ahead)),
        "behind": list(map(len, behind)),
        "left": left,
        "own": sum(map(local_bytes, model.parameters())),
        "groups": sum(isinstance(module, FSDPModule) for module in model.modules()),
    }


def run(section: Parallelism = DEFAULTS, dtypes: tuple[str, str] = ("float32", "float32")) -> dict:
    return run_ranks(options_of_fsdp, 2, section, dtypes)[0]


WHOLE = (BLOCKS + 1) * (8 * 8 + 8) * 4


@pytest.mark.parametrize(("when", "gathers"), [("default", 2 * BLOCKS + 1), ("always", 2 * BLOCKS + 2), ("never", 5)])
def test_reshard_after_forward(when, gathers):
    told = run(Parallelism(fsdp_reshard_after_forward=when))
    assert told["calls"] == {"all-gather": gathers, "reduce-scatter": BLOCKS + 1}
    assert told["groups"] == BLOCKS + 1, "one for each block and one for the rest"
    assert told["own"] == WHOLE // 2, "reshard leaves a rank its own part"
    assert told["left"] == {"default": WHOLE // 2 + WHOLE // 10, "always": WHOLE // 2, "never": WHOLE}[when]


def test_gradients_travel_in_the_dtype_that_was_asked_for():
    whole = run(dtypes=("bfloat16", "float32"))
    halved = run(dtypes=("bfloat16", "bfloat16"))
    assert whole["bytes"]["reduce-scatter"] == WHOLE == 2 * halved["bytes"]["reduce-scatter"]
    assert whole["bytes"]["all-gather"] == halved["bytes"]["all-gather"]


def test_prefetching_looks_as_far_ahead_as_it_is_told():
    plain = run()
    assert plain["ahead"] == plain["behind"] == [0] * BLOCKS
    section = replace(DEFAULTS, fsdp_forward_prefetch=2, fsdp_backward_prefetch=3)
    told = run(section)
    assert told["ahead"] == [2, 2, 1, 0] and told["behind"] == [0, 1, 2, 3]
    assert told["calls"] == plain["calls"]
