"""8-bit products, emulated: really quantized, close to the plain ones, in every place where a block may run."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from flux.model import FluxTransformer
from flux.plans import make_plan
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.collectives import CollectiveCounter
from parallel.compile import apply_compile
from parallel.config import MX, ActivationCheckpoint, Compile, Float8, Quantize, QuantizeLinear
from parallel.data_parallel import reshard
from parallel.quantize import FLOAT8, MXFP8, after_update, apply_converters, check_converters
from parallel.shards import copy_full_, full_tensor
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.tiny_model import (
    CONFIG,
    Result,
    blocks_of,
    build_tiny,
    distance,
    largest_distance,
    make_inputs,
    shard,
)
from tests.unit.parallel.tiny_model import run as run_model

PLAN = make_plan(CONFIG)
QUANTIZED = 0.06  # relative error of one product: e4m3 keeps 3 bits (error up to 1/16), errors of a sum cancel in part
BF16 = 5e-3  # of a bf16 product: the same numbers, their sum rounded to 8 bits at the end
EXACT = 1e-6  # fp32 rounding: the same quantized numbers, added up in another order
# The velocity's error is less than that of one product, since the residual stream and the last layer are not quantized;
# gradients of few tokens err most: e5m2 keeps 2 bits.
MODEL = 0.4
CONDITIONS = ("time_in.", "vector_in.")

EMULATED = Float8(emulate=True)
RECIPES = {
    "tensorwise": (FLOAT8, EMULATED),
    "rowwise": (FLOAT8, replace(EMULATED, recipe_name="rowwise")),
    "rowwise_with_gw_hp": (FLOAT8, replace(EMULATED, recipe_name="rowwise_with_gw_hp")),
    "gathered": (FLOAT8, replace(EMULATED, enable_fsdp_float8_all_gather=True)),
    "mxfp8": (MXFP8, MX(recipe_name="mxfp8_emulated")),
}


def section_of(settings: Float8 | MX) -> Quantize:
    linear = QuantizeLinear(float8=settings) if isinstance(settings, Float8) else QuantizeLinear(mx=settings)
    return Quantize(linear=linear)


def convert(model: nn.Module, recipe: str, **changes: object) -> list[str]:
    converter, settings = RECIPES[recipe]
    section = section_of(replace(settings, **changes))
    return apply_converters(model, [converter], section, PLAN.quantized, PLAN.precise_weight_gradients)


def build(recipe: str | None) -> FluxTransformer:
    """Converted as a run does it: on the meta device, then filled."""
    with torch.device("meta"):
        model = FluxTransformer(CONFIG)
    if recipe:
        convert(model, recipe)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), build_tiny().parameters(), strict=True):
            copy_full_(parameter, value)
    return model


def plain_types(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_is_converted_by_name_and_keeps_its_names(recipe):
    model, plain = build(recipe), build_tiny()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    converted = plain_types(plain) - plain_types(model)
    assert len(converted) == 2 * 2 * 4 + 4 * 2  # layers of double and single blocks
    assert not any("mod" in name or "_in" in name or "final" in name for name in converted)
    ours, theirs = run_model(model), run_model(plain)
    assert 1e-4 < distance(ours.velocity_BTC, theirs.velocity_BTC) < QUANTIZED
    assert largest_distance(ours, theirs) < MODEL


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "name", ["single_blocks.0.linear1", "double_blocks.1.img_mlp.2", "double_blocks.0.txt_attn.qkv"]
)
def test_products_and_weight_gradients_of_a_layer(recipe, name):
    layer = build(recipe).to(torch.bfloat16).get_submodule(name)
    generator = torch.Generator().manual_seed(2)
    x_BSD = torch.randn(2, 16, layer.in_features, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    y_BSD = layer(x_BSD)
    assert y_BSD.dtype == torch.bfloat16
    exact = F.linear(x_BSD, torch.as_tensor(build_tiny().to(torch.bfloat16).get_submodule(name).weight), layer.bias)
    assert BF16 < distance(y_BSD, exact) < QUANTIZED
    gradient_BSD = torch.randn(y_BSD.shape, generator=generator, dtype=torch.bfloat16)
    y_BSD.backward(gradient_BSD)
    product = gradient_BSD.flatten(0, 1).T.float() @ x_BSD.detach().flatten(0, 1).float()
    error = distance(layer.weight.grad, product)
    if name.endswith("qkv") or recipe == "rowwise_with_gw_hp":
        assert error < BF16
    else:  # the control: other layers' gradients are 8-bit
        assert 2 * BF16 < error < 2 * QUANTIZED


def test_filtered_layers_and_odd_sizes_stay():
    model = build_tiny()
    model.single_blocks[1].linear2 = nn.Linear(256 + 1024 + 8, 256)
    names = convert(model, "tensorwise", filter_fqns=["img_mlp", "single_blocks.3"])
    left = plain_types(model)
    assert {"double_blocks.0.img_mlp.0", "single_blocks.3.linear1", "single_blocks.1.linear2"} <= left
    assert not left & set(names) and "single_blocks.1.linear1" in names
    with pytest.raises(ValueError, match="finds no layer to convert"):
        convert(build_tiny(), "tensorwise", filter_fqns=["blocks"])


@pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("mxfp8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("option", [pytest.param("1", marks=pytest.mark.slow), "op"])
def test_in_recomputed_compiled_blocks(recipe, option):
    torch._dynamo.reset()
    model, plain = build(recipe), build(recipe)
    blocks = blocks_of(model)
    apply_activation_checkpoint(blocks, ActivationCheckpoint(mode="selective", selective_ac_option=option))
    expected = run_model(plain)
    assert largest_distance(run_model(model), expected) == 0
    apply_compile(blocks, Compile(enable=True, backend="aot_eager"))
    # Rounding before a cast to 8 bits may choose another of two neighbors.
    assert largest_distance(run_model(model), expected) < QUANTIZED


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_it_learns(recipe):
    model = build(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = make_inputs()
    target_BTC = torch.randn(inputs["img_BTC"].shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(**inputs) - target_BTC).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# --- on two ranks


def _build_sharded(recipe: str, section: Quantize, ranks: int) -> FluxTransformer:
    with torch.device("meta"):
        model = FluxTransformer(CONFIG)
    converter = RECIPES[recipe][0]
    apply_converters(model, [converter], section, PLAN.quantized, PLAN.precise_weight_gradients)
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world // ranks, 1, ranks), mesh_dim_names=("alone", "dp_replicate", "fsdp"))
    shard(model, mesh["dp_replicate", "fsdp"], torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), build_tiny().parameters(), strict=True):
            copy_full_(parameter, value)
    return model


def _sample(index: int) -> dict[str, Tensor]:
    return {name: value[index : index + 1] for name, value in make_inputs().items()}


def _whole(result: Result) -> Result:
    return Result(result.velocity_BTC, {name: full_tensor(value) for name, value in result.gradients.items()})


def _split(result: Result) -> list[Result]:
    """What ranks add up in fp32; and the gradients of modulation and of what it is made of, which one bf16 product adds
    up.
    """
    names = {name for name in result.gradients if ".lin." in name or name.startswith(CONDITIONS)}
    groups = (result.gradients.keys() - names, names)
    return [Result(result.velocity_BTC, {name: result.gradients[name] for name in group}) for group in groups]


def _gathered_bytes(model: nn.Module) -> int:
    with CollectiveCounter() as collectives, torch.no_grad():
        model(**make_inputs())
    reshard(model)
    return collectives.bytes["all-gather"]


def _compare(rank: int, world_size: int, recipes: list[str]) -> dict[str, tuple]:
    """Distances of two ranks from one that takes both samples, before and after an update; a control; bytes."""
    answers = {}
    for recipe in recipes:
        converter, settings = RECIPES[recipe.removesuffix("_precomputed")]
        if recipe.endswith("_precomputed"):
            settings = replace(settings, precompute_float8_dynamic_scale_for_fsdp=True)
        section = section_of(settings)
        recipe_name = recipe.removesuffix("_precomputed")
        spread = _build_sharded(recipe_name, section, world_size)
        alone = _build_sharded(recipe_name, section, 1)
        found = []
        for _ in range(2):
            ours = _whole(run_model(spread, _sample(rank)))
            parts = [_whole(run_model(alone, _sample(index))) for index in range(world_size)]
            summed = {name: sum(part.gradients[name] for part in parts) for name in ours.gradients}
            whole = Result(parts[rank].velocity_BTC, summed)
            found.append([largest_distance(*pair) for pair in zip(_split(ours), _split(whole), strict=True)])
            for model in (spread, alone):
                for parameter, gradient in zip(model.parameters(), summed.values(), strict=True):
                    copy_full_(parameter.grad, gradient)
                torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step()
                after_update(model, [converter], section)
        control = largest_distance(ours, Result(parts[1 - rank].velocity_BTC, summed))
        answers[recipe] = (*found, control, _gathered_bytes(spread))
        for name, parameter in spread.named_parameters():
            assert type(full_tensor(parameter)) is Tensor and full_tensor(parameter).dtype == torch.float32, name
    return answers


def test_two_ranks_compute_what_one_does():
    """Also gathered in float8: the scale of a weight is that of the whole weight, not of a rank's part."""
    recipes = ["tensorwise", "gathered_precomputed", "mxfp8"]  # scales are precomputed after the first update
    for answers in run_ranks(_compare, 2, recipes):
        assert list(answers) == recipes
        for before, after, control, _ in answers.values():
            for added, multiplied in (before, after):
                assert added < EXACT and multiplied < BF16
            assert control > 100 * EXACT
        sizes = {recipe: answer[3] for recipe, answer in answers.items()}
        assert sizes["gathered_precomputed"] < 0.8 * sizes["tensorwise"]


