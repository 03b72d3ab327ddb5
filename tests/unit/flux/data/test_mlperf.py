"""MLPerf's published samples come out bit for bit; whatever is wrong with a copy of them is said, nothing crashes."""

import io
import json
import multiprocessing
import os
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from flux.data.dataset import OpenSource, PositionedDataset, Slot, TrainingDraws, ValidationDraws, collate
from flux.data.decode import DecodeRules
from flux.data.errors import BadSample, DataError
from flux.data.mlperf import STREAM_END, MLPerfSource, _open_file
from flux.data.order import PlainOrder
from flux.data.sample import EncodedSample
from flux.spec import SPECS

SPEC = SPECS["flux-tiny"]
KEY = "training.dataset_path"
SIDE, LENGTH, SAMPLES = 32, 6, 7
SHAPES = {"t5_encodings": (LENGTH, 128), "clip_encodings": (128,), "mean": (16, 4, 4), "logvar": (16, 4, 4)}
SCHEMA = pa.schema(
    [("__key__", pa.string()), *((name, pa.binary()) for name in SHAPES), ("timestep", pa.int32())],
)
BATCHES = (2, 1, 4)  # samples per record batch; the first file has two of them


def to_npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def make_tensors(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def make_row(number: int, **changes) -> dict:
    arrays = {name: to_npy(tensor.view(torch.uint16).numpy()) for name, tensor in make_tensors(number).items()}
    return {"__key__": f"key {number}", **arrays, "timestep": number % 8} | changes


ROWS = [make_row(number) for number in range(SAMPLES)]


def write_files(folder, rows, schema=SCHEMA, batches=BATCHES) -> None:
    """What `save_to_disk` makes of these rows, in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, start, names = [batches[:-1], batches[-1:]], 0, []
    for number, file_sizes in enumerate(sizes):
        names.append(f"data-{number:05d}-of-{len(sizes):05d}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for size in file_sizes:
                writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + size], schema=schema))
                start += size
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def write_empty(folder, dtype=np.float16, leading=(1,)) -> None:
    folder.mkdir(parents=True)
    np.save(folder / "t5_empty.npy", np.full((*leading, LENGTH, 128), 0.5, dtype))
    np.save(folder / "clip_empty.npy", np.full((*leading, 128), 0.25, dtype))


@pytest.fixture
def folder(tmp_path):
    write_files(tmp_path / "set", ROWS)
    write_empty(tmp_path / "empty_encodings")
    return tmp_path / "set"


def open_set(folder, spec=SPEC, img_size=SIDE, text_length=LENGTH) -> MLPerfSource:
    return MLPerfSource(str(folder), KEY, spec, img_size, text_length)


def check(sample: EncodedSample, number: int) -> None:
    made = make_tensors(number)
    assert torch.equal(sample.moments_CHW, torch.cat((made["mean"], made["logvar"])))
    assert torch.equal(sample.t5_LE, made["t5_encodings"])
    assert torch.equal(sample.pooled_V, made["clip_encodings"])
    assert {sample.moments_CHW.dtype, sample.t5_LE.dtype, sample.pooled_V.dtype} == {torch.bfloat16}
    assert (sample.key, sample.caption, sample.time_step) == (f"key {number}", "", number % 8)


def test_samples_come_out_bit_for_bit(folder):
    source = open_set(folder)
    assert len(source) == SAMPLES
    assert [shard.samples for shard in source.shards] == [3, 4]
    for number in (6, 2, 0, 1, 3, 4, 5):
        check(source[number], number)
        assert source[number].shard == ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow")[number > 2]
    assert source.shards[0].bytes == (folder / source.shards[0].name).stat().st_size
    assert source.picture_sizes().tolist() == [[SIDE, SIDE]] * SAMPLES
    with pytest.raises(IndexError):
        source[SAMPLES]


def test_what_is_handed_out_may_be_changed(folder):
    source = open_set(folder)
    for tensor in source[1][:3]:
        tensor.zero_()
    check(source[1], 1)


def test_a_data_set_that_datasets_has_written(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets, which writes the published files")
    made = datasets.Dataset.from_list(ROWS, features=datasets.Features.from_arrow_schema(SCHEMA))
    made.save_to_disk(tmp_path / "alone", num_shards=3)
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "split")
    for source in (open_set(tmp_path / "alone"), open_set(tmp_path / "split")):
        assert len(source) == SAMPLES
        for number in range(SAMPLES):
            check(source[number], number)
    assert len(open_set(tmp_path / "alone").shards) == 3


@pytest.mark.parametrize("kind", ["null", "no column"])
def test_training_samples_prescribe_no_time(tmp_path, kind):
    rows = [make_row(number, timestep=None) for number in range(SAMPLES)]
    schema = SCHEMA if kind == "null" else SCHEMA.remove(SCHEMA.get_field_index("timestep"))
    write_files(tmp_path, rows, schema)
    assert open_set(tmp_path)[3].time_step is None


def test_large_offsets_are_read_too(tmp_path):
    large = pa.schema([pa.field(one.name, pa.large_binary() if one.name in SHAPES else one.type) for one in SCHEMA])
    write_files(tmp_path, ROWS, large)
    check(open_set(tmp_path)[5], 5)


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_files_take_no_descriptors(folder):
    before = open_descriptors()
    source = open_set(folder)
    check(source[6], 6)
    assert open_descriptors() == before


def test_a_source_travels_to_another_process_without_its_files(folder):
    source = open_set(folder)
    source[0]
    packed = pickle.dumps(source)
    assert len(packed) < 2000, "no sample travels"
    _open_file.cache_clear()  # as in a process that has opened nothing
    for number in range(SAMPLES):
        check(pickle.loads(packed)[number], number)


def read_all(source: MLPerfSource, queue) -> None:
    try:
        for number in range(SAMPLES):
            check(source[number], number)
        queue.put("as before")
    except BaseException as error:
        queue.put(repr(error))


def test_a_forked_process_reads_the_same(folder):
    source = open_set(folder)
    source[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=read_all, args=(source, queue))
    worker.start()
    assert queue.get(timeout=60) == "as before"
    worker.join()


@pytest.mark.parametrize("place", ["set", "."])
@pytest.mark.parametrize(("dtype", "leading"), [(np.float16, (1,)), (np.float32, ())])
def test_features_of_the_empty_prompt(tmp_path, place, dtype, leading):
    write_files(tmp_path / "set", ROWS)
    write_empty(tmp_path / place / "empty_encodings", dtype, leading)
    empty = open_set(tmp_path / "set").empty()
    assert torch.equal(empty["t5"], torch.full((LENGTH, 128), 0.5, dtype=torch.bfloat16))
    assert torch.equal(empty["clip"], torch.full((128,), 0.25, dtype=torch.bfloat16))


def test_batches_of_training_and_validation(folder):
    rules = DecodeRules(min_side=8, max_aspect=4, max_megapixels=1, background=(255, 255, 255), fast_jpeg=True)
    sources = [OpenSource(open_set(folder), rules)]
    order = PlainOrder([SAMPLES], (SIDE, SIDE), 5)
    slots = [Slot(position, True, 4) for position in (6, 1, 4, 3)]

    drop_all = PositionedDataset(sources, order, None, SPEC, TrainingDraws(seed=0, drop_prob=1.0, drop_jointly=True))
    raw = collate([drop_all[slot] for slot in slots])
    assert torch.equal(raw.t5_BLE, torch.full((4, LENGTH, 128), 0.5, dtype=torch.bfloat16))
    assert torch.equal(raw.pooled_BV, torch.full((4, 128), 0.25, dtype=torch.bfloat16))
    assert raw.uncaptioned_B.tolist() == [True] * 4

    held_out = PositionedDataset(sources, order, None, SPEC, ValidationDraws(seed=0, midpoints=False))
    raw = collate([held_out[slot] for slot in slots])
    assert raw.draws.t_B.tolist() == [6 / 8, 1 / 8, 4 / 8, 3 / 8]
    assert torch.equal(raw.t5_BLE[1], make_tensors(1)["t5_encodings"])
    assert raw.uncaptioned_B.tolist() == [False] * 4


# Wrong data sets


def test_no_data_set(tmp_path):
    with pytest.raises(DataError, match=rf"{KEY}='.*' holds no state.json: give the folder of"):
        open_set(tmp_path)
    with pytest.raises(DataError, match=r"holds no state\.json"):
        open_set(tmp_path / "missing")


def test_several_splits_are_not_guessed_between(tmp_path):
    for split in ("train", "validation"):
        write_files(tmp_path / split, ROWS)
    with pytest.raises(DataError, match="holds several data sets: give one of its folders train, validation"):
        open_set(tmp_path)
    check(open_set(tmp_path / "validation")[1], 1)


@pytest.mark.parametrize(
    "state",
    ["", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": [{"filename": 5}]}', '{"_data_files": 3}', "\xff"],
)
def test_a_state_that_names_no_files(folder, state):
    (folder / "state.json").write_bytes(state.encode("latin-1"))
    with pytest.raises(DataError, match=rf"{KEY}: .*state.json does not name the files"):
        open_set(folder)


def test_files_elsewhere_are_not_opened(folder):
    write_files(folder.parent / "other", ROWS)
    name = "../other/data-00000-of-00002.arrow"
    (folder / "data-00000-of-00002.arrow").unlink()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"lacks 1 of its 1 files, the first is data-00000-of-00002\.arrow"):
        open_set(folder)


def test_a_data_set_without_samples(tmp_path):
    write_files(tmp_path, [], batches=(0, 0))
    with pytest.raises(DataError, match="has no samples"):
        open_set(tmp_path)


@pytest.mark.parametrize("name", ["__key__", *SHAPES])
def test_a_missing_column(tmp_path, name):
    write_files(tmp_path, ROWS, SCHEMA.remove(SCHEMA.get_field_index(name)))
    with pytest.raises(DataError, match=rf"{KEY}: .*00000-of-00002.arrow has no column {name}, but "):
        open_set(tmp_path)


def test_a_column_of_another_type(tmp_path):
    rows = [make_row(number, mean=0.5) for number in range(SAMPLES)]
    index = SCHEMA.get_field_index("mean")
    write_files(tmp_path, rows, SCHEMA.set(index, pa.field("mean", pa.float32())))
    with pytest.raises(DataError, match=r"column mean of .* is of type float, and must be binary"):
        open_set(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"text_length": 5}, r"t5_encodings in .* \(6, 128\), and this run needs \(5, 128\): set encoder.max_t5_enc"),
        (
            {"img_size": 64},
            r"mean in .* the shape \(16, 4, 4\), and this run needs \(16, 8, 8\): set training.img_size",
        ),
        ({"spec": SPECS["flux-schnell"]}, r"needs \(6, 4096\): set .* or model.flavor"),
        (
            {"spec": replace(SPEC, transformer=replace(SPEC.transformer, pooled_dim=768))},
            r"clip_encodings in .* the shape \(128,\), and this run needs \(768,\): set model.flavor",
        ),
    ],
)
def test_features_of_other_sizes_than_the_runs(folder, options, match):
    with pytest.raises(ValueError, match=match) as caught:
        open_set(folder, **options)
    assert str(caught.value).startswith(f"{KEY}: ")
    assert not isinstance(caught.value, DataError), "the configuration is to be changed, not the data"


# Damage

LATENT = np.zeros((16, 4, 4), np.uint16)
BAD_ARRAYS = {
    "pickled objects": (to_npy(np.array([{}], dtype=object), allow_pickle=True), "array of .O, and must be"),
    "another dtype": (to_npy(LATENT.astype(np.float32)), "mean is of float32, and must be bfloat16 seen as uint16"),
    "big endian": (to_npy(LATENT.astype(">u2")), "array of >u2"),
    "columns first": (to_npy(np.asfortranarray(LATENT)), "stored column by column"),
    "fields": (to_npy(np.zeros(4, [("a", "<u2")])), "is not an array as numpy.save writes it"),
    "another shape": (to_npy(LATENT[:8]), r"the shape \(8, 4, 4\), and the others have \(16, 4, 4\)"),
    "cut": (to_npy(LATENT)[:-2], r"has 255 values for the shape \(16, 4, 4\)"),
    "cut in a value": (to_npy(LATENT)[:-1], "multiple of element size"),
    "too long": (to_npy(LATENT) + b"\0\0", "has 257 values"),
    "nothing": (b"", "is not an array"),
    "something else": (b"<html>not found</html>", "is not an array"),
    "null": (None, "mean is null"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_a_damaged_sample_is_a_bad_sample(tmp_path, kind):
    array, match = BAD_ARRAYS[kind]
    write_files(tmp_path, [*ROWS[:5], make_row(5, mean=array), *ROWS[6:]])
    source = open_set(tmp_path)
    with pytest.raises(BadSample, match=match) as caught:
        source[5]
    assert (caught.value.reason, caught.value.shard) == ("damaged", "data-00001-of-00002.arrow")
    assert caught.value.key in ("key 5", "row 2")
    check(source[4], 4)
    check(source[6], 6)


def test_a_data_set_that_begins_with_a_damaged_sample(tmp_path):
    write_files(tmp_path, [make_row(0, t5_encodings=b"?"), *ROWS[1:]])
    with pytest.raises(DataError, match=r"does not begin with a sample of MLPerf's \(t5_encodings is not an array"):
        open_set(tmp_path)


def test_a_time_that_is_none_of_the_eight(tmp_path):
    write_files(tmp_path, [*ROWS[:5], make_row(5, timestep=8), *ROWS[6:]])
    with pytest.raises(BadSample, match=r"timestep=8 is none of 0\.\.7"):
        open_set(tmp_path)[5]


def test_offsets_that_lead_out_of_the_file(folder):
    path = folder / "data-00001-of-00002.arrow"
    content = path.read_bytes()
    lengths = [len(row["mean"]) for row in ROWS[3:]]
    offsets = np.cumsum([0, *lengths]).astype("<i4")
    assert content.count(offsets.tobytes()) >= 1
    offsets[2] = 2**30
    path.write_bytes(content.replace(np.cumsum([0, *lengths]).astype("<i4").tobytes(), offsets.tobytes()))
    source = open_set(folder)
    for number in (4, 5):  # the offset ends the one and begins the other
        with pytest.raises(BadSample, match="Offset invariant failure"):
            source[number]
    check(source[3], 3)
    check(source[6], 6)


def test_a_file_that_is_cut_anywhere_is_not_opened(tmp_path):
    write_files(tmp_path, ROWS, batches=(1, 1, 1))
    path = tmp_path / "data-00000-of-00002.arrow"
    content = path.read_bytes()
    second = content.rindex(b"\xff\xff\xff\xff", 0, -len(STREAM_END))  # where the second batch begins
    ends = sorted({0, 1, second, *range(7, len(content), 97), *range(len(content) - 12, len(content))})
    for number, end in enumerate(ends):
        copy = tmp_path / str(number)
        copy.mkdir()
        (copy / "cut.arrow").write_bytes(content[:end])
        (copy / "state.json").write_text(json.dumps({"_data_files": [{"filename": "cut.arrow"}]}))
        with pytest.raises(DataError, match=rf"{KEY}: .*cut.arrow is not a whole Arrow stream .*: fetch it again"):
            open_set(copy)


def test_bytes_that_change_never_crash(tmp_path):
    """A process that dies on one file would die again on it after every restart."""
    write_files(tmp_path, ROWS)
    path = tmp_path / "data-00000-of-00002.arrow"
    content = path.read_bytes()
    interesting = [place for place in range(len(content)) if content[place] not in (0, 32)]
    random, outcomes = np.random.default_rng(0), {"opened": 0, "bad": 0, "refused": 0}
    for number in range(150):
        changed = bytearray(content)
        changed[interesting[random.integers(600 if number % 2 else len(interesting))]] = int(random.integers(256))
        copy = tmp_path / str(number)
        copy.mkdir()
        (copy / "changed.arrow").write_bytes(changed)
        (copy / "state.json").write_text(json.dumps({"_data_files": [{"filename": "changed.arrow"}]}))
        try:
            source = open_set(copy)
        except ValueError:
            outcomes["refused"] += 1
            continue
        for index in range(len(source)):
            try:
                source[index]
                outcomes["opened"] += 1
            except BadSample:
                outcomes["bad"] += 1
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((1, 5, 128), np.float16), r"float16 \(1, 5, 128\) instead of float16 \(1, 6, 128\)"),
        (np.zeros((1, LENGTH, 128), np.uint16), "uint16 .* instead of float16"),
        (np.zeros((1, LENGTH, 128)), "an array of <f8"),
        (None, "No such file"),
    ],
)
def test_wrong_features_of_the_empty_prompt(folder, array, match):
    path = folder.parent / "empty_encodings" / "t5_empty.npy"
    path.unlink()
    if array is not None:
        np.save(path, array)
    with pytest.raises(DataError, match=rf"{KEY}: .*t5_empty.npy is not the features of the empty prompt .*{match}"):
        open_set(folder).empty()


def test_no_features_of_the_empty_prompt(tmp_path):
    write_files(tmp_path / "deep" / "set", ROWS)
    source = open_set(tmp_path / "deep" / "set")
    with pytest.raises(
        DataError, match=rf"{KEY}: there is no folder empty_encodings .*, or set training\.classifier_free"
    ):
        source.empty()
