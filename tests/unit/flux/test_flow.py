"""Times, noising and loss against what their definitions say."""

import math

import pytest
import torch

from flux.flow import (
    draw_time,
    make_noisy,
    make_schedule,
    make_target,
    resolution_mu,
    shift_times,
    squared_errors,
)
from flux.spec import ScheduleConfig

DRAWS = 4000
STATISTICAL = 0.03  # four standard errors of a mean of 4000 draws with deviation below 0.5


def draws(**arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([draw_time(generator, **arguments) for _ in range(DRAWS)])


def test_t_1_is_noise_and_t_0_is_latents():
    latents_BTC, noise_BTC = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x_BTC = make_noisy(latents_BTC, noise_BTC, torch.tensor([0.0, 1.0]))
    assert torch.equal(x_BTC[0], latents_BTC[0])
    assert torch.equal(x_BTC[1], noise_BTC[1])


def test_target_is_the_time_derivative_of_x():
    latents_BTC, noise_BTC = torch.randn(1, 3, 4).double(), torch.randn(1, 3, 4).double()
    t_B = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    element = make_noisy(latents_BTC, noise_BTC, t_B)[0, 1, 2]
    (slope,) = torch.autograd.grad(element, t_B)
    torch.testing.assert_close(slope[0], make_target(latents_BTC, noise_BTC)[0, 1, 2])


def test_uniform_times():
    t = draws(distribution="uniform")
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    assert abs(t.mean() - 0.5) < STATISTICAL
    assert abs((t < 0.25).float().mean() - 0.25) < STATISTICAL


def test_logit_normal_times_crowd_in_the_middle():
    t = draws(distribution="logit_normal")
    assert abs(t.mean() - 0.5) < STATISTICAL
    one_sigma = (t > 1 / (1 + math.e)) & (t < 1 / (1 + math.exp(-1)))
    assert abs(one_sigma.float().mean() - 0.6827) < STATISTICAL


def test_shift_moves_times_towards_noise_by_the_documented_formula():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    shifted = shift_times(t, mu=1.15)
    alpha = math.exp(1.15)
    torch.testing.assert_close(shifted, alpha * t / (1 + (alpha - 1) * t))
    assert torch.equal(shift_times(t, mu=0.0), t)
    unshifted, moved = draws(distribution="uniform"), draws(distribution="uniform", mu=1.15)
    torch.testing.assert_close(moved, shift_times(unshifted.double(), 1.15).float())
    assert moved.mean() > unshifted.mean() + 0.1


def test_mu_follows_the_number_of_packed_tokens():
    assert resolution_mu(ScheduleConfig(), 256) == pytest.approx(0.5)
    assert resolution_mu(ScheduleConfig(), 4096) == pytest.approx(1.15)


@pytest.mark.parametrize("shifted", [True, False])
def test_schedule_runs_from_noise_to_latents(shifted):
    times = make_schedule(ScheduleConfig(shifted=shifted), steps=7, image_tokens=1024)
    assert times.shape == (8,) and times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all()
    assert torch.allclose(times, torch.linspace(1, 0, 8)) == (not shifted)


def test_loss_is_mse_when_divided_by_the_element_count():
    velocity_BTC, target_BTC = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    loss = squared_errors(velocity_BTC, target_BTC).sum() / target_BTC.numel()
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(velocity_BTC, target_BTC))


def test_loss_is_summed_in_fp32_for_a_bf16_velocity():
    velocity_BTC = torch.full((1, 512, 64), 1.0, dtype=torch.bfloat16)
    assert squared_errors(velocity_BTC, torch.zeros(1, 512, 64)).tolist() == [512 * 64]
