"""What a run is told on one machine before it meets the others, by folders and disks with something wrong."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import preflight
from config.parse import parse
from flux.model import FluxTransformer
from flux.spec import SPECS
from parallel.degrees import Degrees
from parallel.mesh import Layout
from preflight import GIB, check_together, find_disk, look_alone
from runtime.preflight import Finding

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny"
Usage = namedtuple("Usage", "total used free")
DEV = SPECS["flux-dev"].transformer
CACHE = ["--training.dataset=cache", "--training.dataset_path=cache"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(*options: str):
    return parse(["--job.config_file=train_configs/flux_tiny.toml", *options])[0]


def problems(*options: str) -> list[str]:
    return look_alone(config_of(*options), {})


def only(findings) -> Finding:
    (finding,) = findings
    return finding


def test_nothing_is_wrong_with_the_tiny_run_and_nothing_is_left_behind(tmp_path):
    folder = tmp_path / "run"
    assert problems(f"--job.dump_folder={folder}", "--checkpoint.enable") == []
    check_together(config_of(f"--job.dump_folder={folder}"), Layout(Degrees(), torch.device("cpu")), [])
    assert list(tmp_path.iterdir()) == []


def test_problems_end_a_run_of_one_process(tmp_path):
    with pytest.raises(ValueError, match=r"^no T5: get it\nno CLIP: get it$"):
        check_together(config_of(), Layout(Degrees(), torch.device("cpu")), ["no T5: get it", "no CLIP: get it"])


@pytest.mark.parametrize(("local_rank", "looks"), [("0", True), ("1", False), (None, True)])
def test_one_process_of_a_machine_looks(local_rank, looks):
    environment = {} if local_rank is None else {"LOCAL_RANK": local_rank, "RANK": "8"}
    assert bool(look_alone(config_of("--encoder.t5_encoder=no/such/folder"), environment)) == looks


def spoiled(tmp_path: Path, kind: str) -> str:
    """The option that names an encoder with something wrong."""
    folder = tmp_path / "encoder"
    if kind == "narrow T5":
        shutil.copytree(TINY / "t5", folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"d_model": 2 * values["d_model"]}))
    elif kind == "T5 without weights":
        shutil.copytree(TINY / "t5", folder)
        (folder / "model.safetensors").unlink()
    elif kind == "T5 cut off":
        shutil.copytree(TINY / "t5", folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "autoencoder of 8 channels":
        tensors = load_file(TINY / "autoencoder.safetensors")
        tensors["encoder.conv_out.weight"] = tensors["encoder.conv_out.weight"][:16].contiguous()
        tensors["encoder.conv_out.bias"] = tensors["encoder.conv_out.bias"][:16].contiguous()
        tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:, :8].contiguous()
        save_file(tensors, tmp_path / "ae.safetensors")
        return f"--encoder.autoencoder_path={tmp_path / 'ae.safetensors'}"
    return f"--encoder.t5_encoder={folder}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--encoder.t5_encoder=google/t5-v1_1-xxl", "run `python -m scripts.download_assets --assets t5`"),
        ("--encoder.t5_encoder=assets/tiny/clip", "must hold an encoder of model_type t5"),
        ("--encoder.clip_encoder=assets/tiny/t5", "must hold an encoder of model_type clip_text_model or clip"),
        ("--encoder.clip_encoder=no/such/folder", "there is no folder"),
        ("--encoder.autoencoder_path=no/ae.safetensors", "is not there: use the embedded"),
        ("--validation.clip_score_path=assets/tiny/clip", "validation.clip_score_path"),
        ("--validation.prompts_path=no/prompts.txt", "validation.prompts_path='no/prompts.txt' cannot be read"),
        ("narrow T5", "must equal the model's context_dim"),
        ("T5 without weights", "must hold model.safetensors and does not"),
        ("T5 cut off", "must be a complete safetensors file"),
        ("autoencoder of 8 channels", "has 8 latent channels, but the flavor needs 16"),
    ],
)
def test_what_a_run_could_not_be_built_with_is_one_line(tmp_path, option, message):
    (told,) = problems(option if option.startswith("--") else spoiled(tmp_path, option))
    assert message in told and "\n" not in told


def test_all_problems_are_told_at_once():
    told = problems("--encoder.t5_encoder=a", "--encoder.clip_encoder=b", "--encoder.autoencoder_path=c.safetensors")
    assert [line.partition("=")[0] for line in told] == [
        "encoder.t5_encoder",
        "encoder.clip_encoder",
        "encoder.autoencoder_path",
    ]


def test_a_file_that_this_user_may_not_read(monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    config = config_of()
    monkeypatch.setattr(Path, "read_text", refuse)
    told = look_alone(config, {})[0]
    assert told.endswith("assets/tiny/t5/config.json cannot be read (Permission denied): let this user read it")


@pytest.mark.parametrize("drawn", [False, True])
def test_encoders_that_a_data_set_may_make_needless_are_not_asked_for(drawn):
    missing = ["--encoder.t5_encoder=no/such/folder", f"--validation.enable={str(drawn).lower()}"]
    assert bool(problems(*CACHE, *missing)) == drawn


def test_test_mode_needs_no_text_encoders_and_an_autoencoder():
    test_mode = ["--training.test_mode", "--encoder.t5_encoder=no/such/folder"]
    assert problems(*test_mode) == []
    assert len(problems(*test_mode, "--encoder.autoencoder_path=no/ae.safetensors")) == 1


def test_pictures_that_are_not_drawn_need_nothing():
    assert problems("--validation.prompts_path=no/prompts.txt", "--validation.enable=false") == []


def test_a_folder_that_may_not_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root may write everywhere
    (told,) = problems(f"--job.dump_folder={tmp_path / 'run'}")
    assert told.endswith(f"{tmp_path} cannot be written: set job.dump_folder to a folder that you may write")


def options_of_dev() -> tuple[list[str], int]:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in FluxTransformer(DEV).parameters())
    options = ["--model.flavor=flux-dev", "--encoder.t5_encoder=x", "--checkpoint.enable", "--training.steps=1000"]
    return [*options, "--checkpoint.interval=100", "--ema.enable=false"], parameters


def give_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))


def test_room_for_checkpoints(monkeypatch):
    options, parameters = options_of_dev()
    needed = 3 * 12 * parameters + 4 * parameters  # two, a new one beside them, and the weights at the end
    for free, level in ((needed, "ok"), (needed - 1, "error")):
        give_disk(monkeypatch, free)
        finding = only(find_disk(config_of(*options, "--checkpoint.keep_latest_k=2")))
        assert finding.level == level and f"3 checkpoints of {12 * parameters / GIB:,.2f} GiB" in finding.found


def test_checkpoints_that_somebody_may_carry_away_are_a_warning(monkeypatch, caplog):
    options, parameters = options_of_dev()
    least = 2 * 12 * parameters + 4 * parameters
    for free, level in ((least, "warning"), (least - 1, "error")):
        give_disk(monkeypatch, free)
        finding = only(find_disk(config_of(*options, "--checkpoint.keep_latest_k=0")))
        assert finding.level == level and "10 checkpoints of" in finding.found
    give_disk(monkeypatch, least)
    monkeypatch.setattr(preflight, "CHECKS", (find_disk,))
    assert problems(*options, "--checkpoint.keep_latest_k=0") == []
    assert "carry older checkpoints away in time" in caplog.text


def test_what_a_run_has_saved_already_needs_no_room(monkeypatch, tmp_path):
    options = ["--checkpoint.enable", f"--job.dump_folder={tmp_path}", "--checkpoint.keep_latest_k=1"]
    needed, _, _ = preflight.saved_bytes(config_of(*options))
    give_disk(monkeypatch, needed - 1000)
    assert only(find_disk(config_of(*options))).level == "error"
    (tmp_path / "checkpoint" / "step-100").mkdir(parents=True)
    (tmp_path / "checkpoint" / "step-100" / "part").write_bytes(bytes(1000))
    assert only(find_disk(config_of(*options))).level == "ok"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--checkpoint.interval=300"], 4),  # the last step is saved too
        (["--checkpoint.interval=5000"], 1),
        (["--checkpoint.interval=1000", "--checkpoint.enable_first_step_checkpoint"], 2),
        (["--checkpoint.interval=500", "--checkpoint.keep_latest_k=1", "--checkpoint.keep_every=7"], 2),
        (["--checkpoint.interval=500", "--checkpoint.keep_every=500"], 2),  # each is there once
        (["--checkpoint.interval=100", "--checkpoint.load_only"], 0),
    ],
)
def test_checkpoints_are_counted_as_they_are_saved(options, count):
    finding = only(find_disk(config_of("--checkpoint.enable", "--training.steps=1000", *options)))
    assert f"; {count} checkpoints of" in finding.found


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "rounding", "size"),
    [
        ("float32", "bfloat16", "remainder", 8),
        ("bfloat16", "float32", "remainder", 12),
        ("bfloat16", "bfloat16", "stochastic", 6),
    ],
)
def test_a_checkpoint_in_fewer_bytes_takes_less_room(dtype, state_dtype, rounding, size):
    options, parameters = options_of_dev()
    formats = [f"--training.dtype={dtype}", f"--optimizer.state_dtype={state_dtype}"]
    formats += [f"--optimizer.bf16_rounding={rounding}", "--training.mixed_precision_param=bfloat16"]
    finding = only(find_disk(config_of(*options, *formats)))
    assert f"checkpoints of {size * parameters / GIB:,.2f} GiB" in finding.found
