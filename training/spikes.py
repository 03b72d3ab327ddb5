"""Spikes: losses and gradient norms far above those of the updates before."""

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

WINDOW = 128  # updates
# Of the mean: the least standard deviation that is believed. Where all is alike, the last digit is no spike.
MIN_SPREAD = 0.01


class SpikeWatch:
    """Judges the loss and the gradient norm of each update by those of the WINDOW updates before it.

    Numbers stay on the device and nothing waits for them. Ranks that are given the same ones judge alike.

    Args:
        sigma: standard deviations above the mean from which on a number is a spike; 0: none is.
        device: where losses and norms come from.
    """

    def __init__(self, sigma: float, device: torch.device):
        self._sigma = sigma
        # Of each update its loss and norm, the latest last. NaN where there was none yet: nothing is above it.
        self._window = torch.full((WINDOW, 2), nan, dtype=torch.float64, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether an update is a spike, which those after it are judged by as well.

        A spike enters the window as the largest number that is none. As it is, it would hide all others until it has
        left; without it, a loss that has risen for good would be a spike forever, and never learned from if those are
        skipped. What is no number does not enter, and is no spike.

        Args:
            loss, norm: `[]` on the device, the same on all ranks.

        Returns:
            Bool `[]`, and float64 [2, 2]: mean and standard deviation of losses, then of norms, NaN until there are
            WINDOW updates. Both on the device.
        """
        update = torch.stack([loss.double(), norm.double()])
        spread, mean = torch.std_mean(self._window, dim=0)
        expected = torch.stack([mean, spread], dim=1)
        if not self._sigma:
            return torch.zeros((), dtype=torch.bool, device=update.device), expected
        limit = mean + self._sigma * torch.maximum(spread, MIN_SPREAD * mean.abs())
        is_number = update.isfinite().all()
        is_spike = (update > limit).any() & is_number
        entry = torch.fmin(update, limit)  # which is NaN at first
        self._window = torch.where(is_number, torch.cat([self._window[1:], entry[None]]), self._window)
        return is_spike, expected

    def state(self) -> list[list[float]]:
        """Loss and norm of the updates that the next one is judged by, the latest last; waits for the device."""
        return [row for row in self._window.tolist() if row[0] == row[0]]

    def load(self, state: Sequence[Sequence[float]]) -> None:
        """Goes on from what `state` gave, to the bit."""
        if state:
            self._window[-len(state) :] = torch.tensor(state, dtype=torch.float64)
