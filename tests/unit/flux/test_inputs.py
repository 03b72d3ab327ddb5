"""What the transformer is called with."""

from dataclasses import replace

import torch

from flux.batch import Draws, EncodedBatch, TextCond
from flux.inputs import make_inputs
from flux.spec import SPECS, PositionConfig


def make_encoded() -> tuple[EncodedBatch, Draws]:
    generator = torch.Generator().manual_seed(0)
    text = TextCond(torch.randn(2, 5, 128, generator=generator), torch.randn(2, 128, generator=generator))
    encoded = EncodedBatch(torch.randn(2, 6, 64, generator=generator), (2, 3), text)
    return encoded, Draws(torch.tensor([0.25, 0.75]), torch.randn(2, 6, 64, generator=generator), None)


def test_inputs_and_target_follow_the_convention():
    encoded, draws = make_encoded()
    inputs, target_BTC = make_inputs(encoded, draws, SPECS["flux-tiny"], 1.0, torch.float32)
    torch.testing.assert_close(inputs["img_BTC"][1], 0.25 * encoded.latents_BTC[1] + 0.75 * draws.noise_BTC[1])
    torch.testing.assert_close(target_BTC, draws.noise_BTC - encoded.latents_BTC)
    assert inputs["img_ids_BTA"][0].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert inputs["txt_ids_BLA"].shape == (2, 5, 3) and not inputs["txt_ids_BLA"].any()
    assert inputs["guidance_B"] is None and inputs["txt_mask_BL"] is None


def test_dtypes_ids_stay_int64_and_times_fp32():
    encoded, draws = make_encoded()
    inputs, target_BTC = make_inputs(encoded, draws, SPECS["flux-tiny"], 1.0, torch.bfloat16)
    assert {inputs[name].dtype for name in ("img_BTC", "txt_BLE", "pooled_BV")} == {torch.bfloat16}
    assert inputs["t_B"].dtype == target_BTC.dtype == torch.float32
    assert inputs["img_ids_BTA"].dtype == inputs["txt_ids_BLA"].dtype == torch.int64


def test_guidance_is_fed_only_to_models_that_embed_it():
    encoded, draws = make_encoded()
    inputs, _ = make_inputs(encoded, draws, SPECS["flux-dev"], 3.5, torch.float32)
    assert inputs["guidance_B"].tolist() == [3.5, 3.5]


def test_positions_come_from_the_flavor():
    encoded, draws = make_encoded()
    spec = replace(SPECS["flux-tiny"], positions=PositionConfig(axes=4, text="last_axis"))
    inputs, _ = make_inputs(encoded, draws, spec, 1.0, torch.float32)
    assert inputs["txt_ids_BLA"][0].tolist() == [[0, 0, 0, token] for token in range(5)]
