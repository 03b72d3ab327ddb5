"""Tars: what is a sample, every way in which a tar can be damaged, and reading over a network."""

import gzip
import io
import itertools
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from flux.config import Data
from flux.data import shard_cache, storage
from flux.data.errors import BadSample, DataError
from flux.data.tars import TarDamage, WebDatasetSource, list_members, scan_tar
from tests.unit.flux.data.faulty_server import serve
from tests.unit.flux.data.photographs import make_photographs, members_of, write_tar

PICTURES = make_photographs()
JPEG = PICTURES[3].data


@pytest.fixture
def data(tmp_path):
    return Data(index_folder=str(tmp_path / "index"), index_workers=0)


def sample(key: str, caption: str | None = "a cat", extension: str = "txt") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", JPEG)] + ([] if caption is None else [(f"{key}.{extension}", caption.encode())])


def scan(tmp_path, content: bytes, prefer_json: bool = False):
    (tmp_path / "scanned.tar").write_bytes(content)
    return scan_tar(str(tmp_path / "scanned.tar"), prefer_json)


def keys(scan) -> list[str]:
    ends = [0, *scan.columns["key_end"]]
    return [scan.keys[start:end].tobytes().decode() for start, end in itertools.pairwise(ends)]


def read_all(source) -> list:
    """Samples, or the reasons why not."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index])
        except BadSample as error:
            found.append(error.reason)
    return found


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_photographs_come_back(tmp_path, data, format):
    write_tar(tmp_path / "b.tar", members_of(PICTURES[4:], "deep/"), format)
    write_tar(tmp_path / "a.tar", members_of(PICTURES[:4]), format)
    source = WebDatasetSource(str(tmp_path), data)
    assert len(source) == 6
    for index, picture in enumerate(PICTURES):
        found = source[index]
        assert found.image == picture.data and found.captions == (picture.caption,)
        assert found.key == ("deep/" if index >= 4 else "") + picture.name
        assert found.shard == ("b.tar" if index >= 4 else "a.tar")
    assert source.picture_sizes().tolist() == [list(picture.size) for picture in PICTURES]
    assert source.picture_sizes().dtype == np.int32
    assert [(shard.name, shard.samples) for shard in source.shards] == [("a.tar", 4), ("b.tar", 2)]
    assert source.shards[0].bytes == (tmp_path / "a.tar").stat().st_size


def test_travels_to_workers(tmp_path, data):
    write_tar(tmp_path / "a.tar", members_of(PICTURES))
    source = WebDatasetSource(str(tmp_path), data)
    sent = pickle.dumps(source)
    assert len(sent) < 2000, "the index is opened there, and not sent"
    assert pickle.loads(sent)[5] == source[5]


def test_as_webdataset_reads_it(tmp_path, data):
    import webdataset

    names = ["a.b/x.1.jpg", "a.b/y.jpg", "a.b/y.txt", ".hidden.jpg", "z.JPG", "z.txt", "noext"]
    write_tar(tmp_path / "a.tar", [(name, JPEG if "jpg" in name.lower() else b"text") for name in names])
    source = WebDatasetSource(str(tmp_path), data)
    theirs = [
        one["__key__"] for one in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False) if "jpg" in one
    ]
    assert [source[index].key for index in range(len(source))] == theirs == ["a.b/y", "z"]


@pytest.mark.parametrize(
    ("members", "field", "captions"),
    [
        ([("a.txt", "text")], None, ("text",)),
        ([("a.txt", " two\n words ")], None, ("two words",)),
        ([("a.json", {"caption": "json"})], None, ("json",)),
        ([("a.json", {"text": ["one", "two"]})], None, ("one", "two")),
        ([("a.json", {"text": "json"}), ("a.txt", "text")], None, ("text",)),
        ([("a.txt", "text"), ("a.json", {"long": "json"})], "long", ("json",)),
        ([("a.json", {"long": "json"}), ("a.txt", "text")], "long", ("json",)),
        ([("a.txt", "text")], "long", ("text",)),
        ([("a.json", {"text": "json"})], "long", "no_caption"),
        ([("a.txt", "")], None, "no_caption"),
        ([], None, "no_caption"),
        ([("a.txt", "x" * 9000)], None, "bad_caption"),
        ([("a.json", {"text": "x", "more": "y" * 1_000_000})], None, "bad_caption"),
    ],
)
def test_captions(tmp_path, members, field, captions):
    data = Data(index_folder=str(tmp_path / "index"), caption_field=field)
    encoded = [(name, (json.dumps(text) if isinstance(text, dict) else text).encode()) for name, text in members]
    write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), *encoded])
    source = WebDatasetSource(str(tmp_path), data)
    try:
        assert source[0].captions == captions
    except BadSample as error:
        assert error.reason == captions and error.key == "a" and error.shard == "a.tar"


def test_an_empty_caption_may_mean_no_prompt(tmp_path):
    write_tar(tmp_path / "a.tar", sample("a", ""))
    data = Data(index_folder=str(tmp_path / "index"), empty_caption="unconditional")
    assert WebDatasetSource(str(tmp_path), data)[0].captions == ("",)


def test_members_need_not_be_neighbors(tmp_path, data):
    """Captions first, pictures last, and far apart."""
    far = [(f"{name}.txt", f"caption {name}".encode()) for name in "abc"] + [("x.bin", bytes(200_000))]
    write_tar(tmp_path / "a.tar", far + [(f"{name}.jpg", JPEG) for name in "cab"])
    source = WebDatasetSource(str(tmp_path), data)
    assert [(one.key, one.captions, one.image == JPEG) for one in map(source.__getitem__, range(3))] == [
        (name, (f"caption {name}",), True) for name in "abc"
    ]


def test_doubles_and_strangers_are_left_out_and_told(tmp_path, data, caplog):
    members = [
        *(("a.jpg", JPEG), ("a.jpg", b"second"), ("a.png", b"third"), ("a.txt", b"first"), ("a.txt", b"second")),
        *(("b.txt", b"no picture"), ("c.pickle", b"x"), ("c.pyd", b"x"), ("c.npy", b"x"), ("c.jpg.exe", b"x")),
    ]
    write_tar(tmp_path / "a.tar", members)
    source = WebDatasetSource(str(tmp_path), data)
    assert len(source) == 1 and source[0].image == JPEG and source[0].captions == ("first",)
    assert (
        "left out captions without a picture (1), members of other kinds (4), second captions of a sample (1), "
        "second pictures of a sample (2)" in caplog.text
    )


def test_names_are_labels(tmp_path, data):
    """Names that would lead out of a folder stay names; links and devices are nothing."""
    path = tmp_path / "a.tar"
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(path, "w") as tar:
        for name, content in sample("../../etc/x") + sample("/abs/y") + [("l.jpg", JPEG), ("h.jpg", JPEG)]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in [("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE), ("d.jpg", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = WebDatasetSource(str(path), data)
    assert [one if isinstance(one, str) else one.key for one in read_all(source)] == [
        *("../../etc/x", "/abs/y", "no_caption", "no_caption")
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "index", "secret.txt"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, data, format):
    names = ["d" * 90 + "/" + "k" * 200, "a" * 300, "Überbild", "plain"]
    write_tar(tmp_path / "a.tar", [member for name in names for member in sample(name)], format)
    source = WebDatasetSource(str(tmp_path), data)
    assert [source[index].key for index in range(4)] == names


def test_a_long_path_of_posix_is_put_together(tmp_path, data):
    name = "f" * 120 + "/" + "k" * 90
    write_tar(tmp_path / "a.tar", sample(name), tarfile.USTAR_FORMAT)
    assert WebDatasetSource(str(tmp_path), data)[0].key == name


def test_gnu_keeps_times_where_posix_has_a_folder(tmp_path, data):
    content = write_tar(tmp_path / "a.tar", sample("a"), tarfile.GNU_FORMAT).read_bytes()
    header = bytearray(content[:512])
    header[345:357] = b"14755620212\0"
    (tmp_path / "a.tar").write_bytes(bytes(with_checksum(header)) + content[512:])
    source = WebDatasetSource(str(tmp_path), data)
    assert len(source) == 1 and source[0].key == "a" and source[0].captions == ("a cat",)


def binary_size(content: bytes) -> bytes:
    """The first header's size in GNU's base-256 form, and its checksum."""
    header = bytearray(content[:512])
    size = int(header[124:135], 8)
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    return bytes(with_checksum(header)) + content[512:]


def with_checksum(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return header


def pax_size(size: int) -> bytes:
    """An extended header that gives the size of the next member, and that member's header with another one."""
    record = f"size={size}\n"
    record = f"{len(record) + 3} {record}"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    return info.tobuf(tarfile.USTAR_FORMAT) + record.encode().ljust(512, b"\0")


