"""Finding files, and reading them from disks and over a network that fails."""

import errno
import importlib.util
import os
import random
import threading

import pytest

from flux.config import Data
from flux.data import shard_cache, storage
from flux.data.errors import DataError
from flux.data.shard_cache import ShardCache, ShardFile, ShardReader
from flux.data.storage import file_size, list_files, locked, open_stream, read_range
from tests.unit.flux.data.faulty_server import serve

CONTENT = random.Random(0).randbytes(100_000)
KEY = "training.dataset_path"


@pytest.fixture
def tars(tmp_path):
    for name in ("0.tar", "1.tar", "10.tar", "2.tar", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(storage, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 30_000)
    monkeypatch.setattr(shard_cache, "BLOCK_BYTES", 30_000)
    shard_cache._check_unchanged.cache_clear()
    with serve() as server:
        server.files["a.tar"] = CONTENT
        yield server


def names(files) -> list[str]:
    return [os.path.basename(file) for file in files]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["0.tar", "1.tar", "10.tar", "2.tar"]),
        ("/*.tar", ["0.tar", "1.tar", "10.tar", "2.tar"]),
        ("/?.tar", ["0.tar", "1.tar", "2.tar"]),
        ("/{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("/{1,2}.tar", ["1.tar", "2.tar"]),
        ("/{0,1{,0}}.tar", ["0.tar", "1.tar", "10.tar"]),
        ("/{0..1}.{tar,TAR}", ["0.TAR", "0.tar", "1.TAR", "1.tar"]),
        ("/2.tar", ["2.tar"]),
        ("/{2..3}.tar", ["2.tar", "3.tar"]),  # the second one is lost; whoever reads it says so
    ],
)
def test_names_of_local_files(tars, pattern, found):
    assert names(list_files(f"{tars}{pattern}", KEY, ".tar")) == found


def test_ranges_keep_their_zeros(server):
    files = list_files(server.url("{a,b}-{0008..0010}.tar"), KEY, ".tar")
    assert names(files) == [f"{letter}-{number:04d}.tar" for letter in "ab" for number in (8, 9, 10)]
    assert server.ranges == [], "a brace list is not looked for"


def test_a_name_with_brackets_is_a_name(tmp_path):
    (tmp_path / "a[1].tar").write_bytes(b"")
    assert names(list_files(f"{tmp_path}/a[1].tar", KEY, ".tar")) == ["a[1].tar"]


def test_a_signed_url_is_one_file():
    assert list_files("https://x.org/a.tar?signature=1", KEY, ".tar") == ["https://x.org/a.tar?signature=1"]


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("/*.zip", DataError, "names no .tar file that is there"),
        ("/none.tar", DataError, "names no .tar file that is there"),
        ("/{1,1}.tar", DataError, "/1.tar twice: name it once"),
        ("/{1", ValueError, "has a { without its }: close it"),
        ("/{5..1}.tar", ValueError, "{5..1} must be a range like {0000..0123}, upwards, or a list like {a,b}"),
        ("/{x}.tar", ValueError, "{x} must be a range"),
        ("/{0..9}{0..9}{0..9}.tar", ValueError, "names more than 500 files"),
    ],
)
def test_patterns_that_name_nothing(tars, monkeypatch, pattern, error, message):
    monkeypatch.setattr(storage, "MAX_FILES", 500)
    with pytest.raises(error) as caught:
        list_files(f"{tars}{pattern}", KEY, ".tar")
    assert str(caught.value).startswith(f"{KEY}='{tars}{pattern}'") and "\n" not in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat x.tar", "would run a command"),
        ("ftp://x/a.tar", "ftp:// cannot be read: use a local path, or one of s3://, gs://, hf://"),
        ("file:///x/a.tar", "file:// cannot be read"),
        ("http://x.org/*.tar", "HTTP cannot list files: write a brace list such as shard-{0000..0123}.tar"),
        ("http://x.org/tars/", "HTTP cannot list files"),
    ],
)
def test_what_is_refused(pattern, message):
    with pytest.raises(ValueError) as caught:
        list_files(pattern, KEY, ".tar")
    assert str(caught.value).startswith(f"{KEY}={pattern!r}") and message in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a package that is not installed: pip install s3fs"):
        list_files("s3://bucket/{0..3}.tar", KEY, ".tar")


