"""A run's figures, read back, and its loss curve as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

SMOOTHING_SHARE = 0.05  # the window of the running mean, as a share of the logged steps


def save_loss_curve(metrics_jsonl: Path, png: Path) -> None:
    """Draws `loss` (as logged and smoothed) and `validation_loss` over the steps of a metrics file.

    Lines without one of the two count for the other, and torn ones for neither. Non-finite values leave a gap.
    """
    from matplotlib.figure import Figure  # half a second, which the other ranks and the commands need not wait for

    lines = read_metrics(metrics_jsonl)
    # A Figure of its own, without pyplot: no window system is touched and nothing global is kept.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = series(lines, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, as logged")
    axes.plot(steps, running_mean(losses), color="tab:blue", linewidth=2, label="training, smoothed")
    validation_steps, validation_losses = series(lines, "validation_loss")
    if len(validation_steps):
        axes.plot(validation_steps, validation_losses, color="tab:orange", marker="o", label="validation")
    axes.set(title=f"Loss of {metrics_jsonl.parent.name}", xlabel="step", ylabel="mean squared error of the velocity")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=120)


def read_metrics(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file that have a step; torn ones are left out."""
    return [line for text in metrics_jsonl.read_text(errors="replace").splitlines() if (line := _parse(text))]


def series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Steps at which a figure was logged, and its values."""
    points = [(line["step"], float(line[name])) for line in lines if name in line]
    table = numpy.array(points, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def running_mean(values: numpy.ndarray) -> numpy.ndarray:
    """Mean over a centered window that shrinks at both ends; non-finite values are left out of it."""
    half = max(1, round(len(values) * SMOOTHING_SHARE / 2))
    finite = numpy.isfinite(values)
    sums = numpy.concatenate([[0.0], numpy.cumsum(numpy.where(finite, values, 0.0))])
    counts = numpy.concatenate([[0], numpy.cumsum(finite)])
    places = numpy.arange(len(values))
    first, last = numpy.maximum(places - half, 0), numpy.minimum(places + half + 1, len(values))
    with numpy.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _parse(text: str) -> dict | None:
    """A line of the file, unless a full disk or a loss of power has torn it."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None
