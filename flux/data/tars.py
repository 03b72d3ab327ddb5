"""Tars of pictures and captions, as webdataset lays them out: the members `a/0001.jpg` and `a/0001.txt` are a sample.

Nothing is extracted: an index says where members lie, and they are read from there. A member's name is a label. Which
headers tars have: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's manual, "Basic Tar
Format", for long names and base-256 numbers.
"""

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np

from flux.config import Data
from flux.data.captions import MAX_JSON_BYTES, clean_captions, parse_json, parse_text
from flux.data.decode import MAX_FILE_BYTES, Size, read_size
from flux.data.errors import BadSample
from flux.data.index import Kind, Scan, open_index
from flux.data.sample import Sample, Shard
from flux.data.shard_cache import ShardReader
from flux.data.storage import file_size, list_files, open_stream

BLOCK = 512
PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")  # the column "caption_kind" counts them from 1 on; 0: there is none
HEAD_BYTES = 8192  # of a picture, which mostly tell its size
MAX_NAME_BYTES = 1 << 20
MAX_REST_BYTES = 1 << 20  # after the end mark: zeros that fill up the last record
GAP_BYTES = 1 << 16  # between the members of a sample that are still read together

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REGULAR = (b"0", b"\0", b"7")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
LONG_NAME, LONG_LINK, PAX, GLOBAL_PAX = b"L", b"K", b"x", b"g"
ABOUT_THE_NEXT = (LONG_NAME, LONG_LINK, PAX, GLOBAL_PAX)


class TarDamage(Exception):
    """A tar ends being one at some place."""


class Member(NamedTuple):
    path: bytes
    start: int
    size: int
    regular: bool


