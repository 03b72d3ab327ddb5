"""Several ranks over data with damage: what was bad is written down once, and the numbers are those of one process."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.distributed.layouts import build_trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import BATCH, CP, TP

LOSS_TOLERANCE = 1e-6  # relative; fp32 sums in another order
PICTURES, BAD = 12, (2, 9)
STEPS = 4


def write_pictures(folder: Path) -> None:
    for number in range(PICTURES):
        file = io.BytesIO()
        size = [(32, 32), (48, 32)][number % 2]
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        (folder / f"{number:02d}.png").write_bytes(file.getvalue()[: 40 if number in BAD else None])
        (folder / f"{number:02d}.txt").write_text(f"noise {number}")


def train(rank: int, world_size: int, folder: str, overrides: tuple[str, ...]) -> list[float]:
    trainer = build_trainer(rank, world_size, folder, overrides)
    batches, losses = iter(trainer.loader), []
    for _ in range(STEPS):
        loss, norm = trainer.train_step(batches)
        losses += [trainer.layout.sum(loss).item(), norm.item()]
        trainer.report.tell_all(trainer.step, trainer.cursor)
    return losses


def run(tmp_path: Path, name: str, world_size: int, *overrides: str) -> tuple[list[float], list[dict]]:
    pictures = tmp_path / "pictures"
    if not pictures.exists():
        pictures.mkdir()
        write_pictures(pictures)
    folder = tmp_path / name
    folder.mkdir()
    options = ("--training.dataset=imagefolder", f"--training.dataset_path={pictures}", "--training.img_size=32")
    losses = run_ranks(train, world_size, str(folder), (*options, *overrides))[0]
    (file,) = folder.rglob("bad_samples.jsonl")
    return losses, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "buckets",
    [(), ("--data.buckets.enable", "--data.buckets.step=16", "--data.buckets.constant_tokens")],
    ids=["squares", "buckets"],
)
def test_damage_on_several_ranks(tmp_path, buckets):
    alone, records = run(tmp_path, "one", 1, BATCH(8), *buckets)
    assert {int(Path(record["key"]).stem) for record in records} == set(BAD)
    for name, layout in (("dp", (BATCH(4),)), ("cp", (BATCH(8), CP(2))), ("tp", (BATCH(8), TP(2)))):
        losses, told = run(tmp_path, name, 2, *layout, *buckets)
        assert losses == pytest.approx(alone, rel=LOSS_TOLERANCE)
        assert told == records, "each once, in order"
