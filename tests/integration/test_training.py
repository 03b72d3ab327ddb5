"""Whole runs on the CPU: what they write, and what must not change their numbers."""

import json
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from config.parse import load_config
from evaluate import Evaluator
from flux.batch import RawBatch
from flux.data.build import Deal, build_training_loader, build_validation_loader, open_data
from flux.data.tokenizers import build_tokenizer
from flux.spec import SPECS
from parallel.degrees import Degrees
from parallel.mesh import Layout
from tests.integration.short_runs import TINY, Run
from tests.unit.flux.whole_clip import save_clip
from train import FluxTrainer, build_encoders, main

ACCUMULATION_TOLERANCE = 1e-6  # relative; fp32 sums in another order
ENCODER_TOLERANCE = 1e-5  # fp32 matrix products block their sums differently at other batch sizes
BF16_TOLERANCE = 0.02  # relative; three significant digits, averaged over thousands of elements


def test_a_run_leaves_everything_behind(plain_run):
    names = {path.relative_to(plain_run.folder).as_posix() for path in plain_run.folder.rglob("*") if path.is_file()}
    assert names == {
        "config.toml",
        "metrics.jsonl",
        "exit.json",
        "loss.png",
        "img/step-000004.png",
        "export/transformer.safetensors",
    }
    told = {"code": 0, "reason": "done", "step": 4, "rank": 0, "resumable": False, "save_seconds": None}
    assert plain_run.exit == {**told, "host": socket.gethostname()}
    assert Image.open(plain_run.folder / "img/step-000004.png").size == (70, 70)


def test_logged_steps_carry_their_figures(plain_run):
    steps = [line for line in plain_run.lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["samples_seen"] for line in steps] == [8, 16, 24, 32]
    assert [line["lr"] for line in steps][:2] == [0.0005, 0.001]
    for name in ("grad_norm", "samples_per_s", "data_wait_percent", "memory_gib", "tflops"):
        assert all(line[name] > 0 for line in steps), name
    assert len(plain_run.series("validation_loss")) == 1
    assert 0 <= plain_run.series("background_color_accuracy")[0] <= 1


def test_a_fresh_model_predicts_nothing(plain_run):
    """Zero-initialized output: the first loss is the mean square of noise - latents, about 1 + the latents' own."""
    assert 1.5 < plain_run.series("loss")[0] < 2.6


