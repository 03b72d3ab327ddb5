"""Encoded batch + keyed draws -> what the transformer is called with, and its target.

Training and validation both come through here, so they cannot drift apart.
"""

import torch
from torch import Tensor

from flux.batch import Draws, EncodedBatch, TextCond
from flux.flow import make_noisy, make_target
from flux.positions import image_ids, text_ids
from flux.spec import ModelSpec


def make_inputs(
    encoded: EncodedBatch, draws: Draws, spec: ModelSpec, guidance: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Noises the latents at the drawn times.

    Args:
        encoded: latents and text features.
        draws: times and noise of the same samples.
        spec: the flavor, for positions and switches.
        guidance: value for models that embed it, ignored by the others.
        dtype: dtype of image tokens and text features; times stay fp32 and ids int64.

    Returns:
        Keyword arguments of FluxTransformer.forward, and target_BTC in fp32.
    """
    x_BTC = make_noisy(encoded.latents_BTC, draws.noise_BTC, draws.t_B)
    inputs = make_model_inputs(x_BTC, draws.t_B, encoded.text, encoded.grid, spec, guidance, dtype)
    return inputs, make_target(encoded.latents_BTC, draws.noise_BTC)


def make_model_inputs(
    x_BTC: Tensor,
    t_B: Tensor,
    text: TextCond,
    grid: tuple[int, int],
    spec: ModelSpec,
    guidance: float,
    dtype: torch.dtype,
) -> dict[str, Tensor | None]:
    """Keyword arguments of FluxTransformer.forward for noisy tokens at time t; sampling calls it at every step."""
    batch, device = x_BTC.shape[0], x_BTC.device
    img_ids_TA = image_ids(spec.positions, *grid, device=device)
    txt_ids_LA = text_ids(spec.positions, text.txt_BLE.shape[1], *grid, device)
    return {
        "img_BTC": x_BTC.to(dtype),
        "img_ids_BTA": img_ids_TA.expand(batch, -1, -1),
        "txt_BLE": text.txt_BLE.to(dtype),
        "txt_ids_BLA": txt_ids_LA.expand(batch, -1, -1),
        "t_B": t_B,
        "pooled_BV": None if text.pooled_BV is None else text.pooled_BV.to(dtype),
        "guidance_B": torch.full_like(t_B, guidance) if spec.transformer.guidance_embed else None,
        "txt_mask_BL": text.mask_BL,
    }
