"""Transformer against diffusers': forward, gradients, parameter counts and key sets. Random weights, no downloads."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint.adapter import from_hf, to_hf
from flux.model import FluxTransformer
from flux.rules import BFL_RULES
from tests.parity.families import FAMILIES, FULL_SIZE, LENGTH, Family, each_family, make_inputs, randomize, shapes

TOLERANCE = 1e-5  # fp32 rounding, in units of the largest element of a tensor; the two sum in other orders
VISIBLE = 100  # times the tolerance: what a negative control must exceed


def build_pair(family: Family) -> tuple[FluxTransformer, nn.Module]:
    other = family.build(family.config)
    randomize(other)
    ours = FluxTransformer(family.config)
    ours.load_state_dict(from_hf(other.state_dict(), family.rules), strict=True)
    return ours, other


def run(call: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prediction, and the gradients of the inputs for a random direction of the output."""
    leaves = {
        name: inputs[name].clone().requires_grad_() for name in ("img_BTC", "txt_BLE", "pooled_BV") if name in inputs
    }
    velocity_BTC = call({**inputs, **leaves})
    direction_BTC = torch.randn(velocity_BTC.shape, generator=torch.Generator().manual_seed(3))
    (velocity_BTC * direction_BTC).sum().backward()
    grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {"velocity": velocity_BTC.detach(), **grads}


def parameter_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Zeros where there is none: what the last block makes of the text is not used if no single block follows."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any two tensors of the same name, in units of the largest element."""
    assert ours.keys() == theirs.keys()
    tiny = 1e-12  # a tensor of zeros must be met by zeros
    return max(
        ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=tiny)).item() for name in theirs
    )


@each_family
def test_forward_and_gradients(family):
    ours, other = build_pair(family)
    inputs = make_inputs(family)
    result = run(lambda given: ours(**given), inputs)
    expected = run(lambda given: family.call(other, given), inputs)
    assert distance(result, expected) < TOLERANCE
    assert distance(to_hf(parameter_gradients(ours), family.rules), parameter_gradients(other)) < TOLERANCE


def fault_wrong_id(model: FluxTransformer, inputs: dict[str, Tensor], family: Family) -> None:
    inputs["img_ids_BTA"][:, 4, 1] += 1


def fault_uncounted_text(model: FluxTransformer, inputs: dict[str, Tensor], family: Family) -> None:
    inputs["txt_ids_BLA"][:, LENGTH // 2 :, -1] += 1


def fault_causal(model: FluxTransformer, inputs: dict[str, Tensor], family: Family) -> None:
    class Causal(nn.Module):
        def forward(self, q_BSNK, k_BSNK, v_BSNK, mask_BS=None):
            q, k, v = (x.transpose(1, 2) for x in (q_BSNK, k_BSNK, v_BSNK))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    for block in (*model.double_blocks, *model.single_blocks):
        block.attention = Causal()


def fault_swapped_final(model: FluxTransformer, inputs: dict[str, Tensor], family: Family) -> None:
    """Shift and scale of the last layer as diffusers orders them."""
    for parameter in model.final_layer.adaLN_modulation.parameters():
        parameter.data = torch.cat(parameter.data.chunk(2)[::-1])


def fault_swapped_block(model: FluxTransformer, inputs: dict[str, Tensor], family: Family) -> None:
    """Shift and scale of the first image attention (of all, where they are shared)."""
    shared = family.config.shared_modulation
    linear = model.double_stream_modulation_img.lin if shared else model.double_blocks[0].img_mod.lin
    for parameter in linear.parameters():
        shift, scale, *rest = parameter.data.chunk(6)
        parameter.data = torch.cat((scale, shift, *rest))


FAULTS = (fault_wrong_id, fault_uncounted_text, fault_causal, fault_swapped_final, fault_swapped_block)


@each_family
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_control_fault_shows(family, fault):
    """With each of these faults the comparison above fails by a wide margin, in the prediction and in the gradients."""
    ours, other = build_pair(family)
    inputs = make_inputs(family)
    expected = run(lambda given: family.call(other, given), inputs)
    faulty = {name: value.clone() for name, value in inputs.items()}
    fault(ours, faulty, family)
    result = run(lambda given: ours(**given), faulty)
    assert distance({"": result["velocity"]}, {"": expected["velocity"]}) > VISIBLE * TOLERANCE
    converted = to_hf(parameter_gradients(ours), family.rules)
    assert distance(converted, parameter_gradients(other)) > VISIBLE * TOLERANCE


@pytest.mark.parametrize(
    "config, rules, build, parameters, keys, other_keys",
    [row[1:] for row in FULL_SIZE],
    ids=[row[0] for row in FULL_SIZE],
)
def test_full_size(config, rules, build, parameters, keys, other_keys):
    with torch.device("meta"):
        ours, theirs = FluxTransformer(config).state_dict(), build(config).state_dict()
    assert sum(value.numel() for value in ours.values()) == parameters
    assert (len(ours), len(theirs)) == (keys, other_keys)
    assert shapes(to_hf(ours, rules)) == shapes(theirs)
    assert shapes(from_hf(theirs, rules)) == shapes(ours)


@each_family
def test_conversion_is_exact_both_ways(family):
    other = family.build(family.config)
    randomize(other)
    weights = other.state_dict()
    back = to_hf(from_hf(weights, family.rules), family.rules)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("family", FAMILIES[:4], ids=lambda family: family.name)
def test_black_forest_labs_files(family):
    """Their files have our names, but for the query and key norms; Qwen-Image never had such a file."""
    weights = FluxTransformer(family.config).state_dict()
    exported = to_hf(weights, BFL_RULES)
    norms = {name.replace(".weight", ".scale") for name in weights if name.endswith("_norm.weight")}
    assert "double_blocks.1.txt_attn.norm.key_norm.scale" in norms
    assert exported.keys() == {name for name in weights if not name.endswith("_norm.weight")} | norms
    back = from_hf(exported, BFL_RULES)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
