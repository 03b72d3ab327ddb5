"""Validation and pictures on every layout: the numbers of one process, and no trace in training."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.layouts import build_trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import BATCH, CP, REPLICATE, TP
from tests.integration.short_runs import TINY
from tests.unit.flux.whole_clip import save_clip
from training.metrics import METRICS_NAME

LOSS_TOLERANCE = 1e-6  # relative; fp32 sums in another order
# Of pixels in -1..1: rounding of fp32 through a sampling run, and encoders at other batch sizes.
PIXEL_TOLERANCE = 2e-4
SCORE_TOLERANCE = 0.1  # of a CLIP score out of 100: pixels that round to another of 256 steps
PICTURES = 17  # two and more at each time, and no layout and no batch size here divides it
VALIDATE = (
    "--ema.enable",
    "--validation.enable",
    "--validation.dataset=imagefolder",
    "--validation.steps=-1",
    "--validation.freq=1",
    "--validation.eval_freq=1",
    "--validation.save_img_count=3",
    "--validation.denoising_steps=2",
)
VALIDATE_AT = "--validation.local_batch_size={}".format
# Processes, samples that each of them validates at a time, options.
ROWS = {
    "8 at a time": (1, 8, (BATCH(8),)),
    "fsdp 2": (2, 3, (BATCH(4),)),
    "hsdp 2x2": (4, 1, (BATCH(2), REPLICATE(2))),
    "cp 2": (2, 8, (BATCH(8), CP(2))),
    "tp 2": (2, 1, (BATCH(8), TP(2))),
    "never reshard": (2, 3, (BATCH(4), "--parallelism.fsdp_reshard_after_forward=never")),
    "hsdp 2x2 x cp 2": (8, 1, (BATCH(2), REPLICATE(2), CP(2))),
}


def validate(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> dict:
    """Two updates with or without validation between them."""
    trainer = build_trainer(rank, world_size, folder, overrides)
    batches, found = iter(trainer.loader), {}
    trainer.train_step(batches)
    if trainer.evaluator is not None:
        trainer.evaluator.evaluate(trainer.step, samples=0)
        from PIL import Image

        lines = (Path(folder) / METRICS_NAME).read_text().splitlines() if rank == 0 else []
        found["figures"] = {name: value for line in lines for name, value in json.loads(line).items()}
        pictures = sorted(Path(folder).rglob("*.png"))
        found["pixels"] = {path.name: np.asarray(Image.open(path)) for path in pictures} if rank == 0 else {}
    loss, norm = trainer.train_step(batches)
    found["next"] = (trainer.layout.sum(loss).item(), norm.item())
    return found


def run(world_size: int, *overrides: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(validate, world_size, folder, overrides)[0]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> str:
    """The option that names the held-out pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("held-out")
    for number in range(PICTURES):
        Image.new("RGB", (64, 64), (number * 15, 255 - number * 15, 90)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"color number {number}")
    return f"--validation.dataset_path={folder}"


BUCKETS = ("--training.img_size=64", "--data.buckets.enable", "--data.buckets.step=32", "--encoder.dtype=float32")


@pytest.fixture(scope="module")
def stored_shapes(tmp_path_factory) -> tuple[str, ...]:
    """The options of a validation on a cache of pictures of several shapes."""
    from PIL import Image

    from scripts import preencode

    folder = tmp_path_factory.mktemp("stored")
    for number in range(PICTURES):
        size = [(64, 64), (96, 64), (64, 96)][number % 3]
        Image.new("RGB", size, (number * 15, 90, 255 - number * 15)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"color number {number}")
    pictures = ("--training.dataset=imagefolder", f"--training.dataset_path={folder}", f"--out={folder / 'cache'}")
    preencode.main([*TINY, *BUCKETS, *pictures], rank=0, world_size=1)
    return (*BUCKETS, "--validation.dataset=cache", f"--validation.dataset_path={folder / 'cache'}")


