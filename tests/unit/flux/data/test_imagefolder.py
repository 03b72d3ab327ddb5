"""Reading a folder of pictures, and every way it can be wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from flux.data.errors import DataError
from flux.data.imagefolder import ImageFolderSource
from flux.data.sources import build_source


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
    source = ImageFolderSource(str(folder))
    assert source.pictures == ["a.jpg", "b.png", "d.JPEG", "deep/c.webp"]
    assert source[1].caption == "caption of b.png" and source[1].image.mode == "RGB"
    assert source[3].key == "deep/c.webp"


def test_metadata(folder):
    lines = [{"file_name": "b.png", "text": "two"}, {"file_name": "a.jpg", "text": "one"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    source = ImageFolderSource(str(folder))
    assert [source[index].caption for index in range(len(source))] == ["one", "two"]


def test_split_is_fixed_and_complete(folder):
    everything = ImageFolderSource(str(folder)).pictures
    train = ImageFolderSource(str(folder), split="train").pictures
    held_out = ImageFolderSource(str(folder), split="validation").pictures
    assert sorted(train + held_out) == everything and len(held_out) == 1


def broken(folder, change):
    change(folder)
    source = ImageFolderSource(str(folder))
    return [source[index] for index in range(len(source))]


CHANGES = {
    "no pictures": (lambda f: [path.unlink() for path in f.rglob("*.*")], "has no pictures"),
    "no caption file": (lambda f: (f / "a.txt").unlink(), "1 of 4 pictures have no caption, the first is 'a.jpg'"),
    "empty caption": (lambda f: (f / "a.txt").write_text(" \n"), "a.txt: the caption is empty"),
    "caption not UTF-8": (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\xff"), "a.txt cannot be read as UTF-8"),
    "not an image": (lambda f: (f / "a.jpg").write_text("hello"), "a.jpg does not decode"),
    "truncated": (lambda f: (f / "a.jpg").write_bytes((f / "a.jpg").read_bytes()[:400]), "a.jpg does not decode"),
    "another format": (lambda f: Image.new("RGB", (9, 9)).save(f / "a.jpg", format="TIFF"), "a.jpg does not decode"),
    "empty file": (lambda f: (f / "a.jpg").write_bytes(b""), "a.jpg does not decode"),
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


def test_missing_folder_names_the_key(tmp_path):
    with pytest.raises(DataError, match=r"training\.dataset_path=.*is not a folder"):
        ImageFolderSource(str(tmp_path / "none"))


@pytest.mark.parametrize("limit", [100, 500])  # of 600 pixels: beyond twice the limit Pillow raises, before it warns
def test_decompression_bombs_are_refused(folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match="does not decode"):
        ImageFolderSource(str(folder))[0]


def test_later_data_sets_are_refused_when_opened():
    with pytest.raises(ValueError, match=r"training.dataset='cc12m-wds' cannot be opened"):
        build_source("cc12m-wds", None, 64, "all", "training")


def test_byte_order_marks_are_no_part_of_captions(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa cat")
    assert ImageFolderSource(str(folder))[0].caption == "a cat"


def test_json_strings_may_hold_rare_line_ends(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "one\u2028two"}', encoding="utf-8")
    assert ImageFolderSource(str(folder))[0].caption == "one two"
