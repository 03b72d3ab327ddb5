"""Drawing with a finished run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from build import save_pipeline
from checkpoint.adapter import from_native
from checkpoint.exchange import open_weights
from checkpoint.safetensors_file import write_safetensors
from flux.config import Encoder
from flux.identify import expected_shapes
from flux.rules import BFL_RULES, LAYOUTS
from flux.spec import SPECS
from scripts import sample, score_shapes

ROOT = Path(__file__).parents[2]
DEBUG_SHAPES = expected_shapes(SPECS["flux-debug"].transformer)

PROMPTS = ["a red circle on a blue background", "a small white star at the top on a black background"]


def draw(run, out, *arguments: str) -> list[Image.Image]:
    sample.main([f"--checkpoint={run.folder}", f"--out={out}", "--steps=2", *arguments])
    return [Image.open(path).convert("RGB") for path in sorted(out.iterdir())]


def test_a_picture_per_prompt(plain_run, tmp_path, capsys):
    images = draw(plain_run, tmp_path / "out", "--prompts", *PROMPTS, "--seed=7")
    assert [image.size for image in images] == [(32, 32)] * 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000-seed7.png", "001-seed8.png"]
    assert PROMPTS[1] in capsys.readouterr().out


def test_seeds_belong_to_pictures_not_to_batches(plain_run, tmp_path):
    together = draw(plain_run, tmp_path / "a", "--prompts", *PROMPTS, "--seed=7")
    one_by_one = draw(plain_run, tmp_path / "b", "--prompts", *PROMPTS, "--seed=7", "--batch-size=1")
    second_alone = draw(plain_run, tmp_path / "c", "--prompts", PROMPTS[1], "--seed=8")
    for one, other in zip([*together, together[1]], [*one_by_one, second_alone[0]], strict=True):
        difference = torch.tensor(list(one.tobytes()), dtype=torch.int16) - torch.tensor(list(other.tobytes()))
        assert difference.abs().max() <= 1  # rounding to bytes of fp32 results that differ in the last digits
    assert together[0].tobytes() != draw(plain_run, tmp_path / "d", "--prompts", PROMPTS[0], "--seed=8")[0].tobytes()


def test_size_and_prompt_file(plain_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, ""]))
    options = [f"--prompts-file={tmp_path / 'prompts.txt'}", "--height=48", "--width=80", "--cfg-scale=1"]
    assert [image.size for image in draw(plain_run, tmp_path / "out", *options)] == [(80, 48)] * 2


def test_scores_are_printed_and_written_to_the_metrics(plain_run, tmp_path, capsys):
    score_shapes.main([f"--checkpoint={plain_run.folder}", "--count=4", "--steps=2", f"--out={tmp_path / 'grid.png'}"])
    printed = capsys.readouterr().out
    last = json.loads((plain_run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and f"{last['shape_color_accuracy']:.1%}" in printed
    assert Image.open(tmp_path / "grid.png").size == (70, 70)


@pytest.mark.parametrize("count", [0, 10**6])
def test_counts_beyond_the_held_out_scenes(plain_run, count):
    with pytest.raises(ValueError, match="--count"):
        score_shapes.main([f"--checkpoint={plain_run.folder}", f"--count={count}"])


RUN = ("--checkpoint.enable", "--checkpoint.interval=2", "--ema.enable", "--checkpoint.export_dtype=float32")


@pytest.fixture(scope="module")
def saved_run(train):
    """With checkpoints of steps 2 and 4, an average of the weights, and an export after step 4."""
    return train(*RUN)


@pytest.fixture(scope="module")
def step_2(saved_run):
    return saved_run.folder / "checkpoint/step-2"


@pytest.fixture(scope="module")
def sources(step_2, tmp_path_factory):
    """The weights of step 2 in every layout that can be drawn with."""
    folder = tmp_path_factory.mktemp("sources")
    spec, native = SPECS["flux-tiny"], open_weights(step_2, LAYOUTS).tensors
    write_safetensors(folder / "bfl.safetensors", from_native(native, BFL_RULES), None, {})
    write_safetensors(folder / "own.safetensors", native, None, {"flavor": "flux-tiny", "step": "2"})
    save_pipeline(folder / "pipeline", spec, Encoder(), False, from_native(native, spec.diffusers_rules))
    return {
        "checkpoint": step_2,
        "Black Forest Labs": folder / "bfl.safetensors",
        "own file": folder / "own.safetensors",
        "pipeline": folder / "pipeline",
        "diffusers transformer": folder / "pipeline/transformer",
    }


def draw_from(source, out, *arguments: str) -> list[bytes]:
    options = [f"--checkpoint={source}", f"--out={out}", "--steps=2", "--cfg-scale=1", "--height=32", "--width=32"]
    sample.main([*options, "--prompts", PROMPTS[0], *arguments])
    return [Image.open(path).convert("RGB").tobytes() for path in sorted(out.iterdir())]


def test_every_layout_gives_the_same_pictures(sources, saved_run, tmp_path):
    """And the run itself, which is two steps further, gives others."""
    (tmp_path / "defaults.toml").touch()  # the settings of what knows no others, such as the number of T5 tokens
    expected = draw_from(sources["checkpoint"], tmp_path / "expected", f"--config={tmp_path / 'defaults.toml'}")
    for name, source in sources.items():
        if name != "checkpoint":
            assert draw_from(source, tmp_path / name) == expected, name
    assert draw_from(saved_run.folder, tmp_path / "run", f"--config={tmp_path / 'defaults.toml'}") != expected


def test_a_checkpoint_knows_the_settings_of_its_run(step_2, saved_run, tmp_path):
    moved = shutil.copytree(step_2, tmp_path / "step-2")
    expected = draw_from(step_2, tmp_path / "a", f"--config={saved_run.folder / 'config.toml'}")
    assert draw_from(moved, tmp_path / "b") == expected


def test_a_run_is_drawn_with_the_newest_that_it_left(saved_run, tmp_path, capsys, caplog):
    newest = draw_from(saved_run.folder / "checkpoint/step-4", tmp_path / "step-4")
    assert draw_from(saved_run.folder, tmp_path / "run") == newest
    assert "after 4 steps" in capsys.readouterr().out

    folder = tmp_path / "copy"
    shutil.copytree(saved_run.folder, folder)
    shutil.rmtree(folder / "export")
    assert draw_from(folder, tmp_path / "no-export") == newest
    assert "step-4: flux-tiny after 4 steps" in capsys.readouterr().out

    tensors = next((folder / "checkpoint/step-4").glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert draw_from(folder, tmp_path / "damaged") != newest
    assert "step-2: flux-tiny after 2 steps" in capsys.readouterr().out
    (warning,) = [text for text in caplog.messages if "others are taken" in text]
    assert "step-4" in warning and "take another checkpoint" in warning


def test_an_old_export_does_not_hide_a_newer_checkpoint(saved_run, sources, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(saved_run.folder, folder)
    shutil.copyfile(sources["own file"], folder / "export/transformer.safetensors")
    draw_from(folder, tmp_path / "out")
    assert "step-4: flux-tiny after 4 steps" in capsys.readouterr().out


def test_a_damaged_export_does_not_hide_a_whole_checkpoint(saved_run, tmp_path, capsys):
    folder = shutil.copytree(saved_run.folder, tmp_path / "copy")
    (folder / "export/transformer.safetensors").write_bytes(b"torn")
    draw_from(folder, tmp_path / "out")
    assert "step-4: flux-tiny after 4 steps\n32 x 32 px, 2 steps, cfg 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("away", ["/tmp/elsewhere", "../elsewhere"])
def test_a_checkpoint_does_not_choose_a_place_outside(step_2, tmp_path, away):
    """It may be somebody else's."""
    folder = shutil.copytree(step_2, tmp_path / "step-2")
    state = json.loads((folder / "train_state.json").read_text())
    state["config"]["inference"]["save_img_folder"] = away
    (folder / "train_state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"inference\.save_img_folder=.* leads away: give --out"):
        sample.main([f"--checkpoint={folder}", "--prompts", PROMPTS[0]])


def test_average_of_the_weights(saved_run, step_2, tmp_path):
    average = draw_from(step_2, tmp_path / "average", "--ema")
    assert average != draw_from(step_2, tmp_path / "weights")
    of_step_4 = draw_from(saved_run.folder / "checkpoint/step-4", tmp_path / "step-4", "--ema")
    assert draw_from(saved_run.folder, tmp_path / "run", "--ema") == of_step_4 != average
    folder = shutil.copytree(saved_run.folder, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoint")
    assert draw_from(folder, tmp_path / "exported", "--ema") == of_step_4


def test_another_number_format(step_2, tmp_path):
    assert draw_from(step_2, tmp_path / "a", "--dtype=bfloat16") != draw_from(step_2, tmp_path / "b")


def test_what_the_command_line_leaves_open_the_configuration_says(step_2, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "config.toml").write_text(
        f'[inference]\nprompts_path = "{tmp_path / "prompts.txt"}"\nsave_img_folder = "{tmp_path / "out"}"\n'
        "img_size = 48\nlocal_batch_size = 1\n[validation]\ndenoising_steps = 2\n"
    )
    sample.main([f"--checkpoint={step_2}", f"--config={tmp_path / 'config.toml'}", "--width=64"])
    assert [Image.open(path).size for path in sorted((tmp_path / "out").iterdir())] == [(64, 48)] * 2
    assert "2/2" not in capsys.readouterr().err  # two batches of one picture, of two steps each


@pytest.mark.slow
def test_processes_share_the_prompts(step_2, tmp_path):
    prompts = [*PROMPTS, "a red circle"]
    options = [f"--checkpoint={step_2}", "--steps=2", "--height=32", "--width=32", "--prompts", *prompts]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scripts.sample"]
    done = subprocess.run(
        [sys.executable, *command, *options, f"--out={tmp_path / 'two'}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # The second process may be ready before the first one has told what is drawn.
    drawn = [line.rpartition("  ")[2] for line in done.stdout.splitlines() if ".png  " in line]
    assert sorted(drawn) == sorted(prompts)
    sample.main([*options, f"--out={tmp_path / 'one'}"])
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and len(names) == 3
    for name in names:
        one, two = (torch.tensor(list(Image.open(tmp_path / side / name).tobytes())) for side in ("one", "two"))
        assert (one - two).abs().max() <= 1, name  # rounding to bytes, as batches are others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint={empty}"], "holds no weights that are known"),
        (["--checkpoint={empty}/none.safetensors"], "is missing"),
        (["--checkpoint={own file}", "--ema"], "only a checkpoint holds an average"),
        (["--checkpoint={plain}", "--ema"], "holds no average of the weights that can be read: leave --ema out"),
        (["--checkpoint={config}"], "config holds no weights that can be read: let the run save first, or name"),
        (["--checkpoint={own file}", "--guidance=3"], "--guidance=3 has no effect"),
        (["--checkpoint={checkpoint}", "--config=train_configs/flux_schnell.toml"], "flux-tiny.*flux-schnell"),
        (["--checkpoint={own file}", "--config={empty}/none.toml"], "none.toml"),
        (["--checkpoint={debug}"], "flux-debug without its encoders.*--config train_configs/flux_debug.toml"),
        (["--checkpoint={bin}"], "only these are safe to open"),
    ],
)
def test_weights_that_cannot_be_drawn_with(sources, plain_run, tmp_path, arguments, message):
    names = {"bin": "weights.bin", "debug": "debug.safetensors", "empty": "empty", "config": "config"}
    files = {name: tmp_path / file for name, file in names.items()}
    paths = {name: str(path) for name, path in (sources | files | {"plain": plain_run.folder}).items()}
    files["bin"].write_bytes(b"no weights"), files["empty"].mkdir(), files["config"].mkdir()
    shutil.copy(plain_run.folder / "config.toml", files["config"])
    if "{debug}" in arguments[0]:
        zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in DEBUG_SHAPES.items()}
        save_file(zeros, files["debug"])
    with pytest.raises(ValueError, match=message) as caught:
        sample.main([*(argument.format(**paths) for argument in arguments), "--prompts", "a red circle"])
    assert "\n" not in str(caught.value)


def test_no_prompts(sources):
    with pytest.raises(ValueError, match="no prompts are given: use --prompts or --prompts-file, or set inference"):
        sample.main([f"--checkpoint={sources['own file']}"])
