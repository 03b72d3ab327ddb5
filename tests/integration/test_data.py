"""Whole runs on real kinds of data: damage, caches, shard lists that change, buckets, a target that ends the run."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from config.parse import load_config
from flux.data.build import Deal, build_validation_loader, open_data
from flux.data.cache import shard_name
from flux.data.dataset import Slot, collate
from flux.inputs import make_inputs
from parallel.degrees import Degrees
from parallel.mesh import Layout
from scripts import preencode
from tests.integration.short_runs import TINY, Run
from tests.unit.flux.data.test_mlperf import LENGTH, ROWS, write_empty, write_files
from train import FluxTrainer, main

# Batches of other sizes round differently, in fp32 and in bfloat16.
CACHE_TOLERANCE = 5e-4
PICTURES, BAD = 24, 7
ROUNDING = 1e-6  # relative; fp32 sums in batches of other sizes
NO_VALIDATION = "--validation.enable=false"
# Every sample is encoded by itself, live as in the cache.
ONE_BY_ONE = ("--training.local_batch_size=1", "--training.global_batch_size=8", NO_VALIDATION)


def make_jpeg(number: int) -> bytes:
    """Smooth noise of one of three shapes; one is broken."""
    if number == BAD:
        return b"<html>not found</html>"
    width, height = [(48, 48), (64, 40), (40, 64)][number % 3]
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path, numbers) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for extension, content in (("jpg", make_jpeg(number)), ("txt", f"blobs number {number}".encode())):
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", range(8 * shard, 8 * shard + 8))
    return folder


@pytest.fixture
def data(tars, tmp_path):
    """The options that name the tars."""
    return [
        "--training.dataset=webdataset",
        f"--training.dataset_path={tars}/*.tar",
        f"--data.index_folder={tmp_path / 'index'}",
        "--data.index_workers=0",
        "--data.random_crop=false",
        "--encoder.max_t5_encoding_len=12",
    ]


def encode(tmp_path, data, *options: str):
    """A cache of the tars."""
    folder = tmp_path / "cache"
    arguments = [*TINY, *data, f"--out={folder}", "--samples-per-shard=10", "--batch-size=1", *options]
    preencode.main(arguments, rank=0, world_size=1)
    return folder


def cached(folder) -> list[str]:
    return ["--training.dataset=cache", f"--training.dataset_path={folder}", "--encoder.max_t5_encoding_len=12"]


def fail(capfd, *overrides: str) -> tuple[int, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*TINY, *overrides])
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return caught.value.code, said


def test_a_bad_sample_is_told_and_training_goes_on(train, data):
    run = train(*data, NO_VALIDATION, "--training.steps=6")
    records = [json.loads(line) for line in (run.folder / "bad_samples.jsonl").read_text().splitlines()]
    assert len(records) == 2, "48 positions are two epochs"
    for record in records:
        assert record["reason"] == "damaged" and record["key"] == f"{BAD:04d}" and record["shard"].endswith("0.tar")
    assert sum(run.series("bad_samples/damaged")) == 2
    assert all(np.isfinite(run.series("loss"))) and run.exit["code"] == 0


def test_a_part_is_held_out(train, data):
    run = train(*data, "--training.steps=2")
    assert len(run.series("validation_loss")) == 1


def test_too_many_bad_samples_end_the_run(capfd, data, tmp_path):
    code, said = fail(capfd, *data, NO_VALIDATION, f"--job.dump_folder={tmp_path / 'run'}", "--data.max_bad_fraction=0")
    assert code == 3
    assert "1 of the last 10,000 samples are bad, 1 of them in" in said and "data.max_bad_fraction=0" in said
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 3
    assert (tmp_path / "run" / "bad_samples.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_is_training_with_the_encoders_to_the_last_bit(train, data, tmp_path, dtype):
    """Live and stored in the same batches; prompts are dropped, and a bad sample is among them."""
    live = train(*data, *ONE_BY_ONE, f"--encoder.dtype={dtype}")
    folder = encode(tmp_path, data, f"--encoder.dtype={dtype}")
    run = train(*cached(folder), *ONE_BY_ONE, f"--encoder.dtype={dtype}")
    for name in ("loss", "grad_norm"):
        assert run.series(name) == live.series(name)
    assert sum(run.series("bad_samples/damaged")) == 1
    torch.manual_seed(0)
    other = train(*cached(folder), *ONE_BY_ONE, f"--encoder.dtype={dtype}", "--encoder.sample_posterior=false")
    assert other.series("loss") != live.series("loss"), "the comparison sees latents that are not drawn anew"


def test_a_cache_of_other_batches_is_near(train, data, tmp_path):
    options = (NO_VALIDATION, "--encoder.dtype=bfloat16")
    live = train(*data, *options)
    run = train(*cached(encode(tmp_path, data, "--encoder.dtype=bfloat16", "--batch-size=5")), *options)
    assert run.series("loss") == pytest.approx(live.series("loss"), rel=CACHE_TOLERANCE)


def test_t5_may_stay_live(train, data, tmp_path):
    """Moments and CLIP are stored, T5 runs in training: the same numbers again."""
    live = train(*data, *ONE_BY_ONE)
    run = train(*cached(encode(tmp_path, data, "--parts=moments,clip")), *ONE_BY_ONE)
    assert run.series("loss") == live.series("loss")


def test_buckets_go_through_a_cache(train, data, tmp_path):
    buckets = ["--data.buckets.enable", "--data.buckets.step=16", "--training.img_size=48"]
    live = train(*data, *ONE_BY_ONE, *buckets)
    run = train(*cached(encode(tmp_path, data, *buckets)), *ONE_BY_ONE, *buckets)
    assert run.series("loss") == live.series("loss")


@pytest.fixture
def bucket_run(data, tmp_path):
    """Options of a run that trains and validates on a cache of several shapes."""
    buckets = ["--data.buckets.enable", "--data.buckets.step=16", "--training.img_size=48"]
    folder = encode(tmp_path, data, *buckets)
    validation = ["--validation.dataset=cache", f"--validation.dataset_path={folder}", "--validation.steps=-1"]
    return [*cached(folder), *buckets, *validation, "--validation.eval_freq=0"]


def build_trainer(tmp_path, *options: str) -> FluxTrainer:
    config = load_config([*TINY, f"--job.dump_folder={tmp_path}", *options])
    return FluxTrainer(config, tmp_path, Layout(Degrees(), torch.device("cpu")))


def test_every_stored_shape_is_validated_by_its_own_size(bucket_run, tmp_path):
    trainer = build_trainer(tmp_path, *bucket_run, "--training.steps=2")
    trainer.train()
    dataset, errors, sizes = trainer.evaluator.loader.dataset, [], []
    for position in range(PICTURES):
        raw = collate([dataset[Slot(position, True, 1)]])
        inputs, target_BTC = make_inputs(trainer.encoders.encode(raw), raw.draws, trainer.spec, 1.0, trainer.dtype)
        with torch.no_grad():
            errors.append((trainer.model(**inputs) - target_BTC).square().mean().item())
        sizes.append(target_BTC.numel())
    assert len(set(sizes)) > 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (loss,) = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert loss == pytest.approx(np.mean(errors), rel=ROUNDING)
    for size in set(sizes):
        assert loss != pytest.approx(np.mean(np.multiply(errors, sizes)) / size, rel=1000 * ROUNDING), "control"


@pytest.mark.parametrize("more", [["--validation.local_batch_size=1"], ["--validation.local_batch_size=5"]])
def test_the_batches_of_stored_shapes_do_not_matter(train, bucket_run, more):
    four, other = train(*bucket_run), train(*bucket_run, *more)
    assert other.series("validation_loss") == pytest.approx(four.series("validation_loss"), rel=ROUNDING)
    assert other.series("validation_loss/t=0.0625") == pytest.approx(four.series("validation_loss/t=0.0625"), rel=1e-5)


def test_a_part_of_a_cache_of_several_shapes_is_held_out(train, bucket_run):
    options = [option for option in bucket_run if not option.startswith("--validation.dataset")]
    assert len(train(*options).series("validation_loss")) == 1


def test_stored_shapes_that_do_not_fit(capfd, bucket_run, tmp_path):
    options = [option for option in bucket_run if option != "--data.buckets.enable"]
    training = ["--training.dataset=shapes", f"--job.dump_folder={tmp_path / 'run'}"]
    code, said = fail(capfd, *options, *training)
    assert code == 2 and "those of buckets need data.buckets.enable=true" in said
    trainer = build_trainer(tmp_path, *bucket_run)
    config = trainer.config
    data = open_data(config.training, config.validation, config.data, config.encoder, trainer.spec)
    with pytest.raises(ValueError, match="context_parallel_degree=5 must divide the 8 image tokens of every bucket"):
        build_validation_loader(data, trainer.encoders.tokenizer, Deal(0, sharing=5))


def test_a_cache_goes_on_where_it_stopped(data, tmp_path):
    folder = encode(tmp_path, data)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / shard_name(1)).unlink()  # of samples without a bad one
    encode(tmp_path, data)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_pictures_of_a_run_need_the_encoders_beside_a_cache(train, data, tmp_path):
    run = train(*cached(encode(tmp_path, data)), "--training.steps=2")
    assert (run.folder / "img/step-000002.png").exists()
    assert len(run.series("validation_loss")) == 1


def test_estimates_write_nothing(data, tmp_path, caplog):
    with caplog.at_level("INFO", "scripts.preencode"):
        preencode.main([*TINY, *data, f"--out={tmp_path / 'cache'}", "--estimate"], 0, 1)
    assert not (tmp_path / "cache").exists()
    assert "24 samples x" in caplog.text and "24 samples left, about 0:00:" in caplog.text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--parts=t5"], "--parts=t5 must have moments"),
        (["--batch-size=0"], "--batch-size=0 must be at least 1"),
        (["--source=0"], "--source=0 is for a mixture, and data.sources is empty"),
        (["--training.dataset=cache"], 'training.dataset="cache" is encoded already'),
    ],
)
def test_what_cannot_be_encoded(data, tmp_path, options, error):
    with pytest.raises(ValueError, match="^" + error):
        preencode.main([*TINY, *data, f"--out={tmp_path / 'cache'}", *options], 0, 1)


def test_a_cache_of_another_encoder_or_size_is_refused(capfd, data, tmp_path):
    folder = encode(tmp_path, data)
    out = [NO_VALIDATION, f"--job.dump_folder={tmp_path / 'run'}"]
    code, said = fail(capfd, *cached(folder), *out, "--encoder.max_t5_encoding_len=9")
    assert code == 2 and "was made by another encoder: t5.max_t5_encoding_len 12 -> 9" in said
    code, said = fail(capfd, *cached(folder), *out, "--training.img_size=48")
    assert code == 2 and "training.img_size=48 is not the size of the stored pictures, one has 32 x 32" in said
    (folder / shard_name(2)).unlink()
    code, said = fail(capfd, *cached(folder), *out)
    assert code == 3 and "is not complete, 1 of 3 shards are missing, the first is shard-00002" in said


def test_a_changed_shard_list_is_named_on_resume(tars, data, tmp_path):
    shards = shutil.copytree(tars, tmp_path / "tars")
    options = [*data[:1], f"--training.dataset_path={shards}/*.tar", *data[2:], NO_VALIDATION, "--checkpoint.enable"]

    def build(*more: str) -> FluxTrainer:
        config = load_config([*TINY, *options, f"--job.dump_folder={tmp_path}", *more])
        return FluxTrainer(config, tmp_path, Layout(Degrees(), torch.device("cpu")))

    build("--training.steps=2").train()
    write_tar(shards / "1b.tar", range(100, 104))
    with pytest.raises(ValueError, match=r"training.dataset is not what the checkpoint was trained on") as caught:
        build()
    assert "shard 2 was 2.tar (8 samples," in str(caught.value) and "and is 1b.tar (4 samples," in str(caught.value)
    (shards / "1b.tar").unlink()
    trainer = build()
    trainer.train()
    assert trainer.step == 4 and trainer.cursor == 32


def test_a_shard_that_was_cut_stops_or_is_replaced(capfd, train, tars, data, tmp_path):
    shards = shutil.copytree(tars, tmp_path / "tars")
    options = [*data[:1], f"--training.dataset_path={shards}/*.tar", *data[2:], NO_VALIDATION]
    whole = train(*options)
    size = (shards / "1.tar").stat().st_size
    (shards / "1.tar").write_bytes((shards / "1.tar").read_bytes()[: size // 2])
    code, said = fail(capfd, *options, f"--job.dump_folder={tmp_path / 'run'}")
    assert code == 3 and "1.tar" in said and 'data.on_bad_shard="skip"' in said
    run = train(*options, "--data.on_bad_shard=skip")
    assert sum(run.series("bad_samples/unreadable")) >= 4
    assert run.series("loss") != whole.series("loss") and run.series("samples_seen") == whole.series("samples_seen")


def test_the_run_ends_when_the_target_is_reached(train, tmp_path):
    from train import main

    run = train("--validation.target_loss=100", "--validation.freq=2", "--checkpoint.enable")
    assert (run.exit["code"], run.exit["reason"], run.exit["step"]) == (0, "done", 2)
    assert run.series("samples_to_target_loss") == [16]
    assert (run.folder / "checkpoint" / "step-2").is_dir() and (run.folder / "img/step-000002.png").exists()
    # As when it was killed before its end: it is not trained any further, unless it is to reach more.
    for target, step in ((100, 2), (0.001, 4)):
        folder = tmp_path / str(target)
        shutil.copytree(run.folder / "checkpoint", folder / "checkpoint")
        options = [f"--validation.target_loss={target}", "--validation.freq=2", "--checkpoint.enable"]
        main([*TINY, f"--job.dump_folder={folder}", *options])
        assert Run(folder).exit["step"] == step and (folder / "export" / "transformer.safetensors").exists()
    run = train("--validation.target_loss=0.001", "--validation.freq=2")
    assert run.exit["step"] == 4 and not run.series("samples_to_target_loss")


def test_validation_at_the_times_of_mlperf(train, plain_run):
    run = train("--validation.times=eighths")
    assert run.series("loss") == plain_run.series("loss")
    assert run.series("validation_loss") != plain_run.series("validation_loss")


def test_a_mixture_of_data_sets(tars, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
        [training]
        dataset = "mixture"
        [data]
        index_folder = "{tmp_path / "index"}"
        index_workers = 0
        [[data.sources]]
        dataset = "shapes"
        weight = 3
        [[data.sources]]
        dataset = "webdataset"
        dataset_path = "{tars}/*.tar"
        random_crop = false
        """
    )
    options = ["--encoder.max_t5_encoding_len=12", "--training.mixed_precision_param=float32", NO_VALIDATION]
    main([*TINY, f"--job.config_file={file}", *options, f"--job.dump_folder={tmp_path / 'run'}"])
    assert len(Run(tmp_path / "run").series("loss")) == 4


