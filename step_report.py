"""What a run tells of its steps: their figures, samples that could not be used, and whether it can go on from there."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from config.job_config import JobConfig
from flux.batch import BadRecord
from flux.data.errors import DataError
from parallel.mesh import Layout
from runtime.log import StepLog
from training.bad_samples import BadSamples
from training.loss_parts import LossParts
from training.metrics import MetricsLogger
from training.peaks import Peaks
from training.step_figures import StepFigures, send_figures
from training.step_timer import StepTimer


class StepReport:
    """Tells of logged steps. All ranks make one and do the same; the one with `metrics` writes.

    `send` puts the figures of a step on their way to the host and waits for nothing. `tell` waits for them, when the
    device has the next step to work on; before anything else is told or saved of a step, its figures are.

    Args:
        metrics: where figures go; None on ranks that write none.
        timer: measures the steps.
        step, samples: what is done already.
    """

    def __init__(
        self,
        config: JobConfig,
        folder: Path,
        layout: Layout,
        metrics: MetricsLogger | None,
        timer: StepTimer,
        peaks: Peaks,
        step: int,
        samples: int,
    ):
        self.config, self.layout, self.metrics, self.timer, self.peaks = config, layout, metrics, timer, peaks
        self.bad: list[BadRecord] = []  # of this rank, since the last `send` or `tell_bad_samples`
        self.save_is_overdue = False  # by the clock of rank 0, at the last step that was told
        self._sent: tuple[StepFigures, int, list[BadRecord]] | None = None
        self._samples, self._step_log = samples, StepLog(config.training.steps, done=step, shown=False)
        if metrics:
            self._bad_samples = BadSamples(folder, config.data.max_bad_fraction, samples)

    def start(self, step: int) -> None:
        """Everything is built, after `step` finished steps."""
        self._step_log = StepLog(self.config.training.steps, done=step, shown=self.layout.rank == 0)
        if self.metrics:
            self.metrics.start_run(step)

    def send(
        self,
        step: int,
        samples: int,
        loss_parts: LossParts,
        loss: Tensor,
        norms: Mapping[str, Tensor],
        lr: float,
        save_is_overdue: bool,
    ) -> None:
        """Puts the figures of a step on their way; those of an earlier one are told first.

        Args:
            step, samples: what is done with it.
            loss: this rank's part of the update's loss.
            norms: `[]` on the device, the same on all ranks.
            save_is_overdue: by this rank's clock.
        """
        self.tell()
        own = {"bad_samples": float(len(self.bad)), "save_is_overdue": float(save_is_overdue)}
        known = {"lr": lr, "samples_seen": samples}
        figures = send_figures(step, loss_parts, loss, own, norms, known, self.layout.gather, self.timer)
        self._sent = (figures, *self._take_bad_samples(samples))

    def tell(self) -> None:
        """Tells the figures that are on their way, if there are any.

        Raises:
            DataError: too many samples could not be used.
        """
        if self._sent is None:
            return
        (figures, samples, bad), self._sent = self._sent, None
        self._note_bad_samples(figures.step, samples, bad, some=any(figures.of_ranks("bad_samples")))
        self.save_is_overdue = self.save_is_overdue or figures.of_ranks("save_is_overdue")[0] > 0
        values = figures.read(self.peaks)
        if self.metrics:
            self.metrics.log(figures.step, values)
        self._step_log.report(figures.step, values)

    def tell_all(self, step: int, samples: int) -> None:
        """Before a checkpoint of this step: figures that are on their way, and what could not be used since then."""
        self.tell()
        samples, bad = self._take_bad_samples(samples)
        self._note_bad_samples(step, samples, bad, some=self.layout.any(bool(bad)))
        self.save_is_overdue = False

    def advance(self) -> None:
        """One step is done."""
        self._step_log.advance()

    def close(self) -> None:
        """The last step is done."""
        self.tell()
        self._step_log.close()

    def _take_bad_samples(self, samples: int) -> tuple[int, list[BadRecord]]:
        """Since the last call: how many samples there were, and which of this rank's could not be used."""
        passed, self._samples = samples - self._samples, samples
        bad, self.bad = self.bad, []
        return passed, bad

    def _note_bad_samples(self, step: int, samples: int, bad: list[BadRecord], some: bool) -> None:
        """Tells what could not be used of so many samples.

        Args:
            some: whether there is something on any rank.
        """
        records = json.dumps([record._asdict() for record in bad])
        texts = self.layout.gather_texts(f"bad samples {step}", records) if some else []
        sharing = self.layout.degrees.cp * self.layout.degrees.tp
        if self.metrics and (counts := self._bad_samples.note(samples, [json.loads(text) for text in texts], sharing)):
            self.metrics.log(step, counts)
        name, complain = f"complaint {step}", lambda: self._bad_samples.complaint()
        if some and (complaint := self.layout.from_rank_0(name, complain)):
            raise DataError(complaint)
