"""The door to files of data sets, on disks and over networks: which there are, how long they are, and their bytes.

A URL is a local path, or one of `SCHEMES` through fsspec. What is read from a network is asked for again when it fails,
stalls or comes short; every count of bytes is checked.
"""

import errno
import fcntl
import glob
import importlib.util
import io
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.asyn import AsyncFileSystem

from flux.data.errors import DataError
from redact import BLACKED

# Scheme -> the package that opens it.
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
MAX_FILES = 1_000_000
TRIES = 5
PAUSE_SECONDS = 1.0  # after the first failure; it doubles with each
TIMEOUT_SECONDS = 20.0  # of one request: all tries together are done before a data worker counts as hanging
BLOCK_BYTES = 8 << 20  # the most that one request asks for
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

log = logging.getLogger(__name__)
T = TypeVar("T")


def is_local(url: str) -> bool:
    return "://" not in url


def without_query(url: str) -> str:
    """The name of a file on the web: what signs a URL is another tomorrow."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def list_files(pattern: str, key: str, suffix: str) -> list[str]:
    """The files that a path, a glob, a brace list (`{0000..0123}`, `{a,b}`) or a folder names, sorted.

    Files that a path or a brace list names are not looked for on a network, nor on a disk that has one of them.

    Args:
        pattern: what a user wrote.
        key: its configuration key, for messages.
        suffix: of the files that are taken from a folder.

    Raises:
        ValueError: a pattern that cannot be understood or served here.
        DataError: no such files, or one of them twice.
    """
    _check_scheme(pattern, key)
    patterns = list(itertools.islice(_expand_braces(pattern, f"{key}={pattern!r}"), MAX_FILES + 1))
    if len(patterns) > MAX_FILES:
        raise ValueError(f"{key}={pattern!r} names more than {MAX_FILES:,} files: pack the data into larger ones")
    try:
        files = sorted(file for one in patterns for file in _match(one, key, suffix))
    except PermissionError as error:
        raise DataError(f"{key}={pattern!r} may not be read ({error}): get access, or correct the path") from error
    if not any(not is_local(file) or os.path.exists(file) for file in files):
        raise DataError(f"{key}={pattern!r} names no {suffix} file that is there: correct the path, or fetch the data")
    for before, file in itertools.pairwise(files):
        if before == file:
            raise DataError(f"{key}={pattern!r} names {file} twice: name it once")
    return files


def file_size(url: str) -> int:
    """In bytes.

    Raises:
        OSError: it cannot be told.
    """
    if is_local(url):
        return os.stat(url).st_size
    size = _persist(lambda: _ask(url, "info"), url)["size"]
    if size is None:
        raise OSError(f"{url}: the server does not tell its size")
    return size


def read_range(url: str, start: int, length: int) -> bytes:
    """All of `length` bytes from byte `start` on.

    Raises:
        OSError: they are not there.
    """
    if is_local(url):
        with open(url, "rb", buffering=0) as file:
            return read_at(file, start, length)
    end = start + length
    return b"".join(
        _persist(partial(_fetch, url, block, min(block + BLOCK_BYTES, end)), url)
        for block in range(start, end, BLOCK_BYTES)
    )


def read_at(file: BinaryIO, start: int, length: int) -> bytes:
    """As `read_range`, of an open local file."""
    data = os.pread(file.fileno(), length, start)
    if len(data) != length:
        raise OSError(f"it ends at byte {start + len(data):,}, and {start + length:,} are needed")
    return data


def open_stream(url: str) -> BinaryIO:
    """A file to be read mostly forwards; a remote one comes in large blocks.

    Raises:
        OSError: it cannot be opened. Later: its bytes do not come.
    """
    if is_local(url):
        return open(url, "rb")
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(url, file_size(url)), BLOCK_BYTES))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which stays. On file systems that know no locks it holds nothing."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile would keep it


class _RemoteFile(io.RawIOBase):
    """Seekable bytes of a URL."""

    def __init__(self, url: str, size: int):
        self._url = url
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._place))
        buffer[:length] = read_range(self._url, self._place, length)
        self._place += length
        return length


def _ask(url: str, method: str, **options: Any) -> Any:
    """One call of fsspec.

    File systems are looked up for every call and never kept: they hold threads and connections, which do not survive a
    fork. fsspec remembers those of this process.
    """
    files, path = fsspec.core.url_to_fs(url)
    if isinstance(files, AsyncFileSystem):
        options["timeout"] = TIMEOUT_SECONDS
    elif method == "cat_file":
        options["cache_type"] = "none"  # it would read ahead
    return getattr(files, method)(path, **options)


def _fetch(url: str, start: int, end: int) -> bytes:
    data = _ask(url, "cat_file", start=start, end=end)
    if len(data) != end - start:
        raise OSError(f"{len(data):,} bytes came, and {end - start:,} were asked for, from byte {start:,} on")
    return data


def _persist(action: Callable[[], T], url: str) -> T:
    """Tries again, with growing pauses."""
    for attempt in itertools.count(1):
        try:
            return action()
        except Exception as error:  # NOTE: every file system has exceptions of its own
            if _is_final(error):
                raise error if isinstance(error, OSError) else OSError(f"{url}: {error}") from error
            if attempt >= TRIES:
                raise OSError(f"{url} does not come, tried {TRIES} times: {error or type(error).__name__}") from error
            log.info("%s: %s: trying again", url, error or type(error).__name__)
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError


def _is_final(error: Exception) -> bool:
    """Whether another try could not go better."""
    # NOTE: fsspec calls a file missing whenever HTTP does not tell its size; the true reason is the cause.
    reason = error.__cause__ or error
    status = getattr(reason, "status", None)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)  # time-out, too many requests
    return isinstance(reason, FileNotFoundError | PermissionError | IsADirectoryError)


def _check_scheme(pattern: str, key: str) -> None:
    if pattern.startswith("pipe:"):
        raise ValueError(f"{key}={pattern!r} would run a command, which data sets may not: name files or a URL")
    if is_local(pattern):
        return
    if BLACKED in pattern:
        raise ValueError(f"{key}={pattern!r} has lost a secret, which no file of a run keeps: give the whole URL again")
    scheme = pattern.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"{key}={pattern!r}: {scheme}:// cannot be read: use a local path, or one of {known}")
    if importlib.util.find_spec(SCHEMES[scheme]) is None:
        raise ValueError(f"{key}={pattern!r} needs a package that is not installed: pip install {SCHEMES[scheme]}")


def _match(pattern: str, key: str, suffix: str) -> list[str]:
    """Files of a pattern without braces."""
    magic = re.search(r"[*?\[]", pattern) is not None
    if is_local(pattern):
        if os.path.isdir(pattern):
            return [os.path.join(pattern, name) for name in os.listdir(pattern) if name.endswith(suffix)]
        return glob.glob(pattern, recursive=True) if magic and not os.path.exists(pattern) else [pattern]
    if not magic and pattern.endswith(suffix):
        return [pattern]
    scheme = pattern.partition("://")[0]
    if scheme in ("http", "https"):
        # "?" begins a query here, as signed URLs have.
        if not re.search(r"[*\[]", pattern) and not pattern.endswith("/"):
            return [pattern]
        raise ValueError(
            f"{key}={pattern!r}: HTTP cannot list files: write a brace list such as shard-{{0000..0123}}{suffix}"
        )
    wanted = pattern if magic else f"{pattern.rstrip('/')}/*{suffix}"
    return [f"{scheme}://{path}" for path in _persist(lambda: _ask(wanted, "glob"), wanted)]


def _expand_braces(pattern: str, shown: str) -> Iterator[str]:
    """As a shell expands them, from left to right, one inside another too."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        yield pattern
        return
    depth, commas, end = 1, [-1], -1
    for place, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 1:
            commas.append(place)
        if not depth:
            end = place
            break
    if end < 0:
        raise ValueError(f"{shown} has a {{ without its }}: close it")
    commas.append(end)
    options: Iterator[str]
    if len(commas) > 2:
        options = (rest[before + 1 : after] for before, after in itertools.pairwise(commas))
    else:
        options = _expand_range(rest[:end], shown)
    for option in options:
        for middle in _expand_braces(option, shown):
            for tail in _expand_braces(rest[end + 1 :], shown):
                yield head + middle + tail


def _expand_range(body: str, shown: str) -> Iterator[str]:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"{shown}: {{{body}}} must be a range like {{0000..0123}}, upwards, or a list like {{a,b}}")
    return (f"{number:0{len(match[1])}}" for number in range(int(match[1]), int(match[2]) + 1))
