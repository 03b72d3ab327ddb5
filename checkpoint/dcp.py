"""Checkpoint folders: torch's distributed checkpoint (DCP) of all tensors, one JSON file for all else, and a manifest.

    step-1000/
        __0_0.distcp ...   tensors, a file for each process that saved
        .metadata          which tensors, and where their parts are
        train_state.json   step, samples seen, configuration, ...
        manifest.json      the files with sizes and SHA-256, written last

What DCP leaves open is closed here: a checkpoint appears whole or not at all, its bytes are checked, and nothing that
is loaded can run code.
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpoint.compare import part_of
from checkpoint.errors import CheckpointError
from checkpoint.lazy import LazyTensor
from checkpoint.manifest import MANIFEST, FileEntry, find_problems, make_entry, read_manifest, save_manifest, save_text
from checkpoint.safe_metadata import METADATA, read_metadata
from checkpoint.slices import Slices
from checkpoint.steps import discard, publish, unfinished_path

# That one process saves or loads alone is meant so.
warnings.filterwarnings("ignore", ".*assuming the intent is to (save|load) in a single process", UserWarning)

TRAIN_STATE = "train_state.json"
VISIBLE_SECONDS = 60.0  # the longest that NFS keeps what it knows of a folder, unless it is told otherwise
FORMAT = 1  # of train_state.json and of the tensors' names
# Beside the weights, which have their own names; as torchtitan saves them.
OPTIMIZER_PREFIX, EMA_PREFIX = "optimizer.state.", "ema."
NAMES_OF_PARTS = {"model": "weights", "ema": "average of the weights"}


def save_checkpoint(
    final: Path,
    tensors: Mapping[str, Slices] | Exception,
    train_state: Mapping[str, Any],
    group: ProcessGroup | None,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Writes a checkpoint; all processes of `group` must call it. It is visible at `final` when this returns.

    Args:
        tensors: or why this process has none, which then fails the save on all.
        then: called by the first process when the checkpoint is safe.

    Raises:
        CheckpointException: DCP's, on all processes, whatever failed on whichever.
    """
    writer = _Writer(final, train_state, then)
    failure, held = (tensors, {}) if isinstance(tensors, Exception) else (None, dict(tensors))
    alone, planner = group is None, _SavePlanner(failure)
    try:
        dcp.save(held, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)
    except BaseException:
        if alone or dist.get_rank(group) == 0:
            discard(final)  # the disk may be full, and training goes on
        raise


def load_checkpoint(folder: Path, tensors: Mapping[str, Slices], group: ProcessGroup | None = None) -> None:
    """Fills this process's parts of the tensors; all processes of `group` must call it. Verify the folder before.

    Values are cast to the dtype of the tensors they are loaded into: compare first where that is not wanted.

    Raises:
        ValueError: see `read_metadata`; a tensor is not there, or is none.
        CheckpointError: the disk does not answer.
    """
    _load(_Reader(folder), tensors, group)


def _load(reader: "_Reader", tensors: Mapping[str, Slices], group: ProcessGroup | None) -> None:
    planner = _LoadPlanner()
    try:
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if ended := next((cause for cause in causes if not isinstance(cause, Exception)), None):
            raise ended from None  # a signal
        if any(isinstance(cause, OSError) for cause in causes):
            raise CheckpointError(f"{reader.path} cannot be read: {explain(error)}: try again") from None
        raise ValueError(f"{reader.path} cannot be loaded: {explain(error)}: take another checkpoint") from None


def save_weights(folder: Path, tensors: Mapping[str, LazyTensor], train_state: Mapping[str, Any]) -> None:
    """A checkpoint of the weights alone, made by one process that reads one tensor at a time."""
    save_checkpoint(folder, {name: Slices.of_lazy(tensor) for name, tensor in tensors.items()}, train_state, None)


def open_checkpoint(folder: Path, part: str = "model") -> dict[str, LazyTensor]:
    """The weights in a checkpoint of this recipe, or in torchtitan's, under the model's names; nothing is read yet.

    Args:
        part: "model", or "ema" for their running mean.

    Raises:
        ValueError: no checkpoint, a damaged one, or one without that part.
        CheckpointError: the disk does not answer.
    """
    try:
        problems = find_problems(folder, read_manifest(folder)) if (folder / MANIFEST).is_file() else []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}: try again") from None
    if problems:
        raise ValueError(f"{problems[0]}: take another checkpoint")
    reader = _Reader(folder)
    entries = {name: entry for name, entry in tensor_entries(reader.metadata).items() if part_of(name) == part}
    if not entries:
        raise ValueError(f"{folder} holds no {NAMES_OF_PARTS[part]}: take another one")
    return {
        name.removeprefix(EMA_PREFIX): LazyTensor(
            tuple(entry.size), entry.properties.dtype, partial(_read_tensor, reader, name, entry)
        )
        for name, entry in entries.items()
    }


