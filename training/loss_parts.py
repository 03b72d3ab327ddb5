"""The training loss in parts: by time, with and without a caption, and of the ranks that fare worst."""

import torch
from torch import Tensor

TIME_BINS = 8  # equal parts of [0, 1]; their middles are validation's times
_BY_TIME = [f"loss/t={(number + 0.5) / TIME_BINS:g}" for number in range(TIME_BINS)]
_BY_CAPTION = ["loss/captioned", "loss/uncaptioned"]
_PARTS = [*_BY_TIME, *_BY_CAPTION, "loss_max"]  # the last: this rank's samples of the last update


class LossParts:
    """Adds up the losses of this rank's samples, between `begin_update` and `end_update` of each update. Only
    `summarize` needs to know a number on the host.

    Args:
        device: where losses come from.
        by_caption: captions are dropped, so that the loss with and without one is told.
    """

    def __init__(self, device: torch.device, by_caption: bool):
        self._device, self._by_caption = device, by_caption
        self._of_all = torch.arange(len(_PARTS), device=device) < len(_PARTS) - 1  # parts that earlier updates add to
        self._begin()

    def _begin(self) -> None:
        self._sums = torch.zeros(len(_PARTS), dtype=torch.float64, device=self._device)
        self._counts = torch.zeros_like(self._sums)

    def begin_update(self) -> None:
        for totals in (self._sums, self._counts):
            totals[-1].zero_()  # an assigned 0 would be copied from the host, which waits for that
        self._sums_before = self._sums.clone()
        self._added = torch.zeros(len(_PARTS), dtype=torch.float64)  # on the CPU, where times and captions come from

    def end_update(self, skip: Tensor) -> None:
        """Takes the update's samples out of all means again, should it have been left out: a NaN would stay in them.

        Args:
            skip: float32 `[]` on the device, 1 when it was left out, else 0.
        """
        left_out = self._of_all & (skip > 0)
        counts = self._counts + self._added.to(self._device, non_blocking=True)
        self._sums = torch.where(left_out, self._sums_before, self._sums)
        self._counts = torch.where(left_out, self._counts, counts)

    @torch.no_grad()
    def add(self, losses_B: Tensor, t_B: Tensor, uncaptioned_B: Tensor, counts_B: Tensor | None) -> None:
        """
        Args:
            losses_B: mean squared error of every sample, as far as this rank has its tokens, on the device.
            t_B, uncaptioned_B, counts_B: of the same samples, on the CPU: times, whether the caption was dropped, and 0
                for samples that only fill up the batch (None: all count).
        """
        bin_B = (t_B * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        bins_PB = bin_B == torch.arange(TIME_BINS)[:, None]
        member_PB = torch.cat([bins_PB, torch.stack([~uncaptioned_B, uncaptioned_B, torch.ones_like(uncaptioned_B)])])
        if counts_B is not None:
            member_PB &= counts_B > 0
        self._added += member_PB.sum(dim=1)
        others_PB = (~member_PB).to(self._device, non_blocking=True)
        self._sums += losses_B.masked_fill(others_PB, 0.0).sum(dim=1, dtype=torch.float64)

    def read(self, loss: Tensor) -> Tensor:
        """What this rank has for `summarize`, on the device, of the samples since the last call.

        Args:
            loss: this rank's part of the last update's loss.
        """
        own = torch.cat([loss.double()[None], self._sums, self._counts])
        self._begin()
        return own

    def summarize(self, ranks: Tensor) -> dict[str, float]:
        """Figures of all ranks together.

        Args:
            ranks: what `read` gave on each of them, [dp, cp, figures], on the CPU.

        Returns:
            loss of the last update; loss_max, the largest mean over one data parallel rank's samples of it, whether it
            was made or not; the mean at times around loss/t=0.0625 and so on, of loss/captioned and loss/uncaptioned
            samples of the updates made since the last call. Parts without samples are left out.
        """
        losses, sums, counts = ranks.split([1, len(_PARTS), len(_PARTS)], dim=-1)
        # Ranks of a context parallel group have parts of the sums, each of the same samples.
        sums, counts = sums.sum(dim=1), counts.mean(dim=1)
        total = counts.sum(dim=0)
        parts = {
            name: mean
            for name, mean, count in zip(_PARTS, (sums.sum(dim=0) / total).tolist(), total.tolist(), strict=True)
            if count and (self._by_caption or name not in _BY_CAPTION)
        }
        parts["loss_max"] = (sums[:, -1] / counts[:, -1])[counts[:, -1] > 0].max().item()
        return {"loss": losses.sum().float().item()} | parts