@pytest.fixture(scope="module")
def one_process(held_out) -> dict:
    return run(1, BATCH(8), *VALIDATE, VALIDATE_AT(4), held_out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_layout_validates_like_one_process(one_process, held_out, name):
    processes, at_a_time, options = ROWS[name]
    found = run(processes, *options, *VALIDATE, VALIDATE_AT(at_a_time), held_out)
    assert found["figures"] == pytest.approx(one_process["figures"], rel=LOSS_TOLERANCE)
    assert found["pixels"].keys() == one_process["pixels"].keys() == {"step-000001.png", "step-000001_ema.png"}
    for picture, theirs in one_process["pixels"].items():
        difference = np.abs(found["pixels"][picture].astype(float) - theirs.astype(float)).max()
        assert difference <= 255 * PIXEL_TOLERANCE + 1, picture  # + rounding to 8 bits
    assert found["next"] == run(processes, *options)["next"], "training does not notice validation"


@pytest.mark.slow
def test_pictures_of_several_shapes_on_any_layout(stored_shapes):
    options = (*(option for option in VALIDATE if "dataset" not in option), "--validation.eval_freq=0", *stored_shapes)
    alone = run(1, BATCH(8), *options, VALIDATE_AT(4))["figures"]
    for processes, layout in ((2, (BATCH(4), VALIDATE_AT(3))), (2, (BATCH(8), VALIDATE_AT(2), CP(2)))):
        found = run(processes, *options, *layout)["figures"]
        assert found == pytest.approx(alone, rel=LOSS_TOLERANCE)
    assert len([name for name in alone if "/t=" in name]) == 2 * 8


def test_every_figure_is_there_and_the_average_is_another_model(one_process):
    figures = one_process["figures"]
    kinds = ("validation_loss", "validation_loss_ema")
    assert all(f"{kind}{part}" in figures for kind in kinds for part in ("", "_stderr", "/t=0.0625", "/t=0.9375"))
    assert len([name for name in figures if "/t=" in name]) == 2 * 8
    assert figures["validation_loss"] != pytest.approx(figures["validation_loss_ema"], rel=100 * LOSS_TOLERANCE)


def test_control_another_number_of_samples_is_another_loss(one_process, held_out):
    other = run(2, BATCH(4), *VALIDATE, VALIDATE_AT(4), held_out, "--validation.steps=2")["figures"]
    assert other["validation_loss"] != pytest.approx(
        one_process["figures"]["validation_loss"], rel=100 * LOSS_TOLERANCE
    )


def score(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> tuple[str, float | None]:
    """Where this rank has the CLIP model, and the score that it has logged."""
    trainer = build_trainer(rank, world_size, folder, overrides)
    assert trainer.evaluator is not None and trainer.evaluator.clip_scorer is not None
    trainer.evaluator.evaluate(1, samples=0)
    lines = (Path(folder) / METRICS_NAME).read_text().splitlines() if rank == 0 else []
    found = [json.loads(line)["clip_score"] for line in lines if '"clip_score"' in line]
    return trainer.evaluator.clip_scorer.model.device.type, found[0] if found else None


@pytest.mark.slow
def test_rank_0_alone_scores_by_clip(held_out, tmp_path):
    clip, prompts = save_clip(tmp_path / "clip"), tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na large blue square on the left\n" + "a green triangle " * 40)
    paths = (f"--validation.clip_score_path={clip}", f"--validation.prompts_path={prompts}")
    overrides = (*VALIDATE, VALIDATE_AT(4), held_out, *paths)
    ((_, alone),) = run_ranks(score, 1, str(tmp_path), (BATCH(8), *overrides))
    (first, shared), (second, nothing) = run_ranks(score, 2, str(tmp_path), (BATCH(4), *overrides))
    assert (first, second, nothing) == ("cpu", "meta", None)
    assert shared == pytest.approx(alone, abs=SCORE_TOLERANCE) and alone > 0
