"""What a run has recorded of its steps, and how a step that is computed once more compares with it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.dcp import read_train_state
from checkpoint.steps import find_steps
from config.job_config import JobConfig
from config.parse import load_config
from config.resume import restore_config
from config.write import CONFIG_FILE
from runtime.exit_record import RECORD_NAME, read_exit_record
from step_guard import INCIDENTS
from training.metrics import METRICS_NAME


@dataclass(frozen=True)
class Records:
    """What a run has left.

    Args:
        steps: its checkpoints.
        logged: what metrics.jsonl has of each logged step.
        incidents: what the run has written of updates whose numbers were odd.
    """

    folder: Path
    config: JobConfig  # of its latest start
    steps: Mapping[int, Path]
    logged: Mapping[int, Mapping[str, Any]]
    incidents: Mapping[int, Mapping[str, Any]]

    def check_step(self, step: int) -> None:
        """Raises ValueError for a step that the run has not come to."""
        record = read_exit_record(self.folder / RECORD_NAME) or {}
        done = max([0, *self.steps, *self.logged, *self.incidents, record.get("step") or 0])
        # The last ones may have been made without a trace.
        if not 1 <= step <= min(done + self.config.metrics.log_freq, self.config.training.steps):
            raise ValueError(
                f"--step={step} must be a step of {self.folder}, which has come to step {done} of "
                f"{self.config.training.steps}: name one of these"
            )

    def find_start(self, step: int, wanted: int | None) -> int:
        """The checkpoint from which a step is replayed; 0: the run's beginning, which need not have one."""
        earlier = [number for number in self.steps if number < step]
        if wanted is None and earlier:
            return earlier[-1]
        if wanted is None:
            oldest = f"no checkpoint before step {step}, the oldest is of step {min(self.steps)}" if self.steps else ""
            raise ValueError(
                f"{self.folder} has {oldest or 'no checkpoint'}: replay all {step} steps from its beginning with "
                f"--start 0{', or name a later step' if oldest else ''}"
            )
        if wanted not in {0, *earlier}:
            there = ", ".join(map(str, earlier)) or "none"
            raise ValueError(f"--start={wanted} must be a checkpoint before step {step}: there are {there}, or take 0")
        return wanted

    def settings_of(self, step: int) -> JobConfig:
        """Those that a step was made with.

        Raises:
            ValueError: they are of another version of the recipe.
        """
        state = self._state_after(step)
        return restore_config(state["config"], str(self.folder)) if "config" in state else self.config

    def state_of(self, step: int) -> Mapping[str, Any]:
        """What a checkpoint knows of the run as it made a step, beside its tensors; empty: there is none."""
        earlier = [path for number, path in self.steps.items() if number < step]
        return self._state_after(step) or (read_train_state(earlier[-1]) if earlier else {})

    def layout_of(self, step: int) -> str:
        """The ranks that have made a step, in the words of `Layout.describe`."""
        known = self.incidents.get(step) or self.state_of(step)
        return known.get("layout", "ranks of which nothing is known")

    def _state_after(self, step: int) -> Mapping[str, Any]:
        """Of the first checkpoint from a step on: who has saved it has made the step. Empty: the latest start has."""
        later = [path for number, path in self.steps.items() if number >= step]
        return read_train_state(later[0]) if later else {}


def read_records(folder: Path) -> Records:
    """Reads what a run has left.

    Raises:
        ValueError: it is no folder of a run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is no run, it has no {CONFIG_FILE}: name the folder of a run, such as outputs/run")
    config = load_config([f"--job.config_file={folder / CONFIG_FILE}"], quiet=True)
    metrics, logged = folder / METRICS_NAME, {}
    for line in metrics.read_text().splitlines() if metrics.is_file() else []:
        values = _read_json(line)
        if {"step", "loss", "grad_norm"} <= values.keys():
            logged[values["step"]] = values
    records = [_read_json(path.read_text()) for path in (folder / INCIDENTS).glob("step-*.json")]
    incidents = {record["step"]: record for record in records if "step" in record}
    return Records(folder, config, find_steps(folder / config.checkpoint.folder), logged, incidents)


def _read_json(text: str) -> dict[str, Any]:
    """Empty for what a run was stopped in the middle of."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Figures(NamedTuple):
    """Of one update: what the run would have recorded of it."""

    losses: list[float]  # of the ranks
    loss: float
    logged_loss: float
    grad_norm: float


class Sample(NamedTuple):
    """One of an update, and the mean squared error of its velocity."""

    position: int
    name: str
    time: float
    loss: float
    rank: int  # the first one that has it

    @property
    def weight(self) -> float:
        """Those that stand out have most."""
        return self.loss if math.isfinite(self.loss) else math.inf


def compare(pairs: Iterable[tuple[str, float, float | str]]) -> list[str]:
    """One text for each (name, number here, number then) that is not the same to the last bit."""
    texts = []
    for name, here, told in pairs:
        then = float(told)
        if here == then or (math.isnan(here) and math.isnan(then)):
            continue
        relative = abs(here - then) / max(abs(here), abs(then))
        off = f" (relative difference {relative:.1e})" if math.isfinite(relative) else ""
        texts.append(f"{name} is {here!r} and was {then!r}{off}")
    return texts


def compare_logged(figures: Figures, line: Mapping[str, Any]) -> list[str]:
    """What is not as in a line of metrics.jsonl."""
    return compare([("loss", figures.logged_loss, line["loss"]), ("grad_norm", figures.grad_norm, line["grad_norm"])])


def compare_incident(
    figures: Figures, samples: Sequence[Sample], record: Mapping[str, Any], layout: str
) -> tuple[list[str], list[str]]:
    """What is not as in the record of an odd update, and the ranks whose own loss is not."""
    texts = compare([("loss", figures.loss, record["loss"]), ("grad_norm", figures.grad_norm, record["grad_norm"])])
    then = {(position, name) for rank in record["ranks"] for position, name in rank["samples"]}
    if changed := sorted(then ^ {(sample.position, sample.name) for sample in samples}):
        texts.append(f"the sample at position {changed[0][0]} is another one ({len(changed)} differences)")
    ranks = []
    for rank, here in zip(record["ranks"], figures.losses, strict=False) if record["layout"] == layout else ():
        if differs := compare([(f"loss of rank {rank['rank']}", here, rank["loss"])]):
            texts += differs
            ranks.append(f"rank {rank['rank']} on {rank['host']}")
    return texts, ranks


def explain(here: str, then: str, changes: list[str], is_exact: bool, ranks: list[str], first: int | None) -> str:
    """What a difference means.

    Args:
        here, then: the layouts.
        changes: of versions.
        is_exact: kernels give the same bits each time.
        ranks: whose losses differ, where that is known.
        first: an earlier step that differs already.
    """
    since = f"step {first} differs already, as the first one: " if first else ""
    if then != here:
        small = "sums in another order differ by about 1e-6, 5e-4 in bfloat16, and more than that is a fault"
        return f"{since}made by {then}, and replayed by {here}: {small}"
    if changes:
        return f"{since}other versions may compute otherwise: {', '.join(changes)}"
    if not is_exact:
        return f"{since}without debug.deterministic a GPU adds up in any order (about 1e-6): more than that is a fault"
    threads = ", or there were other OMP_NUM_THREADS" if here.endswith("cpu") else ""
    return (
        f"{since}the same samples, weights and layout do not give what the run has seen: the fault was in none of them "
        f"and is gone: suspect the hardware of {', '.join(ranks[:4]) or 'the run'}{threads}"
    )