def test_large_numbers(tmp_path, data):
    plain = write_tar(tmp_path / "plain.tar", sample("a")).read_bytes()
    expected = scan(tmp_path, plain).columns["image"].tolist()
    assert expected == [[512, len(JPEG)]]
    assert scan(tmp_path, binary_size(plain)).columns["image"].tolist() == expected
    wrong = bytearray(plain[:512])
    wrong[124:136] = b"00000000000\0"
    shifted = scan(tmp_path, pax_size(len(JPEG)) + bytes(with_checksum(wrong)) + plain[512:])
    assert shifted.columns["image"].tolist() == [[1536, len(JPEG)]] and not shifted.damage
    assert WebDatasetSource(str(tmp_path / "scanned.tar"), data)[0].image == JPEG


def test_a_size_that_is_far_into_the_file_is_found(tmp_path):
    """A preview in EXIF that is longer than what is read at first."""
    exif = Image.Exif()
    exif[0x010E] = "x" * 30_000
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (40, 24)).save(file, "JPEG", exif=exif)
    found = scan(tmp_path, write_tar(tmp_path / "a.tar", [("a.jpg", file.getvalue()), ("b.jpg", b"none")]).read_bytes())
    assert found.columns["picture_size"].tolist() == [[24, 40], [0, 0]]


