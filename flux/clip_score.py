"""How well pictures show their prompts, by a CLIP model: Hessel et al. 2021, arXiv 2104.08718."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor

from flux.data.tokenizers import load_clip_tokenizer
from flux.huggingface import CLIPConfig, CLIPModel
from flux.text_files import (
    TextKind,
    check_end_token,
    check_positions,
    check_vocabulary,
    open_encoder,
    read_config,
    read_json,
    read_weights,
)
from flux.text_folders import CLIP_NAME, resolve_clip

WHOLE_CLIP = TextKind(
    key="validation.clip_score_path",
    remedy=CLIP_NAME,
    model_types=("clip",),
    config_class=CLIPConfig,
    model_class=CLIPModel,
    prefix="",
    other_parts=re.compile(r"(text|vision)_model\.embeddings\.position_ids$"),
)
PREPROCESSOR = "preprocessor_config.json"
# Of the color channels of OpenAI's training pictures, for folders without PREPROCESSOR.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """Scores pictures by their prompts. Only `load_clip_scorer` makes one."""

    def __init__(self, model: CLIPModel, tokenizer: Tokenizer, mean: tuple[float, ...], std: tuple[float, ...]):
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.mean_C11, self.std_C11 = (torch.tensor(values)[:, None, None] for values in (mean, std))

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str], batch_size: int) -> float:
        """Mean over the pictures of 100 * max(cos, 0), of the angle between a picture's features and its prompt's.

        Args:
            images: RGB.
            prompts: one per picture; what is longer than 77 tokens is cut.
            batch_size: pictures at a time.
        """
        cosines = []
        for start in range(0, len(images), batch_size):
            some = slice(start, start + batch_size)
            ids = torch.tensor([self.tokenizer.encode(prompt).ids for prompt in prompts[some]])
            pixels_BCHW = torch.stack([self.make_pixels(image) for image in images[some]])
            device = self.model.device
            found = self.model(input_ids=ids.to(device), pixel_values=pixels_BCHW.to(device))
            cosines.append((found.image_embeds * found.text_embeds).sum(-1))  # both have length 1
        return 100 * torch.cat(cosines).clamp(min=0).mean().item()

    def make_pixels(self, image: Image.Image) -> Tensor:
        """[C, H, W] as CLIP has learned to see: the middle square, resized and normalized."""
        side = self.model.config.vision_config.image_size
        square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
        pixels_CHW = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)
        return (pixels_CHW - self.mean_C11) / self.std_C11


def load_clip_scorer(name: str, device: torch.device | str) -> ClipScorer:
    """Opens the CLIP model of `validation.clip_score_path`, in float32.

    Args:
        name: openai/clip-vit-large-patch14, or a folder with a complete CLIP in the Hugging Face layout.
        device: "meta" checks everything and reads no weight.

    Raises:
        ValueError: names the key, the folder, what is wrong with it and the remedy.
    """
    kind, folders = WHOLE_CLIP, resolve_clip(name, WHOLE_CLIP.key)
    config = read_config(kind, folders.weights)
    check_positions(kind, folders.weights, config.text_config)
    opened = open_encoder(kind, folders.weights, config)
    tokenizer = load_clip_tokenizer(kind.key, folders.tokenizer)
    check_vocabulary(kind, config.text_config, tokenizer.get_vocab_size())
    check_end_token(kind, config.text_config, tokenizer.encode("").ids[1])
    model = opened.model.to(torch.float32)
    if torch.device(device).type != "meta":
        read_weights(kind, opened, device)
    return ClipScorer(model, tokenizer, *_read_normalization(folders.weights / PREPROCESSOR))


def _read_normalization(file: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the three color channels."""
    values = read_json(WHOLE_CLIP, file) if file.is_file() else {}
    mean, std = values.get("image_mean", MEAN), values.get("image_std", STD)
    try:
        mean, std = (tuple(map(float, channels)) for channels in (mean, std))
    except (TypeError, ValueError):
        mean, std = (), ()
    if not len(mean) == len(std) == 3 or min(std) <= 0:
        raise ValueError(
            f"{WHOLE_CLIP.key}: {file} must have three numbers each as image_mean and image_std, the latter above 0: "
            "fetch it again, or remove it if the model takes pictures as OpenAI's do"
        )
    return mean, std
