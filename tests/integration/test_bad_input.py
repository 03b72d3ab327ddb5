"""What a user can get wrong: one message with key, value, rule and remedy, the right exit code, no traceback."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import memory_advice
from scripts import sample
from tests.integration.short_runs import TINY
from train import EXIT_CODES, main, recorded_exit

AUTOENCODER = "assets/tiny/autoencoder.safetensors"


def fail(capfd, tmp_path, *overrides: str) -> tuple[int, str]:
    """Runs train.py; its exit code and what it said on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*TINY, f"--job.dump_folder={tmp_path / 'run'}", *overrides])
    said = capfd.readouterr().err
    assert "Traceback" not in said
    if (tmp_path / "run").exists():
        record = json.loads((tmp_path / "run" / "exit.json").read_text())
        assert record["code"] == caught.value.code and record["reason"] in said
    return caught.value.code, said


def spoiled_autoencoder(tmp_path, kind: str) -> str:
    path = tmp_path / "autoencoder.safetensors"
    tensors = load_file(AUTOENCODER)
    if kind == "missing":
        return str(path)
    if kind == "random":
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in tensors.items()}
    if kind == "other channels":
        tensors["encoder.conv_out.weight"] = tensors["encoder.conv_out.weight"][:16].contiguous()
        tensors["encoder.conv_out.bias"] = tensors["encoder.conv_out.bias"][:16].contiguous()
        tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:, :8].contiguous()
    save_file(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    return str(path)


@pytest.mark.parametrize("kind", ["missing", "random", "other channels", "truncated"])
def test_wrong_autoencoders(capfd, tmp_path, kind):
    path = spoiled_autoencoder(tmp_path, kind)
    code, said = fail(capfd, tmp_path, f"--encoder.autoencoder_path={path}")
    assert code == 2 and "encoder.autoencoder_path" in said and path in said, said


def test_encoder_folder_of_another_architecture(capfd, tmp_path):
    code, said = fail(capfd, tmp_path, "--encoder.t5_encoder=assets/tiny/clip")
    assert code == 2 and "encoder.t5_encoder" in said and "assets/tiny/clip" in said, said


def test_encoder_that_is_not_downloaded(capfd, tmp_path):
    code, said = fail(capfd, tmp_path, "--encoder.t5_encoder=google/t5-v1_1-xxl")
    assert code == 2 and "python -m scripts.download_assets" in said, said


def test_clip_model_without_eyes(capfd, tmp_path):
    code, said = fail(capfd, tmp_path, "--validation.clip_score_path=assets/tiny/clip")
    assert code == 2 and "validation.clip_score_path" in said and "step 1" not in said, said


def test_missing_weight_file(capfd, tmp_path):
    shutil.copytree("assets/tiny/t5", tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").unlink()
    code, said = fail(capfd, tmp_path, f"--encoder.t5_encoder={tmp_path / 't5'}")
    assert code == 2 and "encoder.t5_encoder" in said and "model.safetensors" in said, said


def test_picture_size_that_is_no_multiple_of_16(capfd, tmp_path):
    code, said = fail(capfd, tmp_path, "--training.img_size=100")
    assert code == 2 and "training.img_size=100 must be a multiple of 16: use 96 or 112" in said, said
    assert not (tmp_path / "run").exists()


def picture_folder(tmp_path, count: int):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 50), (number * 9, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


FOLDERS = {
    "no folder": (lambda folder: shutil.rmtree(folder), "is not a folder"),
    "no pictures": (lambda folder: [path.unlink() for path in folder.iterdir()], "has no pictures"),
    "empty caption": (lambda folder: [path.write_text("") for path in folder.glob("*.txt")], "the caption is empty"),
    "not an image": (lambda folder: [path.write_text("x") for path in folder.glob("*.png")], "(damaged: "),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", FOLDERS)
def test_faulty_picture_folders_end_with_the_data_code(capfd, tmp_path, kind, workers):
    change, message = FOLDERS[kind]
    folder = picture_folder(tmp_path, 24)
    change(folder)
    data = ["--training.dataset=imagefolder", f"--training.dataset_path={folder}", "--validation.enable=false"]
    code, said = fail(capfd, tmp_path, *data, f"--training.dataloader.num_workers={workers}")
    assert code == 3 and message in said and folder.name in said, said


def test_a_data_set_without_a_public_home_needs_its_place(capfd, tmp_path):
    code, said = fail(capfd, tmp_path, "--training.dataset=cc12m-test")
    assert code == 2 and "training.dataset='cc12m-test' needs to know where its pictures are" in said, said


def test_a_layout_that_does_not_fit_the_processes(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, said = fail(capfd, tmp_path)
    assert code == 2 and "WORLD_SIZE=8 in the environment" in said and "use torchrun" in said, said
    monkeypatch.setenv("RANK", "0")
    code, said = fail(capfd, tmp_path, "--parallelism.data_parallel_replicate_degree=3")
    assert code == 2 and "data_parallel_replicate_degree=3 must divide the 8 processes of this run" in said, said
    assert not (tmp_path / "run").exists()


def test_pretended_processes_train_nothing(capfd, tmp_path):
    code, said = fail(capfd, tmp_path, "--comm.mode=fake_backend")
    assert code == 2 and "python -m scripts.dry_run" in said, said


def test_faulty_prompt_file(capfd, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    code, said = fail(capfd, tmp_path, f"--validation.prompts_path={tmp_path / 'prompts.txt'}")
    assert code == 2 and "validation.prompts_path" in said and "has no prompts" in said, said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint=nowhere"], "nowhere is missing"),
        (["--checkpoint=nowhere", "--height=100"], "--height=100 must be a positive multiple of 16: use 96"),
        (["--checkpoint=nowhere", "--steps=0"], "--steps=0 must be at least 1"),
        (["--checkpoint=nowhere", "--seed=-1"], "--seed=-1 must be"),
    ],
)
def test_sampling(capfd, arguments, message):
    with pytest.raises(SystemExit) as caught, recorded_exit(0, EXIT_CODES):
        sample.main([*arguments, "--prompts", "a red circle"])
    said = capfd.readouterr().err
    assert caught.value.code == 2 and message in said and "Traceback" not in said


def test_photographs_with_the_tiny_autoencoder_warn_once(capfd, tmp_path):
    folder = picture_folder(tmp_path, 24)
    main(
        [
            *TINY,
            f"--job.dump_folder={tmp_path / 'run'}",
            "--training.dataset=imagefolder",
            f"--training.dataset_path={folder}",
            "--training.steps=2",
        ]
    )
    said = capfd.readouterr().err
    assert said.count("warning: the tiny autoencoder blurs photographs") == 1
    assert (tmp_path / "run" / "img" / "step-000002.png").exists()


def test_a_plan_that_does_not_fit_ends_the_run_before_anything_is_built(monkeypatch, tmp_path, capfd):
    """A GPU of 1 MiB, which no CPU of a test is."""

    def check_on_gpu(config, layout):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2**20, 2**30))
        memory_advice.check_memory(config, replace(layout, device=torch.device("cuda")))

    monkeypatch.setattr("preflight.check_memory", check_on_gpu)
    monkeypatch.setattr("train.FluxTrainer", lambda *_arguments: pytest.fail("built"))
    code, said = fail(capfd, tmp_path)
    assert code == EXIT_CODES[ValueError] and "does not fit into memory with training.local_batch_size=" in said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["exit.json", "metrics.jsonl"]