def test_no_permission_is_told(tars, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"may not be read \(.*Permission denied.*\): get access, or correct the path"):
        list_files(str(tars), KEY, ".tar")


def test_local_ranges(tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(CONTENT)
    assert file_size(str(file)) == len(CONTENT)
    assert read_range(str(file), 7, 100) == CONTENT[7:107]
    with pytest.raises(OSError, match="it ends at byte 100,000, and 100,001 are needed"):
        read_range(str(file), 50_000, 50_001)
    with pytest.raises(FileNotFoundError):
        read_range(str(tmp_path / "none"), 0, 1)


def test_remote_ranges_come_in_blocks(server):
    assert file_size(server.url("a.tar")) == len(CONTENT)
    assert read_range(server.url("a.tar"), 10, 70_000) == CONTENT[10:70_010]
    assert [(start, end) for _, start, end in server.ranges] == [(10, 30_010), (30_010, 60_010), (60_010, 70_010)]
    assert read_range(server.url("a.tar"), 0, 0) == b""


@pytest.mark.parametrize("fault", ["500", "stall", "cut", "short", "no range"])
def test_a_fault_is_tried_again(server, fault):
    server.faults += ["", fault]
    assert read_range(server.url("a.tar"), 0, len(CONTENT)) == CONTENT
    assert [start for _, start, _ in server.ranges] == [0, 30_000, 30_000, 60_000, 90_000], "it went on, not back"


def test_four_faults_are_outlasted_and_five_are_not(server):
    server.faults += ["500", "cut", "short", "500"]
    assert read_range(server.url("a.tar"), 0, 100) == CONTENT[:100]
    server.faults += ["short"] * 5
    with pytest.raises(OSError, match=r"a\.tar does not come, tried 5 times: 50 bytes came, and 100 were asked for"):
        read_range(server.url("a.tar"), 0, 100)
    assert server.faults == []


@pytest.mark.parametrize(("name", "faults"), [("none.tar", []), ("a.tar", ["403", "403"])])
def test_what_will_not_come_is_asked_for_once(server, name, faults):
    server.faults += faults
    with pytest.raises(OSError):
        read_range(server.url(name), 0, 100)
    assert len(server.ranges) <= 1 and len(server.faults) == max(0, len(faults) - 1)


def test_a_size_is_asked_for_again(server, monkeypatch):
    server.files.pop("a.tar")
    with pytest.raises(FileNotFoundError):
        file_size(server.url("a.tar"))
    asked = []

    def fail(url, method):
        asked.append(method)
        raise FileNotFoundError(url) from ConnectionResetError("reset")  # as fsspec says it

    monkeypatch.setattr(storage, "_ask", fail)
    with pytest.raises(OSError, match="tried 5 times"):
        file_size(server.url("a.tar"))
    assert len(asked) == 5


def test_a_stream_reads_on_through_faults(server):
    server.faults += ["cut", "", "500", "short"]
    with open_stream(server.url("a.tar")) as stream:
        assert stream.read(10) == CONTENT[:10]
        stream.seek(50_000)
        assert stream.read(45_000) == CONTENT[50_000:95_000]
        assert stream.seek(-5, os.SEEK_END) == 99_995
        assert stream.read() == CONTENT[-5:] and stream.read() == b""


def reader_of(server, folder, gigabytes: float) -> tuple[ShardReader, list[ShardFile]]:
    files = [ShardFile(server.url(name), len(content)) for name, content in sorted(server.files.items())]
    return ShardReader(files, Data(shard_cache=str(folder), shard_cache_gb=gigabytes)), files


def copies(folder) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in folder.glob("[!.]*"))


def test_a_copy_is_fetched_once(server, tmp_path):
    reader, (file,) = reader_of(server, tmp_path / "cache", 1.0)
    server.faults += ["cut", "", "short"]
    for start in (0, 500, 99_990):
        assert reader.read(file, start, 10) == CONTENT[start : start + 10]
    assert [start for _, start, _ in server.ranges] == [0, 0, 30_000, 30_000, 60_000, 90_000]
    with reader.open(file) as copy:
        assert copy.read() == CONTENT
    assert copies(tmp_path / "cache") == ["a.tar"]


