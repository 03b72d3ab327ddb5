"""Real photographs, packed as data sets are: tars and parquet."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import skimage
from PIL import Image

FILES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
SIDE = 160  # the longer one, pixels
TURNED = 6  # EXIF: shown after a quarter turn to the right
ORIENTATION = 0x0112


class Photograph(NamedTuple):
    name: str
    extension: str
    data: bytes
    size: tuple[int, int]  # (width, height), upright
    caption: str


@cache
def make_photographs() -> tuple[Photograph, ...]:
    """Six, in all formats that data sets use; the rocket is stored lying on its side."""
    made = []
    for file, extension in zip(FILES, ("jpg", "png", "webp", "jpg", "jpeg", "jpg"), strict=True):
        name = Path(file).stem
        with Image.open(Path(skimage.__file__).parent / "data" / file) as image:
            image = image.convert("RGB")
            image.thumbnail((SIDE, SIDE))
        size = image.size
        exif = Image.Exif()
        if name == "rocket":
            exif[ORIENTATION] = TURNED
            image = image.transpose(Image.Transpose.ROTATE_90)
        buffer = io.BytesIO()
        format = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
        image.save(buffer, format, quality=90, lossless=True, exif=exif)
        made.append(Photograph(name, extension, buffer.getvalue(), size, f"a photograph of {name}"))
    return tuple(made)


def members_of(photographs: Sequence[Photograph], folder: str = "") -> list[tuple[str, bytes]]:
    """(path, bytes) of pictures and captions, a caption behind each picture."""
    return [
        member
        for one in photographs
        for member in (
            (f"{folder}{one.name}.{one.extension}", one.data),
            (f"{folder}{one.name}.txt", one.caption.encode()),
        )
    ]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of regular files, in the order given; names may come twice."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, photographs: Sequence[Photograph], rows_per_group: int = 2) -> Path:
    """In the Hugging Face layout."""
    table = pa.table(
        {
            "image": [{"bytes": one.data, "path": f"{one.name}.{one.extension}"} for one in photographs],
            "text": [one.caption for one in photographs],
        }
    )
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path
