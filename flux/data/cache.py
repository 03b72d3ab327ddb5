"""A cache of what the frozen encoders make of a data set, in safetensors shards.

    cache.json                  what it is made of and by which encoders
    empty.safetensors           features of the empty prompt
    bad_samples.jsonl           which samples could not be encoded, and why
    shard-00000.safetensors     samples 0 .. samples_per_shard - 1 of the data set, and so on

A shard holds rows of varying length in one tensor each, with the row at which every sample begins:

    moments        [all values]         of picture i from moments_start[i], in the shape [2 * latent_channels, H/8, W/8]
    size           [samples, 2]         (width, height) in which the picture is shown, pixels
    t5             [all rows, E]        of sample i from t5_start[i]; without rows of padding where padding is hidden
    t5_scale       [all rows]           what a row of 8-bit features is multiplied by
    clip           [samples, V]
    caption, key   [all bytes]          UTF-8, from caption_start[i] and key_start[i]
    reason         [samples]            0: the sample is good; n: it is bad for the reason REASONS[n - 1]
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux.data.errors import REASONS, BadSample, DataError
from flux.data.sample import EncodedSample, Shard
from flux.spec import LATENT_STRIDE, TransformerConfig

CACHE_FILE, EMPTY_FILE, BAD_SAMPLES_FILE = "cache.json", "empty.safetensors", "bad_samples.jsonl"
FORMAT = 1
PARTS = ("moments", "t5", "clip")  # a cache always has the moments
OPEN_SHARDS = 32  # files that a process keeps open
# Part of a cache -> the encoder that has made it, as flux/fingerprint.py calls it.
ENCODER_OF = {"moments": "autoencoder", "t5": "t5", "clip": "clip"}


class CacheSettings(NamedTuple):
    """What cache.json says."""

    format: int
    samples: int
    samples_per_shard: int
    parts: list[str]
    t5_dtype: str  # "bfloat16", "float32", or "float8_e4m3fn" with a scale per row
    encoders: dict[str, dict[str, Any]]  # of flux/fingerprint.py
    pictures: dict[str, Any]  # how they were cut and read
    shards: list[Any]  # (name, bytes, samples) of those of the data set

    @property
    def shard_count(self) -> int:
        return math.ceil(self.samples / self.samples_per_shard)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def read_settings(folder: Path, key: str) -> CacheSettings:
    """Of a cache, complete or not.

    Raises:
        DataError: there is none, or one of another format.
    """
    try:
        settings = CacheSettings(**json.loads((folder / CACHE_FILE).read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(
            f"{key}={str(folder)!r} holds no {CACHE_FILE} that can be read ({error.strerror}): make the cache with "
            "python -m scripts.preencode, or correct the path"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / CACHE_FILE} is not the description of a cache ({error}): make it again") from error
    if settings.format != FORMAT:
        raise DataError(f"{folder / CACHE_FILE} has format {settings.format}, and this recipe reads {FORMAT}")
    return settings


def find_difference(before: Any, now: Any, name: str = "") -> str | None:
    """The first thing in which two descriptions differ, such as `t5.max_t5_encoding_len 256 -> 512`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            found = find_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if before == now else f"{name} {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."


