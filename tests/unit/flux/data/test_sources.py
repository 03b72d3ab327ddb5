"""Data sets by name, and what is held out of them."""

import pickle

import numpy as np
import pytest

from flux.config import MIXABLE_DATASETS, Data
from flux.data import sources
from flux.data.errors import DataError
from flux.data.presets import PRESETS
from flux.data.sample import Sample, Shard
from flux.data.shuffle import Shuffle
from flux.data.sources import HeldOut, build_source, hold_out
from flux.data.storage import _expand_braces
from tests.unit.flux.data.photographs import make_photographs, members_of, write_parquet, write_tar

PICTURES = make_photographs()


@pytest.fixture
def folder(tmp_path):
    write_tar(tmp_path / "0.tar", members_of(PICTURES[:3]))
    write_tar(tmp_path / "1.tar", members_of(PICTURES[3:]))
    write_parquet(tmp_path / "0.parquet", PICTURES)
    for picture in PICTURES:
        (tmp_path / f"{picture.name}.{picture.extension}").write_bytes(picture.data)
        (tmp_path / f"{picture.name}.txt").write_text(picture.caption)
    return tmp_path


@pytest.fixture
def data(tmp_path):
    return Data(index_folder=str(tmp_path / "index"), index_workers=0)


@pytest.mark.parametrize("dataset", ["imagefolder", "webdataset", "parquet", "cc12m-wds", "cc12m-test"])
def test_all_kinds_hand_out_the_same(folder, data, dataset):
    source = build_source(dataset, str(folder), data, 64, "all", "training")
    assert len(source) == sum(shard.samples for shard in source.shards) == 6
    found = {(source[index].image, source[index].captions, *size) for index, size in enumerate(source.picture_sizes())}
    assert found == {(picture.data, (picture.caption,), *picture.size) for picture in PICTURES}


@pytest.mark.parametrize("dataset", ["shapes", "imagefolder", "webdataset", "parquet"])
def test_training_never_sees_what_is_held_out(folder, data, dataset):
    parts = {
        split: build_source(dataset, str(folder), data, 64, split, "training") for split in ("train", "validation")
    }
    seen = {split: {part[index].captions for index in range(min(500, len(part)))} for split, part in parts.items()}
    assert seen["validation"] and not seen["train"] & seen["validation"]
    if dataset != "shapes":
        assert len(parts["train"]) == 5 and len(parts["validation"]) == 1


def test_every_name_is_known():
    others = {"shapes", "imagefolder", "webdataset", "parquet", "cache", "mlperf"}
    assert set(PRESETS) | others == set(MIXABLE_DATASETS)


def test_presets_are_opened_where_they_are(data, monkeypatch):
    opened = []
    monkeypatch.setattr(sources, "WebDatasetSource", lambda *args: opened.append(args) or range(2))
    monkeypatch.setattr("flux.data.parquet.ParquetSource", lambda *args: opened.append(args) or range(2))
    monkeypatch.setattr(sources, "_warn_of_a_small_cache", lambda *args: None)
    build_source("cc12m-wds", None, data, 64, "all", "training")
    build_source("coco-validation", None, data, 64, "all", "validation", True)
    build_source("coco-validation", "coco/*.parquet", Data(caption_field="mine"), 64, "all", "validation")
    (cc12m, _, key, _), (coco, coco_data, _, shown), (local, local_data, local_key, _) = opened
    tars = list(_expand_braces(cc12m, ""))
    assert len(tars) == 2176 and tars[-1] == "hf://datasets/pixparse/cc12m-wds/cc12m-train-2175.tar"
    assert key == "training.dataset" and coco.startswith("hf://datasets/howard-hou/COCO-Text/") and shown
    assert (coco_data.image_field, coco_data.caption_field) == ("image", "caption")
    assert (local, local_data.caption_field, local_key) == ("coco/*.parquet", "mine", "validation.dataset_path")


@pytest.mark.parametrize("dataset", ["imagefolder", "webdataset", "parquet", "cc12m-test"])
def test_a_place_is_needed(data, dataset):
    with pytest.raises(
        ValueError, match=rf"^data\.sources\[2\]\.dataset_path is missing: .*dataset='{dataset}'"
    ) as caught:
        build_source(dataset, None, data, 64, "all", "data.sources[2]")
    assert not isinstance(caught.value, DataError)


