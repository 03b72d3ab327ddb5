"""The validation loss of weights in every format is the one that their run has seen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import scripts.validate as validate
from checkpoint.adapter import from_native
from checkpoint.exchange import open_weights
from checkpoint.safetensors_file import write_safetensors
from flux.rules import BFL_RULES, LAYOUTS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
FP32 = 1e-6  # relative: the weights are the same bits, batches of other sizes round differently


@pytest.fixture(scope="module")
def run(train):
    return train(
        *("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.last_save_in_hf", "--ema.enable"),
        *("--validation.freq=2", "--validation.steps=4"),
    )


def figures(tmp_path: Path, *arguments: str) -> dict[str, float]:
    validate.main([*arguments, "--json", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())


def seen(run, name: str) -> dict[str, float]:
    """What a run has logged under one name and those that begin with it, by step."""
    return dict(zip([2, 4], run.series(name), strict=True))


def test_a_run_and_its_average(run, tmp_path, capsys):
    found = figures(tmp_path, "--checkpoint", str(run.folder))
    assert found["step"] == 4 and found["validation_loss"] == seen(run, "validation_loss")[4]
    assert found["validation_loss_stderr"] == seen(run, "validation_loss_stderr")[4]
    assert found["validation_loss/t=0.0625"] == seen(run, "validation_loss/t=0.0625")[4]
    said = capsys.readouterr().out
    assert f"{found['validation_loss']:.4f} ± {found['validation_loss_stderr']:.4f}" in said and "at t = 0.9375" in said
    average = figures(tmp_path, "--checkpoint", str(run.folder), "--ema")
    assert average["validation_loss"] == seen(run, "validation_loss_ema")[4] != found["validation_loss"]


def test_every_format_and_batch_size(run, tmp_path):
    step_2, config = run.folder / "checkpoint" / "step-2", f"--job.config_file={run.folder / 'config.toml'}"
    native = open_weights(step_2, LAYOUTS).tensors
    write_safetensors(tmp_path / "bfl.safetensors", from_native(native, BFL_RULES), None, {})
    for source, step, arguments in (
        (step_2, 2, []),
        (tmp_path / "bfl.safetensors", 2, ["--validation.local_batch_size=16", "--validation.steps=1"]),
        (run.folder / "export" / "diffusers", 4, ["--validation.local_batch_size=1", "--validation.steps=16"]),
    ):
        found = figures(tmp_path, "--checkpoint", str(source), config, *arguments)
        assert found["validation_loss"] == pytest.approx(seen(run, "validation_loss")[step], rel=FP32)
    other = figures(tmp_path, "--checkpoint", str(run.folder), "--validation.times=eighths")
    assert other["validation_loss"] != pytest.approx(seen(run, "validation_loss")[4], rel=100 * FP32)
    every = figures(tmp_path, "--checkpoint", str(run.folder), "--validation.all_timesteps")
    assert len([name for name in every if "/t=" in name]) == 8


def test_a_validation_set_of_its_own_needs_no_training_data(train, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 90, 30)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"color {number}")
    own = ("--validation.dataset=shapes", "--validation.freq=4", "--validation.steps=4")
    run = train("--training.dataset=imagefolder", f"--training.dataset_path={folder}", "--checkpoint.enable", *own)
    shutil.rmtree(folder)
    found = figures(tmp_path, "--checkpoint", str(run.folder))
    assert [found["validation_loss"]] == list(run.series("validation_loss"))


def test_two_processes_say_it_once(run, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = ["scripts.validate", f"--checkpoint={run.folder}", f"--json={tmp_path / 'figures.json'}"]
    options = ["--validation.local_batch_size=2", "--validation.steps=8"]  # the same 16 samples
    done = subprocess.run([*command, *arguments, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["validation_loss"] == pytest.approx(seen(run, "validation_loss")[4], rel=FP32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint=no/such"], "no/such"),
        (["--checkpoint={file}"], "does not say how it is validated: name a configuration, --job.config_file FILE"),
        (["--checkpoint={file}", "--job.config_file={config}", "--model.flavor=flux-debug"], "flux-debug"),
        (["--checkpoint={run}", "--validation.step=3"], "validation.step"),
        (
            ["--checkpoint={run}", "--json=no/such/figures.json"],
            "--json='no/such/figures.json' must be a file in",
        ),
        (["--checkpoint={empty}"], "holds no weights that are known: name a checkpoint"),
        (["--checkpoint={unsaved}"], "holds no weights that can be read: let the run save first, or name another run"),
        (
            ["--checkpoint={file}", "--ema"],
            "only a checkpoint holds an average of the weights beside them: name",
        ),
        (["--checkpoint={plain}", "--ema"], "holds no average of the weights that can be read: leave --ema out"),
    ],
)
def test_bad_input(run, plain_run, tmp_path, arguments, said):
    places = {
        "file": run.folder / "export" / "transformer.safetensors",
        "config": run.folder / "config.toml",
        "run": run.folder,
        "plain": plain_run.folder,
        "empty": tmp_path / "empty",
        "unsaved": tmp_path / "unsaved",
    }
    for name in ("empty", "unsaved"):
        places[name].mkdir()
    shutil.copy(places["config"], places["unsaved"])
    with pytest.raises(ValueError) as caught:
        validate.main([argument.format(**places) for argument in arguments])
    assert said in str(caught.value) and "\n" not in str(caught.value)
