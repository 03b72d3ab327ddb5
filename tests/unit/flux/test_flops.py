"""The FLOP formula against torch's counter and published figures."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flux.flops import forward_flops, training_flops
from flux.model import TIME_FEATURES, FluxTransformer
from flux.spec import SPECS, TransformerConfig

BATCH, IMAGE_TOKENS, TEXT_TOKENS = 2, 900, 124
SMALL = TransformerConfig(
    in_channels=16,
    context_dim=48,
    pooled_dim=40,
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single=3,
    axes_dim=(8, 12, 12),
)
CONFIGS = {
    "schnell": SMALL,
    "dev": replace(SMALL, guidance_embed=True),
    "flux2": replace(SMALL, pooled_dim=None, bias=False, swiglu=True, shared_modulation=True, mlp_ratio=3.0),
    "qwen": replace(SMALL, pooled_dim=None, depth_single=0, context_norm=True),
}


def predict(config: TransformerConfig) -> torch.Tensor:
    """On the meta device, where torch's counter sees attention; on the CPU it counts none."""
    with torch.device("meta"):
        axes = len(config.axes_dim)
        return FluxTransformer(config)(
            img_BTC=torch.empty(BATCH, IMAGE_TOKENS, config.in_channels),
            img_ids_BTA=torch.zeros(BATCH, IMAGE_TOKENS, axes, dtype=torch.int64),
            txt_BLE=torch.empty(BATCH, TEXT_TOKENS, config.context_dim),
            txt_ids_BLA=torch.zeros(BATCH, TEXT_TOKENS, axes, dtype=torch.int64),
            t_B=torch.empty(BATCH),
            pooled_BV=torch.empty(BATCH, config.pooled_dim) if config.pooled_dim else None,
            guidance_B=torch.empty(BATCH) if config.guidance_embed else None,
        )


def uncomputed_flops(config: TransformerConfig) -> int:
    """Input gradients that backward skips because the model's inputs need none, of one sample."""
    widths = IMAGE_TOKENS * config.in_channels + TIME_FEATURES + (config.pooled_dim or 0)
    widths += TIME_FEATURES if config.guidance_embed else 0
    widths += 0 if config.context_norm else TEXT_TOKENS * config.context_dim  # the norm's weight needs a gradient
    return 2 * config.hidden_size * widths


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_what_torch_counts(config):
    with FlopCounterMode(display=False) as forward:
        velocity = predict(config)
    with FlopCounterMode(display=False) as backward:
        velocity.sum().backward()
    assert forward.get_total_flops() == BATCH * forward_flops(config, IMAGE_TOKENS, TEXT_TOKENS)
    expected = training_flops(config, IMAGE_TOKENS, TEXT_TOKENS) - uncomputed_flops(config)
    assert forward.get_total_flops() + backward.get_total_flops() == BATCH * expected


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_attention_matters_at_the_tested_size(config):
    """Otherwise an error in its term would hide."""
    with FlopCounterMode(display=False) as counter:
        predict(config)
    by_operator = counter.get_flop_counts()["Global"]
    attention = sum(
        flops for operator, flops in by_operator.items() if "attention" in str(operator) or "bmm" in str(operator)
    )
    assert attention > 0.2 * counter.get_total_flops()


@pytest.mark.parametrize("image_tokens, text_tokens, teraflop", [(256, 256, 20.42), (4096, 512, 223.2)])
def test_published_figures(image_tokens, text_tokens, teraflop):
    """They count the whole way of the text through the last block, of which most is not computed here."""
    config = SPECS["flux-schnell"].transformer
    left_out = 3 * 2 * text_tokens * 9 * config.hidden_size**2
    flops = training_flops(config, image_tokens, text_tokens) + left_out
    assert round(flops / 1e12, 2 if teraflop < 100 else 1) == teraflop


def test_parameters_times_tokens_is_not_the_answer():
    """The usual estimate is 1.8 times too much: modulation runs once per sample, a double block holds two streams."""
    config = SPECS["flux-schnell"].transformer
    estimate = 6 * 11_891_178_560 * 512
    assert 1.7 < estimate / training_flops(config, 256, 256) < 1.9
