"""The folder that diffusers' FluxPipeline loads: writing all of it but the transformer's weights, and using one.

model_index.json            the classes of the parts
transformer/                config.json; whoever holds the weights adds them
vae/                        the autoencoder
text_encoder/  tokenizer/   CLIP
text_encoder_2/ tokenizer_2/   T5
scheduler/
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from flux.autoencoder import VAE_CONFIG, AutoencoderConfig, Renaming, load_autoencoder
from flux.conditioner import random_encoders
from flux.config import Encoder
from flux.data.tokenizers import CLIP_LENGTH
from flux.rules import AUTOENCODER_DIFFUSERS_RULES, FLUX1_DIFFUSERS_RULES, Rule
from flux.spec import CodecConfig, ModelSpec, PositionConfig, ScheduleConfig, TransformerConfig
from flux.text_files import CLIP, T5, TensorSource, TextEncoder, open_text_encoder
from flux.text_folders import TINY_CLIP, TINY_T5, resolve_clip, resolve_t5

INDEX, PIPELINE = "model_index.json", "FluxPipeline"
# What diffusers and transformers call a file of weights, up to `.safetensors`.
DIFFUSERS_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
CLASSES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
DIFFUSERS_VERSION = "0.30.0"  # the first one with FLUX
T5_LENGTH = 512  # FluxPipeline's own max_sequence_length
# A tokenizer is any set of these; another file in its folder may be weights.
TOKENIZER_FILES = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "merges.txt"),
)
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a checkpoint of FLUX.1's architecture may choose; all else is written into diffusers' class.
_SIZES = (
    *("in_channels", "context_dim", "pooled_dim", "hidden_size", "num_heads", "depth", "depth_single", "axes_dim"),
    "guidance_embed",
)

log = logging.getLogger(__name__)


class WriteWeights(Protocol):
    """Saves tensors as `<stem>.safetensors`, sharded where they are large, one tensor at a time."""

    def __call__(
        self, folder: Path, stem: str, tensors: Mapping[str, TensorSource], rules: Sequence[Rule] | None
    ) -> None:
        """`rules` give the names in the file; None: the tensors have them already."""


def save_pipeline_parts(
    folder: Path, spec: ModelSpec, encoder: Encoder, test_mode: bool, write: WriteWeights, to_native: Renaming
) -> None:
    """Writes everything but the transformer's weights.

    Args:
        folder: made when missing; not visible to others until the weights are there as well.
        spec: the flavor.
        encoder: the [encoder] section, which names the parts. Their weights keep their number format.
        test_mode: the text encoders are the random ones of training.test_mode.
        write: saves the weights of a part.
        to_native: see `load_autoencoder`.

    Raises:
        ValueError: the flavor has no diffusers pipeline, or a part cannot be used.
    """
    configs = {
        INDEX: {"_class_name": PIPELINE, "_diffusers_version": DIFFUSERS_VERSION, **CLASSES},
        "transformer/config.json": make_transformer_config(spec),
        "scheduler/scheduler_config.json": make_scheduler_config(spec.schedule),
    }
    for name, values in configs.items():
        _save_json(folder / name, values)
    _save_autoencoder(folder / "vae", encoder.autoencoder_path, spec.codec, write, to_native)
    t5, clip = _open_text_encoders(encoder, spec.transformer, test_mode)
    _save_text_encoder(folder / "text_encoder", clip, CLIP.prefix, write)
    _save_text_encoder(folder / "text_encoder_2", t5, T5.prefix, write)
    t5_folders, clip_folders = (
        (TINY_T5, TINY_CLIP) if test_mode else (resolve_t5(encoder.t5_encoder), resolve_clip(encoder.clip_encoder))
    )
    _copy_tokenizer(clip_folders.tokenizer, folder / "tokenizer", "CLIPTokenizer", CLIP_LENGTH)
    _copy_tokenizer(t5_folders.tokenizer, folder / "tokenizer_2", "T5Tokenizer", T5_LENGTH)
    if encoder.mask_padding:
        log.warning(
            "encoder.mask_padding=true: FluxPipeline hides no padding, so it draws other pictures from %s", folder
        )
    elif encoder.max_t5_encoding_len != T5_LENGTH:
        log.info("call FluxPipeline with max_sequence_length=%d, as in training", encoder.max_t5_encoding_len)


def make_transformer_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of diffusers' FluxTransformer2DModel.

    Raises:
        ValueError: another architecture than FLUX.1's, at whatever size.
    """
    sizes = spec.transformer
    same = TransformerConfig(**{name: getattr(sizes, name) for name in _SIZES})
    is_flux1 = sizes == same and sizes.pooled_dim is not None and spec.positions == PositionConfig()
    if not is_flux1 or spec.diffusers_rules != FLUX1_DIFFUSERS_RULES:
        raise ValueError(
            f"model.flavor={spec.name!r} is not of FLUX.1's architecture, so {PIPELINE} cannot hold it: write another "
            "layout"
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": sizes.head_dim,
        "axes_dims_rope": sizes.axes_dim,
        "guidance_embeds": sizes.guidance_embed,
        "in_channels": sizes.in_channels,
        "joint_attention_dim": sizes.context_dim,
        "num_attention_heads": sizes.num_heads,
        "num_layers": sizes.depth,
        "num_single_layers": sizes.depth_single,
        "patch_size": 1,
        "pooled_projection_dim": sizes.pooled_dim,
    }


