"""The figures that a validation loss is made of."""

import math

import pytest
import torch

from training.validation import describe_loss, summarize_errors

MIDPOINTS = (torch.arange(8) + 0.5) / 8


def draw(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors whose mean and spread depend on the time, as a flow's do; the times go round."""
    times_N = MIDPOINTS.repeat(-(-samples // 8))[:samples].double()
    noise_N = torch.randn(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return times_N + (0.1 + times_N) * noise_N, times_N


def test_the_loss_is_the_mean_and_has_a_curve():
    errors_N, times_N = draw(80, 0)
    figures = summarize_errors(errors_N, times_N)
    assert figures["validation_loss"] == errors_N.mean().item()
    curve = {name: value for name, value in figures.items() if "/t=" in name}
    assert list(curve) == [f"validation_loss/t={time:g}" for time in MIDPOINTS.tolist()]
    assert list(curve.values()) == pytest.approx(errors_N.reshape(10, 8).mean(0).tolist())


def test_the_standard_error_is_the_spread_of_many_validations():
    runs = [summarize_errors(*draw(64, seed)) for seed in range(2000)]
    losses = torch.tensor([run["validation_loss"] for run in runs])
    claimed = sum(run["validation_loss_stderr"] for run in runs) / len(runs)
    assert losses.std().item() == pytest.approx(claimed, rel=0.06)  # of 2000 draws: a standard deviation within 2 %
    # Control: taken over all samples, without regard to their times, it is far too large.
    errors_N, _ = draw(64, 0)
    assert errors_N.std().item() / 8 > 1.06 * losses.std().item()


def test_the_standard_error_of_pictures_that_are_measured_at_all_times():
    def validate(seed):
        generator = torch.Generator().manual_seed(seed)
        # What is hard about a picture is so at all times.
        of_picture = torch.randn(16, 1, generator=generator, dtype=torch.float64)
        errors_N = (1 + MIDPOINTS.double() + of_picture + 0.1 * torch.randn(16, 8, generator=generator)).flatten()
        return summarize_errors(errors_N, MIDPOINTS.double().repeat(16), visits=8)

    runs = [validate(seed) for seed in range(2000)]
    losses = torch.tensor([run["validation_loss"] for run in runs])
    claimed = sum(run["validation_loss_stderr"] for run in runs) / len(runs)
    assert losses.std().item() == pytest.approx(claimed, rel=0.06)
    assert len([name for name in runs[0] if "/t=" in name]) == 8


def test_times_of_mlperf_and_uneven_counts():
    errors_N = torch.tensor([1.0, 3.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    figures = summarize_errors(errors_N, torch.tensor([0, 0, 0.125, 0.125, 0.125], dtype=torch.float64))
    assert figures["validation_loss/t=0"] == 2 and figures["validation_loss/t=0.125"] == 4
    assert figures["validation_loss"] == pytest.approx(3.2)
    assert figures["validation_loss_stderr"] == pytest.approx(math.sqrt(0.4**2 * 2 / 2 + 0.6**2 * 4 / 3))


def test_one_sample_at_a_time_has_no_standard_error():
    figures = summarize_errors(torch.ones(8, dtype=torch.float64), MIDPOINTS.double())
    assert "validation_loss_stderr" not in figures and describe_loss(figures) == "1.0000"
    assert describe_loss(figures | {"validation_loss_stderr": 0.01234}) == "1.0000 ± 0.0123"
