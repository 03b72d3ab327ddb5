"""The whole transformer, split, against one process: outputs, loss and the full gradient of every parameter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

from flux.model import FluxTransformer
from flux.plans import ParallelPlan, make_plan
from flux.spec import SPECS, TransformerConfig
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.config import ActivationCheckpoint, Parallelism
from parallel.data_parallel import apply_fsdp
from parallel.modulation_parallel import apply_modulation_parallel
from parallel.shards import copy_full_, full_tensor
from parallel.tensor_parallel import apply_tensor_parallel, fsdp_placement
from tests.distributed.ranks import run_ranks

# Of the largest element of a tensor, in fp32: sums over columns and over samples are taken in another order (2e-6).
TOLERANCE = 1e-5
# The same with bf16 weights and activations: 8 bits of mantissa through a few layers (0.05, in key norms).
BF16_TOLERANCE = 0.15
CONFIGS = {
    "flux": SPECS["flux-tiny"].transformer,
    "flux2": TransformerConfig(
        in_channels=16,
        context_dim=24,
        pooled_dim=None,
        hidden_size=64,
        num_heads=4,
        depth=2,
        depth_single=2,
        mlp_ratio=3.0,
        axes_dim=(4, 6, 6),
        guidance_embed=True,
        bias=False,
        swiglu=True,
        shared_modulation=True,
    ),
    "qwen": TransformerConfig(
        in_channels=16,
        context_dim=24,
        pooled_dim=None,
        hidden_size=64,
        num_heads=4,
        depth=2,
        depth_single=1,
        axes_dim=(4, 6, 6),
        context_norm=True,
    ),
}
SAMPLES, IMAGE_TOKENS, TEXT_TOKENS = 4, 6, 5


def make_inputs(config: TransformerConfig) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def ids(tokens: int) -> Tensor:
        return torch.randint(0, 9, (SAMPLES, tokens, len(config.axes_dim)), generator=generator)

    mask_BL = torch.ones(SAMPLES, TEXT_TOKENS, dtype=torch.bool)
    mask_BL[1, 3:] = False
    return {
        "img_BTC": random(SAMPLES, IMAGE_TOKENS, config.in_channels),
        "img_ids_BTA": ids(IMAGE_TOKENS),
        "txt_BLE": random(SAMPLES, TEXT_TOKENS, config.context_dim),
        "txt_ids_BLA": ids(TEXT_TOKENS),
        "t_B": torch.rand(SAMPLES, generator=generator),
        "pooled_BV": random(SAMPLES, config.pooled_dim) if config.pooled_dim else None,
        "guidance_B": torch.rand(SAMPLES, generator=generator) if config.guidance_embed else None,
        "txt_mask_BL": mask_BL,
        "target_BTC": random(SAMPLES, IMAGE_TOKENS, config.in_channels),
    }


def make_weights(model: nn.Module) -> dict[str, Tensor]:
    """Large everywhere, gates and last layer too: each branch of the model counts."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator) * 0.6 / p.shape[-1] ** 0.5
        for name, p in model.named_parameters()
    }


def build_model(config: TransformerConfig) -> FluxTransformer:
    with torch.device("meta"):
        return FluxTransformer(config)


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        copy_full_(parameter, weights[name])


