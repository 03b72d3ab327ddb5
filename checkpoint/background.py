"""One save in a thread of its own, and the copies of the tensors that it writes while training goes on."""

import itertools
import threading
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from checkpoint.slices import Slices


class Staging:
    """Copies in the CPU's memory, which training does not touch.

    Args:
        pinned: from a GPU, into page-locked memory, which is faster; it is kept and used again by every save.
    """

    def __init__(self, pinned: bool):
        self._pinned = pinned and torch.cuda.is_available()
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def __call__(self, tensors: Mapping[str, Slices]) -> dict[str, Slices]:
        """The copies of this moment. Those of the call before are overwritten where memory is page-locked."""
        if not self._pinned:
            return {name: slices.copied(lambda values: values.to("cpu", copy=True)) for name, slices in tensors.items()}
        staged = {name: slices.copied(self._pinned_copy(name)) for name, slices in tensors.items()}
        torch.cuda.synchronize()
        return staged

    def _pinned_copy(self, name: str) -> Callable[[Tensor], Tensor]:
        places = itertools.count()

        def copy(values: Tensor) -> Tensor:
            key = (name, next(places))
            if key not in self._buffers:
                self._buffers[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            return self._buffers[key].copy_(values, non_blocking=True)

        return copy


class BackgroundSave:
    """One save, in a thread that does not keep the process alive."""

    def __init__(self, step: int, write: Callable[[], None]):
        self.step = step
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.is_told = False
        # Not Thread.join: interrupted by a signal, it takes the thread for ended (Python 3.11).
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            write()
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - started
        self._ended.set()

    def is_done(self) -> bool:
        return self._ended.is_set()

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, and its thread too: one that still frees tensors when Python ends takes it down."""
        if self._ended.wait(seconds):
            self._thread.join()
