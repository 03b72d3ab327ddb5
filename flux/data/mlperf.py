"""MLPerf Training's pre-encoded FLUX.1 samples, read as they are published.

    cc12m_preprocessed/state.json                     names the Arrow files, as datasets' `save_to_disk` writes it
    cc12m_preprocessed/data-00000-of-04800.arrow      Arrow streams: record batches of samples
    empty_encodings/t5_empty.npy, clip_empty.npy      features of the empty prompt, float16, [1, L, E] and [1, V]

A sample is a row of `__key__`; `t5_encodings`, `clip_encodings`, `mean` and `logvar`, each the bytes of `numpy.save` of
a bfloat16 tensor seen as uint16; and `timestep`, the k of a validation sample's time k/8, null in training.

Files are mapped: opening a data set reads the headers of its record batches, and a sample takes its own pages.

Source of the format: pytorch/torchtitan, branch mlperf-training-flux.1, torchtitan/experiments/flux/scripts.
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from flux.config import TIME_STEPS
from flux.data.errors import BadSample, DataError
from flux.data.sample import EncodedSample, Shard
from flux.spec import LATENT_STRIDE, ModelSpec

STATE_FILE, EMPTY_FOLDER = "state.json", "empty_encodings"
EMPTY_FILES = {"t5": "t5_empty.npy", "clip": "clip_empty.npy"}
STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; without it, one may be cut between two batches
# Columns of arrays -> the keys that say which shape they must have.
ARRAYS = {
    "t5_encodings": "encoder.max_t5_encoding_len or model.flavor",
    "clip_encodings": "model.flavor",
    "mean": "training.img_size or model.flavor",
    "logvar": "training.img_size or model.flavor",
}
# What numpy.save writes ahead of the values of an array of plain numbers.
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']{1,9})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n",
    re.DOTALL,
)


class MLPerfSource:
    """Map-style source over the published samples.

    Args:
        folder: holds state.json, or one folder that does.
        key: configuration key of the folder, for messages.
        spec: the flavor, whose widths the features must have.
        img_size: side of the pictures that were encoded, pixels.
        text_length: rows of T5's features.

    Raises:
        ValueError: features of other sizes than the run's.
        DataError: no such data set, or a damaged one.
    """

    parts = frozenset({"moments", "t5", "clip"})

    def __init__(self, folder: str, key: str, spec: ModelSpec, img_size: int, text_length: int):
        self.folder = _find_folder(Path(folder), key)
        self._key, self._img_size = key, img_size
        side, transformer = img_size // LATENT_STRIDE, spec.transformer
        latent = (spec.codec.latent_channels, side, side)
        shapes = ((text_length, transformer.context_dim), (transformer.pooled_dim,), latent, latent)
        self._shapes = dict(zip(ARRAYS, shapes, strict=True))
        self._files = _list_files(self.folder, key)
        counts = [_open_file(file, key).samples for file in self._files]
        self.shards = [
            Shard(file.name, file.stat().st_size, rows) for file, rows in zip(self._files, counts, strict=True)
        ]
        self._ends = list(accumulate(counts))
        if not sum(counts):
            raise DataError(f"{key}={folder!r} has no samples: fetch it again")
        self._check_shapes()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> EncodedSample:
        number, place = _find(self._ends, index)
        row = _open_file(self._files[number], self._key).row(place)
        shard, key = self.shards[number].name, f"row {place}"
        try:
            arrays = _read_arrays(row)
            key = row["__key__"][0].as_py() or key
            for name, shape in self._shapes.items():
                if arrays[name].shape != shape:
                    raise ValueError(f"{name} has the shape {arrays[name].shape}, and the others have {shape}")
            time_step = row["timestep"][0].as_py() if "timestep" in row.schema.names else None
            if time_step is not None and time_step not in range(TIME_STEPS):
                raise ValueError(f"timestep={time_step} is none of 0..{TIME_STEPS - 1}")
        except (ValueError, pa.ArrowException) as error:
            raise BadSample("damaged", str(error), key, shard) from error
        return EncodedSample(
            moments_CHW=_to_bfloat16(arrays["mean"], arrays["logvar"]),
            t5_LE=_to_bfloat16(arrays["t5_encodings"]),
            pooled_V=_to_bfloat16(arrays["clip_encodings"]),
            caption="",
            key=key,
            shard=shard,
            time_step=time_step,
        )

    def picture_sizes(self) -> np.ndarray:
        return np.full((len(self), 2), self._img_size, dtype=np.int32)

    def empty(self) -> dict[str, Tensor]:
        return _load_empty(self.folder, self._key, self._shapes["t5_encodings"], self._shapes["clip_encodings"])

    def _check_shapes(self) -> None:
        """The first sample has the shapes that this run needs."""
        number, place = _find(self._ends, 0)
        try:
            arrays = _read_arrays(_open_file(self._files[number], self._key).row(place))
        except (ValueError, pa.ArrowException) as error:
            raise DataError(
                f"{self._key}: {self._files[number]} does not begin with a sample of MLPerf's ({error}): fetch it again"
            ) from error
        for name, shape in self._shapes.items():
            found = arrays[name].shape
            if found != shape:
                raise ValueError(
                    f"{self._key}: {name} in {self.folder} has the shape {found}, and this run needs {shape}: "
                    f"set {ARRAYS[name]} as it was encoded"
                )


class _ArrowFile:
    """The record batches of a mapped file."""

    def __init__(self, path: Path, key: str):
        try:
            with pa.memory_map(str(path)) as stream:  # closes the descriptor; the batches hold the mapping
                stream.seek(max(0, stream.size() - len(STREAM_END)))
                is_whole = stream.read() == STREAM_END
                stream.seek(0)
                reader = pa.ipc.open_stream(stream)
                schema, self._batches = reader.schema, list(reader)
            if not is_whole:
                raise ValueError("its end is missing")
        except (ValueError, OSError, pa.ArrowException) as error:
            raise DataError(f"{key}: {path} is not a whole Arrow stream ({error}): fetch it again") from error
        _check_columns(schema, path, key)
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self.samples = self._ends[-1] if self._ends else 0

    def row(self, place: int) -> pa.RecordBatch:
        """One sample."""
        number, row = _find(self._ends, place)
        return self._batches[number].slice(row, 1)


# Every process opens the files that it reads, and keeps them: a mapping takes no descriptor and next to no memory.
_open_file = lru_cache(maxsize=None)(_ArrowFile)


def _check_columns(schema: pa.Schema, path: Path, key: str) -> None:
    for name in ("__key__", *ARRAYS):
        if name not in schema.names:
            raise DataError(
                f"{key}: {path} has no column {name}, but {', '.join(schema.names)}: "
                "give the folder of MLPerf's pre-encoded samples"
            )
    for name in ARRAYS:
        kind = schema.field(name).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise DataError(
                f"{key}: column {name} of {path} is of type {kind}, and must be binary: "
                "give the folder of MLPerf's pre-encoded samples"
            )


def _find(ends: Sequence[int], number: int) -> tuple[int, int]:
    """Which of the parts with these ends an item is in, and its number there."""
    part = bisect_right(ends, number)
    return part, number - (ends[part - 1] if part else 0)


def _read_arrays(row: pa.RecordBatch) -> dict[str, np.ndarray]:
    """The arrays of one sample, where they lie in its file.

    Raises:
        ValueError: damaged, or of other numbers than bfloat16 seen as uint16.
    """
    row.validate(full=True)  # offsets of a damaged file may lead anywhere
    arrays = {}
    for name in ARRAYS:
        value = row[name][0]
        if not value.is_valid:
            raise ValueError(f"{name} is null")
        arrays[name] = array = _parse_npy(memoryview(value.as_buffer()), name)
        if array.dtype != np.uint16:
            raise ValueError(f"{name} is of {array.dtype}, and must be bfloat16 seen as uint16")
    return arrays


def _parse_npy(data: memoryview, name: str) -> np.ndarray:
    """The array in the bytes of numpy.save, not copied. Objects, which would be pickled, are none that it reads.

    Raises:
        ValueError: other bytes.
    """
    header = _NPY_HEADER.match(data)
    if header is None:
        raise ValueError(f"{name} is not an array as numpy.save writes it")
    dtype, is_by_column, shape = (part.decode() for part in header.groups())
    if dtype not in ("<u2", "<f2", "<f4"):
        raise ValueError(f"{name} is an array of {dtype}, and must be of plain numbers in 16 or 32 bits")
    if is_by_column == "True":
        raise ValueError(f"{name} is stored column by column, and must be row by row")
    sizes = tuple(int(size) for size in shape.split(",") if size.strip())
    values = np.frombuffer(data, dtype, offset=header.end())
    if values.size != math.prod(sizes):
        raise ValueError(f"{name} has {values.size} values for the shape {sizes}")
    return values.reshape(sizes)


def _to_bfloat16(*arrays: np.ndarray) -> Tensor:
    """One tensor of the arrays, joined along their first dim."""
    return torch.from_numpy(np.concatenate(arrays)).view(torch.bfloat16)


def _find_folder(folder: Path, key: str) -> Path:
    if (folder / STATE_FILE).is_file():
        return folder
    splits = sorted(path.parent for path in folder.glob(f"*/{STATE_FILE}"))
    if len(splits) == 1:
        return splits[0]
    if splits:
        names = ", ".join(split.name for split in splits)
        raise DataError(f"{key}={str(folder)!r} holds several data sets: give one of its folders {names}")
    raise DataError(
        f"{key}={str(folder)!r} holds no {STATE_FILE}: give the folder of MLPerf's pre-encoded samples, such as "
        "cc12m_preprocessed"
    )


def _list_files(folder: Path, key: str) -> list[Path]:
    try:
        state: Any = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]  # bare: it must not lead elsewhere
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{key}: {folder / STATE_FILE} does not name the files of a data set ({error}): fetch it again"
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{key}: {folder} lacks {len(missing)} of its {len(names)} files, the first is {missing[0]}: fetch them too"
        )
    return [folder / name for name in names]


@lru_cache(maxsize=8)
def _load_empty(folder: Path, key: str, t5_shape: tuple[int, ...], clip_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Features of the empty prompt, in bfloat16, as the samples are."""
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / EMPTY_FOLDER).is_dir():
            break
    else:
        raise DataError(
            f"{key}: there is no folder {EMPTY_FOLDER} in {folder} or beside it, which prompts are dropped for: "
            "fetch it, or set training.classifier_free_guidance_prob=0"
        )
    features = {}
    for (part, name), shape in zip(EMPTY_FILES.items(), (t5_shape, clip_shape), strict=True):
        path = place / EMPTY_FOLDER / name
        try:
            array = _parse_npy(memoryview(path.read_bytes()), name)
            if array.dtype == np.uint16 or array.shape not in (shape, (1, *shape)):
                raise ValueError(f"{array.dtype} {array.shape} instead of float16 {(1, *shape)}")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{key}: {path} is not the features of the empty prompt ({error}): fetch it again"
            ) from error
        features[part] = torch.from_numpy(array.astype(np.float32)).bfloat16().view(shape)
    return features
