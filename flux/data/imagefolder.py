"""A folder of pictures with captions: `cat.jpg` beside `cat.txt`, or one `metadata.jsonl`."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from flux.data.errors import DataError
from flux.data.sample import Sample
from flux.data.transforms import convert_to_rgb

# Only these parsers run: pictures may come from strangers, and some of Pillow's other formats call outside programs.
FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"
HELD_OUT_SHARE = 20  # one picture in twenty is held out when a folder serves training and validation


class ImageFolderSource:
    """Map-style source over a folder tree, in the order of the sorted relative paths.

    Captions come from `metadata.jsonl` in the folder where it exists (objects with `file_name` and `text`, the Hugging
    Face layout), else from a `.txt` file beside each picture.

    Args:
        folder: the folder; subfolders are searched too.
        key: configuration key named in messages.
        split: "all" pictures, or a fixed division by file name into "train" and "validation".

    Raises:
        DataError: no such folder, no pictures in it, a picture without caption, a faulty line of metadata. Later, on
            access: a picture that does not decode, an empty caption.
    """

    def __init__(
        self,
        folder: str,
        key: str = "training.dataset_path",
        split: Literal["all", "train", "validation"] = "all",
    ):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{key}={folder!r} is not a folder: give a folder of pictures with captions")
        self.captions: dict[str, str] | None = None  # by relative path; None: one .txt beside each picture
        if (self.folder / METADATA).exists():
            self.captions = _load_metadata(self.folder / METADATA)
            self.pictures = sorted(self.captions)
            missing = [name for name in self.pictures if not _is_file(self.folder / name)]
            if missing:
                raise DataError(
                    f"{self.folder / METADATA} names {missing[0]!r}, which is not in the folder ({len(missing)} such)"
                )
        else:
            files = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
            self.pictures = sorted(name for name in files if name.lower().endswith(SUFFIXES))
            bare = [name for name in self.pictures if Path(name).with_suffix(".txt").as_posix() not in files]
            if bare:
                raise DataError(
                    f"{key}={folder!r}: {len(bare)} of {len(self.pictures)} pictures have no caption, the first is "
                    f"{bare[0]!r}: write {Path(bare[0]).with_suffix('.txt').as_posix()!r} beside it, or one {METADATA}"
                )
        if not self.pictures:
            raise DataError(f"{key}={folder!r} has no pictures: put {', '.join(SUFFIXES)} files with captions into it")
        if split != "all":
            self.pictures = _split(self.pictures, split)
            if not self.pictures:
                raise DataError(f"{key}={folder!r} has one picture: training and validation need at least two")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        name = self.pictures[index]
        return Sample(image=self._load_image(name), caption=self._load_caption(name), key=name)

    def _load_image(self, name: str) -> Image.Image:
        path = self.folder / name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # remarks on broken EXIF data
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=FORMATS) as image:
                    return convert_to_rgb(image)
        except (
            OSError,
            SyntaxError,
            ValueError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
            Warning,
        ) as error:
            raise DataError(f"{path} does not decode as {', '.join(FORMATS)} ({error}): repair or remove it") from error

    def _load_caption(self, name: str) -> str:
        if self.captions is not None:
            caption, place = self.captions[name], f"{self.folder / METADATA}, {name!r}"
        else:
            path = (self.folder / name).with_suffix(".txt")
            try:
                caption, place = path.read_text(encoding="utf-8-sig"), str(path)
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read as UTF-8 text ({error}): repair or remove it") from error
        caption = " ".join(caption.split())
        if not caption:
            raise DataError(f"{place}: the caption is empty: describe the picture in a few words, or remove it")
        return caption


def _split(pictures: list[str], split: Literal["train", "validation"]) -> list[str]:
    """At least one picture is held out; which ones depends on their names alone, not on their order."""
    held_out = set(
        sorted(pictures, key=lambda name: hashlib.blake2b(name.encode()).digest())[
            : max(1, len(pictures) // HELD_OUT_SHARE)
        ]
    )
    return [name for name in pictures if (name in held_out) == (split == "validation")]


def _load_metadata(path: Path) -> dict[str, str]:
    captions = {}
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
            name, caption = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{path}:{number}: a line must be like {{"file_name": "a.jpg", "text": "a cat"}} '
                f"({type(error).__name__})"
            ) from error
        if not isinstance(name, str) or not isinstance(caption, str) or not _is_unicode(name + caption):
            raise DataError(f"{path}:{number}: file_name and text must be strings of whole Unicode characters")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{path}:{number}: file_name={name!r} must stay inside the folder")
        if not name.lower().endswith(SUFFIXES):
            raise DataError(f"{path}:{number}: file_name={name!r} must end in {', '.join(SUFFIXES)}")
        name = Path(name).as_posix()
        if name in captions:
            raise DataError(f"{path}:{number}: file_name={name!r} stands there twice: keep one of the lines")
        captions[name] = caption
    return captions


def _is_unicode(text: str) -> bool:
    """False for the halves of characters that JSON's escapes can spell."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False
