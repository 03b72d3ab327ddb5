"""Diffusers' transformer with the weights of ours, to be compared with it."""

from collections.abc import Mapping

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from checkpoint.adapter import to_hf
from flux.spec import ModelSpec, TransformerConfig


def build_peer(config: TransformerConfig) -> nn.Module:
    """Diffusers' FLUX.1 of the same sizes, with weights of its own."""
    return FluxTransformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=config.guidance_embed,
        axes_dims_rope=config.axes_dim,
    )


def build_diffusers(spec: ModelSpec, weights: Mapping[str, Tensor]) -> nn.Module:
    """Diffusers' transformer of the same sizes with these weights."""
    with torch.device("meta"):
        model = build_peer(spec.transformer)
    renamed = {key: value.clone() for key, value in to_hf(weights, spec.diffusers_rules).items()}
    model.load_state_dict(renamed, assign=True)
    return model.train()


def predict_by_diffusers(model: nn.Module, inputs: Mapping[str, Tensor | None]) -> Tensor:
    img_ids_BTA, txt_ids_BLA = inputs["img_ids_BTA"], inputs["txt_ids_BLA"]
    assert img_ids_BTA is not None and txt_ids_BLA is not None
    return model(
        hidden_states=inputs["img_BTC"],
        encoder_hidden_states=inputs["txt_BLE"],
        pooled_projections=inputs["pooled_BV"],
        timestep=inputs["t_B"],
        guidance=inputs["guidance_B"],
        img_ids=img_ids_BTA[0],
        txt_ids=txt_ids_BLA[0],
        return_dict=False,
    )[0]