class WebDatasetSource:
    """Map-style source over tars, in the order of the tars and of the members in each.

    Args:
        pattern: names the tars, see `list_files`.
        data: the section.
        key: configuration key of the pattern, for messages.
        show_progress: of an indexing, on a terminal.

    Raises:
        ValueError: a pattern that cannot be served here.
        DataError: no tars, no samples, or damaged ones.
    """

    def __init__(self, pattern: str, data: Data, key: str = "training.dataset_path", show_progress: bool = False):
        prefer_json = data.caption_field is not None
        kind = Kind("tars", "samples", partial(scan_tar, prefer_json=prefer_json), [prefer_json])
        self._data = data
        self._index = index = open_index(kind, list_files(pattern, key, ".tar"), data, key, show_progress)
        self._files = index.shard_files()
        self._reader = ShardReader(self._files, data)
        self.shards: Sequence[Shard] = [
            Shard(name, file.bytes, file.entries) for name, file in zip(index.names, index.files, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        key, shard = self._index.key(index), self._index.names[self._index.locate(index)]
        try:
            image, caption = self._read(index)
            return Sample(image, self._parse(index, caption), key, shard)
        except OSError as error:
            raise BadSample("unreadable", str(error), key, shard) from error
        except BadSample as error:
            raise BadSample(error.reason, error.detail, key, shard) from error

    def picture_sizes(self) -> np.ndarray:
        return self._index.columns["picture_size"]

    def _read(self, index: int) -> tuple[bytes, bytes]:
        """Picture and caption, at once where they lie together."""
        columns = self._index.columns
        image, caption = columns["image"][index].tolist(), columns["caption"][index].tolist()
        if image[1] > MAX_FILE_BYTES:
            raise BadSample("too_large", f"a file of {image[1]:,} bytes, and {MAX_FILE_BYTES:,} are allowed")
        if caption[1] > MAX_JSON_BYTES:
            raise BadSample("bad_caption", f"a file of {caption[1]:,} bytes, and {MAX_JSON_BYTES:,} are allowed")
        if not columns["caption_kind"][index]:
            raise BadSample("no_caption", f"its tar has no member of its name that ends in {' or '.join(CAPTIONS)}")
        start, end = min(image[0], caption[0]) - BLOCK, max(sum(image), sum(caption))
        if end - start > image[1] + caption[1] + GAP_BYTES:
            return self._read_member(index, *image), self._read_member(index, *caption)
        data = self._read_range(index, start, end)
        return self._take(data, image[0] - start, image[1]), self._take(data, caption[0] - start, caption[1])

    def _read_member(self, index: int, start: int, size: int) -> bytes:
        return self._take(self._read_range(index, start - BLOCK, start + size), BLOCK, size)

    def _read_range(self, index: int, start: int, end: int) -> bytes:
        return self._reader.read(self._files[self._index.locate(index)], start, end - start)

    def _take(self, data: bytes, start: int, size: int) -> bytes:
        """A member, if the header before it still says so: tars that are packed anew often keep their size."""
        try:
            told = _parse_header(data[start - BLOCK : start], start)[2]
        except TarDamage:
            told = -1
        if told not in (size, 0):  # 0: an extended header has said it
            raise OSError(f"its tar is not as it was when it was indexed: delete {self._index.path}")
        return data[start : start + size]

    def _parse(self, index: int, caption: bytes) -> tuple[str, ...]:
        kind = CAPTIONS[self._index.columns["caption_kind"][index] - 1]
        captions = parse_text(caption) if kind == "txt" else parse_json(caption, self._data.caption_field)
        return clean_captions(captions, self._data.empty_caption)


@dataclass
class _Found:
    """The members of one key."""

    image: Member | None = None
    size: Size = (0, 0)
    caption: Member | None = None
    caption_kind: str = ""


def scan_tar(url: str, prefer_json: bool) -> Scan:
    """Where the samples of a tar lie, grouped by key wherever their members stand; up to the first damage.

    Args:
        url: of the tar.
        prefer_json: whether .json goes before .txt where a sample has both.
    """
    found: dict[bytes, _Found] = {}
    left_out: Counter[str] = Counter()
    size, damage = 0, ""
    try:
        size = file_size(url)
        with open_stream(url) as tar:
            for member in list_members(tar, size):
                _file_member(member, tar, found, left_out, prefer_json)
    except TarDamage as error:
        damage = str(error)
    except OSError as error:
        damage = f"cannot be read ({error})"
    left_out["captions without a picture"] = sum(one.image is None for one in found.values())
    return _pack(size, found, damage, +left_out)


def _file_member(
    member: Member, tar: BinaryIO, found: dict[bytes, _Found], left_out: Counter[str], prefer_json: bool
) -> None:
    folder, name = posixpath.split(member.path)
    stem, _, extension = name.partition(b".")
    kind = extension.decode(errors="replace").lower()
    if not member.regular or not stem or kind not in PICTURES + CAPTIONS:
        left_out["members of other kinds" if member.regular else "links, folders and devices"] += 1
        return
    one = found.setdefault(posixpath.join(folder, stem), _Found())
    if kind in PICTURES:
        if one.image is None:
            one.image, one.size = member, _read_member_size(tar, member)
        else:
            left_out["second pictures of a sample"] += 1
        return
    preferred = "json" if prefer_json else "txt"
    if one.caption is None or (kind == preferred and one.caption_kind != kind):
        one.caption, one.caption_kind = member, kind
    elif one.caption_kind == kind:
        left_out["second captions of a sample"] += 1


def _read_member_size(tar: BinaryIO, member: Member) -> Size:
    """Of the picture in a member, by its header; (0, 0) where that is unreadable."""
    tar.seek(member.start)
    size = read_size(tar.read(min(member.size, HEAD_BYTES)))
    if size == (0, 0) and HEAD_BYTES < member.size <= MAX_FILE_BYTES:
        tar.seek(member.start)
        size = read_size(tar.read(member.size))
    return size


def _pack(size: int, found: dict[bytes, _Found], damage: str, left_out: Counter[str]) -> Scan:
    samples = {key: one for key, one in found.items() if one.image is not None}
    members = [(one.image, one.caption or one.image._replace(size=0)) for one in samples.values() if one.image]
    ranges = np.array([(*image[1:3], *caption[1:3]) for image, caption in members], np.int64).reshape(-1, 4)
    kinds = [1 + CAPTIONS.index(one.caption_kind) if one.caption else 0 for one in samples.values()]
    columns = {
        "image": ranges[:, :2],  # (start, size) of the member
        "caption": ranges[:, 2:],
        "caption_kind": np.array(kinds, np.uint8),
        "picture_size": np.array([one.size for one in samples.values()], np.int32).reshape(-1, 2),
        "end": np.maximum(ranges[:, :2].sum(axis=1), ranges[:, 2:].sum(axis=1)),
        "key_end": np.cumsum([len(key) for key in samples], dtype=np.int64),
    }
    return Scan(size, columns, np.frombuffer(b"".join(samples), np.uint8), damage, tuple(left_out.items()))


def list_members(tar: BinaryIO, length: int) -> Iterator[Member]:
    """The complete members of a tar, in order; the caller may read elsewhere in between.

    Raises:
        TarDamage: where no more can be found, though the tar has not come to its end.
    """
    place = 0
    told: dict[bytes, bytes] = {}  # what headers of their own say about the member behind them
    while True:
        tar.seek(place)
        header = tar.read(BLOCK)
        if len(header) < BLOCK:
            raise TarDamage(f"has no end mark, as when it is cut short, at byte {length}" if length else "is empty")
        if not any(header):
            if length - place > MAX_REST_BYTES:
                raise TarDamage(f"has its end mark at byte {place} of {length}")
            return
        kind, path, size = _parse_header(header, place)
        start = place + BLOCK
        if kind in WITHOUT_DATA:
            size = 0
        elif kind not in ABOUT_THE_NEXT:
            size = int(told.get(b"size", size))
        if start + size > length:
            raise TarDamage(f"is cut short at byte {length}, in a member that ends at {start + size}")
        place = start + -(-size // BLOCK) * BLOCK
        if kind not in ABOUT_THE_NEXT:
            yield Member(told.get(b"path", path), start, size, kind in REGULAR)
            told = {}
        elif kind in (LONG_NAME, PAX):
            if size > MAX_NAME_BYTES:
                raise TarDamage(f"has a name of {size} bytes at byte {start}")
            data = tar.read(size)
            told |= {b"path": data.rstrip(b"\0")} if kind == LONG_NAME else _parse_pax(data, start)


def _parse_header(header: bytes, place: int) -> tuple[bytes, bytes, int]:
    """(kind, path, bytes of data)."""
    try:
        checksum = _parse_number(header[148:156])
        size = _parse_number(header[124:136])
    except ValueError:
        checksum = size = -1
    if size < 0 or checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        for magic, name in COMPRESSED.items():
            if not place and header.startswith(magic):
                raise TarDamage(f"is compressed with {name}, and members are read by their place: unpack it")
        raise TarDamage(f"has no sound header at byte {place}")
    path = header[:100].partition(b"\0")[0]
    # NOTE: GNU's own format, whose magic ends in spaces, keeps other things where POSIX has the beginning of the path.
    folder = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return header[156:157], posixpath.join(folder, path), size


def _parse_number(field: bytes) -> int:
    """Octal digits, or from the first bit on binary."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _parse_pax(data: bytes, place: int) -> dict[bytes, bytes]:
    """Records such as `20 path=a/0001.jpg` and a line end; the number is the record's length."""
    fields = {}
    try:
        while data:
            length = int(data.partition(b" ")[0])
            name, equals, value = data[:length].partition(b" ")[2].partition(b"=")
            if not equals or not value.endswith(b"\n") or len(data) < length:
                raise ValueError("no record")
            fields[name] = value[:-1]
            data = data[length:]
        if int(fields.get(b"size", 0)) < 0:
            raise ValueError("negative size")
    except ValueError as error:
        raise TarDamage(f"has no sound extended header at byte {place}") from error
    return fields
