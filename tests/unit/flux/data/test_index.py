"""Indexes: made once, found again, and what they say of files that have changed."""

import os
import pickle
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from flux.config import Data
from flux.data.errors import DataError
from flux.data.index import Index, Kind, Scan, name_files, open_index
from flux.data.tars import WebDatasetSource
from tests.unit.flux.data.photographs import make_photographs, members_of, write_tar
from tests.unit.flux.data.test_tars import keys, read_all

KEY = "training.dataset_path"
PICTURE = make_photographs()[3]
SAMPLES = 8


def scan_lines(url: str, scanned: list[str] | None = None) -> Scan:
    """An entry for every line of a text; "!" is damage."""
    if scanned is not None:
        scanned.append(os.path.basename(url))
    try:
        text = Path(url).read_bytes()
    except OSError as error:
        text, damage = b"", f"cannot be read ({error.strerror})"
    else:
        damage = "has a !" if b"!" in text else ""
    lines = text.partition(b"!")[0].splitlines()
    lengths = np.array([len(line) for line in lines], np.int64)
    columns = {"length": lengths, "end": np.cumsum(lengths + 1), "key_end": np.cumsum(lengths, dtype=np.int64)}
    return Scan(len(text), columns, np.frombuffer(b"".join(lines), np.uint8), damage)


@pytest.fixture
def data(tmp_path):
    return Data(index_folder=str(tmp_path / "index"), index_workers=0)


@pytest.fixture
def files(tmp_path):
    texts = {"a": "one\ntwo\n", "b": "", "c": "three\n", "d": "four\nfive\nsix\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.x").write_text(text)
    return [str(tmp_path / f"{name}.x") for name in texts]


def lines(scanned: list[str] | None = None, *settings: str) -> Kind:
    return Kind("lines", "lines", partial(scan_lines, scanned=scanned), settings)


def all_keys(index: Index) -> list[str]:
    return [index.key(entry) for entry in range(len(index))]


def test_entries_are_found(files, data):
    index = open_index(lines(), files, data, KEY)
    assert all_keys(index) == ["one", "two", "three", "four", "five", "six"]
    assert [index.names[index.locate(entry)] for entry in range(6)] == ["a.x", "a.x", "c.x", "d.x", "d.x", "d.x"]
    assert index.columns["length"].tolist() == [3, 3, 5, 4, 4, 3]
    assert [index.rows(number) for number in range(4)] == [slice(0, 2), slice(2, 2), slice(2, 3), slice(3, 6)]
    for entry in (-1, 6):
        with pytest.raises(IndexError):
            index.locate(entry)


def test_it_is_made_once_and_mapped(files, data, monkeypatch, tmp_path):
    scanned: list[str] = []
    index = open_index(lines(scanned), files, data, KEY)
    assert scanned == ["a.x", "b.x", "c.x", "d.x"]
    monkeypatch.chdir(tmp_path)
    again = open_index(lines(scanned), [os.path.basename(file) for file in files], data, KEY)
    assert len(scanned) == 4 and again.path == index.path and all_keys(again) == all_keys(index)
    assert str(again.path) in Path("/proc/self/maps").read_text()
    assert [file.name for file in again.path.parent.iterdir() if file.suffix != ".lock"] == [again.path.name]


def test_other_settings_and_other_files_have_their_own(files, data):
    paths = {
        open_index(lines(None, *settings), some, data, KEY).path
        for settings in ((), ("x",))
        for some in (files, files[:3])
    }
    assert len(paths) == 4


def test_processes_find_the_same(files, data):
    before = torch.get_rng_state()
    index = open_index(lines(), files, data, KEY)
    other = open_index(lines(None, "other"), files, replace(data, index_workers=2), KEY)
    assert all_keys(other) == all_keys(index) and other.files == index.files
    assert torch.equal(torch.get_rng_state(), before), "an index does not move the random numbers of a run"
    assert all_keys(pickle.loads(pickle.dumps(index))) == all_keys(index)
    assert len(pickle.dumps(index)) < 500


