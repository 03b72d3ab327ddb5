"""Figures come one step late, and still in order: before validation, before a checkpoint, before the end."""

import json
import math

import pytest
import torch

from parallel.degrees import Degrees
from parallel.mesh import Layout
from tests.integration.short_runs import TINY
from train import FluxTrainer

STEPS = 4


def build(folder, *options: str) -> FluxTrainer:
    from config.parse import load_config

    config = load_config([*TINY, f"--job.dump_folder={folder}", f"--training.steps={STEPS}", *options])
    return FluxTrainer(config, folder, Layout(Degrees(), torch.device("cpu")))


def rows(folder) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], "validation" if "validation_loss" in line else "loss") for line in lines]


def test_rows_are_in_the_order_of_steps(tmp_path):
    build(tmp_path, "--validation.freq=2", "--validation.eval_freq=0").train()
    assert rows(tmp_path) == [
        (1, "loss"),
        (2, "loss"),
        (2, "validation"),
        (3, "loss"),
        (4, "loss"),
        (4, "validation"),
    ]


def test_a_row_is_written_when_the_next_step_has_been_taken(tmp_path):
    trainer, seen = build(tmp_path, "--validation.enable=false"), []
    trainer.train(lambda: seen.append([step for step, _ in rows(tmp_path)]))
    assert seen == [[], [1], [1, 2], [1, 2, 3]]
    assert [step for step, _ in rows(tmp_path)] == [1, 2, 3, 4]


def train_until(trainer: FluxTrainer, *broken: int) -> int:
    """Lets the loss of some steps be no number, the last one too many. Returns the step in which the run ended."""
    forward_backward = trainer.forward_backward

    def breaking(batches):
        loss = forward_backward(batches)
        return loss * math.nan if trainer.step + 1 in broken else loss

    trainer.forward_backward = breaking
    with pytest.raises(FloatingPointError, match=f"^step {broken[-1]}: loss or gradients were no numbers in .* lower"):
        trainer.train()
    return trainer.step


ONE = "--reliability.max_nonfinite=1"


def test_a_loss_that_is_no_number_is_found_one_step_later(tmp_path):
    assert train_until(build(tmp_path, "--validation.enable=false", ONE), 2) == 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_only_those_in_a_row_count(tmp_path):
    options = ["--validation.enable=false", "--training.steps=9", "--reliability.max_nonfinite=3"]
    assert train_until(build(tmp_path, *options), 1, 2, 4, 6, 7, 8) == 9
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("nonfinite")] == [1, 2, 4, 6, 7, 8]


@pytest.mark.parametrize("broken", [2, 4])
def test_a_loss_that_is_no_number_is_found_before_it_is_saved(tmp_path, broken):
    trainer = build(tmp_path, "--validation.enable=false", ONE, "--checkpoint.enable", "--checkpoint.interval=2")
    assert train_until(trainer, broken) == broken
    trainer.checkpointer.close()
    saved = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert saved == ([] if broken == 2 else ["step-2"])


def test_a_loss_that_is_no_number_is_found_before_validation(tmp_path):
    assert train_until(build(tmp_path, "--validation.freq=2", "--validation.eval_freq=0", ONE), 2) == 2
    assert rows(tmp_path) == [(1, "loss"), (2, "loss")]


def test_minutes_are_over_at_a_logged_step_and_the_next_one_is_saved(tmp_path, monkeypatch):
    options = ("--checkpoint.enable", "--checkpoint.interval=100", "--checkpoint.interval_minutes=1")
    trainer = build(tmp_path, "--validation.enable=false", *options)
    saved, save = [], trainer.save
    monkeypatch.setattr(trainer.checkpointer, "is_overdue", lambda: trainer.step == 2)
    monkeypatch.setattr(trainer, "save", lambda: (saved.append(trainer.step), save()))
    trainer.train()
    trainer.checkpointer.close()
    assert saved == [3, 4], "and the last step"
