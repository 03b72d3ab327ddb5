"""Safetensors files, tensor by tensor: readable by the library, whole or absent, strict with strangers."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.lazy import LazyTensor, cast_all, lazy, lazy_all, read_all
from checkpoint.safetensors_file import (
    open_indexed,
    open_safetensors,
    read_header_metadata,
    write_safetensors,
    write_sharded,
)

ROOT = Path(__file__).parents[3]
STEM = "model"
INDEX = f"{STEM}.safetensors.index.json"


def make_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(2, 3, 4, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "view": torch.randn(4, 6, generator=generator).T,
        "count": torch.arange(5),
        "flag": torch.tensor([True, False, True]),
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards and their index, as they would be fetched from somewhere."""
    folder = tmp_path / "fetched"
    folder.mkdir()
    write_sharded(folder, STEM, lazy_all({"a": torch.ones(4), "b": torch.zeros(4)}), None, {}, shard_bytes=16)
    return folder


def test_the_library_reads_what_is_written(tmp_path):
    tensors, path = make_tensors(), tmp_path / "x.safetensors"
    write_safetensors(path, lazy_all(tensors), None, {"format": "pt", "step": "7"})
    assert same(load_file(path), tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"} == read_header_metadata(path)
    changed = tensors | {"odd": tensors["odd"] + 1}
    assert not same(load_file(path), changed)  # the comparison sees a difference


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, lazy_all(make_tensors()), None, {})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in make_tensors().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in make_tensors().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    opened = open_safetensors([tmp_path / "x.safetensors"])
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in opened.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert same(read_all(opened), tensors)
    assert torch.equal(opened["odd"].read_rows(1, 3), tensors["odd"][1:3])


def test_a_file_larger_than_the_memory(tmp_path):
    """Of 4 TB, nothing but a hole in the file, one row is read; the library cannot map as much."""
    path = tmp_path / "x.safetensors"
    rows, width = 1_000_000_000, 1000
    header = {"big": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * width * 4)
    opened = open_safetensors([path])["big"]
    assert opened.shape == (rows, width) and opened.bytes == rows * width * 4
    assert torch.equal(opened.read_rows(rows - 1, rows), torch.zeros(1, width))


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(offsets=(0, 4))},
        {"a": entry(offsets=(4, 12))},  # a gap before it
        {"a": entry(), "b": entry()},  # both at one place
        {"a": entry(shape=(1,), offsets=(0, 4))},  # bytes that are nobody's
        {"a": entry(shape=(3,), offsets=(0, 12))},  # beyond the end
        {"a": entry(shape=(-2,), offsets=(0, -8))},
        {"a": entry(shape=(2.0,))},
        {"a": entry(shape=(True, 2))},
        {"a": entry(dtype="F4")},
        {"a": entry(dtype=["F32"])},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": 3},
        {"a": None, "b": None},
        {"a": entry(), "__metadata__": 3},
        [entry()],
        "text",
        None,
    ],
    ids=str,
)
def test_false_headers(tmp_path, header):
    """Eight bytes of content, and a header that must say so."""
    path = tmp_path / "x.safetensors"

    def write(header: object) -> None:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))

    write({"a": entry()})
    assert open_safetensors([path])["a"].read().tolist() == [0, 0]
    write(header)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        open_safetensors([path])


def test_only_one_tensor_at_a_time_is_held(tmp_path):
    alive: list[int] = []
    kept: list[weakref.ref] = []

    def counted(size: int) -> LazyTensor:
        def read() -> Tensor:
            assert sum(ref() is not None for ref in kept) == 0, "the one before is still held"
            tensor = torch.ones(size)
            kept.append(weakref.ref(tensor.untyped_storage()))
            alive.append(size)
            return tensor

        return LazyTensor((size,), torch.float32, read)

    write_safetensors(tmp_path / "x.safetensors", {str(size): counted(size) for size in (5, 6, 7)}, torch.bfloat16, {})
    assert alive == [5, 6, 7]


def test_cast(tmp_path):
    tensors, path = make_tensors(), tmp_path / "x.safetensors"
    write_safetensors(path, lazy_all(tensors), torch.bfloat16, {})
    expected = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    assert same(load_file(path), expected)


def test_a_value_that_would_become_infinite_is_refused(tmp_path):
    path, weights = tmp_path / "x.safetensors", {"w": lazy(torch.tensor([1.0, -70000.0]))}
    with pytest.raises(ValueError, match=r"w reaches 7e\+04, too large for float16: take bfloat16 or float32"):
        write_safetensors(path, weights, torch.float16, {})
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(cast_all(weights, torch.bfloat16)["w"].read(), torch.tensor([1.0, -70000.0]).bfloat16())
    infinite = cast_all({"w": lazy(torch.tensor([float("inf")]))}, torch.float16)  # nothing is made worse
    assert infinite["w"].read().isinf().all()


def test_unknown_number_formats(tmp_path):
    with pytest.raises(ValueError, match=r"w is torch\.complex64, which a safetensors file cannot hold"):
        write_safetensors(tmp_path / "x.safetensors", {"w": lazy(torch.ones(2, dtype=torch.complex64))}, None, {})


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, lazy_all({"a": torch.ones(2)}), None, {})

    def fail() -> Tensor:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_safetensors(path, {"a": lazy(torch.zeros(2)), "b": LazyTensor((2,), torch.float32, fail)}, None, {})
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_synced_before_it_is_visible(tmp_path, monkeypatch):
    done = []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("visible"), move(old, new)))
    write_safetensors(tmp_path / "x.safetensors", lazy_all({"a": torch.ones(2)}), None, {})
    assert done == ["sync", "visible", "sync"]


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path):
    body = f"""
import os, signal, torch
from pathlib import Path
from checkpoint.lazy import LazyTensor, lazy
from checkpoint.safetensors_file import write_safetensors
stop = LazyTensor((2,), torch.float32, lambda: os.kill(os.getpid(), signal.SIGKILL))
write_safetensors(Path({str(tmp_path)!r}) / "x.safetensors", {{"a": lazy(torch.ones(9)), "b": stop}}, None, {{}})
"""
    assert subprocess.run([sys.executable, "-c", body], cwd=ROOT, timeout=60).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".x.safetensors.unfinished"]