def test_who_comes_second_waits(files, data):
    scanned: list[str] = []

    def scan_slowly(url: str) -> Scan:
        time.sleep(0.02)
        return scan_lines(url, scanned)

    found: list[Index] = []
    kind = Kind("lines", "lines", scan_slowly, [])
    threads = [threading.Thread(target=lambda: found.append(open_index(kind, files, data, KEY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(scanned) == 4 and len(found) == 4 and len({tuple(all_keys(index)) for index in found}) == 1


def test_a_file_that_grows_is_read_again_alone(files, data, caplog):
    scanned: list[str] = []
    open_index(lines(scanned), files, data, KEY)
    scanned.clear()
    with open(files[2], "a") as file:
        file.write("more\n")
    index = open_index(lines(scanned), files, data, KEY)
    assert scanned == ["c.x"] and all_keys(index) == ["one", "two", "three", "more", "four", "five", "six"]
    assert f"{files[2]}: longer than when it was indexed, and read again" in caplog.text
    assert index.columns["length"].tolist() == [3, 3, 5, 4, 4, 4, 3]


def test_a_file_that_was_empty_may_grow(tmp_path, data):
    files = [str(tmp_path / name) for name in ("a.x", "b.x")]
    for file in files:
        Path(file).touch()
    with pytest.raises(DataError, match="no lines in"):
        open_index(lines(), files, data, KEY)
    Path(files[1]).write_text("one\n")
    assert all_keys(open_index(lines(), files, data, KEY)) == ["one"]


def test_damage_stops_until_it_is_mended(files, data):
    scanned: list[str] = []
    whole = Path(files[0]).read_text()
    Path(files[0]).write_text("one\n!wo\n")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            open_index(lines(scanned), files, data, KEY)
        assert str(caught.value) == (
            f'{KEY}: {files[0]} has a ! (1 lines before that): fetch it again, or set data.on_bad_shard="skip"'
        )
    assert scanned == ["a.x", "b.x", "c.x", "d.x", "a.x"], "sound files are read once"
    Path(files[0]).write_text(whole)  # no longer than it was
    assert all_keys(open_index(lines(scanned), files, data, KEY))[:3] == ["one", "two", "three"]


def test_damage_may_be_skipped(files, data, caplog):
    Path(files[0]).write_text("one\n!wo\n")
    Path(files[3]).unlink()
    skipping = replace(data, on_bad_shard="skip")
    for _ in range(2):
        caplog.clear()
        assert all_keys(open_index(lines(), files, skipping, KEY)) == ["one", "three"]
        assert f"{files[0]} has a ! (1 lines before that): left out by data.on_bad_shard=skip" in caplog.text
        assert f"{files[3]} cannot be read (No such file or directory)" in caplog.text
    with pytest.raises(DataError, match=r"a\.x has a ! \(1 lines before that\) and 1 more: fetch it again"):
        open_index(lines(), files, data, KEY)


def test_many_damaged_files_are_counted(tmp_path, data, caplog):
    files = [str(tmp_path / f"{number:02}.x") for number in range(15)]
    for file in files:
        Path(file).write_text("one\n!")
    open_index(lines(), files, replace(data, on_bad_shard="skip"), KEY)
    assert caplog.text.count("left out by data.on_bad_shard=skip") == 10 and "5 more files are damaged" in caplog.text


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_a_damaged_index_is_made_again(files, data, caplog, damage):
    path = open_index(lines(), files, data, KEY).path
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:-5], "garbage": b"\xff" * 100}[damage])
    assert len(open_index(lines(), files, data, KEY)) == 6
    assert f"the index {path} is damaged" in caplog.text and path.read_bytes() == whole


def test_no_entries_and_no_folder(files, data, tmp_path):
    with pytest.raises(DataError, match=rf"^{KEY}: no lines in {files[1]}: correct the path"):
        open_index(lines(), files[1:2], data, KEY)
    with pytest.raises(
        ValueError, match=r"^data\.index_folder=.* cannot be written .*: name a folder that can"
    ) as caught:
        open_index(lines(), files, replace(data, index_folder=files[0]), KEY)
    assert not isinstance(caught.value, DataError)


def test_names_stay_when_data_moves():
    assert name_files(["/x/y/0.tar", "/x/y/1.tar"]) == ["0.tar", "1.tar"]
    assert name_files(["/x/a/0.tar", "/x/ab/0.tar", "/x/ab/c/1.tar"]) == ["a/0.tar", "ab/0.tar", "ab/c/1.tar"]
    assert name_files(["s3://b/x/0.tar", "s3://b/y/0.tar"]) == ["x/0.tar", "y/0.tar"]
    assert name_files(["/0.tar"]) == ["0.tar"]
    assert name_files(["https://h/0.tar?key=1", "https://h/1.tar?key=2"]) == ["0.tar", "1.tar"]
    assert name_files(["https://h/get?file=0", "https://h/get?file=1"]) == ["get?file=0", "get?file=1"]
    assert name_files(["/x/a?.tar", "/x/a.tar"]) == ["a?.tar", "a.tar"]
    assert name_files(["0.tar", "a/0.tar"]) == ["0.tar", "a/0.tar"]


# With real tars: what a lost part of the data set means to who reads it.


@pytest.fixture
def tars(tmp_path):
    for shard in ("0", "1"):
        named = [PICTURE._replace(name=f"{shard}{number}") for number in range(SAMPLES)]
        write_tar(tmp_path / f"{shard}.tar", members_of(named))
    return tmp_path


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_a_shard_that_is_cut_short_later(tars, data, caplog):
    source = WebDatasetSource(str(tars), data)
    whole, shards = read_all(source), source.shards
    size = (tars / "0.tar").stat().st_size
    cut(tars / "0.tar", int(source._index.columns["end"][5]))
    with pytest.raises(DataError) as caught:
        WebDatasetSource(str(tars), data)
    left = (tars / "0.tar").stat().st_size
    assert str(caught.value).startswith(
        f"{KEY}: {tars / '0.tar'} is cut short: 6 of 8 samples, {left} of {size} bytes (if that is on purpose, delete "
    )
    assert str(caught.value).endswith(': fetch it again, or set data.on_bad_shard="skip"')
    source = WebDatasetSource(str(tars), replace(data, on_bad_shard="skip"))
    assert source.shards == shards, "no place has moved"
    assert read_all(source) == whole[:6] + ["unreadable"] * 2 + whole[8:]
    assert "0.tar is cut short: 6 of 8 samples" in caplog.text


def test_a_shard_that_is_lost_later(tars, data):
    whole = read_all(WebDatasetSource(f"{tars}/{{0..1}}.tar", data))
    (tars / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar is lost or may not be read: 0 of 8 samples, 0 of \d+ bytes"):
        WebDatasetSource(f"{tars}/{{0..1}}.tar", data)
    source = WebDatasetSource(f"{tars}/{{0..1}}.tar", replace(data, on_bad_shard="skip"))
    assert read_all(source) == whole[:8] + ["unreadable"] * 8


def test_a_shard_that_was_cut_short_before(tars, data):
    cut(tars / "0.tar", 20_000)
    with pytest.raises(DataError, match=r"0\.tar is cut short at byte 20000, in a member .* \(3 samples before that\)"):
        WebDatasetSource(str(tars), data)
    source = WebDatasetSource(str(tars), replace(data, on_bad_shard="skip"))
    assert [shard.samples for shard in source.shards] == [3, 8]
    assert [sample.key for sample in read_all(source)] == ["00", "01", "02"] + [f"1{number}" for number in range(8)]


def test_keys_are_those_of_the_scan(tars, data):
    source = WebDatasetSource(str(tars), data)
    assert keys(source._index.scan(1)) == [f"1{number}" for number in range(SAMPLES)]


def test_an_index_keeps_no_secret_and_opens_files_with_it(tmp_path, data):
    """In other processes too."""
    urls = [f"http://reader:p4ss@host/{name}.x?sig=5ign" for name in "ab"]
    kind = Kind("lines", "lines", lambda url: scan_lines_of(url, damage=f"{url} stops"), [])
    skipping = replace(data, on_bad_shard="skip")
    for index in (open_index(kind, urls, skipping, KEY), open_index(kind, urls, skipping, KEY)):  # made, and found
        for one in (index, pickle.loads(pickle.dumps(index))):
            assert [file.url for file in one.shard_files()] == urls and one.names == ["a.x", "b.x"]
    text = index.path.read_bytes()
    assert b"p4ss" not in text and b"5ign" not in text and b"://********@host/a.x?sig=********" in text


def scan_lines_of(url: str, damage: str) -> Scan:
    one = np.ones(1, np.int64)
    return Scan(3, {"length": one, "end": one, "key_end": one}, np.frombuffer(b"k", np.uint8), damage)
