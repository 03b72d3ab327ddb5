"""Reading a folder of pictures, and every way it can be wrong."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from flux.config import Data
from flux.data.errors import BadSample, DataError
from flux.data.imagefolder import ImageFolderSource
from tests.unit.flux.data.photographs import make_photographs

DATA = Data()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.jpg", "deep/c.webp", "d.JPEG"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"  caption of\n {name} \n")
    (tmp_path / "notes.md").write_text("not a picture")
    return tmp_path


def test_text_files(folder):
    source = ImageFolderSource(str(folder), DATA)
    assert source.pictures == ["a.jpg", "b.png", "d.JPEG", "deep/c.webp"]
    assert source[1].captions == ("caption of b.png",) and source[1].image == (folder / "b.png").read_bytes()
    assert source[3].key == "deep/c.webp" and source[3].shard == folder.name


def test_metadata(folder):
    lines = [{"file_name": "b.png", "text": ["two", " zwei\n"]}, {"file_name": "a.jpg", "text": "one"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    source = ImageFolderSource(str(folder), DATA)
    assert [source[index].captions for index in range(len(source))] == [("one",), ("two", "zwei")]


def test_metadata_of_another_field(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "long": "one"}')
    assert ImageFolderSource(str(folder), Data(caption_field="long"))[0].captions == ("one",)
    with pytest.raises(DataError, match=r'a line must be like {"file_name": "a.jpg", "text": "a cat"} \(KeyError\)'):
        ImageFolderSource(str(folder), DATA)


def test_split_is_fixed_and_complete(folder):
    everything = ImageFolderSource(str(folder), DATA).pictures
    train = ImageFolderSource(str(folder), DATA, split="train").pictures
    held_out = ImageFolderSource(str(folder), DATA, split="validation").pictures
    assert sorted(train + held_out) == everything and len(held_out) == 1


def test_names_that_are_not_text(folder):
    odd = os.fsdecode(b"a\xff.png")
    (folder / "b.png").rename(folder / odd)
    (folder / "b.txt").rename(folder / odd.replace(".png", ".txt"))
    splits = [ImageFolderSource(str(folder), DATA, split=split) for split in ("train", "validation")]
    samples = [source[index] for source in splits for index in range(len(source))]
    assert {sample.key for sample in samples} == {"a.jpg", "a\ufffd.png", "d.JPEG", "deep/c.webp"}
    (folder / odd.replace(".png", ".txt")).unlink()
    with pytest.raises(BadSample, match=r"there is no a.\.txt beside it") as raised:
        [source[index] for source in splits for index in range(len(source))]
    assert raised.value.key == "a\ufffd.png"


def test_sizes_are_those_of_the_headers(tmp_path):
    for picture in make_photographs():
        (tmp_path / f"{picture.name}.{picture.extension}").write_bytes(picture.data)
        (tmp_path / f"{picture.name}.txt").write_text(picture.caption)
    (tmp_path / "broken.jpg").write_text("<html>")
    exif = Image.Exif()
    exif[0x010E] = "x" * 40_000  # a header longer than what is read at first
    Image.new("RGB", (40, 24)).save(tmp_path / "far.jpg", exif=exif)
    source = ImageFolderSource(str(tmp_path), DATA)
    sizes = {picture.name: list(picture.size) for picture in make_photographs()} | {"broken": [0, 0], "far": [40, 24]}
    names = [name.partition(".")[0] for name in source.pictures]
    assert len(names) == 8 and source.picture_sizes().tolist() == [sizes[name] for name in names]


def test_a_changed_folder_has_other_shards(folder):
    (shard,) = ImageFolderSource(str(folder), DATA).shards
    assert shard.name == folder.name and shard.samples == 4
    assert shard.bytes == sum((folder / name).stat().st_size for name in ("b.png", "a.jpg", "deep/c.webp", "d.JPEG"))
    (train,) = ImageFolderSource(str(folder), DATA, split="train").shards
    (held_out,) = ImageFolderSource(str(folder), DATA, split="validation").shards
    assert train.bytes + held_out.bytes == shard.bytes and (train.samples, held_out.samples) == (3, 1)
    (folder / "a.jpg").write_bytes((folder / "b.png").read_bytes() + b"x")
    assert ImageFolderSource(str(folder), DATA).shards != (shard,)


def broken(folder, change):
    change(folder)
    source = ImageFolderSource(str(folder), DATA)
    return [source[index] for index in range(len(source))]


CHANGES = {
    "no pictures": (lambda f: [path.unlink() for path in f.rglob("*.*")], "has no pictures"),
    "no captions": (
        lambda f: [path.unlink() for path in f.rglob("*.txt")],
        "none of 4 pictures has a caption, the first is 'a.jpg': write 'a.txt' beside it, or one metadata.jsonl",
    ),
    "metadata not JSON": (lambda f: (f / "metadata.jsonl").write_text("{"), "metadata.jsonl:1: a line must be"),
    "metadata without text": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "a.jpg"}'),
        ":1: a line must be",
    ),
    "metadata with number": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": 3}'),
        "strings",
    ),
    "metadata with half a character": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x\\ud800"}'),
        "whole Unicode",
    ),
    "metadata outside": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "../a.jpg", "text": "x"}'),
        "inside",
    ),
    "metadata of no picture": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "a.md", "text": "x"}'),
        "end in",
    ),
    "metadata of missing": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "z.jpg", "text": "x"}'),
        "'z.jpg'",
    ),
    "metadata twice": (
        lambda f: (f / "metadata.jsonl").write_text(
            '{"file_name": "a.jpg", "text": "x"}\n{"file_name": "./a.jpg", "text": "y"}'
        ),
        "stands there twice",
    ),
    "metadata of an endless name": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "' + "a" * 300 + '.jpg", "text": "x"}'),
        "which is not in the folder",
    ),
    "metadata of a long number": (lambda f: (f / "metadata.jsonl").write_text("9" * 5000), ":1: a line must be"),
    "metadata empty": (lambda f: (f / "metadata.jsonl").write_text("\n"), "has no pictures"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_faulty_folders_name_the_file_and_the_remedy(folder, name):
    change, message = CHANGES[name]
    with pytest.raises(DataError) as caught:
        broken(folder, change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        (lambda f: (f / "a.txt").unlink(), "no_caption", "there is no a.txt beside it"),
        (lambda f: (f / "a.txt").write_text(" \n"), "no_caption", "the caption is empty"),
        (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\xff"), "bad_caption", "not UTF-8"),
        (lambda f: (f / "a.txt").write_text("x" * 9000), "bad_caption", "bytes, and 8,000 are allowed"),
        (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": []}'), "no_caption", "empty"),
        (
            lambda f: (f / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "\\u0007"}'),
            "bad_caption",
            "U+0007",
        ),
    ],
)
def test_one_faulty_picture_is_a_bad_sample(folder, change, reason, detail):
    change(folder)
    source = ImageFolderSource(str(folder), DATA)
    with pytest.raises(BadSample) as caught:
        source[0]
    assert caught.value.reason == reason and detail in caught.value.detail
    assert (caught.value.key, caught.value.shard) == ("a.jpg", folder.name)
    assert len(source) == 1 or source[1].captions == ("caption of b.png",)


def test_a_picture_that_is_gone_is_unreadable(folder):
    source = ImageFolderSource(str(folder), DATA)
    (folder / "a.jpg").unlink()
    with pytest.raises(BadSample) as caught:
        source[0]
    assert caught.value.reason == "unreadable"
    assert source.picture_sizes().tolist() == [[0, 0]] + [[30, 20]] * 3


def test_an_empty_caption_may_mean_no_prompt(folder):
    (folder / "a.txt").write_text("")
    assert ImageFolderSource(str(folder), Data(empty_caption="unconditional"))[0].captions == ("",)


def test_missing_folder_names_the_key(tmp_path):
    with pytest.raises(DataError, match=r"training\.dataset_path=.*is not a folder"):
        ImageFolderSource(str(tmp_path / "none"), DATA)


def test_byte_order_marks_are_no_part_of_captions(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa cat")
    assert ImageFolderSource(str(folder), DATA)[0].captions == ("a cat",)


def test_json_strings_may_hold_rare_line_ends(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "one\u2028two"}', encoding="utf-8")
    assert ImageFolderSource(str(folder), DATA)[0].captions == ("one two",)
