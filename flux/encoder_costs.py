"""What the frozen encoders of a run cost, counted on the meta device: nothing is read but their sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flux.autoencoder import Autoencoder, AutoencoderConfig, config_from_shapes, read_shapes
from flux.conditioner import random_encoders
from flux.config import Encoder
from flux.huggingface import CLIPTextConfig, CLIPTextModel, PreTrainedConfig, T5Config, T5EncoderModel
from flux.spec import ModelSpec
from flux.text_files import CLIP, T5, TextKind, read_config
from flux.text_folders import CLIP_NAME, T5_NAME, TextFolders, resolve_clip, resolve_t5

CLIP_TOKENS = 77
# Sizes of the encoders that FLUX.1 was trained with, for a plan that is made before they are downloaded: their
# config.json on the Hugging Face hub.
_T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


class EncoderCost(NamedTuple):
    """Of one frozen network."""

    parameters: int
    flops: int  # for one sample
    largest_block: int  # parameters of the largest of its blocks, which FSDP gathers; 0: it is never split
    at_work: int = 0  # numbers that it holds at a time, beside its weights, for one sample


def count_encoders(section: Encoder, spec: ModelSpec, test_mode: bool, side: int) -> dict[str, EncoderCost]:
    """Costs of "t5", "clip" and "autoencoder".

    Args:
        side: of a square picture, pixels.

    Raises:
        ValueError: a folder that the configuration names is not there, or not one of such an encoder.
    """
    with torch.device("meta"):
        t5, clip = random_encoders(spec.transformer) if test_mode else _text_encoders(section)
        autoencoder = Autoencoder(_autoencoder_config(section))
        ids = torch.zeros(1, section.max_t5_encoding_len, dtype=torch.int64)
        return {
            "t5": _cost(t5, lambda: t5(input_ids=ids), max(map(_size, t5.encoder.block))),
            "clip": _cost(clip, lambda: clip(input_ids=torch.zeros(1, CLIP_TOKENS, dtype=torch.int64)), 0),
            "autoencoder": _cost(autoencoder, lambda: autoencoder.encode(torch.empty(1, 3, side, side)), 0),
        }


def _text_encoders(section: Encoder) -> tuple[T5EncoderModel, CLIPTextModel]:
    t5 = _read(T5, section.t5_encoder, T5_NAME, resolve_t5) or T5Config(**_T5_XXL, feed_forward_proj="gated-gelu")
    clip = _read(CLIP, section.clip_encoder, CLIP_NAME, resolve_clip) or CLIPTextConfig(**_CLIP_L)
    return T5EncoderModel(t5), CLIPTextModel(clip)


def _read(kind: TextKind, name: str, known: str, resolve: Callable[[str], TextFolders]) -> PreTrainedConfig | None:
    """The configuration of an encoder; None: it is the known one, which is not downloaded yet."""
    try:
        return read_config(kind, resolve(name).weights)
    except ValueError:
        if name != known:
            raise
        return None


def _autoencoder_config(section: Encoder) -> AutoencoderConfig:
    """By the file's shapes; FLUX.1's where it is not there yet, or under diffusers' names, which only that one has."""
    path = Path(section.autoencoder_path)
    shapes = read_shapes(path) if path.is_file() else {}
    return config_from_shapes(shapes, path) if "encoder.conv_in.weight" in shapes else AutoencoderConfig()


def _cost(model: nn.Module, run: Callable[[], object], largest_block: int) -> EncoderCost:
    counter, held = FlopCounterMode(display=False), _HeldBytes(model)
    with torch.no_grad(), held, counter:
        run()
    return EncoderCost(_size(model), counter.get_total_flops(), largest_block, held.most // torch.float32.itemsize)


class _HeldBytes(TorchDispatchMode):
    """The most bytes that results of operators take at a time. (torch's own tracker does not see the meta device.)"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.most = 0
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._held = {key: one for key, one in self._held.items() if not one[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._weights:
                self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return result


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
