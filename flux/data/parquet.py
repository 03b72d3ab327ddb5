"""Parquet files with pictures and captions, as Hugging Face lays them out.

The picture's column holds `{bytes, path}` or the bytes alone, the caption's a string or a list of them. Parquet is read
by row groups, all rows of one together: each is a shard, and those that were used last are kept.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flux.config import Data
from flux.data.captions import clean_captions, parse_text
from flux.data.decode import Size, read_size
from flux.data.errors import BadSample, DataError
from flux.data.index import Index, Kind, Scan, open_index
from flux.data.sample import Sample, Shard
from flux.data.shard_cache import ShardReader
from flux.data.storage import file_size, list_files, open_stream

KEPT_BYTES = 512_000_000  # of row groups, in each process
FAULTS = (OSError, pa.ArrowException)


def _holds_pictures(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return "bytes" in type.names and _holds_pictures(type.field("bytes").type)
    return pa.types.is_binary(type) or pa.types.is_large_binary(type)


def _holds_captions(type: pa.DataType) -> bool:
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        type = type.value_type
    return pa.types.is_string(type) or pa.types.is_large_string(type)


class Column(NamedTuple):
    """What a column is for."""

    key: str  # of the configuration, names it
    usual_names: Sequence[str]
    fits: Callable[[pa.DataType], bool]
    types: str  # that fit


PICTURE = Column("data.image_field", ("image", "jpg", "png", "webp"), _holds_pictures, "binary, or a struct with bytes")
CAPTION = Column("data.caption_field", ("text", "caption"), _holds_captions, "string, or a list of strings")


class ParquetSource:
    """Map-style source over parquet files, in the order of the files and of their rows.

    Args:
        pattern: names the files, see `list_files`.
        data: the section.
        key: configuration key of the pattern, for messages.
        show_progress: of an indexing, on a terminal.

    Raises:
        ValueError: a pattern that cannot be served here.
        DataError: no files, no rows, damaged files, or without the columns.
    """

    def __init__(self, pattern: str, data: Data, key: str = "training.dataset_path", show_progress: bool = False):
        self._urls = list_files(pattern, key, ".parquet")
        self._data, self._key, self._show_progress = data, key, show_progress
        fields = (data.image_field, data.caption_field)
        kind = Kind("parquet", "row groups", partial(scan_row_groups, fields=fields), list(fields))
        self._index = open_index(kind, self._urls, data, key, show_progress)
        self._files = self._index.shard_files()
        self._reader = ShardReader(self._files, data)
        self._ends = np.cumsum(self._index.columns["rows"])
        if not len(self):
            raise DataError(f"{key}={pattern!r} has no rows: correct the path")
        self.shards: Sequence[Shard] = list(_row_group_shards(self._index))
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()  # by the number of the shard

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_kept": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - self._start(number)
        key, shard = f"row {row}", self.shards[number].name
        try:
            image, caption = (column[row] for column in self._load_table(number).columns)
            return Sample(_read_picture(image), self._read_captions(caption), _read_path(image) or key, shard)
        except BadSample as error:
            raise BadSample(error.reason, error.detail, key, shard) from error
        except (*FAULTS, IndexError) as error:
            raise BadSample("unreadable", str(error), key, shard) from error

    def picture_sizes(self) -> np.ndarray:
        """Reads every picture's header, once: a second index keeps what it says."""
        field = self._data.image_field
        kind = Kind("parquet-sizes", "rows", partial(scan_picture_sizes, image_field=field), [field])
        found = open_index(kind, self._urls, self._data, self._key, self._show_progress)
        sizes = np.zeros((len(self), 2), np.int32)
        for number in range(len(self._files)):
            groups = self._index.rows(number)
            start, end = self._start(groups.start), self._start(groups.stop)
            # Fewer, when the file has been damaged since.
            part = found.columns["picture_size"][found.rows(number)][: end - start]
            sizes[start : start + len(part)] = part
        return sizes

    def _start(self, number: int) -> int:
        """The first sample of a shard."""
        return int(self._ends[number - 1]) if number else 0

    def _load_table(self, number: int) -> pa.Table:
        """A row group with the columns (picture, caption)."""
        table = self._kept.pop(number, None)
        if table is None:
            place = self._index.locate(number)
            with self._reader.open(self._files[place]) as file:
                parquet = pq.ParquetFile(file)
                fields = (self._data.image_field, self._data.caption_field)
                names = _find_columns(parquet, fields, self._files[place].url)
                table = parquet.read_row_group(number - self._index.rows(place).start, names, use_threads=False)
                table = table.select(names)
        self._kept[number] = table
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return table

    def _read_captions(self, caption: pa.Scalar) -> tuple[str, ...]:
        try:
            value = caption.as_py()
        except UnicodeDecodeError as error:
            raise BadSample("bad_caption", f"not UTF-8: {error.reason} at byte {error.start}") from error
        captions = value if isinstance(value, list) else [value]
        written = [one for one in captions if one is not None]
        if not written:
            raise BadSample("no_caption", "its caption is null" if captions else "its list of captions is empty")
        parsed = [text for one in written for text in parse_text(one.encode())]
        return clean_captions(parsed, self._data.empty_caption)


