"""Text encoders as they lie on disk: a folder in the Hugging Face layout, its config.json and its safetensors files.

Everything that can be wrong with a folder is found from names and headers, before a weight is read.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux.data.tokenizers import CLIP_LENGTH
from flux.huggingface import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)
from flux.spec import TransformerConfig
from flux.text_folders import CLIP_NAME, T5_NAME

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The number formats of weights, by the names that safetensors has for them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class TextKind:
    """What a kind of encoder looks like on disk."""

    key: str  # of the configuration
    remedy: str  # an encoder that fits
    model_types: tuple[str, ...]  # of config.json
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    prefix: str  # of the names in some files: both spellings are in use
    other_parts: re.Pattern[str]  # what else may lie in the files, such as the decoder of a complete T5
    width: str = ""  # name of the width in the configuration of the encoder
    transformer_width: str = ""  # and in TransformerConfig; a kind without one feeds no transformer


T5 = TextKind(
    key="encoder.t5_encoder",
    remedy=T5_NAME,
    model_types=("t5",),
    config_class=T5Config,
    model_class=T5EncoderModel,
    prefix="",
    other_parts=re.compile(r"decoder\.|lm_head\."),
    width="d_model",
    transformer_width="context_dim",
)
CLIP = TextKind(
    key="encoder.clip_encoder",
    remedy=CLIP_NAME,
    model_types=("clip_text_model", "clip"),
    config_class=CLIPTextConfig,
    model_class=CLIPTextModel,
    prefix="text_model.",
    other_parts=re.compile(
        r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|embeddings\.position_ids$"
    ),
    width="hidden_size",
    transformer_width="pooled_dim",
)


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class TextEncoder(NamedTuple):
    """A text encoder that fits its configuration."""

    model: PreTrainedModel  # on the meta device
    tensors: dict[str, TensorSource]  # by the model's own names, without the kind's prefix


def open_text_encoder(kind: TextKind, folder: Path, transformer: TransformerConfig) -> TextEncoder:
    """What a folder holds; no weight is read.

    Args:
        kind: T5 or CLIP.
        folder: holds `config.json` and `model.safetensors` or its shards with `model.safetensors.index.json`.
        transformer: the encoder's width must be its.

    Raises:
        ValueError: names the key, the folder, what is wrong with it and the remedy.
    """
    config = read_config(kind, folder)
    _check_width(kind, folder, config, transformer)
    if kind is CLIP:
        check_positions(kind, folder, config)
    return open_encoder(kind, folder, config)


def open_encoder(kind: TextKind, folder: Path, config: PreTrainedConfig) -> TextEncoder:
    """The model of a configuration that `read_config` has read, and its weights, of which none is read.

    Raises:
        ValueError: names the key, the folder, what is wrong with it and the remedy.
    """
    try:
        with torch.device("meta"):
            model = kind.model_class(config)
    except Exception as error:  # such as an activation that the library does not know
        raise _invalid_config(kind, folder, error) from error
    tie(model)
    tensors = _open_weights(kind, folder)
    _check_weights(kind, folder, model, tensors)
    return TextEncoder(model, tensors)


@torch.no_grad()
def read_weights(
    kind: TextKind,
    encoder: TextEncoder,
    device: torch.device | str,
    copy_: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Gives an open encoder its weights, one tensor at a time: the peak is the model itself.

    Args:
        copy_: (parameter, whole tensor): keeps what this process needs of it.
    """
    model = encoder.model
    model.to_empty(device=device)
    tie(model)
    for name, parameter in model.named_parameters():
        copy_(parameter, encoder.tensors[name.removeprefix(kind.prefix)].read())
    for name, buffer in model.named_buffers():  # that no file holds: CLIP counts its positions in one
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def tie(model: PreTrainedModel) -> None:
    """T5 reads its one embedding under two names; CLIP is left as it is."""
    if isinstance(model, T5EncoderModel):
        model.set_input_embeddings(model.shared)


def read_config(kind: TextKind, folder: Path) -> PreTrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{kind.key}: {folder} must hold config.json and {WEIGHTS} and has no config.json: "
            f"give the folder of the encoder itself, or the known name {kind.remedy}"
        )
    values = read_json(kind, file)
    found = values.get("model_type")
    if found not in kind.model_types:
        raise ValueError(
            f"{kind.key}: {folder} must hold an encoder of model_type {' or '.join(kind.model_types)} "
            f"and its config.json says {found!r}: use another folder, or the known name {kind.remedy}"
        )
    if kind is CLIP:
        values = values.get("text_config", values)
    try:
        return kind.config_class.from_dict(_without_implementations(values))
    except Exception as error:  # whatever the library's validation raises
        raise _invalid_config(kind, folder, error) from error


