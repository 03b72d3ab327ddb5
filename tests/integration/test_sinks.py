"""Whole runs whose TensorBoard raises and whose wandb hangs: their numbers are those of a run without them."""

import threading

import pytest

from training import metrics, sinks

CLOSE_SECONDS = 1.0  # what the end of a run may wait here for a sink that hangs


class Acts:
    """A sink that calls a function at one moment."""

    def __init__(self, moment, act):
        self.moment, self.act = moment, act

    def start(self):
        self._reach("start")

    def log(self, step, values):
        self._reach("log")

    def log_image(self, step, name, path):
        self._reach("image")

    def close(self):
        self._reach("close")

    def _reach(self, moment):
        if moment == self.moment:
            self.act()


def refuse():
    raise ConnectionError("no route to host")


@pytest.mark.parametrize("moment", ["start", "log", "image", "close"])
def test_sinks_that_raise_or_hang_change_no_bit(train, plain_run, monkeypatch, capsys, moment):
    released = threading.Event()
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", CLOSE_SECONDS)
    monkeypatch.setattr(sinks, "_TensorBoard", lambda *_: Acts(moment, refuse))
    monkeypatch.setattr(sinks, "_Wandb", lambda *_: Acts(moment, released.wait))
    run = train("--metrics.enable_tensorboard", "--metrics.enable_wandb", "--training.dataloader.num_workers=1")
    released.set()
    for name in ("step", "loss", "grad_norm", "validation_loss", "background_color_accuracy"):
        assert run.series(name) == plain_run.series(name) != [], name
    warnings = [line for line in capsys.readouterr().err.splitlines() if "is off from here on" in line]
    assert len(warnings) == 2
    assert any("enable_tensorboard=true" in line and "no route to host" in line for line in warnings)
    assert any("enable_wandb=true" in line and "has not finished in time" in line for line in warnings)


def test_a_run_that_fails_closes_its_sinks(train, monkeypatch):
    closed = threading.Event()
    monkeypatch.setattr(sinks, "_TensorBoard", lambda *_: Acts("close", closed.set))
    with pytest.raises(SystemExit):
        train("--metrics.enable_tensorboard", "--validation.enable=false", "--optimizer.lr=1e30")
    assert closed.is_set()
