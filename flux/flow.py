"""Rectified flow: times, noising, target, loss and the sampling schedule.

x_t = (1 - t) * latents + t * noise and target = noise - latents = dx_t / dt, so t = 1 is pure noise
(Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from flux.spec import ScheduleConfig

TimestepDistribution = Literal["uniform", "logit_normal"]


def resolution_mu(config: ScheduleConfig, image_tokens: int) -> float:
    """Shift for a token count: the line through (base_tokens, base_shift) and (max_tokens, max_shift)."""
    slope = (config.max_shift - config.base_shift) / (config.max_tokens - config.base_tokens)
    return config.base_shift + slope * (image_tokens - config.base_tokens)


def shift_times(t: Tensor, mu: float) -> Tensor:
    """Moves times in [0, 1] towards noise: e^mu / (e^mu + 1/t - 1); mu = 0 leaves them as they are.

    Source: black-forest-labs/flux, `time_shift`; arXiv 2403.03206 eq. 23 with alpha = e^mu.
    """
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


def draw_time(generator: torch.Generator, distribution: TimestepDistribution, mu: float = 0.0) -> Tensor:
    """One fp32 training time in [0, 1].

    Args:
        generator: keyed to the sample.
        distribution: "uniform", or "logit_normal" = sigmoid of N(0, 1) (arXiv 2403.03206 eq. 19).
        mu: shift as in `shift_times`; 0 is none.
    """
    if distribution == "uniform":
        t = torch.rand((), generator=generator, dtype=torch.float64)
    else:
        t = torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64))
    return (shift_times(t, mu) if mu else t).float()


def make_noisy(latents_BTC: Tensor, noise_BTC: Tensor, t_B: Tensor) -> Tensor:
    """x_t of the flow."""
    t_B11 = t_B[:, None, None]
    return (1 - t_B11) * latents_BTC + t_B11 * noise_BTC


def make_target(latents_BTC: Tensor, noise_BTC: Tensor) -> Tensor:
    """The velocity the transformer learns."""
    return noise_BTC - latents_BTC


def squared_errors(velocity_BTC: Tensor, target_BTC: Tensor) -> Tensor:
    """Squared error of every sample, [B], summed over its tokens in fp32.

    Summed up and divided by the element count of the whole update it is the plain MSE loss, exact under accumulation
    and uneven shards.

    Args:
        velocity_BTC, target_BTC: of any floating dtype.
    """
    return (velocity_BTC.float() - target_BTC.float()).square().sum(dim=(1, 2))


def make_schedule(config: ScheduleConfig, steps: int, image_tokens: int) -> Tensor:
    """`steps` + 1 fp32 times from 1 down to 0 for sampling, shifted by resolution where the flavor wants it."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift_times(t, resolution_mu(config, image_tokens)) if config.shifted else t).float()
