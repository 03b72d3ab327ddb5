"""A cache gives back, bit for bit, what the encoders have made; one that does not belong to a run is refused."""

import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from build import build_encoders
from config.parse import load_config
from flux.config import DataLoader
from flux.data.cache import (
    BAD_SAMPLES_FILE,
    CACHE_FILE,
    EMPTY_FILE,
    FORMAT,
    CacheSettings,
    CacheSource,
    find_difference,
    restore_rows,
    shard_name,
    shrink_rows,
)
from flux.data.cache_writer import CacheWriter, SamplesToEncode, check_parts, claim_cache, estimate_bytes
from flux.data.dataset import OpenSource, PositionedDataset, Slot, ValidationDraws, collate
from flux.data.decode import DecodeRules
from flux.data.errors import BadSample, DataError
from flux.data.loader import HeldOutBatches, Loader
from flux.data.order import PlainOrder
from flux.data.sample import Sample
from flux.data.tokenizers import build_tokenizer
from flux.fingerprint import describe_encoders
from flux.spec import SPECS
from parallel.degrees import Degrees
from parallel.mesh import Layout

SPEC = SPECS["flux-tiny"]
RULES = DecodeRules(min_side=8, max_aspect=4, max_megapixels=1, background=(255, 255, 255), fast_jpeg=True)
SAMPLES, PER_SHARD, BAD = 10, 4, 6
LARGEST_FP8_ERROR = 2**-4  # of a row's largest value: three bits of mantissa


