"""Parquet files: the Hugging Face layout, columns of other names and types, damage, and reading over a network."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux.config import Data
from flux.data import parquet, shard_cache, storage
from flux.data.errors import BadSample, DataError
from flux.data.parquet import ParquetSource
from tests.unit.flux.data.faulty_server import serve
from tests.unit.flux.data.photographs import make_photographs, write_parquet
from tests.unit.flux.data.test_tars import read_all

PICTURES = make_photographs()
JPEG = PICTURES[0].data


@pytest.fixture
def data(tmp_path):
    return Data(index_folder=str(tmp_path / "index"), index_workers=0)


def write(path, image, caption, names=("image", "text"), group: int = 2):
    pq.write_table(pa.table(dict(zip(names, (image, caption), strict=True))), path, row_group_size=group)
    return str(path)


def test_photographs_come_back(tmp_path, data):
    write_parquet(tmp_path / "a.parquet", PICTURES[:5])
    write_parquet(tmp_path / "b.parquet", PICTURES[5:])
    source = ParquetSource(str(tmp_path), data)
    assert [(shard.name, shard.samples) for shard in source.shards] == [
        *(("a.parquet:0", 2), ("a.parquet:1", 2), ("a.parquet:2", 1), ("b.parquet:0", 1))
    ]
    for index, picture in enumerate(PICTURES):
        found = source[index]
        assert found.image == picture.data and found.captions == (picture.caption,)
        assert found.key == f"{picture.name}.{picture.extension}"
        assert found.shard == source.shards[[0, 0, 1, 1, 2, 3][index]].name
    assert len(source) == 6
    assert source.picture_sizes().tolist() == [list(picture.size) for picture in PICTURES]
    assert source.picture_sizes().dtype == np.int32


def test_as_hugging_face_writes_it(tmp_path, data):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {
        "image": [{"bytes": one.data, "path": None} for one in PICTURES],
        "caption": [one.caption for one in PICTURES],
    }
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    source = ParquetSource(str(tmp_path / "a.parquet"), data)
    assert [(source[index].image, source[index].key) for index in range(6)] == [
        (picture.data, f"row {index}") for index, picture in enumerate(PICTURES)
    ]


STRUCT = [{"bytes": JPEG, "path": "a.jpg"}]


@pytest.mark.parametrize(
    ("image", "caption", "found"),
    [
        (STRUCT, ["text"], ("text",)),
        ([JPEG], [" two\nwords "], ("two words",)),
        (pa.array([JPEG], pa.large_binary()), pa.array(["text"], pa.large_string()), ("text",)),
        (STRUCT, [["one", "two"]], ("one", "two")),
        (STRUCT, [["one", None, ""]], ("one",)),
        (STRUCT, pa.array([["one"]], pa.large_list(pa.large_string())), ("one",)),
        (STRUCT, pa.array([None], pa.string()), "no_caption"),
        (STRUCT, pa.array([[]], pa.list_(pa.string())), "no_caption"),
        (STRUCT, [""], "no_caption"),
        (STRUCT, ["x" * 9000], "bad_caption"),
        (pa.array([None], pa.binary()), ["text"], "unreadable"),
        (pa.array([None], pa.struct({"bytes": pa.binary(), "path": pa.string()})), ["text"], "unreadable"),
        ([{"bytes": None, "path": "a.jpg"}], ["text"], "unreadable"),
    ],
)
def test_rows(tmp_path, data, image, caption, found):
    if isinstance(image, list) and isinstance(image[0], dict):
        image = pa.array(image, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    source = ParquetSource(write(tmp_path / "a.parquet", image, caption), data)
    (sample,) = read_all(source)
    assert (sample if isinstance(sample, str) else sample.captions) == found
    if found == "unreadable":
        assert source.picture_sizes().tolist() == [[0, 0]]
    elif isinstance(found, tuple):
        assert sample.image == JPEG


def test_text_that_is_not_unicode(tmp_path, data):
    """Parquet does not check it."""
    caption = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff\xfe"]).buffers()[1:]])
    source = ParquetSource(write(tmp_path / "a.parquet", [JPEG], caption), data)
    with pytest.raises(BadSample, match="not UTF-8") as caught:
        source[0]
    assert caught.value.reason == "bad_caption" and caught.value.shard == "a.parquet:0"


def test_columns_by_name(tmp_path, data):
    path = write(tmp_path / "a.parquet", [JPEG], ["text"], ("photo", "description"))
    with pytest.raises(DataError) as caught:
        ParquetSource(path, data)
    assert str(caught.value) == (
        f"{path} has no column image or jpg or png or webp: "
        "set data.image_field to one of its columns: photo, description"
    )
    named = Data(index_folder=data.index_folder, image_field="photo", caption_field="description")
    assert ParquetSource(path, named)[0].captions == ("text",)
    wrong = Data(index_folder=data.index_folder, image_field="photo", caption_field="alt", index_workers=2)
    write(tmp_path / "b.parquet", [JPEG], ["text"], ("photo", "description"))
    with pytest.raises(
        DataError, match=r"^\S*a\.parquet has no column alt: set data\.caption_field to one of its columns"
    ):
        ParquetSource(str(tmp_path), wrong)  # told by a process that indexes


@pytest.mark.parametrize(
    ("image", "caption", "message"),
    [
        (
            ["a.jpg"],
            ["text"],
            "column image is of type string, and must be binary, or a struct with bytes: set data.image",
        ),
        ([{"path": "a.jpg"}], ["text"], "column image is of type struct<path: string>, and must be"),
        ([JPEG], [3], "column text is of type int64, and must be string, or a list of strings: set data.caption_field"),
        ([JPEG], [[3]], "column text is of type list<element: int64>"),
    ],
)
def test_columns_of_other_types(tmp_path, data, image, caption, message):
    with pytest.raises(DataError) as caught:
        ParquetSource(write(tmp_path / "a.parquet", image, caption), data)
    assert message in str(caught.value) and "a.parquet" in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "no end"])
def test_damage(tmp_path, data, damage):
    path = write_parquet(tmp_path / "a.parquet", PICTURES)
    whole = path.read_bytes()
    write_parquet(tmp_path / "b.parquet", PICTURES[:2])
    source = ParquetSource(str(tmp_path), data)
    good, shards = read_all(source), source.shards
    content = {"empty": b"", "garbage": b"<html>", "cut": whole[: len(whole) // 2], "no end": whole[:-1]}[damage]
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"a\.parquet is cut short: 0 of 3 row groups, {len(content)} of {len(whole)} bytes"
    ):
        ParquetSource(str(tmp_path), data)
    skipping = Data(index_folder=data.index_folder, on_bad_shard="skip")
    source = ParquetSource(str(tmp_path), skipping)
    assert source.shards == shards and read_all(source) == ["unreadable"] * 6 + good[6:]
    assert source.picture_sizes().tolist() == [[0, 0]] * 6 + [list(picture.size) for picture in PICTURES[:2]]
    fresh = Data(index_folder=str(tmp_path / "fresh"), index_workers=0)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet \(.*\) \(0 row groups before that\)"):
        ParquetSource(str(tmp_path), fresh)
    source = ParquetSource(str(tmp_path), Data(index_folder=fresh.index_folder, on_bad_shard="skip"))
    assert read_all(source) == good[6:]


def test_noise_in_one_row_group(tmp_path, data):
    """The others are still read, and their pictures keep their places."""
    path = write_parquet(tmp_path / "a.parquet", PICTURES)
    metadata = pq.read_metadata(path)
    start = metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = bytes(range(200, 240))
    path.write_bytes(content)
    source = ParquetSource(str(path), data)
    assert [one if isinstance(one, str) else one.image for one in read_all(source)] == [
        *(PICTURES[0].data, PICTURES[1].data, "unreadable", "unreadable", PICTURES[4].data, PICTURES[5].data)
    ]
    assert source.picture_sizes().tolist() == [
        list(picture.size) if index // 2 != 1 else [0, 0] for index, picture in enumerate(PICTURES)
    ]


def test_no_rows(tmp_path, data):
    image, text = pa.array([], pa.binary()), pa.array([], pa.string())
    with pytest.raises(DataError, match=r"no row groups in .*a\.parquet|has no rows"):
        ParquetSource(write(tmp_path / "a.parquet", image, text), data)


def test_row_groups_are_kept_within_bounds(tmp_path, data, monkeypatch):
    opened = []
    original = shard_cache.ShardReader.open
    monkeypatch.setattr(
        shard_cache.ShardReader, "open", lambda self, file: (opened.append(file), original(self, file))[1]
    )
    source = ParquetSource(str(write_parquet(tmp_path / "a.parquet", PICTURES)), data)
    for index in (0, 1, 2, 3, 4, 5, 0, 2, 4):
        source[index]
    assert len(opened) == 3
    sent = pickle.dumps(source)
    assert len(sent) < 3000, "row groups do not travel to workers"
    assert pickle.loads(sent)[3] == source[3]
    monkeypatch.setattr(parquet, "KEPT_BYTES", sum(source._load_table(number).nbytes for number in (0, 1)))
    opened.clear()
    for index in (0, 2, 0, 4, 0, 2):  # row groups 0 and 1; 2 takes the place of 1, which was used before 0
        source[index]
    assert len(opened) == 2 and list(source._kept) == [0, 1]
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1)
    assert source[5].key == "hubble_deep_field.jpg" and len(source._kept) == 1


@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_remote_files(tmp_path, monkeypatch, gigabytes):
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(storage, "TIMEOUT_SECONDS", 0.5)
    shard_cache._check_unchanged.cache_clear()
    with serve() as server:
        server.files["a.parquet"] = write_parquet(tmp_path / "a.parquet", PICTURES).read_bytes()
        folders = {"index_folder": str(tmp_path / "index"), "shard_cache": str(tmp_path / "cache")}
        server.faults += ["500", "cut"]
        source = ParquetSource(server.url("a.parquet"), Data(**folders, shard_cache_gb=gigabytes))
        server.faults += ["short", "500"]
        assert [source[index].image for index in range(6)] == [picture.data for picture in PICTURES]
        assert source.picture_sizes().tolist() == [list(picture.size) for picture in PICTURES]
        assert server.faults == []
