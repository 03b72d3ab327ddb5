"""Weights that leave in a published layout and come back are the same bits; names and shapes are the published ones."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.adapter import from_native, to_native
from checkpoint.exchange import DIFFUSERS_STEM, open_weights
from checkpoint.lazy import LazyTensor, lazy_all, read_all
from checkpoint.safetensors_file import SHARD_BYTES, write_safetensors, write_sharded
from flux.identify import check_fits, expected_shapes, find_flavor
from flux.model import FluxTransformer
from flux.rules import BFL_RULES, LAYOUTS, Rule
from flux.spec import SPECS
from scripts import convert_checkpoint
from tests.parity.families import (
    FAMILIES,
    FULL_SIZE,
    Family,
    call_flux1,
    diffusers,
    each_family,
    make_inputs,
    randomize,
)

WITH_BFL_FILE = FAMILIES[:4]  # Qwen-Image never had one
SMALL_SHARD = 100_000  # bytes, so that the tiny models fill several
TOLERANCE = 1e-5  # of the largest element: fp32 rounding, the two sum in other orders
VISIBLE = 100  # times the tolerance: what a negative control must exceed


def make_weights(family: Family, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = FluxTransformer(family.config)
    randomize(model)
    return model.to(dtype).state_dict()


def same_bits(ours: dict[str, LazyTensor], theirs: dict[str, Tensor]) -> bool:
    """`torch.equal` takes 0 and -0 for the same; their bytes differ."""
    tensors = read_all(ours)
    return tensors.keys() == theirs.keys() and all(
        tensors[name].dtype == theirs[name].dtype
        and torch.equal(tensors[name].reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))
        for name in theirs
    )


def write_diffusers(folder: Path, weights: dict[str, Tensor], rules: Sequence[Rule]) -> None:
    folder.mkdir(parents=True)
    tensors = from_native(lazy_all(weights), rules)
    write_sharded(folder, DIFFUSERS_STEM, tensors, None, {"format": "pt"}, SMALL_SHARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_family
def test_to_diffusers_and_back(family, dtype, tmp_path):
    weights = make_weights(family, dtype)
    write_diffusers(tmp_path / "transformer", weights, family.rules)
    assert len(list(tmp_path.glob("transformer/*.safetensors"))) > 2
    opened = open_weights(tmp_path, LAYOUTS)
    assert LAYOUTS[opened.layout] == family.rules
    assert same_bits(opened.tensors, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", WITH_BFL_FILE, ids=lambda family: family.name)
def test_to_black_forest_labs_and_back(family, dtype, tmp_path):
    weights = make_weights(family, dtype)
    write_safetensors(tmp_path / "x.safetensors", from_native(lazy_all(weights), BFL_RULES), None, {})
    opened = open_weights(tmp_path / "x.safetensors", LAYOUTS)
    assert LAYOUTS[opened.layout] == BFL_RULES
    assert same_bits(opened.tensors, weights)


@each_family
def test_a_flipped_sign_of_zero_shows(family, tmp_path):
    """The comparison above is of bits."""
    weights = make_weights(family)
    weights["img_in.weight"][0, 0] = 0.0
    write_diffusers(tmp_path / "transformer", weights, family.rules)
    weights["img_in.weight"][0, 0] = -0.0
    assert not same_bits(open_weights(tmp_path, LAYOUTS).tensors, weights)


@each_family
def test_a_layout_taken_for_another_shows(family, tmp_path):
    """Halves that are not exchanged on one of the two ways: names and shapes are right, values are not."""
    weights = make_weights(family)
    plain = tuple(Rule(rule.native, rule.other) for rule in family.rules)
    write_diffusers(tmp_path / "transformer", weights, plain)
    opened = open_weights(tmp_path, LAYOUTS)
    assert {name: tensor.shape for name, tensor in opened.tensors.items()} == expected_shapes(family.config)
    assert not same_bits(opened.tensors, weights)


@each_family
def test_every_lost_tensor_shows(family):
    """Each tensor of a folder, one at a time: a part of one of ours is missing, or one of ours as a whole."""
    weights = make_weights(family)
    other = from_native(lazy_all(weights), family.rules)
    for lost in other:
        kept = {name: tensor for name, tensor in other.items() if name != lost}
        try:
            assert len(weights.keys() - to_native(kept, family.rules).keys()) == 1, lost
        except ValueError as error:
            assert lost in str(error)


@pytest.mark.parametrize("row", FULL_SIZE, ids=[row[0] for row in FULL_SIZE])
def test_a_published_model_is_recognized(row):
    """From the names and shapes of diffusers; those that are no flavor here are not taken for one."""
    name, config, rules, build, *_ = row
    with torch.device("meta"):
        native = to_native(lazy_all(build(config).state_dict()), rules)
    assert find_flavor(native) == (name if name in SPECS else None)
    if name in SPECS:
        check_fits(native, SPECS[name], name)


@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 5_000_000], ids=["one file", "shards"])
def test_diffusers_loads_a_converted_file(tmp_path, monkeypatch, shard_bytes):
    """A file of Black Forest Labs, converted by the command, predicts in diffusers what the model predicts here."""
    monkeypatch.setattr(convert_checkpoint, "write_sharded", partial(write_sharded, shard_bytes=shard_bytes))
    spec = SPECS["flux-tiny"]
    family = replace(FAMILIES[0], config=spec.transformer)
    weights = make_weights(family)
    write_safetensors(tmp_path / "x.safetensors", from_native(lazy_all(weights), BFL_RULES), None, {})
    convert_checkpoint.main(
        ["--to", "diffusers", "--transformer-only", str(tmp_path / "x.safetensors"), str(tmp_path / "folder")]
    )
    assert (len(list(tmp_path.glob("folder/*.safetensors"))) > 2) == (shard_bytes < SHARD_BYTES)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "folder", local_files_only=True)
    ours, inputs = FluxTransformer(spec.transformer), make_inputs(family)
    ours.load_state_dict(weights)
    with torch.no_grad():
        expected = call_flux1(theirs, inputs)
        assert largest_error(ours(**inputs), expected) < TOLERANCE
        weights["final_layer.adaLN_modulation.1.bias"].copy_(
            weights["final_layer.adaLN_modulation.1.bias"].roll(spec.transformer.hidden_size)
        )
        ours.load_state_dict(weights)
        assert largest_error(ours(**inputs), expected) > VISIBLE * TOLERANCE  # shift and scale exchanged


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