def make_scheduler_config(schedule: ScheduleConfig) -> dict[str, Any]:
    """The scheduler_config.json of diffusers' FlowMatchEulerDiscreteScheduler."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "base_image_seq_len": schedule.base_tokens,
        "base_shift": schedule.base_shift,
        "max_image_seq_len": schedule.max_tokens,
        "max_shift": schedule.max_shift,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": schedule.shifted,
    }


def make_autoencoder_config(config: AutoencoderConfig, codec: CodecConfig) -> dict[str, Any]:
    """The config.json of diffusers' AutoencoderKL."""
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": config.widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks_per_level,
        "mid_block_add_attention": True,
        "norm_num_groups": config.norm_groups,
        "out_channels": 3,
        "sample_size": 1024,  # as published; diffusers tiles pictures that are larger, when it is asked to
        "scaling_factor": codec.scale,
        "shift_factor": codec.shift,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def use_pipeline(folder: Path, spec: ModelSpec, encoder: Encoder) -> Encoder:
    """The [encoder] section with the encoders of a pipeline folder; they are checked when they are loaded.

    Raises:
        ValueError: the folder is that of another pipeline.
    """
    found = _read_json(folder / INDEX).get("_class_name")
    if found != PIPELINE:
        raise ValueError(f"{folder / INDEX} must be that of a {PIPELINE} and is that of a {found}: take another folder")
    has, needed = _read_json(folder / "scheduler/scheduler_config.json"), make_scheduler_config(spec.schedule)
    # A constant shift counts only where there is none by resolution; 1 is none.
    names = [name for name in needed if name.startswith(("base_", "max_"))] if spec.schedule.shifted else ["shift"]
    for name in ("use_dynamic_shifting", *names):
        if has.get(name) != needed[name]:
            told = f"{name} {has.get(name)} instead of {needed[name]}"
            log.warning("%s has another schedule than %s, which is drawn with: %s", folder, spec.name, told)
    return replace(
        encoder,
        t5_encoder=str(folder / "text_encoder_2"),
        clip_encoder=str(folder / "text_encoder"),
        autoencoder_path=str(folder / "vae"),
    )


def _save_autoencoder(folder: Path, path: str, codec: CodecConfig, write: WriteWeights, to_native: Renaming) -> None:
    autoencoder = load_autoencoder(path, codec, None, "cpu", to_native)
    _save_json(folder / VAE_CONFIG, make_autoencoder_config(autoencoder.config, codec))
    write(folder, DIFFUSERS_STEM, _sources(autoencoder.state_dict()), AUTOENCODER_DIFFUSERS_RULES)


def _open_text_encoders(
    encoder: Encoder, transformer: TransformerConfig, test_mode: bool
) -> tuple[TextEncoder, TextEncoder]:
    """T5 and CLIP."""
    if not test_mode:
        t5 = open_text_encoder(T5, resolve_t5(encoder.t5_encoder).weights, transformer)
        return t5, open_text_encoder(CLIP, resolve_clip(encoder.clip_encoder).weights, transformer)
    models = [model.to(getattr(torch, encoder.dtype)) for model in random_encoders(transformer)]
    t5, clip = (
        TextEncoder(
            model, _sources({name.removeprefix(CLIP.prefix): value for name, value in model.named_parameters()})
        )
        for model in models
    )
    return t5, clip


def _save_text_encoder(folder: Path, encoder: TextEncoder, prefix: str, write: WriteWeights) -> None:
    config, tensors = encoder.model.config, encoder.tensors
    config.architectures = [type(encoder.model).__name__]
    config.dtype = next(iter(tensors.values())).dtype
    _save_json(folder / "config.json", json.loads(config.to_json_string()))
    # With the prefix every version of transformers knows the names.
    write(folder, TEXT_STEM, {prefix + name: tensor for name, tensor in tensors.items()}, None)


def _copy_tokenizer(source: Path, target: Path, kind: str, length: int) -> None:
    """Copies the files as they are, and sees to it that the length is told: FluxPipeline pads CLIP's prompts to it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    told = source / TOKENIZER_CONFIG
    own = _read_json(told) if told.is_file() else {}
    _save_json(target / TOKENIZER_CONFIG, {"model_max_length": length, "tokenizer_class": kind} | own)


def _sources(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSource]:
    def source(tensor: torch.Tensor) -> TensorSource:
        return TensorSource(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    return {name: source(tensor) for name, tensor in tensors.items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}): fetch or write the folder again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must be a JSON object: fetch or write the folder again")
    return values


def _save_json(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