def test_messages_name_the_section(tmp_path, data):
    for dataset in ("webdataset", "parquet", "imagefolder"):
        with pytest.raises(DataError, match=r"^data\.sources\[2\]\.dataset_path="):
            build_source(dataset, str(tmp_path / "none"), data, 64, "all", "data.sources[2]")


def test_a_cache_that_cannot_work_is_told(caplog):
    source = Numbers([10, 10], 1_000_000_000)
    told = "data.shard_cache_gb=1.5 keeps a part of 2 GB, and data.shuffle_window=0 takes samples from everywhere"
    for path, options, expected in [
        ("s3://b/x.tar", {}, True),
        ("x.tar", {}, False),
        ("s3://b/x.tar", {"shuffle_window": 2}, False),
        ("s3://b/x.tar", {"shard_cache_gb": 3.0}, False),
    ]:
        caplog.clear()
        sources._warn_of_a_small_cache(source, path, Data(**{"shard_cache_gb": 1.5, **options}))
        assert (told in caplog.text) == expected


class Numbers:
    """Samples that only tell their index."""

    def __init__(self, shards: list[int], size: int = 7):
        self.shards = [Shard(str(number), size, samples) for number, samples in enumerate(shards)]

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def __getitem__(self, index: int) -> Sample:
        return Sample(b"", (str(index),), str(index))

    def picture_sizes(self) -> np.ndarray:
        return np.arange(2 * len(self), dtype=np.int32).reshape(-1, 2)


def indices(source) -> list[int]:
    return [int(source[index].key) for index in range(len(source))]


@pytest.mark.parametrize("shards", [[2], [1, 1], [19], [20], [40, 0, 1], [33, 50, 17, 0, 900], [0, 0, 300]])
def test_the_parts_are_the_whole(shards):
    source = Numbers(shards)
    train, held = HeldOut(source, "train"), HeldOut(source, "validation")
    assert sorted(indices(train) + indices(held)) == list(range(len(source)))
    assert len(held) == max(1, len(source) // 20)
    bounds = np.cumsum(shards)
    for part in (train, held):
        order = indices(part)
        assert order == sorted(order)
        shard_of = np.searchsorted(bounds, order, side="right")
        assert [shard.samples for shard in part.shards] == np.bincount(shard_of, minlength=len(shards)).tolist()
        assert part.picture_sizes().tolist() == source.picture_sizes()[order].tolist()
        assert [(shard.name, shard.bytes) for shard in part.shards] == [(str(n), 7) for n in range(len(shards))]
        with pytest.raises(IndexError):
            part[len(part)]


def test_what_is_held_out_is_spread_and_fixed():
    source = Numbers([500] * 8)
    held = HeldOut(source, "validation")
    assert indices(pickle.loads(pickle.dumps(held))) == indices(HeldOut(source, "validation"))
    counts = [shard.samples for shard in held.shards]
    assert sum(counts) == 200 and min(counts) > 5, "25 are expected of each shard"


def test_of_very_many_a_few_are_held_out():
    held = HeldOut(Numbers([10_000_000, 2_000_000_000]), "train")
    assert len(held) == 2_010_000_000 - 10_000
    shuffle = Shuffle([shard.samples for shard in held.shards], 0, 0, "train")
    assert 0 <= int(held[shuffle.index(123_456_789)].key) < 2_010_000_000


def test_one_sample_cannot_serve_both():
    source = Numbers([1])
    assert hold_out(source, "all", "x") is source
    with pytest.raises(DataError, match=r"^training\.dataset_path: it holds one sample"):
        hold_out(source, "train", "training.dataset_path")


def test_an_encoded_source_keeps_what_it_is():
    class Encoded(Numbers):
        parts = frozenset({"moments", "clip"})

        def empty(self):
            return {"clip": "the empty prompt"}

    held = hold_out(Encoded([40]), "validation", "x")
    assert held.parts == {"moments", "clip"} and held.empty() == {"clip": "the empty prompt"}
    assert HeldOut(Numbers([40]), "train").parts == frozenset()
