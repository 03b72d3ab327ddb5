"""How our parameter names (Black Forest Labs' module names) map to other layouts, as data. No torch here.

`checkpoint/adapter.py` applies these tables in both directions. A pattern is a full key with two kinds of placeholders:
`{i}`, `{j}` stand for a number, `{leaf}` for `weight` or `bias`; the same placeholder is the same text on both sides.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """One of our keys and where its values live elsewhere.

    Args:
        native: our key pattern.
        other: the other layout's key pattern. More than one: the rows of our tensor are split among them, in order;
            each takes as many rows as our weight has columns, and the last takes the rest.
        op: what happens to the values. "swap" exchanges the upper and lower half of the rows; "linear" turns our
            1 x 1 convolution `[O, I, 1, 1]` into their linear weight `[O, I]` and back.
    """

    native: str
    other: tuple[str, ...]
    op: Literal["swap", "linear"] | None = None


def _module(native: str, *other: str, op: Literal["swap", "linear"] | None = None) -> Rule:
    """A rule for the weight and the bias of a module."""
    return Rule(f"{native}.{{leaf}}", tuple(f"{name}.{{leaf}}" for name in other), op)


def _joint_attention(stream: str, projections: tuple[str, str, str], norms: tuple[str, str], output: str) -> list[Rule]:
    """One stream's half of a double block's attention."""
    native, other = f"double_blocks.{{i}}.{stream}_attn", "transformer_blocks.{i}.attn"
    return [
        _module(f"{native}.qkv", *(f"{other}.{name}" for name in projections)),
        Rule(f"{native}.norm.query_norm.weight", (f"{other}.{norms[0]}.weight",)),
        Rule(f"{native}.norm.key_norm.weight", (f"{other}.{norms[1]}.weight",)),
        _module(f"{native}.proj", f"{other}.{output}"),
    ]


def _embedder(native: str, other: str) -> list[Rule]:
    return [_module(f"{native}.in_layer", f"{other}.linear_1"), _module(f"{native}.out_layer", f"{other}.linear_2")]


_DOUBLE_ATTENTION = [
    *_joint_attention("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0"),
    *_joint_attention(
        "txt", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out"
    ),
]
_SINGLE_NORMS = [
    Rule(f"single_blocks.{{i}}.norm.{ours}.weight", (f"single_transformer_blocks.{{i}}.attn.{theirs}.weight",))
    for ours, theirs in (("query_norm", "norm_q"), ("key_norm", "norm_k"))
]
# Diffusers keeps (scale, shift) where Black Forest Labs keep (shift, scale): the only halves that are exchanged.
_FINAL = [
    _module("final_layer.linear", "proj_out"),
    _module("final_layer.adaLN_modulation.1", "norm_out.linear", op="swap"),
]

FLUX1_DIFFUSERS_RULES: tuple[Rule, ...] = (
    _module("img_in", "x_embedder"),
    _module("txt_in", "context_embedder"),
    *_embedder("time_in", "time_text_embed.timestep_embedder"),
    *_embedder("vector_in", "time_text_embed.text_embedder"),
    *_embedder("guidance_in", "time_text_embed.guidance_embedder"),
    _module("double_blocks.{i}.img_mod.lin", "transformer_blocks.{i}.norm1.linear"),
    _module("double_blocks.{i}.txt_mod.lin", "transformer_blocks.{i}.norm1_context.linear"),
    *_DOUBLE_ATTENTION,
    _module("double_blocks.{i}.img_mlp.0", "transformer_blocks.{i}.ff.net.0.proj"),
    _module("double_blocks.{i}.img_mlp.2", "transformer_blocks.{i}.ff.net.2"),
    _module("double_blocks.{i}.txt_mlp.0", "transformer_blocks.{i}.ff_context.net.0.proj"),
    _module("double_blocks.{i}.txt_mlp.2", "transformer_blocks.{i}.ff_context.net.2"),
    _module("single_blocks.{i}.modulation.lin", "single_transformer_blocks.{i}.norm.linear"),
    _module(
        "single_blocks.{i}.linear1",
        "single_transformer_blocks.{i}.attn.to_q",
        "single_transformer_blocks.{i}.attn.to_k",
        "single_transformer_blocks.{i}.attn.to_v",
        "single_transformer_blocks.{i}.proj_mlp",
    ),
    *_SINGLE_NORMS,
    _module("single_blocks.{i}.linear2", "single_transformer_blocks.{i}.proj_out"),
    *_FINAL,
)

FLUX2_DIFFUSERS_RULES: tuple[Rule, ...] = (
    _module("img_in", "x_embedder"),
    _module("txt_in", "context_embedder"),
    *_embedder("time_in", "time_guidance_embed.timestep_embedder"),
    *_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
    _module("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    _module("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    _module("single_stream_modulation.lin", "single_stream_modulation.linear"),
    *_DOUBLE_ATTENTION,
    _module("double_blocks.{i}.img_mlp.0", "transformer_blocks.{i}.ff.linear_in"),
    _module("double_blocks.{i}.img_mlp.2", "transformer_blocks.{i}.ff.linear_out"),
    _module("double_blocks.{i}.txt_mlp.0", "transformer_blocks.{i}.ff_context.linear_in"),
    _module("double_blocks.{i}.txt_mlp.2", "transformer_blocks.{i}.ff_context.linear_out"),
    _module("single_blocks.{i}.linear1", "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj"),
    *_SINGLE_NORMS,
    _module("single_blocks.{i}.linear2", "single_transformer_blocks.{i}.attn.to_out"),
    *_FINAL,
)

QWEN_DIFFUSERS_RULES: tuple[Rule, ...] = (
    _module("img_in", "img_in"),
    _module("txt_in", "txt_in"),
    Rule("txt_norm.weight", ("txt_norm.weight",)),
    *_embedder("time_in", "time_text_embed.timestep_embedder"),
    _module("double_blocks.{i}.img_mod.lin", "transformer_blocks.{i}.img_mod.1"),
    _module("double_blocks.{i}.txt_mod.lin", "transformer_blocks.{i}.txt_mod.1"),
    *_DOUBLE_ATTENTION,
    _module("double_blocks.{i}.img_mlp.0", "transformer_blocks.{i}.img_mlp.net.0.proj"),
    _module("double_blocks.{i}.img_mlp.2", "transformer_blocks.{i}.img_mlp.net.2"),
    _module("double_blocks.{i}.txt_mlp.0", "transformer_blocks.{i}.txt_mlp.net.0.proj"),
    _module("double_blocks.{i}.txt_mlp.2", "transformer_blocks.{i}.txt_mlp.net.2"),
    *_FINAL,
)

# Black Forest Labs' own single files: our names, but the weights of the query and key norms are called `.scale`.
BFL_RULES: tuple[Rule, ...] = tuple(
    dict.fromkeys(
        Rule(rule.native, (rule.native.replace("_norm.weight", "_norm.scale"),))
        for rule in (*FLUX1_DIFFUSERS_RULES, *FLUX2_DIFFUSERS_RULES)
    )
)


def _resnet(native: str, other: str) -> list[Rule]:
    same = [_module(f"{native}.{name}", f"{other}.{name}") for name in ("norm1", "conv1", "norm2", "conv2")]
    return [*same, _module(f"{native}.nin_shortcut", f"{other}.conv_shortcut")]


def _autoencoder_middle(side: str) -> list[Rule]:
    """What encoder and decoder have in common: the ends and the middle with its one-head attention."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    native, other = f"{side}.mid", f"{side}.mid_block"
    return [
        _module(f"{side}.conv_in", f"{side}.conv_in"),
        _module(f"{side}.norm_out", f"{side}.conv_norm_out"),
        _module(f"{side}.conv_out", f"{side}.conv_out"),
        *_resnet(f"{native}.block_1", f"{other}.resnets.0"),
        *_resnet(f"{native}.block_2", f"{other}.resnets.1"),
        _module(f"{native}.attn_1.norm", f"{other}.attentions.0.group_norm"),
        *(
            rule
            for ours, theirs in attention.items()
            for rule in (
                Rule(f"{native}.attn_1.{ours}.weight", (f"{other}.attentions.0.{theirs}.weight",), "linear"),
                Rule(f"{native}.attn_1.{ours}.bias", (f"{other}.attentions.0.{theirs}.bias",)),
            )
        ),
    ]


_LEVELS = 4  # of resolution, in every FLUX autoencoder: 8x smaller takes three halvings

AUTOENCODER_DIFFUSERS_RULES: tuple[Rule, ...] = (
    *_autoencoder_middle("encoder"),
    *_resnet("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}"),
    _module("encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"),
    *_autoencoder_middle("decoder"),
    # Our decoder counts its levels from the finest, as the encoder does; diffusers counts in running order.
    *(
        rule
        for level in range(_LEVELS)
        for rule in (
            *_resnet(f"decoder.up.{level}.block.{{j}}", f"decoder.up_blocks.{_LEVELS - 1 - level}.resnets.{{j}}"),
            _module(f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{_LEVELS - 1 - level}.upsamplers.0.conv"),
        )
    ),
)

# The layouts that a transformer's weights may come in, by what they are called.
LAYOUTS: dict[str, tuple[Rule, ...]] = {
    "Black Forest Labs'": BFL_RULES,
    "diffusers' FLUX.1": FLUX1_DIFFUSERS_RULES,
    "diffusers' FLUX.2": FLUX2_DIFFUSERS_RULES,
    "diffusers' Qwen-Image": QWEN_DIFFUSERS_RULES,
}
