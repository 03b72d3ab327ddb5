"""Names of data sets -> sources, and the part of a source that is held out for validation."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar, cast

import numpy as np
from torch import Tensor

from flux.config import Data
from flux.data.errors import DataError
from flux.data.imagefolder import ImageFolderSource
from flux.data.presets import PRESETS
from flux.data.sample import EncodedSample, EncodedSource, Sample, Shard, Source, held_out_count
from flux.data.shapes import ShapesSource
from flux.data.shuffle import permute
from flux.data.storage import is_local
from flux.data.tars import WebDatasetSource

Split = Literal["all", "train", "validation"]

HELD_OUT_KEY = 0  # of the draw of which ones; another seed of a run must not show them to training

log = logging.getLogger(__name__)
AnySource = TypeVar("AnySource", Source, EncodedSource)


def build_source(
    dataset: str,
    dataset_path: str | None,
    data: Data,
    img_size: int,
    split: Split,
    section: str,
    show_progress: bool = False,
) -> Source:
    """A data set of pictures by name.

    Args:
        dataset: "shapes", "imagefolder", "webdataset", "parquet" or one of PRESETS.
        dataset_path: where its pictures are; of a preset, where a copy is.
        data: the section.
        img_size: side of procedural pictures in pixels.
        split: what of it; shapes always keep their held-out scenes out of training.
        section: where the configuration says so: "training", "validation" or "data.sources[2]".
        show_progress: of an indexing, on a terminal.

    Raises:
        ValueError: a data set that cannot be opened as configured.
        DataError: a data set that is faulty.
    """
    if dataset == "shapes":
        return ShapesSource("validation" if split == "validation" else "train", img_size)
    kind, path, key = dataset, dataset_path, f"{section}.dataset_path"
    if dataset in PRESETS:
        preset = PRESETS[dataset]
        kind = preset.kind
        if path is None and preset.url is not None:
            path, key = preset.url, f"{section}.dataset"
        data = replace(
            data,
            image_field=data.image_field or preset.image_field,
            caption_field=data.caption_field or preset.caption_field,
        )
    if path is None:
        raise ValueError(f"{key} is missing: {section}.dataset={dataset!r} needs to know where its pictures are")
    if kind == "imagefolder":
        return ImageFolderSource(path, data, key, split)
    source: Source
    if kind == "webdataset":
        source = WebDatasetSource(path, data, key, show_progress)
    else:
        assert kind == "parquet", kind
        from flux.data.parquet import ParquetSource  # only who reads it pays for the import of pyarrow

        source = ParquetSource(path, data, key, show_progress)
    _warn_of_a_small_cache(source, path, data)
    return hold_out(source, split, key)


def _warn_of_a_small_cache(source: Source, path: str, data: Data) -> None:
    gigabytes = sum(shard.bytes for shard in source.shards) / 1e9
    if not is_local(path) and 0 < data.shard_cache_gb < gigabytes and not data.shuffle_window:
        log.warning(
            "data.shard_cache_gb=%g keeps a part of %.3g GB, and data.shuffle_window=0 takes samples from everywhere: "
            "set a window that fits into it, or data.shard_cache_gb=0 to fetch samples instead of shards",
            data.shard_cache_gb,
            gigabytes,
        )


def hold_out(source: AnySource, split: Split, key: str) -> AnySource:
    """The part of a source that is for training or for validation, or all of it.

    Raises:
        DataError: one sample cannot serve both.
    """
    if split == "all":
        return source
    if len(source) < 2:
        raise DataError(f"{key}: it holds one sample, and training and validation need one each")
    return cast(AnySource, HeldOut(source, split))


class HeldOut:
    """A part of a source: a few samples, spread over all of it, or all the others.

    Which ones follows from the length of the source alone.

    Args:
        source: of pictures or of encoded samples.
        split: "validation", the few; "train", the others.
    """

    def __init__(self, source: Source | EncodedSource, split: Literal["train", "validation"]):
        self.source = source
        self.split = split
        length = len(source)
        count = held_out_count(length)
        self._held = np.sort([permute(place, length, HELD_OUT_KEY) for place in range(count)])
        # Before the i-th of them stand so many others.
        self._others_before = self._held - np.arange(count)
        ends = np.cumsum([shard.samples for shard in source.shards])
        held = np.diff(np.searchsorted(self._held, ends), prepend=0).tolist()
        self.shards: Sequence[Shard] = [
            shard._replace(samples=some if split == "validation" else shard.samples - some)
            for shard, some in zip(source.shards, held, strict=True)
        ]

    @property
    def parts(self) -> frozenset[str]:
        """Of an encoded source."""
        return getattr(self.source, "parts", frozenset())

    def empty(self) -> dict[str, Tensor]:
        """Of an encoded source."""
        return cast(EncodedSource, self.source).empty()

    def __len__(self) -> int:
        return len(self._held) if self.split == "validation" else len(self.source) - len(self._held)

    def __getitem__(self, index: int) -> Sample | EncodedSample:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in range({len(self)})")
        if self.split == "validation":
            return self.source[int(self._held[index])]
        return self.source[index + int(np.searchsorted(self._others_before, index, side="right"))]

    def picture_sizes(self) -> np.ndarray:
        sizes = self.source.picture_sizes()
        return sizes[self._held] if self.split == "validation" else np.delete(sizes, self._held, axis=0)
