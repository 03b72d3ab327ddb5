"""A small complete CLIP, of random weights, in the Hugging Face layout."""

import json
import shutil
from pathlib import Path

import torch

from flux.text_folders import TINY_CLIP

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def save_clip(folder: Path) -> Path:
    """With the tokenizer of the tiny text encoder and pictures of 24 px."""
    from transformers import CLIPConfig, CLIPModel

    text = json.loads((TINY_CLIP.weights / "config.json").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {name: text[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    vision = sizes | {"image_size": 24, "patch_size": 8}
    config = CLIPConfig(text_config=sizes | ends, vision_config=vision, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # of a few, the one under which prompts matter most
        model = CLIPModel(config)
        for name, parameter in model.named_parameters():
            if "proj" in name or "embedding" in name:  # so small by default that all pictures look alike
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(TINY_CLIP.tokenizer / name, folder)
    return folder
