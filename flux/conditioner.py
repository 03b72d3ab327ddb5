"""Token ids -> TextCond through a frozen T5 encoder and a frozen CLIP text model.

Which is which is decided by the configuration key and checked against `config.json`, never by a word in a path.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux.batch import TextCond
from flux.config import Encoder
from flux.data.tokenizers import CLIP_LENGTH, FluxTokenizer
from flux.huggingface import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)
from flux.spec import TransformerConfig
from flux.text_folders import CLIP_NAME, T5_NAME, TINY_CLIP, TINY_T5, resolve_clip, resolve_t5

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEST_MODE_SEED = 0


class T5ClipConditioner:
    """Encodes prompts for FLUX: T5's last hidden states and CLIP's state at the end token.

    Args:
        t5, clip: the encoders; they are frozen and put into eval mode here.
        mask_padding: hide padding from T5 and return the mask, so that the transformer hides it too. False: padding is
            attended everywhere, as FLUX was trained.
    """

    def __init__(self, t5: T5EncoderModel, clip: CLIPTextModel, mask_padding: bool):
        self.t5 = t5.requires_grad_(False).eval()
        self.clip = clip.requires_grad_(False).eval()
        self.mask_padding = mask_padding

    # Not inference_mode: its tensors cannot be saved for the backward pass of the transformer.
    @torch.no_grad()
    def encode(self, tokens: dict[str, Tensor]) -> TextCond:
        """Text features in the encoders' dtype, on their device.

        Args:
            tokens: what FluxTokenizer made, "t5" [B, L] and "clip" [B, 77], on the encoders' device.
        """
        mask_BL = tokens["t5"] != self.t5.config.pad_token_id if self.mask_padding else None
        return TextCond(
            txt_BLE=self.t5(input_ids=tokens["t5"], attention_mask=mask_BL).last_hidden_state,
            pooled_BV=self.clip(input_ids=tokens["clip"]).pooler_output,
            mask_BL=mask_BL,
        )


@dataclass(frozen=True)
class _Kind:
    """What a kind of encoder looks like on disk."""

    key: str  # of the configuration
    remedy: str  # an encoder that fits
    model_types: tuple[str, ...]  # of config.json
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    width: str  # name of the width in the configuration of the encoder
    transformer_width: str  # and in TransformerConfig
    prefix: str  # of the names in some files: both spellings are in use
    other_parts: re.Pattern[str]  # weights of a complete T5 or CLIP that the text encoder has no use for


_T5 = _Kind(
    key="encoder.t5_encoder",
    remedy=T5_NAME,
    model_types=("t5",),
    config_class=T5Config,
    model_class=T5EncoderModel,
    width="d_model",
    transformer_width="context_dim",
    prefix="",
    other_parts=re.compile(r"decoder\.|lm_head\."),
)
_CLIP = _Kind(
    key="encoder.clip_encoder",
    remedy=CLIP_NAME,
    model_types=("clip_text_model", "clip"),
    config_class=CLIPTextConfig,
    model_class=CLIPTextModel,
    width="hidden_size",
    transformer_width="pooled_dim",
    prefix="text_model.",
    other_parts=re.compile(
        r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|embeddings\.position_ids$"
    ),
)


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
) -> T5ClipConditioner:
    """The frozen text encoders of a run.

    Args:
        encoder: the [encoder] section; `dtype` is that of the weights and of the features.
        transformer: the encoders' widths must be its context_dim and pooled_dim.
        test_mode: True builds randomly initialized one-layer encoders of these widths for the tiny tokenizers, always
            the same ones, whatever the section names.
        device: where the encoders live.
        t5_sharding: splits T5, which is 38 times CLIP's size, over processes. None: this one holds all of it.

    Raises:
        ValueError: names the key, the folder, what is wrong with it and the remedy.
    """
    dtype = getattr(torch, encoder.dtype)
    if test_mode:
        t5, clip = _random_encoders(transformer)
        t5, clip = t5.to(device, dtype), clip.to(device, dtype)
        if t5_sharding is not None:
            t5_sharding.split(t5, list(t5.encoder.block))
    else:
        t5 = load_t5(resolve_t5(encoder.t5_encoder).weights, transformer, dtype, device, t5_sharding)
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
    return _load(_T5, folder, transformer, dtype, device, sharding)


def load_clip(
    folder: Path, transformer: TransformerConfig, dtype: torch.dtype, device: torch.device | str
) -> CLIPTextModel:
    """CLIP text model from safetensors files of it or of a complete CLIP, whose vision tower is left out.

    The arguments are those of `load_t5`; the width is the transformer's pooled_dim.

    Raises:
        ValueError: names `encoder.clip_encoder`, the folder, what is wrong with it and the remedy.
    """
    model = _load(_CLIP, folder, transformer, dtype, device)
    if model.config.max_position_embeddings != CLIP_LENGTH:
        raise ValueError(
            f"{_CLIP.key}: {folder} has {model.config.max_position_embeddings} positions and must have {CLIP_LENGTH}: "
            f"use a CLIP text model such as {CLIP_NAME}"
        )
    return model


def _load(
    kind: _Kind,
    folder: Path,
    transformer: TransformerConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    sharding: Sharding | None = None,
):
    config = _read_config(kind, folder)
    _check_width(kind, folder, config, transformer)
    try:
        with torch.device("meta"):
            model = kind.model_class(config).to(dtype)
    except Exception as error:  # such as an activation that the library does not know
        raise _invalid_config(kind, folder, error) from error
    _tie(model)
    with ExitStack() as stack:
        sources = _open_weights(kind, folder, stack)
        _check_weights(kind, folder, model, sources)
        if torch.device(device).type == "meta":
            return model
        if sharding is not None:
            sharding.split(model, list(model.encoder.block))
        model.to_empty(device=device)
        _tie(model)
        copy_ = Tensor.copy_ if sharding is None else sharding.copy_
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # one at a time: the peak is the model itself
                copy_(parameter, sources[name.removeprefix(kind.prefix)].read())
    _fill_buffers(model)
    return model


def _read_config(kind: _Kind, folder: Path) -> PreTrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{kind.key}: {folder} must hold config.json and {WEIGHTS} and has no config.json: "
            f"give the folder of the encoder itself, or the known name {kind.remedy}"
        )
    values = _read_json(kind, file)
    found = values.get("model_type")
    if found not in kind.model_types:
        raise ValueError(
            f"{kind.key}: {folder} must hold an encoder of model_type {' or '.join(kind.model_types)} "
            f"and its config.json says {found!r}: use another folder, or the known name {kind.remedy}"
        )
    try:
        return kind.config_class.from_dict(values.get("text_config", values))
    except Exception as error:  # whatever the library's validation raises
        raise _invalid_config(kind, folder, error) from error


def _invalid_config(kind: _Kind, folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{kind.key}: {folder / 'config.json'} must be the configuration of a {kind.model_class.__name__} "
        f"and has a value that does not work ({type(error).__name__}): fetch the encoder again"
    )


def _check_width(kind: _Kind, folder: Path, config: PreTrainedConfig, transformer: TransformerConfig) -> None:
    width, wanted = getattr(config, kind.width), getattr(transformer, kind.transformer_width)
    if width != wanted:
        raise ValueError(
            f"{kind.key}: {folder} has {kind.width} {width}, which must equal the model's {kind.transformer_width} "
            f"{wanted}: use an encoder of width {wanted}, or a model.flavor with {kind.transformer_width} {width}"
        )


def _read_json(kind: _Kind, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{kind.key}: {file} must be a JSON object and is not: fetch the encoder again")
    return values


@dataclass(frozen=True)
class _Source:
    """One tensor in an open safetensors file."""

    file: Any  # safetensors' handle
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def _open_weights(kind: _Kind, folder: Path, stack: ExitStack) -> dict[str, _Source]:
    """Parameter name, without the kind's prefix -> where it lies. Only headers are read here."""
    sources = {}
    for path in _weight_files(kind, folder):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{kind.key}: {path} must be a complete safetensors file and cannot be read ({error}): fetch it again"
            ) from error
        for name in file.keys():  # noqa: SIM118, not a dict
            plain = name.removeprefix(kind.prefix)
            if not kind.other_parts.match(plain):
                sources[plain] = _Source(file, name)
    # Files hold the one embedding of T5 under either of its names, or under both.
    copy = sources.pop("encoder.embed_tokens.weight", None)
    if copy is not None:
        sources.setdefault("shared.weight", copy)
    return sources


