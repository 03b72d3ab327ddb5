"""Floating-point operations of the transformer, counted exactly: one multiplication and one addition make two.

Only matrix products count, as in torch's FlopCounterMode, which gives the same integers.
"""

from flux.model import TIME_FEATURES, mlp_width
from flux.spec import TransformerConfig


def forward_flops(config: TransformerConfig, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one forward pass of one sample.

    Each token meets one stream's weights in a double block, and whatever is made of time, guidance and pooled text is
    computed once per sample: the common estimate `2 * parameters * tokens` is 1.8 times too much for FLUX.1 at 256 px.
    """
    D, inner, tokens = config.hidden_size, mlp_width(config), image_tokens + text_tokens
    mlp_in = 2 * inner if config.swiglu else inner

    # Multiply-adds. The linear layers of a double block's stream and of a single block have the same sizes in total.
    per_token = D * 3 * D + D * D + D * mlp_in + inner * D
    attention = 2 * tokens * tokens * D  # logits, and the weighted sum of values: full, not causal
    blocks = (config.depth + config.depth_single) * (tokens * per_token + attention)
    if config.depth_single:  # the last block leaves the text out of its MLP and of its second layer
        blocks -= text_tokens * (mlp_in + D + inner) * D
    ends = D * (image_tokens * 2 * config.in_channels + text_tokens * config.context_dim)
    double, single = (1, 1) if config.shared_modulation else (config.depth, config.depth_single)
    modulation = D * D * (double * 2 * 6 + single * 3 + 2)
    features = [TIME_FEATURES, TIME_FEATURES if config.guidance_embed else None, config.pooled_dim]
    conditions = sum(D * (width + D) for width in features if width is not None)
    return 2 * (blocks + ends + modulation + conditions)


def training_flops(config: TransformerConfig, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one training sample without recomputation: three times the forward pass.

    Backward repeats each product twice, for the gradients of both operands. That counts five products that are never
    computed because model inputs need no gradient: the input gradients of img_in, txt_in and the first layers of
    time_in, guidance_in and vector_in (0.03 % for FLUX.1 at 256 px). Published figures count them too.
    """
    return 3 * forward_flops(config, image_tokens, text_tokens)


def with_unit(number: float) -> str:
    """A count of FLOPs for people, to be followed by FLOP: `20.3 T`."""
    unit, size = next(((unit, size) for unit, size in (("T", 1e12), ("G", 1e9)) if number >= size), ("M", 1e6))
    return f"{number / size:.3g} {unit}"
