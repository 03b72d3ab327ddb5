"""What some weights are is told from names and shapes; what does not fit is named."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flux.identify import check_fits, describe, expected_shapes, find_flavor
from flux.spec import SPECS, TransformerConfig

each_flavor = pytest.mark.parametrize("flavor", SPECS)


def weights_of(config: TransformerConfig) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(config).items()}


def weights(flavor: str) -> dict[str, Tensor]:
    return weights_of(SPECS[flavor].transformer)


def refusal(tensors: dict[str, Tensor], flavor: str) -> str:
    with pytest.raises(ValueError) as raised:
        check_fits(tensors, SPECS[flavor], "x.safetensors")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@each_flavor
def test_every_flavor_is_recognized_and_fits_itself(flavor):
    assert find_flavor(weights(flavor)) == flavor
    check_fits(weights(flavor), SPECS[flavor], "x.safetensors")


@pytest.mark.parametrize("wanted", SPECS)
@each_flavor
def test_no_flavor_fits_another(flavor, wanted):
    if flavor != wanted:
        message = refusal(weights(flavor), wanted)
        assert f"x.safetensors holds a {flavor} (" in message
        assert f"but model.flavor={wanted!r} (" in message
        assert f"set model.flavor={flavor!r}" in message


def test_dev_in_place_of_schnell():
    assert refusal(weights("flux-dev"), "flux-schnell") == (
        "x.safetensors holds a flux-dev (hidden 3072, 19 + 38 blocks, guidance_in present), "
        "but model.flavor='flux-schnell' (hidden 3072, 19 + 38 blocks, guidance_in absent): "
        "set model.flavor='flux-dev' or take other weights"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"depth": 3}, "hidden 256, 3 + 4 blocks"),
        ({"hidden_size": 512}, "hidden 512, 2 + 4 blocks"),
        ({"context_dim": 64}, "context 64 instead of 128"),
        ({"pooled_dim": None}, "pooled None instead of 128"),
        ({"in_channels": 128}, "channels 128 instead of 64"),
        ({"guidance_embed": True}, "guidance_in present"),
    ],
    ids=str,
)
def test_what_is_no_known_flavor_is_described(change, told):
    config = replace(SPECS["flux-tiny"].transformer, **change)
    tensors = weights_of(replace(config, axes_dim=(16, 24, 24)) if "hidden_size" in change else config)
    assert find_flavor(tensors) is None
    message = refusal(tensors, "flux-tiny")
    assert "holds a transformer of no known flavor" in message and told in message


def test_other_weights_altogether():
    tensors = {"model.embed_tokens.weight": torch.ones(2, 2), "img_in.weight": torch.tensor(1.0)}
    assert find_flavor(tensors) is None
    assert describe(tensors) == "hidden unknown, 0 + 0 blocks, guidance_in absent"
    assert "no known flavor (hidden unknown" in refusal(tensors, "flux-tiny")


def test_missing_foreign_and_misshapen():
    """Of the right flavor, but not whole."""
    tensors = weights("flux-tiny")
    del tensors["double_blocks.1.img_mlp.2.bias"]
    assert find_flavor(tensors) == "flux-tiny"
    assert refusal(tensors, "flux-tiny") == (
        "x.safetensors does not fit model.flavor='flux-tiny', it lacks double_blocks.1.img_mlp.2.bias: "
        "take whole weights"
    )
    tensors = weights("flux-tiny") | {f"lora.{place}": torch.ones(1) for place in range(5)}
    assert "it has the foreign lora.0, lora.1, lora.2 and 2 more:" in refusal(tensors, "flux-tiny")
    tensors = weights("flux-tiny") | {"final_layer.linear.bias": torch.ones(63)}
    assert "it has another shape for final_layer.linear.bias ([63], not [64]):" in refusal(tensors, "flux-tiny")


def test_looking_makes_no_tensor():
    """Every check above is of shapes alone: the 12 B flavors take neither memory nor time."""
    assert sum(torch.Size(shape).numel() for shape in expected_shapes(SPECS["flux-dev"].transformer).values()) > 11e9
