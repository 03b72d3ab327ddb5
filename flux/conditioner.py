"""Token ids -> TextCond through a frozen T5 encoder and a frozen CLIP text model.

Which is which is decided by the configuration key and checked against `config.json`, never by a word in a path.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flux.batch import TextCond
from flux.config import Encoder
from flux.data.tokenizers import FluxTokenizer
from flux.huggingface import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from flux.spec import TransformerConfig
from flux.text_files import (
    CLIP,
    T5,
    TextKind,
    check_end_token,
    check_vocabulary,
    open_text_encoder,
    read_config,
    read_weights,
)
from flux.text_folders import TINY_CLIP, TINY_T5, resolve_clip, resolve_t5

TEST_MODE_SEED = 0


class T5ClipConditioner:
    """Encodes prompts for FLUX: T5's last hidden states and CLIP's state at the end token.

    Args:
        t5, clip: the encoders; they are frozen and put into eval mode here. None: all its features are stored ones.
        mask_padding: hide padding from T5 and return the mask, so that the transformer hides it too. False: padding is
            attended everywhere, as FLUX was trained.
    """

    def __init__(self, t5: T5EncoderModel | None, clip: CLIPTextModel | None, mask_padding: bool):
        self.t5 = t5 and t5.requires_grad_(False).eval()
        self.clip = clip and clip.requires_grad_(False).eval()
        self.mask_padding = mask_padding

    def encode(self, tokens: dict[str, Tensor]) -> TextCond:
        """Text features in the encoders' dtype, on their device.

        Args:
            tokens: what FluxTokenizer made, "t5" [B, L] and "clip" [B, 77], on the encoders' device.
        """
        txt_BLE, mask_BL = self.encode_t5(tokens["t5"])
        return TextCond(txt_BLE, self.encode_clip(tokens["clip"]), mask_BL)

    # Not inference_mode: its tensors cannot be saved for the backward pass of the transformer.
    @torch.no_grad()
    def encode_t5(self, ids_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """T5's last hidden states, and the mask of what is not padding where padding is hidden."""
        assert self.t5 is not None
        mask_BL = ids_BL != self.t5.config.pad_token_id if self.mask_padding else None
        return self.t5(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state, mask_BL

    @torch.no_grad()
    def encode_clip(self, ids_BL: Tensor) -> Tensor:
        """CLIP's state at the end token, [B, V]."""
        assert self.clip is not None
        return self.clip(input_ids=ids_BL).pooler_output


class Sharding(NamedTuple):
    """How a frozen model is split over processes, handed in by who knows of processes."""

    split: Callable[[nn.Module, Sequence[nn.Module]], None]  # (model, its blocks), in place, before it has weights
    copy_: Callable[[Tensor, Tensor], object]  # (parameter, whole tensor): what this process keeps of it


def build_conditioner(
    encoder: Encoder,
    transformer: TransformerConfig,
    test_mode: bool,
    device: torch.device | str,
    t5_sharding: Sharding | None = None,
    parts: Collection[str] = ("t5", "clip"),
) -> T5ClipConditioner:
    """The frozen text encoders of a run.

    Args:
        encoder: the [encoder] section; `dtype` is that of the weights and of the features.
        transformer: the encoders' widths must be its context_dim and pooled_dim.
        test_mode: True builds randomly initialized one-layer encoders of these widths for the tiny tokenizers, always
            the same ones, whatever the section names.
        device: where the encoders work, and live; T5 lives in the CPU's memory where the section says so.
        t5_sharding: splits T5, which is 38 times CLIP's size, over processes. None: this one holds all of it.
        parts: "t5", "clip": those of them that are needed.

    Raises:
        ValueError: names the key, the folder, what is wrong with it and the remedy.
    """
    dtype = getattr(torch, encoder.dtype)
    t5, clip = None, None
    home = "cpu" if encoder.cpu_offload else device
    if test_mode:
        t5, clip = random_encoders(transformer)
        t5, clip = t5.to(home, dtype), clip.to(device, dtype)
        if t5_sharding is not None:
            t5_sharding.split(t5, list(t5.encoder.block))
        return T5ClipConditioner(t5, clip, encoder.mask_padding)
    if "t5" in parts:
        t5 = load_t5(resolve_t5(encoder.t5_encoder).weights, transformer, dtype, home, t5_sharding)
    if "clip" in parts:
        clip = load_clip(resolve_clip(encoder.clip_encoder).weights, transformer, dtype, device)
    return T5ClipConditioner(t5, clip, encoder.mask_padding)


def load_t5(
    folder: Path,
    transformer: TransformerConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    sharding: Sharding | None = None,
) -> T5EncoderModel:
    """T5 encoder from safetensors files of an encoder or of a complete T5, whose decoder is left out.

    Args:
        folder: holds `config.json` and `model.safetensors` or its shards with `model.safetensors.index.json`.
        transformer: its context_dim must be the encoder's width.
        dtype: of the weights.
        device: "meta" checks everything and reads no weight.
        sharding: each process keeps its part and, while loading, one whole tensor more.

    Raises:
        ValueError: names `encoder.t5_encoder`, the folder, what is wrong with it and the remedy.
    """
    return _load(T5, folder, transformer, dtype, device, sharding)


def load_clip(
    folder: Path, transformer: TransformerConfig, dtype: torch.dtype, device: torch.device | str
) -> CLIPTextModel:
    """CLIP text model from safetensors files of it or of a complete CLIP, whose vision tower is left out.

    The arguments are those of `load_t5`; the width is the transformer's pooled_dim.

    Raises:
        ValueError: names `encoder.clip_encoder`, the folder, what is wrong with it and the remedy.
    """
    return _load(CLIP, folder, transformer, dtype, device)


def _load(
    kind: TextKind,
    folder: Path,
    transformer: TransformerConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    sharding: Sharding | None = None,
):
    opened = open_text_encoder(kind, folder, transformer)
    model = opened.model.to(dtype)
    if torch.device(device).type == "meta":
        return model
    if sharding is not None:
        sharding.split(model, list(model.encoder.block))
    read_weights(kind, opened, device, Tensor.copy_ if sharding is None else sharding.copy_)
    return model


def random_encoders(transformer: TransformerConfig) -> tuple[T5EncoderModel, CLIPTextModel]:
    """One-layer encoders of the transformer's widths for the tiny tokenizers; the global generator does not move."""
    t5 = read_config(T5, TINY_T5.weights).to_dict()
    t5 |= {"d_model": transformer.context_dim, "num_layers": 1, "num_heads": 2, "d_kv": 64, "d_ff": 128}
    clip = read_config(CLIP, TINY_CLIP.weights).to_dict()
    clip |= {"hidden_size": transformer.pooled_dim, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip |= {"intermediate_size": 128}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(TEST_MODE_SEED)
        return T5EncoderModel(T5Config.from_dict(t5)), CLIPTextModel(CLIPTextConfig.from_dict(clip))


def check_tokenizer(tokenizer: FluxTokenizer, conditioner: T5ClipConditioner) -> None:
    """A tokenizer of another encoder would give wrong features without a word, or an index fault on the device.

    Raises:
        ValueError: names the key, what does not fit and the remedy.
    """
    if conditioner.t5 is not None:
        check_vocabulary(T5, conditioner.t5.config, tokenizer.vocabulary_sizes["t5"])
    if conditioner.clip is not None:
        check_vocabulary(CLIP, conditioner.clip.config, tokenizer.vocabulary_sizes["clip"])
        # An empty prompt has its end right after the start.
        check_end_token(CLIP, conditioner.clip.config, int(tokenizer([""])["clip"][0, 1]))