WHOLE = [member for name in ("a", "b", "c") for member in sample(name)]


def whole_tar(tmp_path) -> bytes:
    """Three samples, then two blocks of zeros and what fills up the record."""
    return write_tar(tmp_path / "whole.tar", WHOLE).read_bytes()


def end_of_members(content: bytes) -> int:
    return len(content.rstrip(b"\0")) // 512 * 512 + 512


DAMAGE = {
    "empty file": (lambda whole: b"", "is empty", []),
    "garbage": (lambda whole: b"<html>not found</html>" * 100, "has no sound header at byte 0", []),
    "zeros": (lambda whole: bytes(2 << 20), "has its end mark at byte 0 of 2097152", []),
    "cut within the first header": (
        lambda whole: whole[:300],
        "has no end mark, as when it is cut short, at byte 300",
        [],
    ),
    "cut within data": (lambda whole: whole[:1000], "is cut short at byte 1000, in a member that ends at 5006", []),
    "no end mark": (lambda whole: whole[: end_of_members(whole)], "has no end mark", ["a", "b", "c"]),
    "a flipped bit in a header": (
        lambda whole: whole[:6144] + bytes([whole[6144] ^ 1]) + whole[6145:],
        "has no sound header at byte 6144",
        ["a"],
    ),
    "no number": (
        lambda whole: bytes(with_checksum(bytearray(whole[:124] + b"not a size  " + whole[136:512]))) + whole[512:],
        "has no sound header at byte 0",
        [],
    ),
    "an endless member": (
        lambda whole: (
            bytes(with_checksum(bytearray(whole[:124] + b"\xbf" + b"\xff" * 11 + whole[136:512]))) + whole[512:]
        ),
        "is cut short at byte",
        [],
    ),
    "zeros in the middle": (
        lambda whole: whole[:6144] + bytes(2 << 20) + whole[6144:],
        "has its end mark at byte 6144 of",
        ["a"],
    ),
    "gzip": (lambda whole: gzip.compress(whole), "is compressed with gzip, and members are read by their place", []),
    "an endless name": (
        lambda whole: long_name_header(2 << 20) + bytes(2 << 20) + whole,
        "has a name of 2097152 bytes at byte 512",
        [],
    ),
    "a broken extended header": (
        lambda whole: pax_size(1).replace(b" size", b"xsize") + whole,
        "has no sound extended header at byte 512",
        [],
    ),
}


