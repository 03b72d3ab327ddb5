"""The global order, dealt to ranks in batches that worker processes prepare.

The only state of a loader is one cursor, the number of positions that finished steps have used. A worker that dies or
hangs is replaced once: new workers begin with the first batch that was not handed out.
"""

import contextlib
import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from types import FrameType

import numpy as np
import torch
from torch.utils.data import DataLoader

from flux.batch import RawBatch
from flux.config import DataLoader as DataLoaderSection
from flux.data.dataset import PositionedDataset, Slot, collate
from flux.data.errors import BadSample, DataError
from flux.data.sample import EncodedSample

# How DataLoader's errors begin. It looks after its workers only when it has waited for its time limit in vain; asked
# again after that, it goes on waiting for the same batch.
_DEAD, _LATE = "DataLoader worker (pid", "DataLoader timed out"
_LOOK_SECONDS = 2
OUTLIVE_SECONDS = 60  # for a worker that was asked to end

log = logging.getLogger(__name__)


class _WorkersFailed(Exception):
    """A worker died or hangs."""


class PositionBatches:
    """Batches of slots, dealt so that every update uses the same positions on any layout.

    Within an update the positions go first over accumulation, then over ranks, then over the local batch. Every rank
    gets equally many full batches, since ranks wait for each other: where an update has fewer samples than slots, the
    last slots repeat its last sample and do not count.

    Args:
        update_size: positions of an update, from one to the next.
        accumulation: batches of each rank per update.
        group: this rank's place among the `groups` that see different samples.
        cursor: position to begin at, a multiple of update_size.
        update_samples: samples of the update that begins at a position; None: update_size.
    """

    end = None

    def __init__(
        self,
        update_size: int,
        accumulation: int = 1,
        group: int = 0,
        groups: int = 1,
        cursor: int = 0,
        update_samples: Callable[[int], int] | None = None,
    ):
        self.update_size = update_size
        self.accumulation = accumulation
        self.group = group
        self.groups = groups
        self.cursor = cursor
        self.update_samples = update_samples

        self._skipped = 0

    def rest(self, given: int) -> "PositionBatches":
        """What follows after the first `given` batches."""
        rest = copy(self)
        updates, rest._skipped = divmod(self._skipped + given, self.accumulation)
        rest.cursor += updates * self.update_size
        return rest

    def __iter__(self) -> Iterator[list[Slot]]:
        return itertools.islice(self._batches(), self._skipped, None)

    def _batches(self) -> Iterator[list[Slot]]:
        start = self.cursor
        while True:
            samples = self.update_samples(start) if self.update_samples else self.update_size
            local = -(-samples // (self.accumulation * self.groups))
            for turn in range(self.accumulation):
                first = (turn * self.groups + self.group) * local
                yield [self._slot(start, number, samples) for number in range(first, first + local)]
            start += self.update_size

    def _slot(self, start: int, number: int, samples: int) -> Slot:
        return Slot(start + min(number, samples - 1), number < samples, samples)


class HeldOutBatches:
    """Batches of validation: every position once, in batches of pictures of one size.

    Every rank gets equally many full batches, since ranks wait for each other: where positions of a size run out, the
    last slots repeat the last one and do not count.

    Args:
        positions_by_size: those of pictures of one size together.
        local_batch_size: slots of a batch.
        group: this rank's place among the `groups` that see different samples.
    """

    def __init__(self, positions_by_size: Sequence[np.ndarray], local_batch_size: int, group: int = 0, groups: int = 1):
        self.positions_by_size = positions_by_size
        self.local_batch_size = local_batch_size
        self.group = group
        self.groups = groups
        self.end = sum(map(len, positions_by_size))
        self._skipped = 0

    def rest(self, given: int) -> "HeldOutBatches":
        """What follows after the first `given` batches."""
        rest = copy(self)
        rest._skipped += given
        return rest

    def __iter__(self) -> Iterator[list[Slot]]:
        return itertools.islice(self._batches(), self._skipped, None)

    def _batches(self) -> Iterator[list[Slot]]:
        local = self.local_batch_size
        for positions in self.positions_by_size:
            for start in range(0, len(positions), local * self.groups):
                dealt = positions[start : start + local * self.groups].tolist()
                mine = range(self.group * local, (self.group + 1) * local)
                yield [Slot(dealt[min(number, len(dealt) - 1)], number < len(dealt), len(dealt)) for number in mine]


def _outlive_signals(worker: int) -> None:
    """A job system may send its signals to every process of a job: the run needs its workers until it has saved."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    """It may be the run itself that wants an end of a worker that is stuck; then it asks again."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(OUTLIVE_SECONDS)


class Loader:
    """Iterates RawBatches from a cursor on; raises DataError for what no substitute can mend."""

    def __init__(
        self,
        dataset: PositionedDataset,
        batches: PositionBatches | HeldOutBatches,
        section: DataLoaderSection,
        worker_timeout: int = 0,
    ):
        self.dataset = dataset
        self.batches = batches
        self.end = batches.end  # the number of positions; None: they are endless
        self._section = section
        self._worker_timeout = worker_timeout
        self._loader = self._build(batches)

    def _build(self, batches: PositionBatches | HeldOutBatches) -> DataLoader:
        workers = self._section.num_workers
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=self._section.persistent_workers and workers > 0,
            pin_memory=self._section.pin_memory and torch.cuda.is_available(),
            prefetch_factor=self._section.prefetch_factor if workers > 0 else None,
            timeout=_LOOK_SECONDS if workers > 0 else 0,
            worker_init_fn=_outlive_signals,
        )

    def __iter__(self) -> Iterator[RawBatch]:
        given, replaced = 0, False
        batches = self._start(self._loader)
        while True:
            try:
                batch = self._wait(batches)
            except StopIteration:
                return
            except _WorkersFailed as error:
                reason = str(error)
                if replaced:
                    raise DataError(
                        f"data workers failed twice ({reason}): look for a lack of memory or a disk that does not "
                        "answer, raise data.worker_timeout_seconds, or set num_workers=0"
                    ) from None
                log.warning("data workers are replaced: %s", reason)
                replaced = True
                batches = self._start(self._build(self.batches.rest(given)))  # of this pass only
                continue
            if isinstance(batch, DataError):
                raise batch
            given += 1
            yield batch

    def _start(self, loader: DataLoader) -> Iterator[RawBatch | DataError]:
        batches = iter(loader)
        if self._section.num_workers:
            # NOTE: the handler that DataLoader has just set raises wherever the main process is when a worker dies, in
            # the middle of an update too. Without it the death is found where a batch of that worker is waited for.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return batches

    def _wait(self, batches: Iterator[RawBatch | DataError]) -> RawBatch | DataError:
        """The next batch. Raises _WorkersFailed when a worker is dead, or the batch far too late."""
        started = time.monotonic()
        while True:
            try:
                return next(batches)
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                if not self._section.num_workers:
                    raise
                # Tensors that a dead worker has queued are lost with it.
                raise _WorkersFailed(f"{type(error).__name__}: {error}") from error
            except RuntimeError as error:
                if str(error).startswith(_DEAD):
                    raise _WorkersFailed(str(error).splitlines()[0]) from error
                if not str(error).startswith(_LATE):
                    raise
                if self._worker_timeout and time.monotonic() - started > self._worker_timeout:
                    limit = f"no batch in data.worker_timeout_seconds={self._worker_timeout}"
                    raise _WorkersFailed(limit) from error

    def captions(self, count: int) -> list[str]:
        """Captions of the first samples, at most `count`; bad ones are left out."""
        found: list[str] = []
        for opened in self.dataset.sources:
            for index in range(min(len(opened.source), 2 * count)):
                if len(found) == count:
                    return found
                with contextlib.suppress(BadSample):
                    sample = opened.source[index]
                    found.append(sample.caption if isinstance(sample, EncodedSample) else sample.captions[0])
        return found
