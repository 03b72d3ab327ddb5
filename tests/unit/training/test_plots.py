import json
import math

import matplotlib.figure
import numpy
from PIL import Image

from training.plots import running_mean, save_loss_curve


def write_metrics(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def drawn_series(monkeypatch, lines, tmp_path):
    """What ends up in the figure: label -> (steps, values)."""
    drawn = {}

    class Recorder(matplotlib.figure.Figure):
        def savefig(self, *args, **kwargs):
            drawn.update({line.get_label(): line.get_xydata() for line in self.axes[0].lines})
            return super().savefig(*args, **kwargs)

    monkeypatch.setattr(matplotlib.figure, "Figure", Recorder)
    save_loss_curve(write_metrics(tmp_path / "metrics.jsonl", lines), tmp_path / "loss.png")
    return drawn


def test_training_and_validation_are_drawn(monkeypatch, tmp_path):
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 101)]
    lines += [{"step": 50, "validation_loss": 0.3}, {"step": 100, "validation_loss": 0.2}]
    drawn = drawn_series(monkeypatch, lines, tmp_path)
    assert drawn["training, as logged"].tolist() == [[step, 1 / step] for step in range(1, 101)]
    assert drawn["validation"].tolist() == [[50, 0.3], [100, 0.2]]
    assert len(drawn["training, smoothed"]) == 100
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (960, 540)
        assert len(picture.convert("RGB").getcolors(2**16)) > 10


def test_a_run_without_validation_and_with_a_bad_step(monkeypatch, tmp_path):
    drawn = drawn_series(monkeypatch, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}], tmp_path)
    assert set(drawn) == {"training, as logged", "training, smoothed"}
    assert math.isnan(drawn["training, as logged"][1, 1])


def test_torn_and_foreign_lines_are_passed_by(monkeypatch, tmp_path):
    lines = [{"step": 1, "loss": 1.0}, '{"step": 2, "lo', "\x00\x00", "7", '{"loss": 2.0}', {"step": 3, "loss": 0.5}]
    drawn = drawn_series(monkeypatch, lines, tmp_path)
    assert drawn["training, as logged"].tolist() == [[1, 1.0], [3, 0.5]]


def test_running_mean_is_a_mean_and_leaves_out_what_is_not_finite():
    assert running_mean(numpy.full(50, 3.0)).tolist() == [3.0] * 50
    # 10 values: the window reaches one to each side.
    assert running_mean(numpy.array([0.0, 3.0, 6.0, 0, 0, 0, 0, 0, 0, 0]))[:3].tolist() == [1.5, 3.0, 3.0]
    assert running_mean(numpy.array([1.0, numpy.nan, 5.0]))[1] == 3.0