class Noise:
    """PNG files of noise; one is broken."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        pixels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        image = file.getvalue()[:-100] if index == BAD else file.getvalue()
        return Sample(image, (f"noise {index}",), f"key {index}", "noise")


def make_config(*options: str):
    return load_config(["--encoder.dtype=bfloat16", "--encoder.max_t5_encoding_len=12", *options])


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(make_config().encoder, test_mode=False)


def encoders_of(config, tokenizer):
    return build_encoders(config, SPEC, tokenizer, Layout(Degrees(), torch.device("cpu")))


def settings_of(config, parts=("moments", "t5", "clip"), t5_dtype="bfloat16") -> CacheSettings:
    encoders = describe_encoders(config.encoder, False)
    return CacheSettings(FORMAT, SAMPLES, PER_SHARD, list(parts), t5_dtype, encoders, {}, [["noise", 0, SAMPLES]])


def write_cache(folder, config, tokenizer, sizes=None, **changes) -> CacheWriter:
    settings = settings_of(config, **changes)
    writer = CacheWriter(folder, settings, encoders_of(config, tokenizer), batch_size=3)
    sizes = np.full((SAMPLES, 2), 32) if sizes is None else sizes
    samples = SamplesToEncode(OpenSource(Noise(), RULES, random_crop=False), sizes, tokenizer, seed=0)
    missing = claim_cache(folder, settings)
    assert sum(writer.write(missing, samples, workers=0)) == len(missing) * PER_SHARD - 2
    writer.write_empty()
    return writer


def open_cache(folder, config) -> CacheSource:
    return CacheSource(str(folder), "training.dataset_path", describe_encoders(config.encoder, False))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("cache")
    return folder, write_cache(folder, make_config(), tokenizer)


@pytest.mark.parametrize(
    "options", [[], ["--encoder.dtype=float32"], ["--encoder.mask_padding"]], ids=["bfloat16", "float32", "masked"]
)
def test_the_same_batch_is_encoded_to_the_same_bits(tmp_path, tokenizer, options):
    """Live and stored, in batches of the same samples."""
    config = make_config(*options)
    write_cache(tmp_path, config, tokenizer, t5_dtype=config.encoder.dtype)
    live = OpenSource(Noise(), RULES, random_crop=False)
    stored = OpenSource(open_cache(tmp_path, config), RULES)
    order, draws = PlainOrder([SAMPLES], (32, 32), 5), ValidationDraws(seed=5)
    length = 12 if config.encoder.mask_padding else None
    batch = [Slot(position, True, 3) for position in range(3)]  # the very batch that was encoded
    encoders = encoders_of(config, tokenizer)
    ours = encoders.encode(
        collate([PositionedDataset([stored], order, None, SPEC, draws, length)[one] for one in batch])
    )
    theirs = encoders.encode(collate([PositionedDataset([live], order, tokenizer, SPEC, draws)[one] for one in batch]))
    assert torch.equal(ours.latents_BTC, theirs.latents_BTC) and ours.grid == theirs.grid
    assert torch.equal(ours.text.pooled_BV, theirs.text.pooled_BV)
    if config.encoder.mask_padding:
        mask_BL = theirs.text.mask_BL
        assert torch.equal(ours.text.mask_BL, mask_BL) and not mask_BL.all()
        assert torch.equal(ours.text.txt_BLE[mask_BL], theirs.text.txt_BLE[mask_BL])
    else:
        assert torch.equal(ours.text.txt_BLE, theirs.text.txt_BLE) and ours.text.mask_BL is None
    assert ours.text.txt_BLE.dtype == theirs.text.txt_BLE.dtype == getattr(torch, config.encoder.dtype)


def test_bad_samples_are_noted_and_replaced(cache):
    folder, writer = cache
    assert {reason: count for reason, count in writer.bad.items() if count} == {"damaged": 1}
    (line,) = (json.loads(line) for line in (folder / BAD_SAMPLES_FILE).open())
    assert (line["number"], line["reason"], line["shard"], line["key"]) == (BAD, "damaged", "noise", f"key {BAD}")
    source = open_cache(folder, make_config())
    with pytest.raises(BadSample) as caught:
        source[BAD]
    assert (caught.value.reason, caught.value.key, caught.value.shard) == ("damaged", f"key {BAD}", shard_name(1))
    order, draws = PlainOrder([SAMPLES], (32, 32), 5), ValidationDraws(seed=5)
    dataset = PositionedDataset([OpenSource(source, RULES)], order, None, SPEC, draws)
    loader = Loader(dataset, HeldOutBatches([np.arange(10)], 5), DataLoader(num_workers=1))
    raws = list(loader)
    captions = [caption for raw in raws for caption in raw.captions]
    assert captions[:BAD] + captions[BAD + 1 :] == [f"noise {number}" for number in range(10) if number != BAD]
    assert captions[BAD] in captions[:BAD] + captions[BAD + 1 :], "another one stands in"
    assert [record.key for raw in raws for record in raw.bad] == [f"key {BAD}"]


def test_latents_are_drawn_anew_at_every_visit(cache):
    source = open_cache(cache[0], make_config())
    order = PlainOrder([SAMPLES], (32, 32), 5)
    dataset = PositionedDataset([OpenSource(source, RULES)], order, None, SPEC, ValidationDraws(seed=5))
    first, second = dataset[Slot(0, True, 1)], dataset[Slot(SAMPLES, True, 1)]
    assert torch.equal(first.moments_CHW, second.moments_CHW)
    assert not torch.equal(first.posterior_noise_TC, second.posterior_noise_TC)


def test_the_empty_prompt_is_stored(cache, tokenizer):
    config = make_config()
    text = encoders_of(config, tokenizer).encode_prompts([""])
    empty = open_cache(cache[0], config).empty()
    assert torch.equal(empty["t5"], text.txt_BLE[0]) and torch.equal(empty["clip"], text.pooled_BV[0])


def test_pictures_of_several_shapes(tmp_path, tokenizer):
    sizes = np.array([[32, 32], [48, 32]] * (SAMPLES // 2))
    config = make_config()
    write_cache(tmp_path, config, tokenizer, sizes)
    source = open_cache(tmp_path, config)
    assert np.array_equal(source.picture_sizes(), sizes)
    assert [source[number].moments_CHW.shape[1:] for number in (0, 1)] == [(4, 4), (4, 6)]
    assert [source[number].caption for number in (0, 1, 9)] == ["noise 0", "noise 1", "noise 9"]


def test_fp8_keeps_t5_within_its_precision(tmp_path, cache, tokenizer):
    config = make_config()
    write_cache(tmp_path, config, tokenizer, t5_dtype="float8_e4m3fn")
    exact, shrunk = open_cache(cache[0], config), open_cache(tmp_path, config)
    for number in (0, 9):
        one, other = exact[number].t5_LE.float(), shrunk[number].t5_LE.float()
        assert ((one - other).abs().amax(1) <= LARGEST_FP8_ERROR * one.abs().amax(1)).all()
        assert not torch.equal(one, other)
        assert torch.equal(exact[number].moments_CHW, shrunk[number].moments_CHW)
    assert shrunk.empty()["t5"].dtype == torch.bfloat16
    size = sum((tmp_path / shard_name(number)).stat().st_size for number in range(3))
    assert size < sum((cache[0] / shard_name(number)).stat().st_size for number in range(3))


def test_rows_of_zeros_survive_fp8():
    rows = torch.zeros(2, 8, dtype=torch.bfloat16)
    assert torch.equal(restore_rows(*shrink_rows(rows)), rows)


def test_t5_may_be_left_to_training(tmp_path, tokenizer):
    config = make_config()
    write_cache(tmp_path, config, tokenizer, parts=("moments", "clip"))
    source = open_cache(tmp_path, config)
    assert source.parts == {"moments", "clip"} and source.empty().keys() == {"clip"}
    assert source[0].t5_LE is None and source[0].caption == "noise 0"
    # Another T5 is as good: nothing of it is in the cache.
    open_cache(tmp_path, make_config("--encoder.max_t5_encoding_len=9"))


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ("--encoder.max_t5_encoding_len=9", "t5.max_t5_encoding_len 12 -> 9"),
        ("--encoder.mask_padding", "t5.mask_padding False -> True"),
        ("--encoder.dtype=float32", "autoencoder.dtype bfloat16 -> float32"),
    ],
)
def test_another_use_of_the_encoders_is_refused(cache, option, difference):
    with pytest.raises(ValueError, match=f"was made by another encoder: {difference}: set"):
        open_cache(cache[0], make_config(option))


def test_another_encoder_is_refused(cache, tmp_path):
    from safetensors.torch import load_file, save_file

    config = make_config()
    path = config.encoder.autoencoder_path
    weights = load_file(path)
    name = "encoder.conv_in.weight"
    weights[name] = weights[name] + 1e-3
    save_file(weights, tmp_path / "other.safetensors")
    other = replace(config, encoder=replace(config.encoder, autoencoder_path=str(tmp_path / "other.safetensors")))
    with pytest.raises(ValueError, match=r"was made by another encoder: autoencoder.weights"):
        open_cache(cache[0], other)
    save_file(load_file(path), tmp_path / "other.safetensors", {"note": "the same tensors in another file"})
    open_cache(cache[0], other)


def test_an_interrupted_cache_goes_on(tmp_path, tokenizer, cache):
    config = make_config()
    settings = settings_of(config)
    assert claim_cache(tmp_path, settings) == [0, 1, 2]
    write_cache(tmp_path, config, tokenizer)
    whole = (tmp_path / shard_name(1)).read_bytes()
    (tmp_path / shard_name(1)).unlink()
    (tmp_path / f".{shard_name(1)}.123").write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"is not complete, 1 of 3 shards are missing, the first is shard-00001"):
        open_cache(tmp_path, config)
    assert claim_cache(tmp_path, settings) == [1]
    assert not list(tmp_path.glob(".shard*")), "what was half written is gone"
    writer = CacheWriter(tmp_path, settings, encoders_of(config, tokenizer), batch_size=3)
    samples = SamplesToEncode(OpenSource(Noise(), RULES, random_crop=False), np.full((SAMPLES, 2), 32), tokenizer, 0)
    list(writer.write([1], samples, workers=1))
    assert (tmp_path / shard_name(1)).read_bytes() == whole


def test_other_settings_do_not_go_on(cache):
    with pytest.raises(ValueError, match=r"begun with other settings: parts .*: name another folder"):
        claim_cache(cache[0], settings_of(make_config(), parts=("moments",)))


@pytest.mark.parametrize("damage", ["empty", "cut", "no settings", "format", "garbage"])
def test_a_damaged_cache_is_named(tmp_path, cache, damage):
    config = make_config()
    for file in cache[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / CACHE_FILE).read_text())
    if damage in ("empty", "cut"):
        whole = (tmp_path / shard_name(0)).read_bytes()
        (tmp_path / shard_name(0)).write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
        source = open_cache(tmp_path, config)
        with pytest.raises(BadSample) as caught:
            source[0]
        assert caught.value.reason == "unreadable" and caught.value.shard == shard_name(0)
        assert source[9].caption == "noise 9"
        with pytest.raises(
            DataError, match=f"{shard_name(0)} is damaged .*: delete it and run scripts.preencode again"
        ):
            source.picture_sizes()
        return
    match damage:
        case "no settings":
            (tmp_path / CACHE_FILE).unlink()
        case "format":
            (tmp_path / CACHE_FILE).write_text(json.dumps({**settings, "format": 2}))
        case "garbage":
            (tmp_path / CACHE_FILE).write_text("[1]")
    with pytest.raises(DataError, match=CACHE_FILE):
        open_cache(tmp_path, config)


def test_travels_to_workers(cache):
    source = open_cache(cache[0], make_config())
    source[0]
    assert torch.equal(pickle.loads(pickle.dumps(source))[1].moments_CHW, source[1].moments_CHW)


def test_the_estimate_is_the_size(cache):
    folder, writer = cache
    sizes = np.full((SAMPLES, 2), 32)
    written = sum(
        file.stat().st_size for file in folder.iterdir() if file.name not in (CACHE_FILE, EMPTY_FILE, BAD_SAMPLES_FILE)
    )
    estimate = estimate_bytes(writer.settings, sizes, SPEC) * (SAMPLES - 1) / SAMPLES  # one is bad
    assert 1 <= written / estimate < 1.2, "the rest are headers, captions and keys"


def test_parts_are_checked():
    assert check_parts("clip, moments") == ["moments", "clip"]
    with pytest.raises(ValueError, match="--parts=moments,vae has 'vae', which must be one of moments, t5, clip"):
        check_parts("moments,vae")
    with pytest.raises(ValueError, match="must have moments"):
        check_parts("t5")


def test_differences_are_found_in_depth():
    assert find_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert find_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c 2 -> 3"
    assert find_difference({"a": 1}, {}) == "a 1 -> None"
