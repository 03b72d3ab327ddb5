"""A folder of pictures with captions: `cat.jpg` beside `cat.txt`, or one `metadata.jsonl`."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flux.config import Data
from flux.data.captions import MAX_CAPTION_BYTES, clean_captions, parse_text
from flux.data.decode import MAX_FILE_BYTES, Size, read_size
from flux.data.errors import BadSample, DataError
from flux.data.sample import Sample, Shard, held_out_count

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"
HEADER_READERS, HEADERS_AT_ONCE = 16, 1024  # threads wait for disks that are far away
HEAD_BYTES = 16_384


class ImageFolderSource:
    """Map-style source over a folder tree, in the order of the sorted relative paths.

    Captions come from `metadata.jsonl` in the folder where it exists (objects with `file_name` and `text`, the Hugging
    Face layout; `text` may be a list of them), else from a `.txt` file beside each picture.

    Args:
        folder: the folder; subfolders are searched too.
        data: the section; its caption_field is the field of metadata, if not `text`.
        key: configuration key named in messages.
        split: "all" pictures, or a fixed division by file name into "train" and "validation".

    Raises:
        DataError: no such folder, no pictures in it, none with a caption, or a faulty line of metadata.
    """

    def __init__(
        self,
        folder: str,
        data: Data,
        key: str = "training.dataset_path",
        split: Literal["all", "train", "validation"] = "all",
    ):
        self.folder = Path(folder)
        self.data = data
        if not self.folder.is_dir():
            raise DataError(f"{key}={folder!r} is not a folder: give a folder of pictures with captions")
        self.captions: dict[str, list[str]] | None = None  # by relative path; None: one .txt beside each picture
        if (self.folder / METADATA).exists():
            self.captions = _load_metadata(self.folder / METADATA, data.caption_field or "text")
            self.pictures = sorted(self.captions)
            missing = [name for name in self.pictures if not _is_file(self.folder / name)]
            if missing:
                raise DataError(
                    f"{self.folder / METADATA} names {missing[0]!r}, which is not in the folder ({len(missing)} such)"
                )
        else:
            files = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
            self.pictures = sorted(name for name in files if name.lower().endswith(SUFFIXES))
            if self.pictures and not any(_caption_file(name) in files for name in self.pictures):
                raise DataError(
                    f"{key}={folder!r}: none of {len(self.pictures)} pictures has a caption, the first is "
                    f"{self.pictures[0]!r}: write {_caption_file(self.pictures[0])!r} beside it, or one {METADATA}"
                )
        if not self.pictures:
            raise DataError(f"{key}={folder!r} has no pictures: put {', '.join(SUFFIXES)} files with captions into it")
        if split != "all":
            self.pictures = _split(self.pictures, split)
            if not self.pictures:
                raise DataError(f"{key}={folder!r} has one picture: training and validation need at least two")
        size = sum((self.folder / name).stat().st_size for name in self.pictures)
        self.shards: Sequence[Shard] = (Shard(self.folder.resolve().name, size, len(self.pictures)),)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        name, shard = self.pictures[index], self.shards[0].name
        key = _label(name)
        try:
            captions = clean_captions(self._load_captions(name), self.data.empty_caption)
            with (self.folder / name).open("rb") as file:
                # One byte more than is allowed tells that it is too large.
                return Sample(file.read(MAX_FILE_BYTES + 1), captions, key, shard)
        except OSError as error:
            raise BadSample("unreadable", error.strerror or type(error).__name__, key, shard) from error
        except BadSample as error:
            raise BadSample(error.reason, error.detail, key, shard) from error

    def picture_sizes(self) -> np.ndarray:
        sizes = np.zeros((len(self), 2), np.int32)
        with ThreadPoolExecutor(HEADER_READERS) as readers:
            for start in range(0, len(self), HEADERS_AT_ONCE):
                names = self.pictures[start : start + HEADERS_AT_ONCE]
                for place, head in enumerate(readers.map(self._read_head, names), start):
                    # Parsed by one thread: Pillow's warnings are silenced for the whole process.
                    sizes[place] = read_size(head)
                    if not sizes[place].any() and len(head) == HEAD_BYTES:
                        sizes[place] = self._read_far_size(self.pictures[place])
        return sizes

    def _read_head(self, name: str) -> bytes:
        try:
            with (self.folder / name).open("rb") as file:
                return file.read(HEAD_BYTES)
        except OSError:
            return b""

    def _read_far_size(self, name: str) -> Size:
        """Where much stands before it, such as a preview."""
        with (self.folder / name).open("rb") as file:
            return read_size(file)

    def _load_captions(self, name: str) -> list[str]:
        if self.captions is not None:
            return [text for caption in self.captions[name] for text in parse_text(caption.encode())]
        path = self.folder / _caption_file(name)
        try:
            with path.open("rb") as file:
                return list(parse_text(file.read(MAX_CAPTION_BYTES + 1)))
        except FileNotFoundError as error:
            raise BadSample("no_caption", f"there is no {_label(path.name)} beside it") from error


def _label(name: str) -> str:
    """For people: the name of a file need not be text."""
    return os.fsencode(name).decode(errors="replace")


def _caption_file(picture: str) -> str:
    return Path(picture).with_suffix(".txt").as_posix()


def _split(pictures: list[str], split: Literal["train", "validation"]) -> list[str]:
    """At least one picture is held out; which ones depends on their names alone, not on their order."""
    by_name = sorted(pictures, key=lambda name: hashlib.blake2b(os.fsencode(name)).digest())
    held_out = set(by_name[: held_out_count(len(pictures))])
    return [name for name in pictures if (name in held_out) == (split == "validation")]


def _load_metadata(path: Path, field: str) -> dict[str, list[str]]:
    """Captions by relative path of the picture."""
    captions: dict[str, list[str]] = {}
    try:
        # Not splitlines: JSON strings may hold the rarer line ends as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}): repair it") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{path}:{number}: a line must be like {{"file_name": "a.jpg", "{field}": "a cat"}} '
                f"({type(error).__name__})"
            ) from error
        texts = text if isinstance(text, list) else [text]
        if not all(_is_unicode(one) for one in (name, *texts)):
            raise DataError(f"{path}:{number}: file_name and {field} must be strings of whole Unicode characters")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{path}:{number}: file_name={name!r} must stay inside the folder")
        if not name.lower().endswith(SUFFIXES):
            raise DataError(f"{path}:{number}: file_name={name!r} must end in {', '.join(SUFFIXES)}")
        name = Path(name).as_posix()
        if name in captions:
            raise DataError(f"{path}:{number}: file_name={name!r} stands there twice: keep one of the lines")
        captions[name] = texts
    return captions


def _is_unicode(text: Any) -> bool:
    """False for what is no string, and for the halves of characters that JSON's escapes can spell."""
    return isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False