def test_without_room_each_read_is_its_own(server, tmp_path):
    reader, (file,) = reader_of(server, tmp_path / "cache", 0.0)
    assert reader.read(file, 5, 10) == CONTENT[5:15]
    assert [(start, end) for _, start, end in server.ranges] == [(5, 15)]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_a_shard_that_has_changed_is_refused(server, tmp_path, gigabytes):
    reader, (file,) = reader_of(server, tmp_path / "cache", gigabytes)
    server.files["a.tar"] += b"more"
    with pytest.raises(OSError, match="has 100,004 bytes, and had 100,000 when it was indexed"):
        reader.read(file, 0, 10)


def test_a_cache_smaller_than_a_shard_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match=r"data\.shard_cache_gb=5e-05 has no room for a shard of 0\.0001 GB"):
        reader_of(server, tmp_path, 50_000 / 1e9)


def test_the_least_used_copy_goes(server, tmp_path):
    server.files |= {"b.tar": CONTENT[::-1], "c.tar": CONTENT[1:] + b"c"}
    reader, (a, b, c) = reader_of(server, tmp_path, 210_000 / 1e9)
    reader.read(a, 0, 1)
    reader.read(b, 0, 1)
    os.utime(next(tmp_path.glob("*-b.tar")), (1, 1))  # long ago
    with reader.open(b) as held:
        os.utime(next(tmp_path.glob("*-b.tar")), (1, 1))
        assert reader.read(c, 0, 1) == CONTENT[1:2]
        assert copies(tmp_path) == ["a.tar", "c.tar"]
        assert held.read() == CONTENT[::-1], "who has it open can read on"
    assert reader.read(b, 0, 3) == CONTENT[::-1][:3], "and it comes again"
    assert len(copies(tmp_path)) == 2


def test_what_a_dead_process_has_left_goes(server, tmp_path):
    reader, (file,) = reader_of(server, tmp_path, 150_000 / 1e9)
    (tmp_path / "0123-old.tar.part").write_bytes(bytes(120_000))
    assert reader.read(file, 0, 4) == CONTENT[:4]
    assert copies(tmp_path) == ["a.tar"]


def test_a_copy_that_fails_leaves_nothing(server, tmp_path):
    reader, (file,) = reader_of(server, tmp_path, 1.0)
    server.faults += ["", *["500"] * 5]
    with pytest.raises(OSError, match="tried 5 times"):
        reader.read(file, 0, 4)
    assert copies(tmp_path) == []
    assert reader.read(file, 0, 4) == CONTENT[:4]


def test_many_at_once_stay_within_the_bound(server, tmp_path):
    """Six readers, five shards, room for two of them."""
    server.files = {f"{name}.tar": bytes([name]) * 100_000 for name in range(5)}
    room = 210_000
    files = [ShardFile(server.url(name), 100_000) for name in server.files]
    wrong, largest, done = [], [0], threading.Event()

    def read(seed: int) -> None:
        cache = ShardCache(tmp_path, room)
        draw = random.Random(seed)
        for _ in range(8):
            number = draw.randrange(5)
            with cache.open(files[number]) as copy:
                if copy.read() != bytes([number]) * 100_000:
                    wrong.append(number)

    def watch() -> None:
        while not done.is_set():
            with locked(tmp_path / ".lock"):
                largest[0] = max(largest[0], sum(path.stat().st_size for path in tmp_path.glob("[!.]*")))

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    watcher = threading.Thread(target=watch)
    for thread in (watcher, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    done.set()
    watcher.join()
    assert wrong == [] and 0 < largest[0] <= room


def test_a_url_that_has_lost_a_secret_is_refused():
    for url in ("https://********@host/a.tar", "https://host/a.tar?X-Amz-Signature=********"):
        with pytest.raises(
            ValueError, match="has lost a secret, which no file of a run keeps: give the whole URL again"
        ):
            list_files(url, KEY, ".tar")


def test_a_copy_is_named_without_what_signs_its_url(server, tmp_path):
    server.files["a.tar?sig=5ign"] = CONTENT
    cache = ShardCache(tmp_path, 10**6)
    with cache.open(ShardFile(server.url("a.tar?sig=5ign"), len(CONTENT))) as copy:
        assert copy.read() == CONTENT
    (name,) = (path.name for path in tmp_path.iterdir() if path.name != ".lock")
    assert name.endswith("-a.tar")