@pytest.mark.parametrize("kept", [0, 4, 8, 20, 100, -1])
def test_truncated(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, lazy_all(make_tensors()), None, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        open_safetensors([path])


def test_a_file_cut_after_it_was_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, lazy_all({"a": torch.ones(9)}), None, {})
    opened = open_safetensors([path])["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        opened.read()


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.ckpt", "x"])
def test_other_formats_are_not_opened(tmp_path, name):
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"is not a \.safetensors file: only these are safe to open"):
        open_safetensors([tmp_path / name])


def test_a_pickle_under_a_safe_name(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        open_safetensors([tmp_path / "x.safetensors"])


def test_missing_and_folder(tmp_path):
    (tmp_path / "y.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"x\.safetensors is missing"):
        open_safetensors([tmp_path / "x.safetensors"])
    with pytest.raises(ValueError, match=r"y\.safetensors is a folder"):
        open_safetensors([tmp_path / "y.safetensors"])


def test_shards(tmp_path):
    tensors = {f"t{number}": torch.full((4,), float(number)) for number in range(5)}  # 16 bytes each
    write_sharded(tmp_path, STEM, lazy_all(tensors), None, {"format": "pt"}, shard_bytes=40)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 80}
    assert index["weight_map"] == {f"t{n}": f"model-{n // 2 + 1:05d}-of-00003.safetensors" for n in range(5)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert same(read_all(open_indexed(tmp_path, STEM)), tensors)


def test_shards_are_as_large_as_what_is_written(tmp_path):
    """The limit counts the bytes after the cast."""
    write_sharded(tmp_path, STEM, lazy_all({"a": torch.ones(4), "b": torch.ones(4)}), torch.bfloat16, {}, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_one_file_needs_no_index(tmp_path):
    write_sharded(tmp_path, STEM, lazy_all(make_tensors()), None, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert same(read_all(open_indexed(tmp_path, STEM)), make_tensors())


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    tensors = {"a": torch.ones(2), "big": torch.ones(100), "c": torch.ones(2)}
    write_sharded(tmp_path, STEM, lazy_all(tensors), None, {}, shard_bytes=64)
    assert len(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())) == 3


def test_a_whole_folder_is_read(folder):
    assert same(read_all(open_indexed(folder, STEM)), {"a": torch.ones(4), "b": torch.zeros(4)})


def test_neither_file_nor_index(tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        open_indexed(tmp_path, STEM)


def test_file_and_index_at_once(folder):
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has both: remove the one that is old"):
        open_indexed(folder, STEM)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{", '"weight_map"'])
def test_faulty_index(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"is not JSON|must hold a weight_map"):
        open_indexed(folder, STEM)


def test_index_and_shards_disagree(folder):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(folder, {"a": first})
    assert open_indexed(folder, STEM).keys() == {"a"}  # the second shard is not listed and not opened
    write_index(folder, {"a": first, "c": second})
    with pytest.raises(ValueError, match=r"does not fit: .* b, 2 such names"):
        open_indexed(folder, STEM)
    write_index(folder, {"a": first, "b": first})
    with pytest.raises(ValueError, match="its shards lack b"):
        open_indexed(folder, STEM)
    (folder / second).unlink()
    write_index(folder, {"a": first, "b": second})
    with pytest.raises(ValueError, match=r"00002\.safetensors is missing"):
        open_indexed(folder, STEM)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/outside.safetensors", "sub/x.safetensors", "..", ".", ""]
)
def test_shards_elsewhere(folder, place):
    save_file({"a": torch.ones(1)}, folder.parent / "outside.safetensors")
    write_index(folder, {"a": place})
    with pytest.raises(ValueError, match="is not a plain file name: do not trust this folder"):
        open_indexed(folder, STEM)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", INDEX])
def test_links_that_lead_out(folder, name):
    outside = folder.parent / "outside.safetensors"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link that leads out of its folder"):
        open_indexed(folder, STEM)


def test_links_within_and_to_the_folder(folder):
    (folder / "model-00001-of-00002.safetensors").rename(folder / "content")
    (folder / "model-00001-of-00002.safetensors").symlink_to(folder / "content")
    (folder.parent / "link").symlink_to(folder)
    assert open_indexed(folder.parent / "link", STEM).keys() == {"a", "b"}


def test_the_cache_of_the_hugging_face_hub(folder):
    """There each file of `snapshots/<revision>/` is a link into `blobs/`."""
    repository = folder.parent / "models--someone--something"
    home = repository / "snapshots" / "0123" / "transformer"
    home.parent.mkdir(parents=True)
    folder.rename(home)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(home.iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(Path("../../../blobs") / str(number))
    assert read_all(open_indexed(home, STEM)).keys() == {"a", "b"}


def test_the_same_name_in_two_files(tmp_path):
    for file in ("x", "y"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(ValueError, match=r"y\.safetensors holds a once more"):
        open_safetensors([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
