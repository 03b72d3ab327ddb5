"""The plan fits the transformer: every pattern finds what it means, and nothing that it does not."""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flux.model import FluxTransformer
from flux.plans import make_plan
from flux.spec import SPECS, TransformerConfig
from parallel.names import find_modules

ROOT = Path(__file__).resolve().parents[3]
TINY = SPECS["flux-tiny"].transformer
SWIGLU = replace(TINY, swiglu=True, bias=False, shared_modulation=True, pooled_dim=None)
CONFIGS = pytest.mark.parametrize(
    "config", [TINY, SPECS["flux-dev"].transformer, SWIGLU], ids=["tiny", "dev", "swiglu without bias"]
)


def build(config: TransformerConfig) -> FluxTransformer:
    with torch.device("meta"):
        return FluxTransformer(config)


@CONFIGS
def test_blocks_are_all_that_repeats_in_the_order_of_the_forward_pass(config):
    model, plan = build(config), make_plan(config)
    blocks = list(find_modules(model, plan.blocks).values())
    assert blocks == [*model.double_blocks, *model.single_blocks]
    assert len(find_modules(model, [plan.attention])) == len(blocks)
    assert not any(list(module.parameters()) for module in find_modules(model, [plan.attention]).values())


@CONFIGS
def test_tensor_parallel_splits_every_linear_layer_that_meets_heads_or_the_mlp(config):
    """In a block, only modulation is left whole."""
    model, plan = build(config), make_plan(config)
    column, row = find_modules(model, plan.column), find_modules(model, plan.row)
    assert not column.keys() & row.keys()
    linear = {
        name
        for block_name, block in find_modules(model, plan.blocks).items()
        for name in (f"{block_name}.{part}" for part, module in block.named_modules() if isinstance(module, nn.Linear))
    }
    rest = linear - column.keys() - row.keys()
    assert all(".modulation." in name or "_mod." in name for name in rest), rest
    assert find_modules(model, plan.quantized).keys() == column.keys() | row.keys()


@CONFIGS
def test_packed_pieces_have_the_hidden_size_or_the_mlps(config):
    """A piece is what one rank takes an equal part of: a whole number of heads, or of MLP columns."""
    model, plan = build(config), make_plan(config)
    width, mlp = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    for patterns, size in ((plan.column, "out_features"), (plan.row, "in_features")):
        for pattern, pieces in patterns.items():
            for module in find_modules(model, [pattern]).values():
                piece, rest = divmod(getattr(module, size), pieces)
                assert rest == 0 and piece in (width, mlp), (pattern, piece)


@CONFIGS
def test_norms_of_heads_are_those_of_queries_and_keys(config):
    model, plan = build(config), make_plan(config)
    norms = find_modules(model, plan.head_norms)
    assert len(norms) == 4 * config.depth + 2 * config.depth_single
    assert all(module.weight.shape == (config.head_dim,) for module in norms.values())
    assert all(name.endswith(("query_norm", "key_norm")) for name in norms)


@CONFIGS
def test_precise_weight_gradients_are_of_quantized_layers(config):
    model, plan = build(config), make_plan(config)
    precise = find_modules(model, plan.precise_weight_gradients)
    assert precise.keys() < find_modules(model, plan.quantized).keys()
    assert len(precise) == 2 * config.depth


def test_sequence_tensors_are_arguments_of_the_model_or_its_target():
    arguments = set(inspect.signature(FluxTransformer.forward).parameters)
    named = set(make_plan(TINY).sequence_tensors)
    assert named - arguments == {"target_BTC"}
    # By the legend of shapes: T image and L text tokens.
    with_tokens = {name for name in arguments if set(name.rpartition("_")[2]) & {"T", "L"} and name[-1].isupper()}
    assert with_tokens == named - {"target_BTC"}


def test_a_plan_needs_no_torch():
    program = "import sys, flux.plans; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
