"""Validation and pictures on every layout: the numbers of one process, and no trace in training."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.layouts import build_trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import BATCH, CP, REPLICATE, TP

LOSS_TOLERANCE = 1e-6  # relative; fp32 sums in another order
# Of pixels in -1..1: rounding of fp32 through a sampling run, and encoders at other batch sizes.
PIXEL_TOLERANCE = 2e-4
VALIDATE = (
    "--validation.enable",
    "--validation.steps=3",  # of 4 samples: 12, which 2 groups of 4 do not divide
    "--validation.local_batch_size=4",
    "--validation.save_img_count=3",
    "--validation.denoising_steps=2",
)
ROWS = {
    "fsdp 2": (2, (BATCH(4),)),
    "cp 2": (2, (BATCH(8), CP(2))),
    "tp 2": (2, (BATCH(8), TP(2))),
    "never reshard": (2, (BATCH(4), "--parallelism.fsdp_reshard_after_forward=never")),
    "hsdp 2x2 x cp 2": (8, (BATCH(2), REPLICATE(2), CP(2))),
}


def validate(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> dict:
    """Two updates with or without validation between them."""
    trainer = build_trainer(rank, world_size, folder, overrides)
    batches, found = iter(trainer.loader), {}
    trainer.train_step(batches)
    if trainer.evaluator is not None:
        found["loss"] = trainer.evaluator.validate(trainer.step)
        trainer.evaluator.draw_grid(trainer.step)
        pictures = list(Path(folder).rglob("*.png"))
        from PIL import Image

        found["pixels"] = [np.asarray(Image.open(picture)) for picture in pictures] if rank == 0 else []
    loss, norm = trainer.train_step(batches)
    found["next"] = (trainer.layout.sum(loss).item(), norm.item())
    return found


def run(world_size: int, *overrides: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(validate, world_size, folder, overrides)[0]


@pytest.fixture(scope="module")
def one_process() -> dict:
    return run(1, BATCH(8), *VALIDATE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_layout_validates_like_one_process(one_process, name):
    processes, options = ROWS[name]
    found = run(processes, *options, *VALIDATE)
    assert found["loss"] == pytest.approx(one_process["loss"], rel=LOSS_TOLERANCE)
    (ours,), (theirs,) = found["pixels"], one_process["pixels"]
    assert np.abs(ours.astype(float) - theirs.astype(float)).max() <= 255 * PIXEL_TOLERANCE + 1  # + rounding to 8 bits
    assert found["next"] == run(processes, *options)["next"], "training does not notice validation"


def test_control_another_number_of_samples_is_another_loss(one_process):
    other = run(2, BATCH(4), *VALIDATE, "--validation.steps=2")
    assert other["loss"] != pytest.approx(one_process["loss"], rel=100 * LOSS_TOLERANCE)