def predict(model: nn.Module, inputs: dict[str, Tensor | None], part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The velocity of some samples and their part of the loss, backward pass included."""
    own = {name: None if value is None else value[part] for name, value in inputs.items()}
    target_BTC = own.pop("target_BTC")
    velocity_BTC = model(**own)
    loss = (velocity_BTC.float() - target_BTC).square().sum() / inputs["target_BTC"].numel()
    loss.backward()
    return velocity_BTC.detach(), loss.detach()


def difference(a: Tensor, b: Tensor) -> float:
    """Of the largest element; a gradient that should not be zero and is differs by 1."""
    return ((a.float() - b).abs().max() / b.abs().max()).item()


def split_model(
    config: TransformerConfig,
    mesh: DeviceMesh,
    plan: ParallelPlan,
    prepare: Callable[[nn.Module], None],
    dtype: torch.dtype = torch.float32,
) -> FluxTransformer:
    """Over tp, and over fsdp where the mesh has it."""
    model = build_model(config)
    names = [name for name, _ in model.named_parameters()]
    apply_tensor_parallel(model, mesh["tp"], plan.column, plan.row, plan.head_norms)
    assert [name for name, _ in model.named_parameters()] == names
    for block in (*model.double_blocks, *model.single_blocks):
        prepare(block)
    if "fsdp" in mesh.mesh_dim_names:
        data = mesh[tuple(name for name in mesh.mesh_dim_names if name != "tp")]
        dtypes, blocks = (dtype, torch.float32), [*model.double_blocks, *model.single_blocks]
        stationary = apply_modulation_parallel(model, plan.modulation, plan.modulation_product, data, *dtypes)
        apply_fsdp(model, blocks, data, Parallelism(), *dtypes, False, stationary)
    return model


def leave(block: nn.Module) -> None:
    pass


def recompute(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)


def compile_block(block: nn.Module) -> None:
    block.compile(backend="aot_eager", fullgraph=True)


def compile_recomputed(block: nn.Module) -> None:
    apply_activation_checkpoint([block], ActivationCheckpoint(mode="selective", selective_ac_option="op"))
    compile_block(block)


PREPARATIONS = {
    "eager": leave,
    "recomputed": recompute,
    "compiled": compile_block,
    "compiled and recomputed by operator": compile_recomputed,
}


def compare(
    rank: int,
    world: int,
    family: str,
    axes: dict[str, int],
    fault: str = "",
    preparation: str = "eager",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Largest relative difference of outputs, loss and gradients from one process."""
    config = CONFIGS[family]
    axes = {"dp_replicate": 1, **axes} if "fsdp" in axes else axes
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    plan = make_plan(config)
    if fault == "qkv split as one piece":
        plan.column.update({name: 1 for name in plan.column if name.endswith("qkv")})
    elif fault == "linear2 split as one piece":
        plan.row.update({name: 1 for name in plan.row if name.endswith("linear2")})
    elif fault == "head norms as they are":
        object.__setattr__(plan, "head_norms", ())

    inputs, alone = make_inputs(config), build_model(config)
    weights = make_weights(alone)
    load(alone, weights)
    expected_BTC, expected_loss = predict(alone, inputs)

    model = split_model(config, mesh, plan, PREPARATIONS[preparation], dtype)
    load(model, weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(full_tensor(parameter), weights[name]), name
    shards = 1
    for name in axes:
        shards *= axes[name] if name != "tp" else 1
    mine = rank // axes["tp"]
    part = slice(mine * SAMPLES // shards, (mine + 1) * SAMPLES // shards)
    velocity_BTC, loss = predict(model, inputs, part)
    torch.distributed.all_reduce(loss)
    found = {
        "output": difference(velocity_BTC, expected_BTC[part]),
        "loss": difference(loss / axes["tp"], expected_loss),
    }
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        found[name] = difference(full_tensor(ours.grad), theirs.grad)
    return found


def largest(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(result[name] for result in results) for name in results[0]}


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("flux", {"tp": 2}),
        ("flux", {"tp": 4}),
        ("flux", {"fsdp": 2, "tp": 2}),
        ("flux2", {"tp": 4}),
        ("flux2", {"fsdp": 2, "tp": 2}),
        ("qwen", {"tp": 2}),
    ],
    ids=str,
)
def test_a_split_model_is_the_whole_model(family, axes):
    world = axes["tp"] * axes.get("fsdp", 1)
    found = largest(run_ranks(compare, world, family, axes))
    assert {name: value for name, value in found.items() if not value < TOLERANCE} == {}


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("qkv split as one piece", "output"),
        ("linear2 split as one piece", "output"),
        ("head norms as they are", "double_blocks.1.img_attn.norm.query_norm.weight"),
    ],
)
def test_the_comparison_sees_a_wrong_split(fault, wrong):
    found = largest(run_ranks(compare, 2, "flux", {"tp": 2}, fault))
    assert found[wrong] > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("preparation", "axes"),
    [
        ("recomputed", {"fsdp": 2, "tp": 2}),
        ("compiled", {"tp": 2}),
        pytest.param("compiled", {"fsdp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param("compiled and recomputed by operator", {"tp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_blocks_may_be_recomputed_and_compiled(preparation, axes):
    world = axes["tp"] * axes.get("fsdp", 1)
    found = largest(run_ranks(compare, world, "flux2", axes, "", preparation))
    assert {name: value for name, value in found.items() if not value < TOLERANCE} == {}


def test_a_split_model_computes_in_bf16_under_fsdp():
    axes = {"fsdp": 2, "tp": 2}
    found = largest(run_ranks(compare, 4, "flux2", axes, "", "eager", torch.bfloat16))
    assert {name: value for name, value in found.items() if not value < BF16_TOLERANCE} == {}
    assert found["output"] > TOLERANCE


@pytest.mark.slow
def test_copies_of_shards_of_a_split_model():
    axes = {"dp_replicate": 2, "fsdp": 2, "tp": 2}
    found = largest(run_ranks(compare, 8, "flux2", axes))
    assert {name: value for name, value in found.items() if not value < TOLERANCE} == {}


def count_collectives(rank: int, world: int) -> list[int]:
    config = CONFIGS["flux2"]
    plan = make_plan(config)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = split_model(config, mesh, plan, leave)
    load(model, make_weights(model))
    inputs = make_inputs(config)
    target_BTC = inputs.pop("target_BTC")
    with CommDebugMode() as forward:
        velocity_BTC = model(**inputs)
    with CommDebugMode() as backward:
        (velocity_BTC - target_BTC).square().sum().backward()
    return [forward.get_total_counts(), backward.get_total_counts()]


def test_a_block_sums_once_for_each_pair_of_layers():
    double, single = CONFIGS["flux2"].depth, CONFIGS["flux2"].depth_single
    forward = 4 * double + single
    backward = forward + 4 * double + 2 * single  # and one for the weight of each norm of heads
    assert run_ranks(count_collectives, 2) == [[forward, backward]] * 2


def refuse(rank: int, world: int) -> str:
    class Other(nn.Linear):
        pass

    with torch.device("meta"):
        model = nn.Sequential(Other(4, 4))
    with pytest.raises(ValueError) as caught:
        apply_tensor_parallel(model, init_device_mesh("cpu", (2,)), {"0": 1}, {}, ())
    return str(caught.value)


def test_converted_layers_are_refused():
    for message in run_ranks(refuse, 2):
        assert "parallelism.tensor_parallel_degree" in message and "model.converters" in message


def test_fsdp_splits_a_dim_that_is_whole():
    assert fsdp_placement(nn.Parameter(torch.zeros(4, 4))) == Shard(0)
    placements = run_ranks(place, 2)
    assert placements == [{"qkv.weight": 1, "qkv.bias": 0, "proj.weight": 0, "proj.bias": 0}] * 2


def place(rank: int, world: int) -> dict[str, int]:
    with torch.device("meta"):
        model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})
    apply_tensor_parallel(model, init_device_mesh("cpu", (2,)), {"qkv": 3}, {"proj": 1}, ())
    return {name: fsdp_placement(parameter).dim for name, parameter in model.named_parameters()}
