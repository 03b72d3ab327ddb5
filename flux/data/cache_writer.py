"""Writes a cache, shard by shard. Each shard appears whole or not at all, so that an interrupted job goes on."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flux.data.cache import (
    BAD_SAMPLES_FILE,
    CACHE_FILE,
    EMPTY_FILE,
    PARTS,
    CacheSettings,
    find_difference,
    make_starts,
    pack_texts,
    read_settings,
    shard_name,
    shrink_rows,
)
from flux.data.captions import choose_caption
from flux.data.dataset import OpenSource
from flux.data.decode import decode_image
from flux.data.errors import REASONS, BadSample, Reason
from flux.data.sample import Sample
from flux.data.tokenizers import FluxTokenizer
from flux.data.transforms import fit_and_crop
from flux.encoders import Encoders
from flux.rng import keyed_generator
from flux.spec import LATENT_STRIDE, ModelSpec


class ToEncode(NamedTuple):
    """What the encoders get of one sample."""

    pixels_CHW: Tensor
    tokens: dict[str, Tensor]


class Features(NamedTuple):
    """What they make of it, on the CPU."""

    moments_CHW: Tensor
    t5_LE: Tensor | None
    pooled_V: Tensor | None


class Bad(NamedTuple):
    """What is wrong with a sample."""

    reason: Reason
    detail: str
    shard: str  # of the data set


class Entry(NamedTuple):
    """One sample on its way into a shard."""

    number: int  # in the data set
    key: str
    caption: str = ""
    bad: Bad | None = None  # why there is nothing to encode
    inputs: ToEncode | None = None
    features: Features | None = None


class SamplesToEncode(Dataset):
    """number -> Entry, with a crop and a caption that depend on the seed and the number alone."""

    def __init__(self, opened: OpenSource, sizes: np.ndarray, tokenizer: FluxTokenizer, seed: int):
        self.opened = opened
        self.sizes = sizes
        self.tokenizer = tokenizer
        self.seed = seed

    def __getitem__(self, number: int) -> Entry:
        key = shard = ""
        size = (int(self.sizes[number][0]), int(self.sizes[number][1]))
        try:
            sample = self.opened.source[number]
            assert isinstance(sample, Sample), "what is encoded is not encoded again"
            key, shard = sample.key, sample.shard
            image = decode_image(sample.image, self.opened.rules, size)
        except BadSample as error:
            return Entry(number, error.key or key, bad=Bad(error.reason, error.detail, error.shard or shard))
        crop = keyed_generator(self.seed, "cache/crop", number) if self.opened.random_crop else None
        caption = choose_caption(sample.captions, keyed_generator(self.seed, "cache/caption", number))
        tokens = {part: ids[0] for part, ids in self.tokenizer([caption]).items()}
        return Entry(number, key, caption, inputs=ToEncode(fit_and_crop(image, size, crop), tokens))


class CacheWriter:
    """The part of a cache that one process writes.

    Args:
        folder: of the cache.
        settings: what cache.json says.
        encoders: all that the settings' parts need.
        batch_size: samples that are encoded together, of one size.
    """

    def __init__(self, folder: Path, settings: CacheSettings, encoders: Encoders, batch_size: int):
        self.folder = folder
        self.settings = settings
        self.encoders = encoders
        self.batch_size = batch_size
        self.bad: dict[Reason, int] = dict.fromkeys(REASONS, 0)

    def write(self, shards: Sequence[int], samples: SamplesToEncode, workers: int) -> Iterator[int]:
        """Writes shards; yields the number of samples after every batch."""
        batches = [(shard, batch) for shard in shards for batch in self.batches(shard, samples.sizes)]
        loader = DataLoader(
            samples, batch_sampler=[batch for _, batch in batches], collate_fn=list, num_workers=workers
        )
        entries: dict[int, Entry] = {}
        for place, (prepared, (shard, batch)) in enumerate(zip(loader, batches, strict=True)):
            entries |= {entry.number: entry for entry in self.encode(prepared)}
            if place + 1 == len(batches) or batches[place + 1][0] != shard:
                self._write_shard(shard, [entries[number] for number in sorted(entries)], samples.sizes)
                entries = {}
            yield len(batch)

    def encode(self, prepared: Sequence[Entry]) -> list[Entry]:
        """One batch through the encoders, in the very calls that training makes."""
        inputs = [entry.inputs for entry in prepared if entry.inputs is not None]
        for entry in prepared:
            if entry.bad is not None:
                self.bad[entry.bad.reason] += 1
        features = iter(self._features(inputs) if inputs else [])
        return [
            entry if entry.inputs is None else entry._replace(inputs=None, features=next(features))
            for entry in prepared
        ]

    def _features(self, inputs: Sequence[ToEncode]) -> list[Features]:
        device, conditioner = self.encoders.device, self.encoders.conditioner
        ids = {part: torch.stack([one.tokens[part] for one in inputs]).to(device) for part in ("t5", "clip")}
        moments = self.encoders.codec.moments(torch.stack([one.pixels_CHW for one in inputs]).to(device)).cpu()
        t5: Sequence[Tensor | None] = [None] * len(inputs)
        if "t5" in self.settings.parts:
            t5 = attended_rows(*conditioner.encode_t5(ids["t5"]))
        pooled: Sequence[Tensor | None] = [None] * len(inputs)
        if "clip" in self.settings.parts:
            pooled = list(conditioner.encode_clip(ids["clip"]).cpu())
        return [Features(*one) for one in zip(moments, t5, pooled, strict=True)]

    def batches(self, shard: int, sizes: np.ndarray) -> Iterator[list[int]]:
        """The samples of a shard, those of one size together."""
        start = shard * self.settings.samples_per_shard
        indices = np.arange(start, min(start + self.settings.samples_per_shard, self.settings.samples))
        for size in np.unique(sizes[indices], axis=0):
            alike = indices[(sizes[indices] == size).all(axis=1)].tolist()
            for first in range(0, len(alike), self.batch_size):
                yield alike[first : first + self.batch_size]

    def _write_shard(self, shard: int, entries: Sequence[Entry], sizes: np.ndarray) -> None:
        made = [entry.features for entry in entries]
        good = [features for features in made if features is not None]
        moments = [features.moments_CHW for features in good]
        tensors: dict[str, Tensor] = {
            "moments": torch.cat([one.flatten() for one in moments]) if good else torch.zeros(0),
            "moments_start": make_starts([0 if one is None else one.moments_CHW.numel() for one in made]),
            "size": torch.from_numpy(sizes[[entry.number for entry in entries]].astype(np.int32)),
            "reason": torch.tensor(
                [0 if entry.bad is None else 1 + REASONS.index(entry.bad.reason) for entry in entries],
                dtype=torch.uint8,
            ),
        }
        tensors["caption"], tensors["caption_start"] = pack_texts([entry.caption for entry in entries])
        tensors["key"], tensors["key_start"] = pack_texts([entry.key for entry in entries])
        t5 = [features.t5_LE for features in good if features.t5_LE is not None]
        if t5:
            tensors |= self.t5_tensors(torch.cat(t5))
            tensors["t5_start"] = make_starts(
                [0 if one is None or one.t5_LE is None else len(one.t5_LE) for one in made]
            )
        pooled = [features.pooled_V for features in good if features.pooled_V is not None]
        if pooled:
            blank_V = torch.zeros_like(pooled[0])
            tensors["clip"] = torch.stack(
                [blank_V if one is None or one.pooled_V is None else one.pooled_V for one in made]
            )
        save_whole(tensors, self.folder / shard_name(shard))
        with (self.folder / BAD_SAMPLES_FILE).open("a", encoding="utf-8") as file:
            for entry in entries:
                if entry.bad:
                    line = {"number": entry.number, "key": entry.key, **entry.bad._asdict()}
                    file.write(json.dumps(line) + "\n")

    def t5_tensors(self, rows_LE: Tensor) -> dict[str, Tensor]:
        """T5 features in the number format of the cache."""
        if self.settings.t5_dtype == "float8_e4m3fn":
            shrunk_LE, scale_L = shrink_rows(rows_LE)
            return {"t5": shrunk_LE, "t5_scale": scale_L}
        return {"t5": rows_LE.to(getattr(torch, self.settings.t5_dtype))}

    def write_empty(self) -> None:
        """The features of the empty prompt, which prompt dropout needs."""
        assert self.encoders.tokenizer is not None
        ids = {part: row_BL.to(self.encoders.device) for part, row_BL in self.encoders.tokenizer([""]).items()}
        tensors: dict[str, Tensor] = {}
        if "t5" in self.settings.parts:
            tensors |= self.t5_tensors(attended_rows(*self.encoders.conditioner.encode_t5(ids["t5"]))[0])
        if "clip" in self.settings.parts:
            tensors["clip"] = self.encoders.conditioner.encode_clip(ids["clip"])[0].cpu()
        save_whole(tensors, self.folder / EMPTY_FILE)


def attended_rows(txt_BLE: Tensor, mask_BL: Tensor | None) -> list[Tensor]:
    """The rows of every prompt that are attended."""
    rows = list(txt_BLE.cpu())
    return rows if mask_BL is None else [row_LE[mask_L] for row_LE, mask_L in zip(rows, mask_BL.cpu(), strict=True)]


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """A file that is complete on the disk when its name appears."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.chmod(path.parent.stat().st_mode & 0o666)  # the library lets nobody else read it
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def claim_cache(folder: Path, settings: CacheSettings) -> list[int]:
    """Makes the folder, or goes on in it: the shards that are still missing. By one process.

    Raises:
        ValueError: a cache of other settings is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CACHE_FILE).exists():
        before = read_settings(folder, "--out")
        # Through JSON, as the other went: tuples come back as lists.
        now = json.loads(json.dumps(settings._asdict()))
        if difference := find_difference(before._asdict(), now):
            raise ValueError(
                f"--out={str(folder)!r} holds a cache that was begun with other settings: {difference}: "
                "name another folder, or take the settings that it was begun with"
            )
    else:
        unfinished = folder / f".{CACHE_FILE}"
        unfinished.write_text(json.dumps(settings._asdict(), indent=1), encoding="utf-8")
        unfinished.replace(folder / CACHE_FILE)
    for leftover in folder.glob(".shard-*"):
        leftover.unlink()
    return [number for number in range(settings.shard_count) if not (folder / shard_name(number)).exists()]


def estimate_bytes(settings: CacheSettings, sizes: np.ndarray, spec: ModelSpec) -> int:
    """Size of a whole cache; where padding is hidden, at most that."""
    itemsize = torch.finfo(getattr(torch, settings.encoders["autoencoder"]["dtype"])).bits // 8
    latents = (sizes[:, 0].astype(np.int64) // LATENT_STRIDE) * (sizes[:, 1] // LATENT_STRIDE)
    total = int(latents.sum()) * 2 * spec.codec.latent_channels * itemsize
    if "t5" in settings.parts:
        values = torch.finfo(getattr(torch, settings.t5_dtype)).bits // 8 * spec.transformer.context_dim
        row = values + (4 if settings.t5_dtype == "float8_e4m3fn" else 0)
        total += settings.samples * settings.encoders["t5"]["max_t5_encoding_len"] * row
    if "clip" in settings.parts:
        total += settings.samples * (spec.transformer.pooled_dim or 0) * itemsize
    return total


def check_parts(text: str) -> list[str]:
    """The parts of a cache that a comma-separated list names.

    Raises:
        ValueError: an unknown one, or no moments.
    """
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts={text} has {unknown[0]!r}, which must be one of {', '.join(PARTS)}")
    if "moments" not in parts:
        raise ValueError(f"--parts={text} must have moments: the autoencoder's part is what every cache holds")
    return [part for part in PARTS if part in parts]
