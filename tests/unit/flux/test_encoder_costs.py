"""Sizes and operations of the frozen encoders, against published ones and against the loaded networks."""

import pytest

from flux.autoencoder import Autoencoder, AutoencoderConfig
from flux.config import Encoder
from flux.encoder_costs import count_encoders
from flux.spec import SPECS
from flux.text_folders import CLIP_NAME, T5_NAME

# Published counts; the autoencoder has both halves, of which only the encoder runs.
T5_XXL_ENCODER, CLIP_L_TEXT, AUTOENCODER = 4_762_310_656, 123_060_480, 83_819_683


def flux_encoders(**changes: object) -> Encoder:
    settings = {"t5_encoder": T5_NAME, "clip_encoder": CLIP_NAME, "autoencoder_path": "not/yet/there.safetensors"}
    return Encoder(**settings | {"max_t5_encoding_len": 256} | changes)  # type: ignore[arg-type]


def test_encoders_of_flux_before_they_are_downloaded() -> None:
    costs = count_encoders(flux_encoders(), SPECS["flux-dev"], False, 256)
    parameters = {name: cost.parameters for name, cost in costs.items()}
    assert parameters == {"t5": T5_XXL_ENCODER, "clip": CLIP_L_TEXT, "autoencoder": AUTOENCODER}
    # Every token meets every weight of a block, but not the table of embeddings; the rest is attention.
    block = costs["t5"].largest_block
    attention = 24 * 4 * 256 * 256 * 4096
    assert costs["t5"].flops == 2 * 256 * (24 * 12 * 4096**2 + 24 * 3 * 4096 * 10240 - 24 * 8 * 4096**2) + attention
    assert block == pytest.approx(T5_XXL_ENCODER / 24, rel=0.05)
    longer = count_encoders(flux_encoders(max_t5_encoding_len=512), SPECS["flux-dev"], False, 512)
    assert longer["t5"].flops > 2 * costs["t5"].flops
    assert longer["autoencoder"].flops == pytest.approx(4 * costs["autoencoder"].flops, rel=0.1)


def test_encoders_of_a_laptop_and_of_test_mode() -> None:
    tiny = count_encoders(Encoder(), SPECS["flux-tiny"], False, 64)
    assert all(cost.parameters < 10**6 for cost in tiny.values())
    random = count_encoders(Encoder(), SPECS["flux-debug"], True, 64)
    assert random["t5"].parameters > tiny["t5"].parameters
    full = sum(one.numel() for one in Autoencoder(AutoencoderConfig()).parameters())
    assert tiny["autoencoder"].parameters < full == AUTOENCODER


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="t5_encoder='nowhere' must be a folder"):
        count_encoders(flux_encoders(t5_encoder="nowhere"), SPECS["flux-dev"], False, 256)
