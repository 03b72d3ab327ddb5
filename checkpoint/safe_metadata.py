"""Reads DCP's `.metadata` without running what it says: it is a pickle, and unpickling executes any code in it."""

import pickle
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from checkpoint.errors import CheckpointError
from checkpoint.manifest import is_plain_name

METADATA = ".metadata"
_DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool"
_KINDS = "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata ChunkStorageMetadata"
_PLACES = {
    "pathlib": "PosixPath PurePosixPath",
    "pathlib._local": "PosixPath PurePosixPath",  # Python 3.13's name for the same
    "torch": f"Size {_DTYPES}",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": f"{_KINDS} BytesStorageMetadata _MEM_FORMAT_ENCODING",
}
# Exact names: a module as a whole would let a dotted name walk on from it, `filesystem.os.system` for one.
_ALLOWED = {(module, name) for module, names in _PLACES.items() for name in names.split()}


class _Unpickler(pickle.Unpickler):
    """Gives out only what is allowed, and takes back what the pickle has changed in it: a BUILD can set attributes."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.given: dict[type, dict[str, Any]] = {}  # class -> its attributes before

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        found = super().find_class(module, name)
        if isinstance(found, type):
            self.given.setdefault(found, dict(vars(found)))
        # A function is given as a copy, so to speak; a dtype bears no attributes.
        return partial(found) if isinstance(found, FunctionType) else found

    def load(self) -> Any:
        try:
            loaded = super().load()
        finally:
            changed = [cls for cls, before in self.given.items() if _restore(cls, before)]
        if changed:
            raise pickle.UnpicklingError(f"it changes {changed[0].__name__}, which no checkpoint needs")
        return loaded


def _restore(cls: type, before: dict[str, Any]) -> bool:
    """Puts a class's attributes back. Returns whether they were others."""
    now = dict(vars(cls))
    for name in now.keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if now.get(name) is not value:
            setattr(cls, name, value)
    return now != before


def read_metadata(folder: Path) -> Metadata:
    """What a DCP folder holds: names, shapes, and where the parts of each tensor lie.

    Raises:
        ValueError: no such file, one that holds anything but the description of tensors, or one that leads elsewhere.
        CheckpointError: the disk does not answer.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(f"{folder} must be a checkpoint (step-N) and has no {METADATA}: correct the path")
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        problem = _find_problem(metadata, folder)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}: try again") from None
    except Exception as error:  # whatever a broken pickle makes of itself
        problem = " ".join(str(error).split()) or type(error).__name__
    if problem:
        raise ValueError(f"{path} is not read: {problem}")
    return metadata


def _find_problem(metadata: Any, folder: Path) -> str:
    if type(metadata) is not Metadata or not isinstance(metadata.storage_data, dict):
        return "it does not describe a checkpoint"
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry) is BytesStorageMetadata:
            continue
        if type(entry) is not TensorStorageMetadata or any(type(c) is not ChunkStorageMetadata for c in entry.chunks):
            return f"its entry {name!r} is no tensor"
        if not isinstance(entry.properties.dtype, torch.dtype):
            return f"its entry {name!r} has no number format"
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            return f"the parts of {name} do not make a whole"
    for info in metadata.storage_data.values():
        if type(info) is not _StorageInfo or info.transform_descriptors:
            return "it wants the files to be read in another way"
        name = info.relative_path
        if not isinstance(name, str) or not is_plain_name(name) or (folder / name).is_symlink():
            return f"it names the file {name!r}, which is not in the folder itself"
    return ""
