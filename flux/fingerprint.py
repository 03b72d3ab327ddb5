"""What encoders were used, in a few words and hashes: features that others have made are of no use to a transformer."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flux.config import Encoder
from flux.text_folders import (
    CLIP_TOKENIZER_FILES,
    T5_TOKENIZER_FILES,
    TINY_CLIP,
    TINY_T5,
    TextFolders,
    resolve_clip,
    resolve_t5,
)

# Fields of config.json that change no feature.
_WRITERS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
_PROBE = 4096  # bytes at the beginning, the middle and the end of every tensor


def describe_encoders(encoder: Encoder, test_mode: bool) -> dict[str, dict[str, Any]]:
    """What the features of each encoder depend on: "autoencoder", "t5" and "clip".

    Args:
        encoder: the [encoder] section.
        test_mode: training.test_mode, whose text encoders have no files.

    Raises:
        ValueError: an encoder that is not there.
    """
    t5 = TINY_T5 if test_mode else resolve_t5(encoder.t5_encoder)
    clip = TINY_CLIP if test_mode else resolve_clip(encoder.clip_encoder)
    autoencoder = Path(encoder.autoencoder_path)
    dtype = {"dtype": encoder.dtype}
    return {
        "autoencoder": {"weights": _hash_weights([autoencoder], "encoder.autoencoder_path"), **dtype},
        "t5": {
            "weights": "test_mode" if test_mode else _hash_weights([t5.weights], "encoder.t5_encoder"),
            "config": _hash_config(t5),
            "tokenizer": _hash_tokenizer(t5, T5_TOKENIZER_FILES),
            "max_t5_encoding_len": encoder.max_t5_encoding_len,
            "mask_padding": encoder.mask_padding,
            **dtype,
        },
        "clip": {
            "weights": "test_mode" if test_mode else _hash_weights([clip.weights], "encoder.clip_encoder"),
            "config": _hash_config(clip),
            "tokenizer": _hash_tokenizer(clip, CLIP_TOKENIZER_FILES),
            **dtype,
        },
    }


def _hash_weights(paths: list[Path], key: str) -> str:
    """Of the names and shapes of all tensors, and of a few kilobytes of each: other training changes every tensor, and
    ten gigabytes are not read at every start.
    """
    digest = hashlib.sha256()
    files = [file for path in paths for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"{key}: {paths[0]} holds no safetensors files: fetch the encoder, or correct the path")
    for file in files:
        try:
            _hash_file(file, digest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{key}: {file} is not a complete safetensors file ({error}): fetch it again") from error
    return digest.hexdigest()


def _hash_file(path: Path, digest: "hashlib._Hash") -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items()):
            begin, end = tensor["data_offsets"]
            digest.update(f"{name}|{tensor['dtype']}|{tensor['shape']}|".encode())
            for start in (begin, (begin + end) // 2, max(begin, end - _PROBE)):
                file.seek(8 + length + start)
                digest.update(file.read(min(_PROBE, end - start)))


def _hash_config(folders: TextFolders) -> str:
    """Of config.json, but for what only tells who has written it."""
    try:
        values = json.loads((folders.weights / "config.json").read_text(encoding="utf-8"))
        values = {name: value for name, value in values.items() if name not in _WRITERS}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folders.weights / 'config.json'} cannot be read ({error}): fetch the encoder again"
        ) from error
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _hash_tokenizer(folders: TextFolders, alternatives: tuple[tuple[str, ...], ...]) -> str:
    digest = hashlib.sha256()
    for name in sorted({name for names in alternatives for name in names}):
        file = folders.tokenizer / name
        if file.is_file():
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()
