"""Every model flavor as plain data. No torch here, so that a configuration is checked before torch is imported."""

from dataclasses import dataclass, field
from typing import Literal

from flux.rules import FLUX1_DIFFUSERS_RULES, Rule


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and the six architecture switches of the transformer. Defaults are FLUX.1-schnell's."""

    in_channels: int = 64  # C, channels of one image token
    context_dim: int = 4096  # E, width of the text features
    pooled_dim: int | None = 768  # V, width of the pooled text feature; None: no `vector_in` (FLUX.2, Qwen-Image)
    hidden_size: int = 3072  # D
    num_heads: int = 24  # N
    depth: int = 19  # double blocks
    depth_single: int = 38  # single blocks
    mlp_ratio: float = 4.0
    axes_dim: tuple[int, ...] = (16, 56, 56)  # rotary dims of each position axis; their sum is the head dim K
    theta: float = 10_000.0
    guidance_embed: bool = False  # FLUX.1-dev, FLUX.2-dev
    bias: bool = True  # FLUX.2 has no bias anywhere
    swiglu: bool = False  # FLUX.2
    shared_modulation: bool = False  # FLUX.2: one modulation for all blocks of a kind
    context_norm: bool = False  # Qwen-Image: RMSNorm before txt_in

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class PositionConfig:
    """How tokens get their position ids (flux/positions.py)."""

    axes: int = 3  # A
    reference_stride: int = 1  # step on axis 0 from one reference image to the next
    centered: bool = False  # Qwen-Image: rows and columns count from the middle
    text: Literal["zero", "last_axis", "after_image"] = "zero"


@dataclass(frozen=True)
class CodecConfig:
    """How the autoencoder's latents become tokens: 2 x 2 patches, then (x - shift) * scale."""

    latent_channels: int = 16
    shift: float = 0.1159
    scale: float = 0.3611


@dataclass(frozen=True)
class ScheduleConfig:
    """Shift of the sampling times: mu = a line through (256 tokens, base_shift) and (4096 tokens, max_shift)."""

    shifted: bool = True  # schnell samples on plain linspace times
    base_tokens: int = 256
    base_shift: float = 0.5
    max_tokens: int = 4096
    max_shift: float = 1.15


@dataclass(frozen=True)
class ModelSpec:
    """One flavor: everything that differs between models, in one place."""

    name: str
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    positions: PositionConfig = field(default_factory=PositionConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    diffusers_rules: tuple[Rule, ...] = FLUX1_DIFFUSERS_RULES


LATENT_STRIDE = 8  # what the autoencoder shrinks sides by
PIXELS_PER_TOKEN = 16  # patches shrink them by 2 more; every picture side is a multiple of it

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="flux-dev",
            transformer=TransformerConfig(guidance_embed=True),
        ),
        ModelSpec(
            name="flux-schnell",
            schedule=ScheduleConfig(shifted=False),
        ),
        ModelSpec(
            name="flux-debug",
            transformer=TransformerConfig(hidden_size=1536, num_heads=12, depth=2, depth_single=2),
        ),
        ModelSpec(
            name="flux-tiny",
            transformer=TransformerConfig(
                context_dim=128,
                pooled_dim=128,
                hidden_size=256,
                num_heads=8,
                depth=2,
                depth_single=4,
                axes_dim=(8, 12, 12),
            ),
        ),
    )
}