def _weight_files(kind: _Kind, folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        files = [WEIGHTS]
    else:
        weight_map = _read_json(kind, index).get("weight_map")
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


def _check_weights(kind: _Kind, folder: Path, model: nn.Module, sources: dict[str, _Source]) -> None:
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


def _tie(model: PreTrainedModel) -> None:
    """T5 reads its one embedding under two names; CLIP is left as it is."""
    if isinstance(model, T5EncoderModel):
        model.set_input_embeddings(model.shared)


def _fill_buffers(model: nn.Module) -> None:
    """Buffers that no file holds: CLIP counts its positions in one."""
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def _random_encoders(transformer: TransformerConfig) -> tuple[T5EncoderModel, CLIPTextModel]:
    """One-layer encoders of the transformer's widths for the tiny tokenizers; the global generator does not move."""
    t5 = _read_config(_T5, TINY_T5.weights).to_dict()
    t5 |= {"d_model": transformer.context_dim, "num_layers": 1, "num_heads": 2, "d_kv": 64, "d_ff": 128}
    clip = _read_config(_CLIP, TINY_CLIP.weights).to_dict()
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
    clip = conditioner.clip
    for kind, model, size in (
        (_T5, conditioner.t5, tokenizer.vocabulary_sizes["t5"]),
        (_CLIP, clip, tokenizer.vocabulary_sizes["clip"]),
    ):
        if size > model.config.vocab_size:
            raise ValueError(
                f"{kind.key}: the tokenizer has {size} tokens and the encoder embeds only {model.config.vocab_size}: "
                "use the tokenizer that belongs to the encoder"
            )
    # CLIP pools at its end token, which an empty prompt has right after the start. A configured id of 2 is a known
    # fault of old files; the library then takes the highest id of the prompt instead.
    end = int(tokenizer([""])["clip"][0, 1])
    configured = clip.config.eos_token_id
    if end != (clip.config.vocab_size - 1 if configured == 2 else configured):
        raise ValueError(
            f"{_CLIP.key}: the tokenizer ends prompts with id {end} and the encoder's config.json says eos_token_id "
            f"{configured}: use the tokenizer that belongs to the encoder"
        )