class CacheSource:
    """The samples of a cache, by their numbers in the data set that it was made of.

    Args:
        folder: of the cache.
        key: configuration key of the folder, for messages.
        encoders: those of the run, of `describe_encoders`: the cache must be made by the same ones.

    Raises:
        ValueError: it was made by other encoders.
        DataError: no cache, or one that is not complete.
    """

    def __init__(self, folder: str, key: str, encoders: dict[str, dict[str, Any]]):
        self.folder = Path(folder)
        self.settings = settings = read_settings(self.folder, key)
        self.parts = frozenset(settings.parts)
        for part in settings.parts:
            encoder = ENCODER_OF[part]
            if difference := find_difference(settings.encoders[encoder], encoders[encoder], encoder):
                raise ValueError(
                    f"{key}={folder!r} was made by another encoder: {difference}: "
                    "set [encoder] as it was, or make the cache again"
                )
        files = [self.folder / shard_name(number) for number in range(settings.shard_count)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise DataError(
                f"{key}={folder!r} is not complete, {len(missing)} of {len(files)} shards are missing, the first is "
                f"{missing[0]}: run scripts.preencode again, it goes on where it stopped"
            )
        self.shards = [
            Shard(file.name, file.stat().st_size, min(settings.samples_per_shard, settings.samples - start))
            for file, start in zip(files, range(0, settings.samples, settings.samples_per_shard), strict=True)
        ]
        self._key = key
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def check_widths(self, transformer: TransformerConfig) -> None:
        """Raises ValueError unless the features have the widths that a transformer reads."""
        empty = self.empty()
        for part, wanted in (("t5", transformer.context_dim), ("clip", transformer.pooled_dim)):
            if part in empty and empty[part].shape[-1] != wanted:
                raise ValueError(
                    f"{self._key}={str(self.folder)!r} holds features of {part} of width {empty[part].shape[-1]}, and "
                    f"model.flavor needs {wanted}: set the flavor that it was made for"
                )

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return self.settings.samples

    def __getitem__(self, index: int) -> EncodedSample:
        number, row = divmod(index, self.settings.samples_per_shard)
        name = shard_name(number)
        try:
            return self._open(number).read(row, name)
        except (SafetensorError, OSError, RuntimeError, ValueError, LookupError) as error:
            if isinstance(error, BadSample):
                raise
            raise BadSample("unreadable", f"the shard of the cache is damaged ({error})", str(row), name) from error

    def picture_sizes(self) -> np.ndarray:
        sizes = []
        for shard in self.shards:
            try:
                with safe_open(self.folder / shard.name, framework="pt") as file:
                    sizes.append(file.get_tensor("size").numpy())
            except (SafetensorError, OSError) as error:
                raise DataError(
                    f"{self._key}: {self.folder / shard.name} is damaged ({error}): "
                    "delete it and run scripts.preencode again"
                ) from error
        return np.concatenate(sizes)

    def empty(self) -> dict[str, Tensor]:
        try:
            return dict(_read_empty(self.folder))
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{self._key}: {self.folder / EMPTY_FILE} cannot be read ({error}): run scripts.preencode again"
            ) from error

    def _open_shard(self, number: int) -> "_CacheShard":
        return _CacheShard(self.folder / shard_name(number))


@lru_cache(maxsize=8)
def _read_empty(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / EMPTY_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    if "t5_scale" in tensors:
        tensors["t5"] = restore_rows(tensors["t5"], tensors.pop("t5_scale"))
    return tensors


class _CacheShard:
    """One open file: small tensors in memory, the others mapped."""

    def __init__(self, path: Path):
        file = safe_open(path, framework="pt")
        names = set(file.keys())
        small = ("size", "reason", "caption", "caption_start", "key", "key_start", "moments_start", "t5_start")
        held = {name: file.get_tensor(name).numpy() for name in small if name in names}
        self.size: np.ndarray = held["size"]
        self._held = held
        self._slices = {name: file.get_slice(name) for name in ("moments", "t5", "t5_scale", "clip") if name in names}

    def read(self, row: int, shard: str) -> EncodedSample:
        key = self._text("key", row)
        if reason := int(self._held["reason"][row]):
            raise BadSample(REASONS[reason - 1], "found when the cache was made", key, shard)
        width, height = (int(side) // LATENT_STRIDE for side in self.size[row])
        t5_LE = None
        if "t5" in self._slices:
            t5_LE = self._rows("t5", row)
            if "t5_scale" in self._slices:
                start, end = self._range("t5", row)
                t5_LE = restore_rows(t5_LE, self._slices["t5_scale"][start:end])
        return EncodedSample(
            moments_CHW=self._rows("moments", row).view(-1, height, width),
            t5_LE=t5_LE,
            pooled_V=self._slices["clip"][row] if "clip" in self._slices else None,
            caption=self._text("caption", row),
            key=key,
            shard=shard,
        )

    def _range(self, name: str, row: int) -> tuple[int, int]:
        starts = self._held[f"{name}_start"]
        return int(starts[row]), int(starts[row + 1])

    def _rows(self, name: str, row: int) -> Tensor:
        start, end = self._range(name, row)
        return self._slices[name][start:end]

    def _text(self, name: str, row: int) -> str:
        start, end = self._range(name, row)
        return self._held[name][start:end].tobytes().decode()


def shrink_rows(rows_LE: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit floats and the scale of every row, [L], that brings its largest value to their largest."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale_L = rows_LE.float().abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny) / largest
    return (rows_LE.float() / scale_L[:, None]).to(torch.float8_e4m3fn), scale_L


def restore_rows(rows_LE: Tensor, scale_L: Tensor) -> Tensor:
    """What `shrink_rows` kept, in bfloat16."""
    return (rows_LE.float() * scale_L[:, None]).bfloat16()


def pack_texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Bytes of all texts, and where each begins."""
    encoded = [text.encode() for text in texts]
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    return torch.from_numpy(data.copy()), make_starts([len(text) for text in encoded])


def make_starts(lengths: Sequence[int]) -> Tensor:
    """[samples + 1] int64: where rows of these lengths begin, and where the last ends."""
    return torch.tensor([0, *lengths]).cumsum(0)
