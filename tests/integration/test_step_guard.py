"""What a run makes of odd numbers and of wishes to stop, in one process."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch

from config.parse import load_config
from parallel.degrees import Degrees
from parallel.mesh import Layout
from runtime.stop import Preempted
from tests.integration.short_runs import TINY
from train import FluxTrainer
from training.spikes import WINDOW

USUAL = [[2.0 + 0.3 * (number % 3), 1.0 + 0.3 * (number % 3)] for number in range(WINDOW)]


def build(folder, *options: str) -> FluxTrainer:
    config = load_config([*TINY, f"--job.dump_folder={folder}", "--validation.enable=false", *options])
    return FluxTrainer(config, folder, Layout(Degrees(), torch.device("cpu")))


def train_with_spike(folder, *options: str) -> tuple[list[float], dict]:
    """The loss of step 2 is a thousand times what it would be. Returns a weight after each step, and the incident."""
    trainer = build(folder, *options)
    trainer.guard._spikes.load(USUAL)
    forward_backward, weights = trainer.forward_backward, []

    def spiking(batches):
        loss = forward_backward(batches)
        return loss * 1000 if trainer.step == 1 else loss

    trainer.forward_backward = spiking
    trainer.train(lambda: weights.append(next(trainer.model.parameters()).detach().sum().item()))
    return weights, json.loads((folder / "incidents" / "step-000002.json").read_text())


def test_a_spike_is_told_and_made(tmp_path, caplog):
    weights, incident = train_with_spike(tmp_path)
    assert len(set(weights)) == 4, "all updates are made"
    assert incident["kind"] == "spike" and not incident["skipped"] and incident["loss"] > 500
    assert [position for position, _ in incident["ranks"][0]["samples"]] == list(range(8, 16))
    told = next(record.getMessage() for record in caplog.records if "a spike" in record.getMessage())
    assert "usual are 2.298 and 1.3" in told and str(tmp_path / "incidents") in told
    assert not (tmp_path / "incidents" / "step-000003.json").exists()


def test_a_spike_may_be_left_out(tmp_path):
    weights, incident = train_with_spike(tmp_path, "--reliability.skip_spikes")
    assert weights[1] == weights[0] != weights[2] and incident["skipped"]


def test_control_without_spikes_nothing_is_told(tmp_path):
    trainer = build(tmp_path, "--reliability.spike_sigma=0")
    trainer.guard._spikes.load(USUAL)
    trainer.train()
    assert not (tmp_path / "incidents").exists()


EVALUATED = ["--validation.enable", "--validation.freq=2", "--validation.eval_freq=2", "--checkpoint.enable"]


def stop_at(trainer: FluxTrainer, call: int) -> None:
    """Sends SIGTERM at the given question of an evaluation whether to stop."""
    asked, poll = [], trainer.guard.poll

    def counted() -> bool:
        asked.append(1)
        if len(asked) == call:
            signal.raise_signal(signal.SIGTERM)
        return poll()

    trainer.guard.poll = counted


def rows(folder, name: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if name in line]


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_evaluation_that_is_stopped_is_made_when_the_run_goes_on(tmp_path, call):
    """Two batches of validation, and two steps of drawing, which end before they are done."""
    trainer = build(tmp_path, *EVALUATED)
    stop_at(trainer, call)
    with pytest.raises(Preempted, match="SIGTERM: saved step 2"):
        trainer.train()
    trainer.metrics.close()
    assert rows(tmp_path, "validation_loss") == ([2] if call > 2 else [])
    assert not list((tmp_path / "img").glob("*"))
    trainer = build(tmp_path, *EVALUATED)
    assert trainer.step == 2
    trainer.train()
    assert rows(tmp_path, "validation_loss") == ([2, 2, 4] if call > 2 else [2, 4]), "what was whole may be there twice"
    assert sorted(path.name for path in (tmp_path / "img").glob("*")) == ["step-000002.png", "step-000004.png"]


def test_an_evaluation_has_its_own_limit_from_its_beginning(tmp_path):
    """Data workers start, and read, before the first question whether to stop."""
    trainer, expected = build(tmp_path, *EVALUATED), []
    trainer.guard.watchdog.expect = lambda what, seconds, step=0: expected.append(what)
    trainer.evaluator.evaluate = lambda step, samples: expected.append("evaluated")
    trainer.train()
    before = [expected[place - 1] for place, what in enumerate(expected) if what == "evaluated"]
    assert before == ["an evaluation"] * 2


def test_who_waits_for_others_waits_longer_than_the_watchdog(tmp_path):
    guard, timeouts, limits = build(tmp_path).guard, [], []
    guard.layout = SimpleNamespace(set_timeout=timeouts.append)
    guard.watchdog.expect_step = lambda *of: limits.pop()
    for limit in (60, 100, 150, 250, 400, 120, 90, 60):
        limits.append(limit)
        guard.limit_step(1)
        assert limit < timeouts[-1] < 4 * limit
    assert len(timeouts) < 8, "not for every little change"
    guard.limit_phase("an evaluation", 1)
    assert timeouts[-1] > guard.config.reliability.phase_limit_seconds


def test_the_second_step_is_not_judged_by_the_first(tmp_path):
    """The first is not measured, for it compiles: nothing is known of a step that takes minutes."""
    guard, phase = build(tmp_path, "--data.worker_timeout_seconds=0").guard, 600
    guard.limit_phase("the first step", 0)
    guard.limit_step(1)
    assert guard.watchdog._seconds == phase
    guard.limit_step(2)
    assert guard.watchdog._seconds == 60


def test_control_an_evaluation_that_was_made_is_not_made_again(tmp_path):
    trainer = build(tmp_path, *EVALUATED, "--checkpoint.interval=2")
    stop_at(trainer, 5)  # after the save of step 2
    with pytest.raises(Preempted, match="saved step 2"):
        trainer.train()
    trainer.metrics.close()
    build(tmp_path, *EVALUATED).train()
    assert rows(tmp_path, "validation_loss") == [2, 4]


def test_a_run_that_saves_nothing_ends_at_once(tmp_path):
    trainer = build(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    trainer.train(lambda: setattr(trainer, "seen", signal.getsignal(signal.SIGTERM)))
    assert trainer.seen == before, "the program's own handler stays"


def test_a_grace_that_is_too_short_is_said_before_training_starts(tmp_path, caplog, monkeypatch):
    trainer = build(tmp_path, "--checkpoint.enable", "--training.steps=2")
    trainer.checkpointer.longest_save = 40.0
    trainer.train()
    trainer.checkpointer.finish()
    caplog.clear()
    monkeypatch.setenv("FLUX_GRACE_SECONDS", "20")
    build(tmp_path, "--checkpoint.enable", "--training.steps=4")
    assert sum("a save took 40 s" in record.getMessage() for record in caplog.records) == 1
