"""The list of a checkpoint's files with their sizes and SHA-256: what makes a damaged one known before it is loaded.

DCP itself loads flipped bytes without a word (torch's zip reader does not check its checksums).
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

MANIFEST = "manifest.json"
_GONE = (FileNotFoundError, NotADirectoryError)


class FileEntry(NamedTuple):
    bytes: int
    sha256: str


def make_entry(path: Path, sync: bool = False) -> FileEntry:
    """Size and digest of a file as it is now; with `sync`, once it is on the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return FileEntry(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def save_manifest(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    """Writes the manifest and waits until it is on the disk."""
    save_text(folder / MANIFEST, _text(entries))


def save_text(path: Path, text: str) -> None:
    """Writes a small file and waits until it is on the disk."""
    with path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """File name -> what it must be.

    Raises:
        ValueError: there is no manifest, or it is not as it was written.
        OSError: it cannot be read now.
    """
    path = folder / MANIFEST
    try:
        text = _plain_file(path).read_bytes().decode()  # read_text would take another line end for the same
        entries = {name: FileEntry(**entry) for name, entry in json.loads(text)["files"].items()}
        is_whole = _text(entries) == text  # also what JSON would forgive, such as another space
    except _GONE:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged")
    for name in entries:
        if not is_plain_name(name):
            raise ValueError(f"{path} names {name!r}, which is no plain file name")
    return entries


def is_plain_name(name: str) -> bool:
    """Whether a name can only mean a file in the folder itself, on any system."""
    return name not in ("", ".", "..") and Path(name).name == name and "\\" not in name


def find_problems(
    folder: Path,
    entries: Mapping[str, FileEntry],
    part: tuple[int, int] = (0, 1),
    on_file: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each.

    Args:
        part: (k, n): look at every n-th file from the k-th on; n processes share the work so.
        on_file: called with the name of each file that has been looked at.

    Raises:
        OSError: a file is there and cannot be read now, which says nothing about what is in it.
    """
    problems = []
    for name in sorted(entries)[part[0] :: part[1]]:
        path, wanted = folder / name, entries[name]
        try:
            size = _plain_file(path).stat().st_size
            if size != wanted.bytes:
                problems.append(f"{path} has {size} bytes and must have {wanted.bytes}")
            elif make_entry(path) != wanted:
                problems.append(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
        except _GONE:
            problems.append(f"{path} is missing")
        except ValueError as error:
            problems.append(str(error))
        on_file(name)
    return problems


def _plain_file(path: Path) -> Path:
    """Raises ValueError for what only leads elsewhere, or is no file."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path} is no plain file: links are not followed")
    return path


def _text(entries: Mapping[str, FileEntry]) -> str:
    files = {name: entries[name]._asdict() for name in sorted(entries)}
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1) + "\n"
