"""Watches over the steps of a run: their numbers, the time they take, and whether the run is asked to stop.

Every update is judged before it is made, on the device: one whose numbers went bad is left out, on all ranks. The host
learns of it when the device has the next step to work on. Whether a rank is asked to stop travels with the verdicts.
"""

import json
import logging
import math
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.job_config import JobConfig
from flux.batch import RawBatch
from parallel.mesh import Layout
from parallel.replicas import ReplicasDiffer, compare_replicas, describe_deviations
from runtime.stop import STOP_REASONS, StopRequest
from runtime.watchdog import LEAST_STEP_SECONDS, Watchdog
from training.metrics import MetricsLogger
from training.spikes import SpikeWatch

WAIT_SECONDS = 30.0  # that ranks wait for each other beyond a limit of the watchdog
INCIDENTS = "incidents"  # in the run folder: a file for each update whose numbers were odd

log = logging.getLogger("train")


@dataclass(frozen=True)
class _Verdict:
    step: int
    first_position: int
    samples: list[tuple[int, str]]  # of this rank: position and key
    numbers: Tensor  # on their way to the host: what _FIGURES names, then loss and stop reason of every rank
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[dict[str, float], list[list[float]]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        figures, ranks = self.numbers[: len(_FIGURES)], self.numbers[len(_FIGURES) :]
        return dict(zip(_FIGURES, figures.tolist(), strict=True)), ranks.unflatten(0, (-1, 2)).tolist()


_FIGURES = ("skipped", "nonfinite", "spike", "loss", "grad_norm", "usual_loss", "usual_grad_norm")


class StepGuard:
    """All ranks make one and do the same; the one with `metrics` writes.

    Args:
        watchdog: of this rank.
        metrics: where figures go; None on ranks that write none.
        window: what an earlier part of the run knew of usual losses, see `state`.
    """

    def __init__(
        self,
        config: JobConfig,
        folder: Path,
        layout: Layout,
        watchdog: Watchdog,
        metrics: MetricsLogger | None,
        window: list[list[float]] | None,
    ):
        self.config, self.folder, self.layout = config, folder, layout
        self.watchdog, self.metrics = watchdog, metrics
        self.stop = StopRequest(config.reliability.stop_after_minutes)
        self.stop_reason: str | None = None  # why all ranks shall leave; the same step later on all
        section = config.reliability
        self._spikes = SpikeWatch(section.spike_sigma, layout.device)
        if window:
            self._spikes.load(window)
        self._skips_spikes = section.skip_spikes
        self._samples: list[tuple[int, str]] = []
        self._verdicts: deque[_Verdict] = deque()
        self._nonfinite_in_a_row = 0
        self._patience = 0.0  # seconds, for a communication
        # A data worker that stands still may be replaced, a shard fetched, new shapes compiled, a trace written.
        waits = 2 * config.data.worker_timeout_seconds + 30
        traced = config.profiling.enable_profiling or config.profiling.enable_memory_snapshot
        compiles = section.phase_limit_seconds if config.compile.enable or traced else 0.0
        self._least_step_seconds = max(LEAST_STEP_SECONDS, waits, compiles)

    def note(self, raw: RawBatch) -> None:
        """A batch is a part of the update that will be judged next."""
        self._samples += raw.samples

    @torch.no_grad()
    def judge(self, step: int, first_position: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the update is to be left out: fp32 `[]` on the device, 1 or 0, the same on all ranks. One collective.

        Args:
            step: number of the update.
            first_position: of its samples.
            loss: this rank's part of its loss.
            grad_norm: before clipping, the same on all ranks.
        """
        loss, norm = loss.double(), grad_norm.to(loss.device).double()
        ranks = self.layout.gather(torch.stack([loss, loss.new_full((), float(self.stop.number))]))
        total = ranks[:, :, 0, 0].sum()  # tp ranks have the same
        nonfinite = ~(total + norm).isfinite()
        spike, usual = self._spikes.judge(total, norm)
        skip = (nonfinite | spike) if self._skips_spikes else nonfinite
        flags = torch.stack([skip, nonfinite, spike]).double()
        numbers = torch.cat([flags, torch.stack([total, norm]), usual[:, 0], ranks.flatten()])
        numbers = numbers.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        arrived = None
        if loss.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        samples, self._samples = self._samples, []
        self._verdicts.append(_Verdict(step, first_position, samples, numbers, arrived))
        return skip.float()

    def tell(self, before: int) -> None:
        """Tells the verdicts on updates before this one, which the device has made.

        Raises:
            FloatingPointError: reliability.max_nonfinite in a row were no numbers.
        """
        while self._verdicts and self._verdicts[0].step < before:
            self._tell(self._verdicts.popleft())

    def limit_phase(self, what: str, step: int) -> None:
        """What comes now, after `step` steps, is no step as the others are."""
        seconds = self.config.reliability.phase_limit_seconds
        self.watchdog.expect(what, seconds, step)
        self._wait_longer_than(seconds)

    def limit_writing(self, what: str, step: int) -> None:
        """Now something is written, for which ranks wait for each other in their own time."""
        self.watchdog.expect(what, self.config.checkpoint.timeout_seconds + WAIT_SECONDS, step)

    def limit_step(self, step: int) -> None:
        """Now comes the step after `step`."""
        section = self.config.reliability
        least, phase = self._least_step_seconds, section.phase_limit_seconds
        self._wait_longer_than(self.watchdog.expect_step(step, section.step_limit_seconds, least, phase))

    def _wait_longer_than(self, limit: float) -> None:
        """Who waits for other ranks waits longer than the watchdog, so that it can tell for whom."""
        patience = float(self.config.comm.train_timeout_seconds)
        if self.config.reliability.watchdog:
            patience = max(patience, limit + WAIT_SECONDS)
        if not patience <= self._patience <= 2 * patience:  # not at every step, whose limit always moves a little
            self._patience = 1.2 * patience
            self.layout.set_timeout(self._patience)

    def check_replicas(self, step: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Compares the replicas where that is due.

        Raises:
            ReplicasDiffer: they have not the same bits.
        """
        freq = self.config.reliability.compare_replicas_freq
        if not freq or step % freq or not (found := compare_replicas(tensors(), self.layout)):
            return
        raise ReplicasDiffer(
            f"step {step}: {describe_deviations(found)}: a machine computes or keeps wrong numbers: leave it out, and "
            f"go on from a checkpoint of step {step - freq} or before, when they were compared last"
        )

    def poll(self) -> bool:
        """Whether any rank is asked to stop, where no update is under way. All ranks must call it, and wait here."""
        if self.stop_reason is None:
            self._hear(self.layout.max(self.stop.number))
        return self.stop_reason is not None

    def state(self) -> list[list[float]]:
        """What a run that goes on must know to judge as this one would."""
        return self._spikes.state()

    def _hear(self, number: float) -> None:
        if number and self.stop_reason is None:
            self.stop_reason = STOP_REASONS[int(number) - 1]

    def _tell(self, verdict: _Verdict) -> None:
        figures, ranks = verdict.read()
        self._hear(max(number for _, number in ranks))
        is_odd = bool(figures["nonfinite"] or figures["spike"])
        self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if figures["nonfinite"] else 0
        if not is_odd:
            return
        own = json.dumps({"host": socket.gethostname(), "samples": verdict.samples})
        texts = self.layout.gather_texts(f"incident {verdict.step}", own)
        if self.metrics:
            self.metrics.log(verdict.step, {name: figures[name] for name in ("skipped", "nonfinite", "spike")})
            losses = [loss for loss, _ in ranks]
            path = self._write(verdict, figures, losses, [json.loads(text) for text in texts])
            log.error("%s", _describe(verdict.step, figures, losses, path))
        if self._nonfinite_in_a_row >= (allowed := self.config.reliability.max_nonfinite):
            lr, max_norm = self.config.optimizer.lr, self.config.training.max_norm
            raise FloatingPointError(
                f"step {verdict.step}: loss or gradients were no numbers in {allowed} updates in a row, and these were "
                f"left out: lower optimizer.lr={lr:g} or training.max_norm={max_norm:g}, or warm up for longer"
            )

    def _write(
        self, verdict: _Verdict, figures: dict[str, float], losses: list[float], ranks: list[dict[str, Any]]
    ) -> Path:
        path = incident_path(self.folder, verdict.step)
        record = {
            "step": verdict.step,
            "kind": "nonfinite" if figures["nonfinite"] else "spike",
            "skipped": bool(figures["skipped"]),
            "loss": _plain(figures["loss"]),
            "grad_norm": _plain(figures["grad_norm"]),
            "first_position": verdict.first_position,
            "seed": self.config.debug.seed,
            "layout": self.layout.describe(),
            "ranks": [
                {"rank": rank, "host": about["host"], "loss": _plain(loss), "samples": about["samples"]}
                for rank, (loss, about) in enumerate(zip(losses, ranks, strict=True))
            ],
        }
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:
            log.warning("%s could not be written: %s", path, error)
        return path


def incident_path(folder: Path, step: int) -> Path:
    """Where a run tells of an update whose numbers were odd."""
    return folder / INCIDENTS / f"step-{step:06d}.json"


def _describe(step: int, figures: dict[str, float], losses: list[float], path: Path) -> str:
    loss, norm = figures["loss"], figures["grad_norm"]
    what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
    bad = [str(rank) for rank, own in enumerate(losses) if not math.isfinite(own)]
    if bad and len(losses) > 1:
        what += f" (not finite on rank {', '.join(bad[:8])}{' ...' if len(bad) > 8 else ''} of {len(losses)})"
    if figures["spike"]:
        what += f", a spike: usual are {figures['usual_loss']:.4g} and {figures['usual_grad_norm']:.4g}"
    done = "the update is left out" if figures["skipped"] else "the update is made, with clipped gradients"
    return f"step {step}: {what}: {done}; its samples are in {path}"


def _plain(value: float) -> float | str:
    """JSON has no word for what is no number."""
    return value if math.isfinite(value) else str(value)