def long_name_header(size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_what_stands_before_it_is_kept(tmp_path, name, data):
    change, message, left = DAMAGE[name]
    found = scan(tmp_path, change(whole_tar(tmp_path)))
    assert message in found.damage and keys(found) == left
    assert found.columns["end"].tolist() == sorted(found.columns["end"].tolist())
    with pytest.raises(DataError) as caught:
        WebDatasetSource(str(tmp_path / "scanned.tar"), data)
    told = str(caught.value)
    assert "scanned.tar" in told and message in told and 'data.on_bad_shard="skip"' in told and "\n" not in told
    assert f"({len(left)} samples before that)" in told


def test_a_sound_tar_has_no_damage(tmp_path):
    """As tarfile writes it, with one block of zeros at the end, and with none but what is needed."""
    whole = whole_tar(tmp_path)
    end = end_of_members(whole)
    for content in (whole, whole[: end + 512], whole[: end + 1024], whole + bytes(10_240)):
        found = scan(tmp_path, content)
        assert found.damage == "" and keys(found) == ["a", "b", "c"]


def test_cut_at_every_block(tmp_path):
    """Never a sample that is not whole, never a loss that is not told."""
    whole = whole_tar(tmp_path)
    ends = scan(tmp_path, whole).columns["end"]
    assert len(ends) == 3
    for cut in range(0, end_of_members(whole) + 1, 512):
        found = scan(tmp_path, whole[:cut])
        assert found.damage
        # A picture whose caption is cut away is there, without a caption.
        complete = [end for end, kind in zip(found.columns["end"], found.columns["caption_kind"], strict=True) if kind]
        assert complete == [end for end in ends if end <= cut]
        assert all(start + size <= cut for start, size in found.columns["image"])


def test_noise_never_gets_through(tmp_path):
    """Bytes changed anywhere: an answer, never an exception of another kind."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(whole_tar(tmp_path), np.uint8)
    damaged = 0
    for _ in range(150):
        changed = whole.copy()
        headers = np.flatnonzero(rng.random(len(changed)) < 2e-4)
        changed[headers] = rng.integers(0, 256, len(headers))
        try:
            list(list_members(io.BytesIO(changed.tobytes()), len(changed)))
        except TarDamage:
            damaged += 1
    assert damaged > 20


def test_lost_while_it_is_read(tmp_path, data):
    whole = write_tar(tmp_path / "a.tar", WHOLE).read_bytes()
    source = WebDatasetSource(str(tmp_path), data)
    (tmp_path / "a.tar").write_bytes(whole[:6000])
    assert read_all(source) == [source[0], "unreadable", "unreadable"]
    (tmp_path / "a.tar").unlink()
    assert read_all(source) == ["unreadable"] * 3


def test_a_tar_that_was_packed_anew_is_noticed(tmp_path, data):
    """Its size is the same, as tars are filled up; a caption of another length is not where it was, or not as long."""
    before = [*sample("a", "x" * 400), *sample("b", "before"), *sample("c", "same")]
    size = write_tar(tmp_path / "a.tar", before).stat().st_size
    source = WebDatasetSource(str(tmp_path), data)
    for a, b in (("x" * 400, "afterwards"), ("x" * 600, "before")):
        write_tar(tmp_path / "a.tar", [*sample("a", a), *sample("b", b), *sample("c", "same")])
        assert (tmp_path / "a.tar").stat().st_size == size
        found = read_all(WebDatasetSource(str(tmp_path), data))
        if len(a) == 400:
            assert [found[0].captions, found[1], found[2].captions] == [("x" * 400,), "unreadable", ("same",)]
        else:
            assert found == ["unreadable"] * 3
    with pytest.raises(BadSample, match=r"is not as it was when it was indexed: delete .*index"):
        source[1]


def test_huge_members_are_not_read(tmp_path, data, monkeypatch):
    monkeypatch.setattr("flux.data.tars.MAX_FILE_BYTES", 1000)
    monkeypatch.setattr("flux.data.tars.MAX_JSON_BYTES", 10)
    write_tar(tmp_path / "a.tar", [*sample("a"), ("b.jpg", b"small"), ("b.txt", b"x" * 11)])
    assert read_all(WebDatasetSource(str(tmp_path), data)) == ["too_large", "bad_caption"]


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(storage, "TIMEOUT_SECONDS", 0.5)
    shard_cache._check_unchanged.cache_clear()
    with serve() as server:
        for number in range(2):
            members = members_of(PICTURES[3 * number : 3 * number + 3])
            server.files[f"{number}.tar"] = write_tar(tmp_path / "served.tar", members).read_bytes()
        yield server


@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_remote_tars(server, tmp_path, gigabytes):
    """Nothing is lost to a network that fails now and then; indexed by two processes."""
    folders = {"index_folder": str(tmp_path / "index"), "shard_cache": str(tmp_path / "cache")}
    data = Data(**folders, shard_cache_gb=gigabytes, index_workers=2)
    server.faults += ["500", "cut", "short"]
    source = WebDatasetSource(server.url("{0..1}.tar"), data)
    server.ranges.clear()
    server.faults += ["", "cut", "500", "stall"]
    for index, picture in enumerate(PICTURES):
        found = source[index]
        assert (found.image, found.captions, found.key) == (picture.data, (picture.caption,), picture.name)
    assert server.faults == []
    good = len(server.ranges) - 3
    assert good == (2 if gigabytes else 6), "a range for every shard, or for every sample with both of its members"
    server.ranges.clear()
    again = WebDatasetSource(server.url("{0..1}.tar"), data)
    assert server.ranges == [] and len(again) == 6, "the index is kept"
    assert [shard.name for shard in again.shards] == ["0.tar", "1.tar"]


def test_workers_that_were_forked_read_over_the_network(server, tmp_path):
    """The process that forks them has connections of its own by then."""
    source = WebDatasetSource(server.url("{0..1}.tar"), Data(index_folder=str(tmp_path / "index"), index_workers=0))
    first = source[0]
    loader = torch.utils.data.DataLoader(source, batch_size=None, collate_fn=tuple, num_workers=2, timeout=20)
    found = list(loader)
    assert [one[0] for one in found] == [picture.data for picture in PICTURES] and found[0] == tuple(first)
    assert source[5].image == PICTURES[5].data


def test_a_remote_shard_that_is_gone(server, tmp_path):
    data = Data(index_folder=str(tmp_path / "index"), index_workers=0)
    with pytest.raises(DataError, match=r"2\.tar cannot be read \(.*2\.tar.*\) \(0 samples before that\)"):
        WebDatasetSource(server.url("{0..2}.tar"), data)
    source = WebDatasetSource(server.url("{0..1}.tar"), data)
    server.files.pop("1.tar")
    assert read_all(source)[3:] == ["unreadable"] * 3 and source[2].key == "coffee"