# --- what is refused


@pytest.mark.parametrize(
    ("converters", "settings", "message"),
    [
        ([FLOAT8], Float8(), "compute capability 8.9 or newer .this: cpu.: set quantize.linear.float8.emulate=true"),
        ([MXFP8], MX(), "compute capability 10.0 or newer .this: cpu.: set .*recipe_name=.mxfp8_emulated"),
    ],
)
def test_refused(converters, settings, message):
    with pytest.raises(ValueError, match=message):
        check_converters(converters, section_of(settings), "cpu")


def test_capability_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r"this: NVIDIA A100, 8\.0"):
        check_converters([FLOAT8], section_of(Float8()), "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_converters([FLOAT8], section_of(Float8()), "cuda")
    with pytest.raises(ValueError, match=r"capability 10\.0"):
        check_converters([MXFP8], section_of(MX()), "cuda")


def test_missing_torchao(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="needs torchao: install it with"):
        check_converters([FLOAT8], section_of(EMULATED), "cpu")
    check_converters([], Quantize(), "cpu")


def test_starting_a_run_says_nothing_of_torchao():
    done = subprocess.run([sys.executable, "-c", "import train"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_filter_that_fits_nothing_is_refused():
    with torch.device("meta"):
        model = FluxTransformer(CONFIG)
    section = section_of(replace(EMULATED, filter_fqns=["blcoks"]))
    with pytest.raises(ValueError, match='filter_fqns holds "blcoks", which is part of no name'):
        apply_converters(model, [FLOAT8], section, PLAN.quantized, [])