def _picture_bytes(image: pa.Scalar) -> pa.Scalar:
    return image["bytes"] if pa.types.is_struct(image.type) and image.is_valid else image


def _read_picture(image: pa.Scalar) -> bytes:
    value = _picture_bytes(image).as_py()
    if value is None:
        path = _read_path(image)
        raise BadSample("unreadable", f"the file has only its path, {path!r}" if path else "its picture is null")
    return value


def _read_path(image: pa.Scalar) -> str | None:
    """A label."""
    named = pa.types.is_struct(image.type) and image.is_valid and "path" in image.type.names
    return image["path"].as_py() if named else None


def _row_group_shards(index: Index) -> Iterator[Shard]:
    for number, name in enumerate(index.names):
        rows = index.rows(number)
        counts, sizes = index.columns["rows"][rows].tolist(), index.columns["bytes"][rows].tolist()
        for group, (count, size) in enumerate(zip(counts, sizes, strict=True)):
            yield Shard(f"{name}:{group}", size, count)


def _find_columns(parquet: pq.ParquetFile, fields: tuple[str | None, str | None], url: str) -> list[str]:
    """Names of the columns (picture, caption), of which data.image_field and data.caption_field are given."""
    return [_find_column(parquet, column, field, url) for column, field in zip((PICTURE, CAPTION), fields, strict=True)]


def _find_column(parquet: pq.ParquetFile, column: Column, wanted: str | None, url: str) -> str:
    """Name of a column.

    Raises:
        DataError: it is missing, or of a type that cannot be used.
    """
    schema = parquet.schema_arrow
    remedy = f"set {column.key} to one of its columns: {', '.join(schema.names)}"
    names = column.usual_names if wanted is None else (wanted,)
    name = next((name for name in names if name in schema.names), None)
    if name is None:
        raise DataError(f"{url} has no column {' or '.join(names)}: {remedy}")
    if not column.fits(type := schema.field(name).type):
        raise DataError(f"{url}: column {name} is of type {type}, and must be {column.types}: {remedy}")
    return name


def scan_row_groups(url: str, fields: tuple[str | None, str | None]) -> Scan:
    """Rows and bytes of every row group, as the end of the file tells them.

    Raises:
        DataError: a column is missing.
    """
    size, damage = 0, ""
    groups: list[tuple[int, int]] = []
    try:
        size = file_size(url)
        with open_stream(url) as file:
            parquet = pq.ParquetFile(file)
            _find_columns(parquet, fields, url)
            told = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
            groups = [(group.num_rows, group.total_byte_size) for group in told]
    except FAULTS as error:
        damage = f"cannot be read as parquet ({error})"
    rows, sizes = np.array(groups, np.int64).reshape(-1, 2).T
    return Scan(size, {"rows": rows.copy(), "bytes": sizes.copy(), "end": np.full(len(rows), size)}, damage=damage)


def scan_picture_sizes(url: str, image_field: str | None) -> Scan:
    """(width, height) of all pictures; (0, 0) where that is unreadable.

    Raises:
        DataError: the column is missing.
    """
    size, damage = 0, ""
    sizes: list[Size] = []
    try:
        size = file_size(url)
        with open_stream(url) as file:
            parquet = pq.ParquetFile(file)
            name = _find_column(parquet, PICTURE, image_field, url)
            for group in range(parquet.num_row_groups):
                sizes += _read_sizes(parquet, group, name)
    except FAULTS as error:
        damage = f"cannot be read as parquet ({error})"
    columns = {"picture_size": np.array(sizes, np.int32).reshape(-1, 2), "end": np.full(len(sizes), size)}
    return Scan(size, columns, damage=damage)


def _read_sizes(parquet: pq.ParquetFile, group: int, name: str) -> list[Size]:
    try:
        table = parquet.read_row_group(group, [name], use_threads=False)
    except FAULTS:
        return [(0, 0)] * parquet.metadata.row_group(group).num_rows
    pictures = [_picture_bytes(image).as_py() for image in table.column(name)]
    return [(0, 0) if picture is None else read_size(picture) for picture in pictures]
