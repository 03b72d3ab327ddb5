"""The model families that one transformer covers, tiny and at full size, and how diffusers builds and calls each."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from flux.positions import image_ids, text_ids
from flux.rules import FLUX1_DIFFUSERS_RULES, FLUX2_DIFFUSERS_RULES, QWEN_DIFFUSERS_RULES, Rule
from flux.spec import SPECS, PositionConfig, TransformerConfig

diffusers = pytest.importorskip("diffusers")

BATCH, ROWS, COLUMNS, LENGTH = 2, 3, 5, 7  # odd and unequal, so that swapped axes show

FLUX2_DEV = TransformerConfig(
    in_channels=128,
    context_dim=15360,
    pooled_dim=None,
    hidden_size=6144,
    num_heads=48,
    depth=8,
    depth_single=48,
    mlp_ratio=3.0,
    axes_dim=(32, 32, 32, 32),
    theta=2000,
    guidance_embed=True,
    bias=False,
    swiglu=True,
    shared_modulation=True,
)
FLUX2_KLEIN_4B = replace(
    FLUX2_DEV, context_dim=7680, hidden_size=3072, num_heads=24, depth=5, depth_single=20, guidance_embed=False
)
FLUX2_KLEIN_9B = replace(
    FLUX2_DEV, context_dim=12288, hidden_size=4096, num_heads=32, depth=8, depth_single=24, guidance_embed=False
)
QWEN_IMAGE = TransformerConfig(context_dim=3584, pooled_dim=None, depth=60, depth_single=0, context_norm=True)


def build_flux1(config: TransformerConfig) -> nn.Module:
    from benchmarks.diffusers_peer import build_peer  # needs diffusers, which may be missing

    return build_peer(config)


def build_flux2(config: TransformerConfig) -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        mlp_ratio=config.mlp_ratio,
        axes_dims_rope=config.axes_dim,
        rope_theta=config.theta,
        guidance_embeds=config.guidance_embed,
    )


def build_qwen(config: TransformerConfig) -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels // 4,
        num_layers=config.depth,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        axes_dims_rope=config.axes_dim,
    )


def call_flux1(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return call_flux2(model, inputs, pooled_projections=inputs["pooled_BV"])


def call_flux2(model: nn.Module, inputs: dict[str, Tensor], **more: Tensor) -> Tensor:
    return model(
        hidden_states=inputs["img_BTC"],
        encoder_hidden_states=inputs["txt_BLE"],
        timestep=inputs["t_B"],
        guidance=inputs.get("guidance_B"),
        img_ids=inputs["img_ids_BTA"][0],
        txt_ids=inputs["txt_ids_BLA"][0],
        return_dict=False,
        **more,
    )[0]


def call_qwen(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Qwen-Image makes its positions itself, from the size of the picture."""
    return model(
        hidden_states=inputs["img_BTC"],
        encoder_hidden_states=inputs["txt_BLE"],
        encoder_hidden_states_mask=inputs["txt_mask_BL"],
        timestep=inputs["t_B"],
        img_shapes=[[(1, ROWS, COLUMNS)]] * BATCH,
        return_dict=False,
    )[0]


@dataclass(frozen=True)
class Family:
    name: str
    config: TransformerConfig
    positions: PositionConfig
    rules: tuple[Rule, ...]
    build: Callable[[TransformerConfig], nn.Module]
    call: Callable[[nn.Module, dict[str, Tensor]], Tensor]


_TINY = TransformerConfig(
    in_channels=16,
    context_dim=24,
    pooled_dim=20,
    hidden_size=64,
    num_heads=4,
    depth=2,
    depth_single=2,
    axes_dim=(4, 6, 6),
)
_TINY_FLUX2 = replace(
    FLUX2_DEV, in_channels=16, context_dim=24, hidden_size=64, num_heads=4, depth=2, depth_single=2, axes_dim=(4,) * 4
)
_FLUX2_POSITIONS = PositionConfig(axes=4, reference_stride=10, text="last_axis")
FAMILIES = (
    Family("flux1-schnell", _TINY, PositionConfig(), FLUX1_DIFFUSERS_RULES, build_flux1, call_flux1),
    Family(
        "flux1-dev",
        replace(_TINY, guidance_embed=True),
        PositionConfig(),
        FLUX1_DIFFUSERS_RULES,
        build_flux1,
        call_flux1,
    ),
    Family("flux2-dev", _TINY_FLUX2, _FLUX2_POSITIONS, FLUX2_DIFFUSERS_RULES, build_flux2, call_flux2),
    Family(
        "flux2-klein",
        replace(_TINY_FLUX2, guidance_embed=False),
        _FLUX2_POSITIONS,
        FLUX2_DIFFUSERS_RULES,
        build_flux2,
        call_flux2,
    ),
    Family(
        "qwen-image",
        replace(_TINY, pooled_dim=None, depth_single=0, context_norm=True),
        PositionConfig(centered=True, text="after_image"),
        QWEN_DIFFUSERS_RULES,
        build_qwen,
        call_qwen,
    ),
)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def randomize(model: nn.Module) -> None:
    """Weights so large that every branch matters: fresh gates and final layers would hide whatever is behind them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.5, generator=generator)
            if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.5)  # a head's logits grow with it, and with them what positions and masks do


def make_inputs(family: Family) -> dict[str, Tensor]:
    config, generator = family.config, torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    inputs = {
        "img_BTC": normal(ROWS * COLUMNS, config.in_channels),
        "img_ids_BTA": image_ids(family.positions, ROWS, COLUMNS).repeat(BATCH, 1, 1),
        "txt_BLE": normal(LENGTH, config.context_dim),
        "txt_ids_BLA": text_ids(family.positions, LENGTH, ROWS, COLUMNS).repeat(BATCH, 1, 1),
        "t_B": torch.tensor([0.125, 0.5]),  # 1000 t f is the same in any order of multiplication
    }
    if config.pooled_dim:
        inputs["pooled_BV"] = normal(config.pooled_dim)
    if config.guidance_embed:
        inputs["guidance_B"] = torch.tensor([1.0, 3.5])
    if config.context_norm:
        inputs["txt_mask_BL"] = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 3]])
    return inputs


FULL_SIZE = (
    ("flux-dev", SPECS["flux-dev"].transformer, FLUX1_DIFFUSERS_RULES, build_flux1, 11_901_408_320, 780, 1160),
    ("flux-schnell", SPECS["flux-schnell"].transformer, FLUX1_DIFFUSERS_RULES, build_flux1, 11_891_178_560, 776, 1156),
    ("flux-debug", SPECS["flux-debug"].transformer, FLUX1_DIFFUSERS_RULES, build_flux1, 258_286_144, 80, 108),
    ("flux2-dev", FLUX2_DEV, FLUX2_DIFFUSERS_RULES, build_flux2, 32_223_281_152, 299, 331),
    ("flux2-klein-4b", FLUX2_KLEIN_4B, FLUX2_DIFFUSERS_RULES, build_flux2, 3_875_544_576, 149, 169),
    ("flux2-klein-9b", FLUX2_KLEIN_9B, FLUX2_DIFFUSERS_RULES, build_flux2, 9_078_581_248, 201, 233),
    ("qwen-image", QWEN_IMAGE, QWEN_DIFFUSERS_RULES, build_qwen, 20_430_401_088, 1453, 1933),
)


def shapes(state_dict: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state_dict.items()}