def test_mlperfs_log_of_a_run(train):
    run = train("--metrics.enable_mllog", "--validation.freq=2", "--validation.target_loss=100")
    lines = [json.loads(line.removeprefix(":::MLLOG ")) for line in (run.folder / "mllog.txt").open()]
    keys = [line["key"] for line in lines if line["key"] not in ("tracked_stats",)]
    assert keys[:2] == ["cache_clear", "init_start"] and {"submission_benchmark", "global_batch_size"} <= set(keys)
    expected = ["init_stop", "run_start", "block_start", "block_stop", "eval_start", "eval_accuracy", "eval_stop"]
    assert keys[-8:] == [*expected, "run_stop"]
    assert lines[-1]["metadata"]["status"] == "success"
    assert [line["value"] for line in lines if line["key"] == "eval_accuracy"] == run.series("validation_loss")


def test_mlperfs_protocol_on_a_few_samples(train, tmp_path):
    """Without any encoder; the times of validation are those of the data set."""
    write_files(tmp_path / "set", ROWS)
    write_empty(tmp_path / "empty_encodings")
    options = {
        "training.dataset": "mlperf",
        "training.dataset_path": tmp_path / "set",
        "training.classifier_free_guidance_prob": 0.5,
        "encoder.max_t5_encoding_len": LENGTH,
        "encoder.t5_encoder": tmp_path / "nowhere",
        "validation.dataset": "mlperf",
        "validation.dataset_path": tmp_path / "set",
        "validation.times": "eighths",
        "validation.steps": -1,
        "validation.eval_freq": 0,
    }
    run = train(*(f"--{name}={value}" for name, value in options.items()))
    assert len(run.series("loss")) == 4 and len(run.series("validation_loss")) == 1
    again = train(*(f"--{name}={value}" for name, value in options.items()), "--training.local_batch_size=4")
    assert again.series("validation_loss") != run.series("validation_loss"), "other updates"