def read_train_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint knows beside its tensors; empty for a folder that is not this recipe's.

    Raises:
        ValueError: the file is damaged, or of a newer recipe.
    """
    path = folder / TRAIN_STATE
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text())
        known = state["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged") from None
    if known != FORMAT:
        raise ValueError(f"{path} has format {known} and must have {FORMAT}: use the recipe that has written it")
    return state


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Name -> description of the tensors; what DCP stores as bytes is left out, since only pickle could read it."""
    entries = metadata.state_dict_metadata
    return {name: entry for name, entry in entries.items() if not isinstance(entry, BytesStorageMetadata)}


def is_weight(name: str) -> bool:
    """Whether a tensor of a checkpoint is one of the model's own."""
    return part_of(name) == "model"


def _read_tensor(reader: "_Reader", name: str, entry: TensorStorageMetadata) -> Tensor:
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    whole = {name: Slices.of_views(entry.size, tensor.dtype, [((0,) * tensor.ndim, tensor)])}
    _load(reader, whole, None)
    return tensor


def explain(error: BaseException | None) -> str:
    """What failed, on which process, in one line."""
    if not isinstance(error, CheckpointException):
        return _line(error)
    rank, (cause, _) = next(iter(error.failures.items()))
    more = f" (and {len(error.failures) - 1} other ranks)" if len(error.failures) > 1 else ""
    return f"rank {rank}: {_line(cause)}{more}"


def _line(error: BaseException | None) -> str:
    if type(error).__name__ == "UnpicklingError":  # whose own text advises to run what is in the file
        return "in place of a tensor it holds what could run code"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@dataclass(frozen=True)
class _HashedResult(WriteResult):
    """Tells the process that writes the manifest what this process has written."""

    file: str
    entry: FileEntry


class _Writer(FileSystemWriter):
    """DCP's own writer with one file per process; what is written becomes visible when all of it is on the disk."""

    def __init__(self, final: Path, train_state: Mapping[str, Any], then: Callable[[], None]):
        super().__init__(unfinished_path(final), thread_count=1, sync_files=False, overwrite=False)
        self.final, self.train_state, self.then = final, train_state, then

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """DCP's own keeps all that it has written in the CPU's memory until its file is done (torch 2.13)."""
        name = f"{plan.storage_data.prefix}0.distcp"
        path, places = Path(self.path) / name, []
        if plan.items:
            with path.open("xb") as file:
                for item in plan.items:
                    begin = file.tell()
                    tensor = cast(Tensor, planner.resolve_data(item)).detach().cpu()
                    whole = tensor.untyped_storage().size() == tensor.nbytes  # else all of its storage would be saved
                    try:
                        torch.save(tensor if whole else tensor.clone(), file)
                    except RuntimeError:
                        file.flush()  # raises what is wrong with the disk, which torch has made something else of
                        raise
                    places.append((item.index, begin, file.tell() - begin))
                    del tensor  # else it stays while the next one is read
        entry = make_entry(path, sync=True) if places else FileEntry(0, "")
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [_HashedResult(index, size, _StorageInfo(name, begin, size), name, entry) for index, begin, size in places]
        )
        return future

    def finish(self, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
        """On the first process, once all have written."""
        super().finish(metadata, results)  # type: ignore[arg-type]
        folder = Path(self.path)
        save_text(folder / TRAIN_STATE, json.dumps({"format": FORMAT} | dict(self.train_state), indent=1) + "\n")
        entries = {name: make_entry(folder / name, sync=True) for name in (METADATA, TRAIN_STATE)}
        for result in (result for written in results for result in written):
            assert isinstance(result, _HashedResult)
            entries[result.file] = result.entry
        for name, entry in entries.items():
            _await_file(folder / name, entry.bytes)
        save_manifest(folder, entries)
        publish(self.final)
        self.then()


def _await_file(path: Path, size: int) -> None:
    """Until this process sees what another has written, which a network file system may show a little later.

    Raises:
        OSError: it is not there.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (path.is_file() and path.stat().st_size == size):
        if time.monotonic() > deadline:
            raise OSError(f"{path} was written by another process and is not seen here: is the folder shared by all?")
        time.sleep(0.1)


class _Reader(FileSystemReader):
    """DCP's own reader, with a `.metadata` that cannot run code. torch.load takes weights only in it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.metadata = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, failure: Exception | None):
        super().__init__(flatten_state_dict=False)
        self.failure = failure

    def create_local_plan(self) -> SavePlan:
        if self.failure:
            raise self.failure
        return super().create_local_plan()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        entries, items = tensor_entries(self.metadata), []
        for name, slices in self.state_dict.items():
            items += create_read_items_for_chunk_list(name, entries[name], slices.__create_chunk_list__())
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self.state_dict[read_item.dest_index.fqn].store(read_item.dest_index, read_item.dest_offsets, tensor)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(f"{read_item.storage_index.fqn} is not a tensor, and nothing else is loaded from a checkpoint")
