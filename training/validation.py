"""What a validation loss is made of: its mean, how sure that is, and how it depends on the time."""

import math

from torch import Tensor

STEPS_OF_TIME = 16  # both conventions, k / 8 and (k + 0.5) / 8, are multiples of 1/16


def summarize_errors(errors_N: Tensor, times_N: Tensor, visits: int = 1) -> dict[str, float]:
    """Figures for the metrics.

    Args:
        errors_N: mean squared error of every sample, float64.
        times_N: the time at which it was measured, a multiple of 1/16.
        visits: so many errors in a row are of one picture; 1: all are of different ones.

    Returns:
        validation_loss, the mean; validation_loss_stderr, its standard error, where there are enough samples to tell;
        validation_loss/t=0.0625 and so on, the mean at each time.
    """
    steps_N = (times_N * STEPS_OF_TIME).round().long()
    figures = {"validation_loss": errors_N.mean().item()}
    by_time = {step / STEPS_OF_TIME: errors_N[steps_N == step] for step in steps_N.unique().tolist()}
    if visits == 1:
        # Each time has samples of its own, and the times are fixed: only what differs at one time is chance.
        variance = sum((len(part) / len(errors_N)) ** 2 * _variance_of_mean(part) for part in by_time.values())
    else:
        pictures = len(errors_N) // visits
        variance = _variance_of_mean(errors_N[: pictures * visits].reshape(pictures, visits).mean(dim=1))
    if not math.isnan(variance):
        figures["validation_loss_stderr"] = math.sqrt(variance)
    return figures | {f"validation_loss/t={time:g}": part.mean().item() for time, part in by_time.items()}


def _variance_of_mean(values: Tensor) -> float:
    """nan where there are too few to tell."""
    return values.var().item() / len(values) if len(values) > 1 else math.nan


def describe_loss(figures: dict[str, float]) -> str:
    """Such as `0.5862 ± 0.0011`."""
    error = figures.get("validation_loss_stderr")
    return f"{figures['validation_loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")
