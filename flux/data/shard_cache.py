"""Copies of remote shards on a local disk, in a folder of bounded size that all processes of a machine share."""

import fcntl
import hashlib
import os
import posixpath
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from flux.config import Data
from flux.data.storage import BLOCK_BYTES, file_size, is_local, locked, open_stream, read_at, read_range, without_query

PART = ".part"  # ends the name of a copy that is still being made
WAIT_SECONDS = 0.2


class ShardFile(NamedTuple):
    """A file as the index knows it."""

    url: str
    bytes: int


class ShardReader:
    """Reads from shards: local ones where they are, remote ones from copies or, without room for any, by themselves.

    Args:
        files: all that will be read.
        data: the section, for its cache.

    Raises:
        ValueError: no room for one shard.
    """

    def __init__(self, files: Sequence[ShardFile], data: Data):
        room = int(data.shard_cache_gb * 1e9)
        largest = max((file.bytes for file in files if not is_local(file.url)), default=0)
        if room and largest > room:
            raise ValueError(
                f"data.shard_cache_gb={data.shard_cache_gb:g} has no room for a shard of {largest / 1e9:.3g} GB: raise "
                "it to a few shards for every data worker of a machine, or set 0 to fetch every sample by itself"
            )
        self._cache = ShardCache(Path(data.shard_cache), room) if room else None

    def read(self, file: ShardFile, start: int, length: int) -> bytes:
        """A part of a shard.

        Raises:
            OSError: it is not there.
        """
        if is_local(file.url):
            return read_range(file.url, start, length)
        if self._cache is not None:
            with self._cache.open(file) as copy:
                return read_at(copy, start, length)
        _check_unchanged(file)
        return read_range(file.url, start, length)

    def open(self, file: ShardFile) -> BinaryIO:
        """A shard to be read at several places.

        Raises:
            OSError: it is not there.
        """
        if is_local(file.url) or self._cache is None:
            return open_stream(file.url)
        return self._cache.open(file)


@lru_cache(maxsize=100_000)
def _check_unchanged(file: ShardFile) -> None:
    """Once per process: places in the index mean nothing in another file of the same name."""
    size = file_size(file.url)
    if size != file.bytes:
        raise OSError(f"{file.url} has {size:,} bytes, and had {file.bytes:,} when it was indexed")


class ShardCache:
    """A folder with copies of shards. The least recently used ones go when room is needed.

    A copy is made by one process, which holds a lock on it, and gets its name when it is complete. Removing a copy
    takes nothing away from a process that has it open.

    Args:
        folder: on a local disk; made when it is first used.
        room: bytes that copies, finished or not, may take together.
    """

    def __init__(self, folder: Path, room: int):
        self.folder = folder
        self.room = room

    def open(self, file: ShardFile) -> BinaryIO:
        """The copy, made if need be.

        Raises:
            OSError: the shard does not come, or has changed.
        """
        digest = hashlib.sha256(repr(file).encode()).hexdigest()[:16]
        path = self.folder / f"{digest}-{posixpath.basename(without_query(file.url))[-80:]}"
        while True:
            try:
                copy = path.open("rb")
                os.utime(copy.fileno())  # marks its use
                return copy
            except FileNotFoundError:
                self.folder.mkdir(parents=True, exist_ok=True)
            if copied := self._copy(file, path):
                return copied

    def _copy(self, file: ShardFile, path: Path) -> BinaryIO | None:
        """The new copy; None when another process has been at it meanwhile.

        It is returned open, so that this process gets its bytes even when the copy has to go at once.
        """
        part = path.with_name(path.name + PART)
        copy = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT), "r+b")
        try:
            fcntl.flock(copy, fcntl.LOCK_EX)  # waits for a process that makes the same copy
            if path.exists() or not _is_at(copy, part):  # that one is finished, or has given up
                if _is_at(copy, part):
                    part.unlink()
                copy.close()
                return None
            _check_unchanged(file)
            copy.truncate(0)
            self._make_room(file.bytes, copy)
            for start in range(0, file.bytes, BLOCK_BYTES):
                copy.write(read_range(file.url, start, min(BLOCK_BYTES, file.bytes - start)))
            copy.seek(0)  # writes what is left in the buffer too
            os.fsync(copy.fileno())
            with self._locked():
                part.rename(path)
            fcntl.flock(copy, fcntl.LOCK_UN)
            return copy
        except BaseException:
            if _is_at(copy, part):
                part.unlink()
            copy.close()
            raise

    def _make_room(self, needed: int, copy: BinaryIO) -> None:
        """Takes the room for a copy before it is filled; waits where other processes' copies are in the making."""
        while True:
            with self._locked():
                copies = sorted(self._find_copies())
                taken = sum(size for _, size, _ in copies)
                for _, size, path in copies:
                    if taken + needed <= self.room:
                        break
                    if _remove(path):
                        taken -= size
                if taken + needed <= self.room:
                    copy.truncate(needed)
                    return
            time.sleep(WAIT_SECONDS)

    def _locked(self) -> AbstractContextManager[None]:
        """While it is held, no copy gets room or its name."""
        return locked(self.folder / ".lock")

    def _find_copies(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path), those in the making too."""
        for path in self.folder.glob("[!.]*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # given up just now
                continue
            yield status.st_mtime, status.st_size, path


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Removes a copy, unless a process is making it."""
    if path.suffix != PART:
        path.unlink(missing_ok=True)
        return True
    try:
        with path.open("rb") as part:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()  # its process died
            return True
    except (BlockingIOError, FileNotFoundError):
        return False
