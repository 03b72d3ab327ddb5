"""Safetensors files, tensor by tensor: https://github.com/huggingface/safetensors#format.

The library writes only what is in memory as a whole, and to read one tensor it maps the file as if to write all of it,
which Linux refuses for a file larger than the memory. Here only the bytes of a tensor are read and written. Nothing but
safetensors is opened: what other formats hold can run code.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoint.lazy import LazyTensor, cast_all
from checkpoint.manifest import save_text
from checkpoint.steps import sync_folder

SUFFIX = ".safetensors"
SHARD_BYTES = 10 * 10**9  # diffusers' own size of a shard

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def open_safetensors(paths: Sequence[Path]) -> dict[str, LazyTensor]:
    """What the files hold; only their headers are read.

    Raises:
        ValueError: no such file, another format, damaged, or two files that hold the same name. Also at reading.
    """
    tensors: dict[str, LazyTensor] = {}
    for path in paths:
        places, _ = _read_header(path)
        if twice := tensors.keys() & places.keys():
            raise ValueError(f"{path} holds {min(twice)} once more: give each tensor in one file only")
        tensors |= {name: _open_tensor(path, place) for name, place in places.items()}
    return tensors


def read_header_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a file."""
    return _read_header(path)[1]


def open_indexed(folder: Path, stem: str) -> dict[str, LazyTensor]:
    """`<stem>.safetensors` of a folder from anywhere, or the shards that its `<stem>.safetensors.index.json` lists.

    Raises:
        ValueError: there is neither or both, the index does not fit the shards, or a file lies outside the folder.
    """
    single, index = folder / f"{stem}{SUFFIX}", folder / f"{stem}{SUFFIX}.index.json"
    if single.exists() and index.exists():
        raise ValueError(f"{folder} must hold {single.name} or {index.name}, and has both: remove the one that is old")
    if not index.exists():
        return open_safetensors([_inside(folder, single.name)])
    weight_map = _read_weight_map(_inside(folder, index.name))
    tensors = open_safetensors([_inside(folder, file) for file in sorted(set(weight_map.values()))])
    if wrong := sorted(weight_map.keys() ^ tensors.keys()):
        where = "its shards lack" if wrong[0] in weight_map else "is not told of"
        raise ValueError(f"{index} does not fit: {where} {wrong[0]}, {len(wrong)} such names: fetch the folder again")
    return tensors


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Writes one file, which appears whole or not at all and holds one tensor at a time in memory.

    Args:
        path: its folder is made when missing; a file of this name is replaced.
        dtype: floating tensors are cast to it; None: as they are.
        metadata: strings for the header; transformers asks for {"format": "pt"}.

    Raises:
        ValueError: a number format that the file cannot hold, or a value too large for `dtype`.
    """
    cast = cast_all(tensors, dtype)
    # Widest first, so that every tensor starts at a multiple of its element size.
    names = sorted(cast, key=lambda name: -cast[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + cast[name].bytes
        if cast[name].dtype not in _CODES:
            raise ValueError(
                f"{name} is {cast[name].dtype}, which a safetensors file cannot hold: choose another dtype"
            )
        header[name] = {
            "dtype": _CODES[cast[name].dtype],
            "shape": list(cast[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = cast[name].read().detach().cpu()
            assert (tuple(values.shape), values.dtype) == (cast[name].shape, cast[name].dtype), name
            file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del values  # else it stays while the next one is read
        file.flush()
        os.fsync(file.fileno())


def write_sharded(
    folder: Path,
    stem: str,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `<stem>.safetensors`, or shards and their index where one file would be larger than `shard_bytes`.

    The index comes last and only each file is whole on its own: write into a folder that is not yet visible.
    """
    cast = cast_all(tensors, dtype)
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in cast.items():
        if shards[-1] and sum(other.bytes for other in shards[-1].values()) + tensor.bytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}{SUFFIX}", cast, None, metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}{SUFFIX}"
        write_safetensors(folder / file, shard, None, metadata)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": sum(tensor.bytes for tensor in cast.values())}, "weight_map": weight_map}
    save_text(folder / f"{stem}{SUFFIX}.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; at the end it takes the place of `path`, after an error it goes."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class _Place(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


def _read_header(path: Path) -> tuple[dict[str, _Place], dict[str, str]]:
    """Name -> place, and the metadata."""
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} is not a {SUFFIX} file: only these are safe to open, others can run code")
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder, not a file' if path.is_dir() else 'missing'}: correct the path")
    try:
        with path.open("rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        return _find_places(header, 8 + length, size), {key: str(value) for key, value in metadata.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error if isinstance(error, OSError | ValueError) else f"its header has a {type(error).__name__}"
        raise ValueError(f"{path} is not a whole safetensors file ({reason}): fetch or write it again") from error


def _find_places(header: Mapping[str, Any], begin: int, size: int) -> dict[str, _Place]:
    """The tensors must fill the file from `begin` to its end, without gaps."""
    places = {}
    end = begin
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if code not in _DTYPES or not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"{name} has the number format {code!r} and the shape {list(shape)}")
        places[name] = _Place(_DTYPES[code], shape, end)
        length = math.prod(shape) * places[name].dtype.itemsize
        if (begin + start, begin + stop) != (end, end + length):
            raise ValueError(f"{name} takes bytes {start} to {stop} instead of {length} after those of the one before")
        end += length
    if end != size:
        raise ValueError(f"it has {size} bytes and must have {end}")
    return places


def _open_tensor(path: Path, place: _Place) -> LazyTensor:
    row_bytes = math.prod(place.shape[1:]) * place.dtype.itemsize

    def read_from(start: int, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=place.dtype)
        bytes_of_it = tensor.reshape(-1).view(torch.uint8).numpy().data
        with path.open("rb") as file:
            file.seek(start)
            if file.readinto(bytes_of_it) != bytes_of_it.nbytes:
                raise ValueError(f"{path} is not a whole safetensors file any more: fetch or write it again")
        return tensor

    return LazyTensor(
        place.shape,
        place.dtype,
        lambda: read_from(place.start, place.shape),
        lambda start, stop: read_from(place.start + start * row_bytes, (stop - start, *place.shape[1:])),
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not JSON ({error}): fetch it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} must hold a weight_map from tensor names to files: fetch it again")
    return weight_map


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder by its plain name; a link may lead to where the Hugging Face hub's cache keeps files."""
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{folder} lists the file {name!r}, which is not a plain file name: do not trust this folder")
    home = folder.resolve()
    blobs = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if path.exists() and not any(path.resolve().is_relative_to(allowed) for allowed in [home, *blobs]):
        raise ValueError(
            f"{path} is a link that leads out of its folder, to {path.resolve()}: put the file itself there"
        )
    return path
