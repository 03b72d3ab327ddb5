"""The real encoders: names, shapes and counts, from safetensors files that have a header and no content."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from flux.conditioner import load_clip, load_t5
from flux.spec import SPECS

T5_XXL_COUNT = 4_762_310_656
CLIP_L_COUNT = 123_060_480
T5_XXL_CONFIG = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 32128,
}
CLIP_L_TEXT_CONFIG = {
    "model_type": "clip_text_model",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
CLIP_L_CONFIG = {
    "architectures": ["CLIPModel"],
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": CLIP_L_TEXT_CONFIG,
    "torch_dtype": "float32",
    "vision_config": {"hidden_size": 1024, "model_type": "clip_vision_model", "patch_size": 14},
}


def t5_xxl_shapes() -> dict[str, list[int]]:
    shapes = {"shared.weight": [32128, 4096], "encoder.final_layer_norm.weight": [4096]}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = [32, 64]
    for block in range(24):
        attention, feed_forward = f"encoder.block.{block}.layer.0", f"encoder.block.{block}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{part}.weight": [4096, 4096] for part in "qkvo"}
        shapes |= {f"{feed_forward}.DenseReluDense.{part}.weight": [10240, 4096] for part in ("wi_0", "wi_1")}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = [4096, 10240]
        shapes |= {f"{layer}.layer_norm.weight": [4096] for layer in (attention, feed_forward)}
    return shapes


def clip_l_shapes() -> dict[str, list[int]]:
    shapes = {
        "text_model.embeddings.token_embedding.weight": [49408, 768],
        "text_model.embeddings.position_embedding.weight": [77, 768],
        "text_model.final_layer_norm.weight": [768],
        "text_model.final_layer_norm.bias": [768],
    }
    for layer in range(12):
        start = f"text_model.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{start}.self_attn.{part}.weight": [768, 768], f"{start}.self_attn.{part}.bias": [768]}
        shapes |= {f"{start}.mlp.fc1.weight": [3072, 768], f"{start}.mlp.fc1.bias": [3072]}
        shapes |= {f"{start}.mlp.fc2.weight": [768, 3072], f"{start}.mlp.fc2.bias": [768]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{start}.{norm}.weight": [768], f"{start}.{norm}.bias": [768]}
    return shapes


def write_header_only(path: Path, shapes: dict[str, list[int]], dtype: str, size: int) -> None:
    """A safetensors file of full length whose content is a hole that takes no room on the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        length = size * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_encoder(folder: Path, config: dict, shapes: dict[str, list[int]], dtype: str, size: int) -> None:
    """As FLUX's T5 lies on the hub: two shards and their index, or one file when there is little."""
    (folder / "config.json").write_text(json.dumps(config))
    names = list(shapes)
    files = {"model.safetensors": names}
    if len(names) > 1 and config["model_type"] == "t5":
        half = len(names) // 2
        files = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, part in files.items():
        write_header_only(folder / file, {name: shapes[name] for name in part}, dtype, size)


def check_meta(model: nn.Module, shapes: dict[str, list[int]], count: int) -> None:
    parameters = {name.removeprefix("text_model."): list(p.shape) for name, p in model.named_parameters()}
    assert parameters == {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


REAL = SPECS["flux-schnell"].transformer


def test_t5_xxl_as_in_the_flux_repositories(tmp_path):
    write_encoder(tmp_path, T5_XXL_CONFIG, t5_xxl_shapes(), "BF16", 2)
    check_meta(load_t5(tmp_path, REAL, torch.bfloat16, "meta"), t5_xxl_shapes(), T5_XXL_COUNT)


def test_t5_xxl_of_another_depth_is_refused(tmp_path):
    """Negative control: one block less, then one more than config.json says."""
    for layers, message in ((25, "lack encoder.block.24"), (23, "hold also encoder.block.23")):
        write_encoder(tmp_path, T5_XXL_CONFIG | {"num_layers": layers}, t5_xxl_shapes(), "BF16", 2)
        with pytest.raises(ValueError, match=message):
            load_t5(tmp_path, REAL, torch.bfloat16, "meta")


def test_clip_l_as_in_the_flux_repositories(tmp_path):
    write_encoder(tmp_path, CLIP_L_TEXT_CONFIG, clip_l_shapes(), "BF16", 2)
    check_meta(load_clip(tmp_path, REAL, torch.bfloat16, "meta"), clip_l_shapes(), CLIP_L_COUNT)


def test_clip_l_as_openai_published_it(tmp_path):
    rest = {
        "logit_scale": [],
        "text_projection.weight": [768, 768],
        "visual_projection.weight": [768, 1024],
        "vision_model.embeddings.class_embedding": [1024],
        "vision_model.encoder.layers.23.mlp.fc1.weight": [4096, 1024],
    }
    write_encoder(tmp_path, CLIP_L_CONFIG, clip_l_shapes() | rest, "F32", 4)
    model = load_clip(tmp_path, REAL, torch.bfloat16, "meta")
    check_meta(model, clip_l_shapes(), CLIP_L_COUNT)
    assert (model.config.eos_token_id, model.config.hidden_act) == (2, "quick_gelu")
