"""Where the samples of files lie, found by reading the files through once, and kept for all later starts.

An index is one safetensors file with a column for each thing that is known of an entry, mapped into memory: millions of
samples cost nothing to open. Its name follows from the files' names and not from their content, so the index of files
that have been cut short or lost since is found: it tells what is missing. Files that have grown are read again.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flux.config import Data
from flux.data.errors import DataError
from flux.data.shard_cache import ShardFile
from flux.data.storage import is_local, locked, without_query
from redact import redact

FORMAT = 1  # of the index and of what the scans put into it
NAMED = 10  # damaged files that a warning names

log = logging.getLogger(__name__)


class Scan(NamedTuple):
    """What reading a file through has found."""

    bytes: int
    columns: dict[str, np.ndarray]  # a row for each entry; "end": the bytes that the file needs for it
    keys: np.ndarray = np.empty(0, np.uint8)  # the bytes of all, up to the column "key_end" for each; or none
    damage: str = ""  # why it was not read to its end
    left_out: tuple[tuple[str, int], ...] = ()  # what is of no use, and how many of it


class Kind(NamedTuple):
    """A kind of files to index."""

    name: str
    entry: str  # what an entry is, in the plural
    scan: Callable[[str], Scan]
    settings: Sequence[str | bool | None]  # that the scan depends on


class IndexedFile(NamedTuple):
    url: str
    bytes: int
    entries: int
    key_bytes: int
    damage: str


class Index:
    """An index of files, opened.

    Args:
        path: of the safetensors file.
        urls: of the files, where the index keeps them without a secret; else none.
    """

    def __init__(self, path: Path, urls: Sequence[str] = ()):
        self.path, self._urls = path, urls
        with safe_open(path, framework="pt") as file:
            files = [IndexedFile(*row) for row in json.loads(file.metadata()["files"])]
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118, not a dict
        self.files = [one._replace(url=url) for one, url in zip(files, urls, strict=True)] if urls else files
        self._keys: np.ndarray = arrays.pop("keys")
        self.columns: dict[str, np.ndarray] = arrays
        self.ends = np.cumsum([file.entries for file in self.files])
        self._key_ends = np.cumsum([file.key_bytes for file in self.files])
        self.names = name_files([file.url for file in self.files])

    def __reduce__(self) -> tuple[type, tuple[Path, Sequence[str]]]:
        return Index, (self.path, self._urls)  # other processes map the file themselves

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, number: int) -> slice:
        """The entries of a file."""
        end = int(self.ends[number])
        return slice(end - self.files[number].entries, end)

    def locate(self, entry: int) -> int:
        """The number of the file that has an entry."""
        if not 0 <= entry < len(self):
            raise IndexError(f"{entry} is not in range({len(self)})")
        return int(np.searchsorted(self.ends, entry, side="right"))

    def shard_files(self) -> list[ShardFile]:
        return [ShardFile(file.url, file.bytes) for file in self.files]

    def key(self, entry: int) -> str:
        """A label. Of strangers, so never a path to open."""
        number = self.locate(entry)
        start = 0 if entry == self.rows(number).start else int(self.columns["key_end"][entry - 1])
        return self._file_keys(number)[start : self.columns["key_end"][entry]].tobytes().decode(errors="replace")

    def scan(self, number: int) -> Scan:
        """What reading a file has found."""
        file, rows = self.files[number], self.rows(number)
        columns = {name: array[rows] for name, array in self.columns.items()}
        return Scan(file.bytes, columns, self._file_keys(number), file.damage)

    def _file_keys(self, number: int) -> np.ndarray:
        end = int(self._key_ends[number])
        return self._keys[end - self.files[number].key_bytes : end]


def open_index(kind: Kind, urls: Sequence[str], data: Data, key: str, show_progress: bool = False) -> Index:
    """The index of files, made if there is none that is good for them. One process makes it, others wait for it.

    Args:
        kind: what the files are.
        urls: sorted.
        data: the section.
        key: configuration key of the files, for messages.
        show_progress: on a terminal.

    Raises:
        DataError: files that are damaged, cut short or lost (unless data.on_bad_shard says skip), or without entries.
        ValueError: data.index_folder cannot be written.
    """
    # Absolute, so that a run that starts from another folder finds the index, and in it the files.
    urls = [os.path.abspath(url) if is_local(url) else url for url in urls]
    identity = json.dumps([FORMAT, kind.name, kind.settings, urls])
    path = Path(data.index_folder) / f"{kind.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    whole = urls if any(redact(url) != url for url in urls) else ()
    index = _load(path, whole)
    if index is None or _outdated(index, data):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                index = _load(path, whole)  # another process may have made it
                _make(path, index, kind, urls, data, show_progress)
        except OSError as error:
            raise ValueError(
                f"data.index_folder={data.index_folder!r} cannot be written ({error}): name a folder that can"
            ) from error
        index = Index(path, whole)
    _report_damage(index, kind, data, key)
    if not len(index):
        raise DataError(f"{key}: no {kind.entry} in {urls[0]}{_others(urls)}: correct the path")
    return index


def name_files(urls: Sequence[str]) -> list[str]:
    """Names that stay when the folder of all files is moved, and are still different: paths from there on.

    Without the queries of signed URLs, which are others tomorrow, unless it is they that tell the files apart.
    """
    plain = [without_query(url) for url in urls]
    parts = [redact(url).split("/") for url in (plain if len(set(plain)) == len(urls) else urls)]
    folders = [path[:-1] for path in parts]
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))
    return ["/".join(path[shared:]) for path in parts]


def present_size(url: str) -> int:
    """Of a local file; -1: it is lost or may not be read."""
    try:
        return os.stat(url).st_size if os.access(url, os.R_OK) else -1
    except OSError:
        return -1


def _load(path: Path, urls: Sequence[str]) -> Index | None:
    try:
        return Index(path, urls)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the index %s is damaged (%s) and is made again", path, error)
        return None


def _outdated(index: Index, data: Data) -> list[int]:
    """Files to be read again: they have grown, or were damaged and may be mended by now.

    A remote file is not asked for its size, which would take long for thousands: reading from it notices a change.
    """
    return [
        number
        for number, file in enumerate(index.files)
        if (is_local(file.url) and present_size(file.url) > file.bytes) or (file.damage and data.on_bad_shard == "stop")
    ]


def _make(path: Path, before: Index | None, kind: Kind, urls: Sequence[str], data: Data, show_progress: bool) -> None:
    """Reads files and writes the index, keeping what an earlier one says of files that are as they were."""
    todo, scans = list(range(len(urls))), {}
    if before is not None:
        todo = _outdated(before, data)
        if not todo:
            return
        scans = {number: before.scan(number) for number in range(len(urls))}
        grown = [urls[number] for number in todo if not before.files[number].damage]
        if grown:
            log.warning("%s%s: longer than when it was indexed, and read again", grown[0], _others(grown))
    loader = DataLoader(
        _Scans([urls[number] for number in todo], kind.scan),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=min(data.index_workers, len(todo), os.cpu_count() or 1) if len(todo) > 1 else 0,
        generator=torch.Generator(),  # NOTE: without one it draws from the global generator
    )
    found = tqdm(loader, f"indexing {kind.name}", len(todo), unit="file", disable=None if show_progress else True)
    for number, scan in zip(todo, found, strict=True):
        if isinstance(scan, DataError):
            raise scan
        scans[number] = scan
    left_out: Counter[str] = Counter()
    for number in todo:
        left_out.update(dict(scans[number].left_out))
    if left_out:
        counts = ", ".join(f"{what} ({count:,})" for what, count in sorted(left_out.items()))
        log.warning("%s%s: left out %s", urls[todo[0]], _others(todo), counts)
    _save(path, urls, [scans[number] for number in range(len(urls))])


class _Scans(Dataset):
    """File -> Scan, or the DataError that ends it: as an exception it would arrive wrapped into a traceback."""

    def __init__(self, urls: Sequence[str], scan: Callable[[str], Scan]):
        self.urls = urls
        self.scan = scan

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, number: int) -> Scan | DataError:
        try:
            return self.scan(self.urls[number])
        except DataError as error:
            return error


def _as_it_is(scan: Any) -> Any:
    return scan


def _save(path: Path, urls: Sequence[str], scans: Sequence[Scan]) -> None:
    files = [
        IndexedFile(redact(url), scan.bytes, len(scan.columns["end"]), len(scan.keys), redact(scan.damage))
        for url, scan in zip(urls, scans, strict=True)
    ]
    arrays = {name: np.concatenate([scan.columns[name] for scan in scans]) for name in scans[0].columns}
    arrays["keys"] = np.concatenate([scan.keys for scan in scans])
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        save_file(tensors, unfinished, {"files": json.dumps(files)})
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _report_damage(index: Index, kind: Kind, data: Data, key: str) -> None:
    found = [text for number in range(len(index.files)) if (text := _describe_damage(index, number, kind))]
    if found and data.on_bad_shard == "stop":
        raise DataError(f'{key}: {found[0]}{_others(found)}: fetch it again, or set data.on_bad_shard="skip"')
    for text in found[:NAMED]:
        log.warning("%s: left out by data.on_bad_shard=skip", text)
    if len(found) > NAMED:
        log.warning("%d more files are damaged", len(found) - NAMED)


def _describe_damage(index: Index, number: int, kind: Kind) -> str:
    """Of one file, in words; "" where there is none."""
    file, rows = index.files[number], index.rows(number)
    size = present_size(file.url) if is_local(file.url) else file.bytes
    if max(0, size) < file.bytes:
        left = int((index.columns["end"][rows] <= size).sum())
        state = "is lost or may not be read" if size < 0 else "is cut short"
        return (
            f"{file.url} {state}: {left} of {file.entries} {kind.entry}, {max(0, size)} of {file.bytes} bytes "
            f"(if that is on purpose, delete {index.path})"
        )
    return f"{file.url} {file.damage} ({file.entries} {kind.entry} before that)" if file.damage else ""


def _others(files: Sized) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""
