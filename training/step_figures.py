"""The figures of a logged step: put together on the device, and read when they have come to the host by themselves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from training.loss_parts import LossParts
from training.metrics import peak_memory_gib
from training.peaks import Peaks
from training.step_timer import Lap, StepTimer


@dataclass(frozen=True)
class StepFigures:
    """What all ranks know of one logged step. Looking at it waits for the end of that step, and for nothing later."""

    step: int
    _lap: Lap
    _loss_parts: LossParts
    _parts: Tensor  # of LossParts, [dp, cp, tp, parts]; like the next two on its way to the host until the lap is over
    _own: Tensor  # [names, ranks]
    _same: Tensor  # [names]
    _own_names: list[str]
    _same_names: list[str]
    _known: Mapping[str, float]

    def of_ranks(self, name: str) -> list[float]:
        """One of the numbers that ranks have of their own, in the order of ranks."""
        self._lap.wait()
        return self._own[self._own_names.index(name)].tolist()

    def read(self, peaks: Peaks) -> dict[str, float]:
        """All that is logged."""
        speed = self._lap.read()
        return {
            **self._loss_parts.summarize(self._parts[:, :, 0]),
            **dict(zip(self._same_names, self._same.tolist(), strict=True)),
            **self._known,
            **speed,
            **peaks.shares(speed["tflops"]),
            "memory_gib": max(self.of_ranks("memory_gib")),
        }


def send_figures(
    step: int,
    loss_parts: LossParts,
    loss: Tensor,
    own: Mapping[str, float],
    same: Mapping[str, Tensor],
    known: Mapping[str, float],
    gather: Callable[[Tensor], Tensor],
    timer: StepTimer,
) -> StepFigures:
    """Sets the figures of a step on their way to the host, which does not wait for them. All ranks must call it.

    Args:
        loss: this rank's part of the update's loss.
        own: numbers of this rank that every rank shall know.
        same: `[]` on the device, the same on all ranks.
        known: numbers that are the same on all ranks.
        gather: what each rank has of a vector, on all of them: [dp, cp, tp, ...]. One collective.
        timer: its lap ends here.
    """
    parts = loss_parts.read(loss)
    own = {"memory_gib": peak_memory_gib(parts.device.type), **own}
    # Filled in one by one: a tensor of the host's numbers would be copied from there, and the host would wait for that.
    mine = [parts.new_full((1,), value) for value in own.values()]
    ranks = gather(torch.cat([parts, *mine])).to("cpu", non_blocking=True)  # from a GPU: into pinned memory
    numbers = torch.stack(list(same.values())).to("cpu", non_blocking=True)
    of_parts, of_ranks = ranks.split([len(parts), len(own)], dim=-1)
    return StepFigures(
        step,
        timer.end_lap(),
        loss_parts,
        of_parts,
        of_ranks.flatten(0, -2).T,
        numbers,
        list(own),
        list(same),
        known,
    )