def test_the_written_configuration_reproduces_the_run(plain_run, tmp_path):
    main([f"--job.config_file={plain_run.folder / 'config.toml'}", f"--job.dump_folder={tmp_path / 'again'}"])
    again = Run(tmp_path / "again")
    for name in ("loss", "grad_norm", "validation_loss"):
        assert again.series(name) == plain_run.series(name)
    ours, theirs = (load_file(run.folder / "export/transformer.safetensors") for run in (plain_run, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_drawn_seed_is_written_down(tmp_path):
    config = (tmp_path / "no_seed.toml", tmp_path / "first", tmp_path / "second")
    text = Path("train_configs/flux_tiny.toml").read_text().replace("seed = 0", "")
    config[0].write_text(text)
    short = [option for option in TINY if "config_file" not in option] + ["--validation.enable=false"]
    main([f"--job.config_file={config[0]}", f"--job.dump_folder={config[1]}", *short])
    main([f"--job.config_file={config[1] / 'config.toml'}", f"--job.dump_folder={config[2]}"])
    assert Run(config[1]).series("loss") == Run(config[2]).series("loss")


def test_a_used_folder_is_left_alone(train, plain_run, capsys):
    before = {path: path.read_bytes() for path in plain_run.folder.rglob("*") if path.is_file()}
    main([*TINY, f"--job.dump_folder={plain_run.folder}", "--training.steps=1", "--validation.enable=false"])
    assert before == {path: path.read_bytes() for path in plain_run.folder.rglob("*") if path.is_file()}
    second = plain_run.folder.with_name(f"{plain_run.folder.name}-2")
    assert Run(second).exit["code"] == 0
    assert f"this run writes to {second}" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["--training.dataloader.num_workers=1", "--validation.enable=false"])
def test_workers_and_validation_do_not_touch_the_numbers(train, plain_run, override):
    run = train(override)
    assert run.series("loss") == plain_run.series("loss")
    assert run.series("grad_norm") == plain_run.series("grad_norm")


def test_a_score_by_clip_is_logged_and_touches_no_number(train, plain_run, tmp_path, capsys):
    run = train(f"--validation.clip_score_path={save_clip(tmp_path / 'clip')}", "--ema.enable", "--ema.decay=0.5")
    (score,), (of_average,) = run.series("clip_score"), run.series("clip_score_ema")
    assert 0 < score < 100 and 0 < of_average < 100 and score != of_average
    assert f"CLIP score {score:.2f}" in capsys.readouterr().err
    assert run.series("shape_accuracy") == plain_run.series("shape_accuracy"), "the other scores are there as well"
    assert run.series("loss") == plain_run.series("loss")
    ours, theirs = (load_file(one.folder / "export/transformer.safetensors") for one in (run, plain_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("local_batch_size", [4, 2])
def test_accumulation_equals_the_large_batch(train, plain_run, local_batch_size):
    run = train(f"--training.local_batch_size={local_batch_size}", "--training.global_batch_size=8")
    for name in ("loss", "grad_norm"):
        assert run.series(name) == pytest.approx(plain_run.series(name), rel=ACCUMULATION_TOLERANCE)


def test_accumulation_control_another_batch_is_another_run(train, plain_run):
    run = train("--training.local_batch_size=4")
    assert run.series("loss") != pytest.approx(plain_run.series("loss"), rel=100 * ACCUMULATION_TOLERANCE)


@pytest.mark.parametrize(
    "precision",
    [
        ["--training.mixed_precision_param=bfloat16"],
        ["--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16"],
    ],
)
def test_bf16_is_near_fp32_and_not_equal(train, plain_run, precision):
    run = train(*precision, "--validation.enable=false")
    assert run.series("loss") == pytest.approx(plain_run.series("loss"), rel=BF16_TOLERANCE)
    assert run.series("loss") != plain_run.series("loss")


@pytest.mark.parametrize(
    "override",
    [
        "--training.timestep_distribution=logit_normal",
        "--training.timestep_shift=resolution",
        "--training.prompt_dropout=independent",
        "--training.classifier_free_guidance_prob=0.9",
        "--training.max_norm=0.01",
        "--encoder.mask_padding",
        "--encoder.sample_posterior=false",
        "--encoder.max_t5_encoding_len=12",
        "--encoder.dtype=bfloat16",
        "--optimizer.lr=0.01",
        "--lr_scheduler.warmup_steps=1",
        "--debug.seed=1",
    ],
)
def test_every_training_option_reaches_the_numbers(train, plain_run, override):
    run = train(override, "--validation.enable=false")
    assert run.series("loss") != plain_run.series("loss")


def test_test_mode_trains_with_random_encoders(train):
    run = train("--training.test_mode", "--training.steps=2", "--validation.enable=false")
    assert len(run.series("loss")) == 2


def load_batch(batch_size: int) -> tuple[RawBatch, object]:
    config = load_config([*TINY, f"--training.local_batch_size={batch_size}"])
    spec = SPECS["flux-tiny"]
    tokenizer = build_tokenizer(config.encoder, False)
    encoders = build_encoders(config, spec, tokenizer, Layout(Degrees(), torch.device("cpu")))
    data = open_data(config.training, config.validation, config.data, config.encoder, spec)
    return next(iter(build_training_loader(data, tokenizer, Deal(seed=0), cursor=0))), encoders


def test_encoder_outputs_do_not_depend_on_the_batch_size():
    (large, encoders), (small, _) = load_batch(8), load_batch(2)
    ours, theirs = encoders.encode(large), encoders.encode(small)
    for one, other in (
        (ours.latents_BTC, theirs.latents_BTC),
        (ours.text.txt_BLE, theirs.text.txt_BLE),
        (ours.text.pooled_BV, theirs.text.pooled_BV),
    ):
        torch.testing.assert_close(one[:2], other, atol=ENCODER_TOLERANCE, rtol=ENCODER_TOLERANCE)
        assert not one.requires_grad


def test_training_and_validation_share_the_same_lines(tmp_path):
    config = load_config([*TINY, f"--job.dump_folder={tmp_path}"])
    trainer = FluxTrainer(config, tmp_path, Layout(Degrees(), torch.device("cpu")))
    batches = list(trainer.evaluator.loader)
    with torch.no_grad():
        errors = sum(trainer.squared_errors(*trainer.ahead.encode(raw)).double().sum().item() for raw in batches)
    mean = errors / sum(raw.draws.noise_BTC.numel() for raw in batches)
    assert trainer.evaluator.validate(0)["validation_loss"] == pytest.approx(mean, rel=1e-12)


def test_a_few_held_out_pictures_are_shown_at_every_time(tmp_path):
    for number in range(3):
        Image.new("RGB", (40, 40), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    config = load_config([*TINY, "--training.dataset=imagefolder", f"--training.dataset_path={tmp_path}"])
    tokenizer = build_tokenizer(config.encoder, False)
    data = open_data(config.training, config.validation, config.data, config.encoder, SPECS["flux-tiny"])
    loader = build_validation_loader(data, tokenizer, Deal(seed=0))
    times = sorted(t for raw in loader for t in raw.draws.t_B.tolist())
    assert times == [(k + 0.5) / 8 for k in range(8)]


def test_a_run_that_diverges_stops(tmp_path, capfd):
    with pytest.raises(SystemExit) as caught:
        options = ["--optimizer.lr=1e30", "--validation.enable=false", "--training.steps=20"]
        main([*TINY, f"--job.dump_folder={tmp_path / 'run'}", *options])
    run = Run(tmp_path / "run")
    assert caught.value.code == run.exit["code"] == 4 and run.exit["step"] < 10
    assert "lower optimizer.lr=1e+30" in capfd.readouterr().err
    assert not (run.folder / "export").exists()


def test_a_failed_start_leaves_its_name_free(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        main([*TINY, f"--job.dump_folder={folder}", "--encoder.autoencoder_path=nowhere.safetensors"])
    assert json.loads((folder / "exit.json").read_text())["code"] == 2
    main([*TINY, f"--job.dump_folder={folder}", "--training.steps=1", "--validation.enable=false"])
    assert Run(folder).exit["code"] == 0 and not folder.with_name("run-2").exists()


def test_interrupted_runs_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "draw_grid", lambda self, step: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as caught:
        main([*TINY, f"--job.dump_folder={tmp_path / 'run'}"])
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert caught.value.code == record["code"] == 130 and record["step"] == 4
