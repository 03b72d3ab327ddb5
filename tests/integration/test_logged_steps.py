"""The host waits for the device to tell it a number only when the next step is on its way."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config.parse import load_config
from parallel.degrees import Degrees
from parallel.mesh import Layout
from tests.integration.short_runs import TINY
from train import FluxTrainer

STEPS, LOG_FREQ = 7, 3
LOGGED = [1, 3, 6, 7]
READERS = ("cpu", "tolist", "numpy")  # of a tensor, beside .item(), float() and bool(), which the operators show


class Reads(TorchDispatchMode):
    """Notes in which step a number goes from a tensor to the host, before the step is on its way."""

    def __init__(self):
        super().__init__()
        self.step: int | None = None  # None: between two of them
        self.steps: list[int | None] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.steps.append(self.step)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch) -> Reads:
    noted = Reads()
    for name in READERS:
        original = getattr(torch.Tensor, name)

        def reader(tensor, *args, original=original, **kwargs):
            noted.steps.append(noted.step)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, reader)
    return noted


def build(folder, *options: str) -> FluxTrainer:
    folder.mkdir(exist_ok=True)
    config = load_config(
        [
            *TINY,
            f"--job.dump_folder={folder}",
            f"--training.steps={STEPS}",
            f"--metrics.log_freq={LOG_FREQ}",
            "--validation.enable=false",
            *options,
        ]
    )
    trainer = FluxTrainer(config, folder, Layout(Degrees(), torch.device("cpu")))
    batches = iter(trainer.loader)
    trainer.loader = [next(batches) for _ in range(STEPS * trainer.accumulation)]  # workers prepare them elsewhere
    return trainer


def train(trainer: FluxTrainer, reads: Reads) -> list[int]:
    """Steps in which a number was read."""
    train_step = trainer.train_step
    reads.steps.clear()

    def noted_step(batches):
        reads.step = trainer.step + 1
        result = train_step(batches)
        reads.step = None
        return result

    trainer.train_step, trainer._finish = noted_step, lambda: None
    with reads:
        trainer.train()
    assert None in reads.steps, "the verdict on a step is read when it is over"
    return [step for step in reads.steps if step is not None]


@pytest.mark.parametrize("options", [[], ["--training.local_batch_size=4", "--training.global_batch_size=8"]])
def test_numbers_are_read_one_step_later(tmp_path, reads, options):
    assert train(build(tmp_path, "--ema.enable", *options), reads) == []
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == LOGGED


@pytest.mark.parametrize("reader", ["item", "__float__", "__bool__", *READERS])
def test_control_a_number_that_is_read_is_seen(tmp_path, reads, reader):
    trainer = build(tmp_path)
    clip = trainer.clip_gradients

    def reading_clip():
        norm = clip()
        if trainer.step + 1 == 5:
            getattr(norm, reader)()
        return norm

    trainer.clip_gradients = reading_clip
    assert set(train(trainer, reads)) == {5}


def test_figures_change_no_bit_of_training(tmp_path):
    """The same updates with a line of figures after each, and with none."""
    trained = []
    for number, frequency in enumerate((1, 1000)):
        trainer = build(tmp_path / str(number), f"--metrics.log_freq={frequency}")
        batches, losses = iter(trainer.loader), []
        for _ in range(4):
            loss, norm = trainer.train_step(batches)
            losses.append((loss.item(), norm.item()))
            if frequency == 1:
                trainer._log_step(loss, norm, lr=0.0)
                trainer.report.tell()
        trained.append((losses, [parameter.detach().clone() for parameter in trainer.model.parameters()]))
    (losses, weights), (without, others) = trained
    assert losses == without and all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