def _without_implementations(values: dict[str, Any]) -> dict[str, Any]:
    """A file may ask for attention by the name of a repository, whose code the library would fetch and run."""
    return {
        key: _without_implementations(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if "implementation" not in key
    }


def _invalid_config(kind: TextKind, folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{kind.key}: {folder / 'config.json'} must be the configuration of a {kind.model_class.__name__} "
        f"and has a value that does not work ({type(error).__name__}): fetch the encoder again"
    )


def check_positions(kind: TextKind, folder: Path, config: CLIPTextConfig) -> None:
    """Raises ValueError unless a CLIP text model reads as many tokens as its tokenizer makes."""
    if config.max_position_embeddings != CLIP_LENGTH:
        raise ValueError(
            f"{kind.key}: {folder} has {config.max_position_embeddings} positions and must have {CLIP_LENGTH}: "
            f"use a CLIP model such as {CLIP_NAME}"
        )


def check_vocabulary(kind: TextKind, config: PreTrainedConfig, size: int) -> None:
    """Raises ValueError for a tokenizer whose ids would be an index fault on the device."""
    if size > config.vocab_size:
        raise ValueError(
            f"{kind.key}: the tokenizer has {size} tokens and the encoder embeds only {config.vocab_size}: "
            "use the tokenizer that belongs to the encoder"
        )


def check_end_token(kind: TextKind, config: CLIPTextConfig, end: int) -> None:
    """Raises ValueError for a tokenizer that ends prompts with an id at which CLIP would not pool.

    A configured id of 2 is a known fault of old files; the library then takes the highest id of the prompt instead.
    """
    configured = config.eos_token_id
    if end != (config.vocab_size - 1 if configured == 2 else configured):
        raise ValueError(
            f"{kind.key}: the tokenizer ends prompts with id {end} and the encoder's config.json says eos_token_id "
            f"{configured}: use the tokenizer that belongs to the encoder"
        )


def _check_width(kind: TextKind, folder: Path, config: PreTrainedConfig, transformer: TransformerConfig) -> None:
    width, wanted = getattr(config, kind.width), getattr(transformer, kind.transformer_width)
    if width != wanted:
        raise ValueError(
            f"{kind.key}: {folder} has {kind.width} {width}, which must equal the model's {kind.transformer_width} "
            f"{wanted}: use an encoder of width {wanted}, or a model.flavor with {kind.transformer_width} {width}"
        )


def read_json(kind: TextKind, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{kind.key}: {file} must be a JSON object and is not: fetch the encoder again")
    return values


def _open_weights(kind: TextKind, folder: Path) -> dict[str, TensorSource]:
    """Parameter name, without the kind's prefix -> where it lies. Only headers are read here."""
    sources = {}
    for path in _weight_files(kind, folder):
        try:
            with safe_open(path, framework="pt") as file:
                headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
                found = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in headers.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{kind.key}: {path} must be a complete safetensors file and cannot be read ({error}): fetch it again"
            ) from error
        for name, (shape, dtype) in found.items():
            plain = name.removeprefix(kind.prefix)
            if kind.other_parts.match(plain):
                continue
            if dtype not in _DTYPES:
                raise ValueError(
                    f"{kind.key}: {path} holds {name} as {dtype}, which is no number format of weights: "
                    f"use files that are not quantized, or the known name {kind.remedy}"
                )
            sources[plain] = TensorSource(shape, _DTYPES[dtype], partial(_read, path, name))
    # Files hold the one embedding of T5 under either of its names, or under both.
    copy = sources.pop("encoder.embed_tokens.weight", None)
    if copy is not None:
        sources.setdefault("shared.weight", copy)
    return sources


def _read(path: Path, name: str) -> Tensor:
    # The file is opened for each tensor: what one handle has read stays mapped until the handle is closed.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _weight_files(kind: TextKind, folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        files = [WEIGHTS]
    else:
        weight_map = read_json(kind, index).get("weight_map")
        # The bare name: an index must not lead out of its folder.
        files = (
            sorted({Path(str(file)).name for file in weight_map.values()})
            if isinstance(weight_map, dict)
            else [WEIGHTS]
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        other = sorted(path.name for path in folder.glob("*.bin"))
        raise ValueError(
            f"{kind.key}: {folder} must hold {', '.join(missing)} and does not"
            + (f"; {other[0]} is not read, since only safetensors files are safe to open" if other else "")
            + f": fetch the safetensors files, or use the known name {kind.remedy}"
        )
    return [folder / file for file in files]


def _check_weights(kind: TextKind, folder: Path, model: nn.Module, sources: dict[str, TensorSource]) -> None:
    wanted = {name.removeprefix(kind.prefix): tuple(value.shape) for name, value in model.named_parameters()}
    for names, rule in (
        (wanted.keys() - sources.keys(), "lack"),
        (sources.keys() - wanted.keys(), f"must hold only a {kind.model_class.__name__} and hold also"),
    ):
        if names:
            raise ValueError(
                f"{kind.key}: the safetensors files in {folder} {rule} {_some(names)}: "
                f"use the files that belong to its config.json, or the known name {kind.remedy}"
            )
    for name, shape in wanted.items():
        if sources[name].shape != shape:
            raise ValueError(
                f"{kind.key}: {name} in {folder} has shape {sources[name].shape} and must have {shape} by config.json: "
                f"use the files that belong together, or the known name {kind.remedy}"
            )


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
