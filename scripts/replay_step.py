"""Computes one step of a run once more, and compares it to the last bit with what the run has recorded of it.

    python -m scripts.replay_step outputs/run --step 120
    torchrun --nproc_per_node=8 -m scripts.replay_step outputs/run --step 120     # of a run on 8 processes

The steps since the newest checkpoint before it are made again, with the run's own settings, samples and draws, and tell
the loss of each rank and sample, and the gradient norm. `--section.key value` changes a setting, such as where the data
are now. The run's folder is only read.

Exit code 0: equal to the last bit, or nothing was recorded of that step. 1: it differs. 2: it cannot be replayed.
"""

import argparse
import json
import logging
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from build import build_run_layout, read_versions
from checkpoint.dcp import read_train_state
from checkpoint.lazy import lazy_all
from checkpoint.safetensors_file import write_safetensors
from config.job_config import JobConfig
from config.parse import load_config
from config.resume import find_version_changes
from config.write import CONFIG_FILE, save_config
from flux.batch import EncodedBatch, RawBatch
from parallel.degrees import divisors, read_ranks
from parallel.mesh import Layout, close_layout
from redact import redact
from runtime import exit_codes
from runtime.exit_record import recorded_exit
from runtime.log import setup_logging
from runtime.run_folder import closed_to_others
from step_guard import INCIDENTS, incident_path
from step_records import Figures, Records, Sample, compare_incident, compare_logged, explain, read_records
from train import EXIT_CODES, FluxTrainer
from training.determinism import apply_determinism
from training.metrics import METRICS_NAME

SHOWN = 10  # samples
EQUAL = "equal to the last bit"

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.replay_step",
        usage="%(prog)s RUN --step N [options] [--section.key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a run, such as outputs/run")
    add("--step", type=int, required=True, metavar="N", help="the step, 1 or more")
    add("--start", type=int, metavar="N", help="go on from this checkpoint instead; 0: from the run's beginning")
    add(
        "--other-layout",
        action="store_true",
        help="of a run on another number of processes: take those that there are, each with its own samples, so that "
        "sums are made in another order",
    )
    add(
        "--save",
        type=Path,
        metavar="FILE.safetensors",
        help="write the step's batch there: what the loader gave, what the model was given, and the losses of the "
        "samples; of several ranks each writes FILE-rank-N.safetensors",
    )
    return parser


def find_config(records: Records, step: int, start: int, world: int, shares: bool, options: list[str]) -> JobConfig:
    """What a step is replayed with: the settings that it was made with. Nothing is saved, sent, validated or drawn.

    Args:
        start: what it goes on from; 0: the run's beginning, if that has no checkpoint.
        world: number of processes.
        shares: take as many as there are.
        options: `--section.key value`, which win.

    Raises:
        ValueError: this is another number of processes than the run had.
    """
    path, config, layout = records.steps.get(start), records.settings_of(step), records.layout_of(step)
    ranks = re.match(r"(\d+) (ranks|process)", layout)
    if ranks and int(ranks[1]) != world:
        if not shares:
            program = "python" if int(ranks[1]) == 1 else f"torchrun --nproc_per_node={ranks[1]}"
            raise ValueError(
                f"step {step} was made by {layout}, and this is {world}: for the same bits start `{program} -m "
                f"scripts.replay_step {records.folder} --step {step}`, or take what there is with --other-layout"
            )
        log.info("step %d was made by %s, and is replayed by %d", step, layout, world)
        config = share_out(config, records.state_of(step).get("update_size"), world)
    section, validation = config.checkpoint, config.validation
    if path:
        anew = read_train_state(path).get("started_anew", ())
        section = replace(
            section,
            initial_load_path=str(path),
            initial_load_model_only=False,
            initial_load_in_hf=False,
            exclude_from_loading=[part for part in section.exclude_from_loading if part not in anew],
        )
    # Samples that are held out of the training data must stay so.
    holds_out = validation.enable and validation.dataset is None and validation.dataset_path is None
    config = replace(
        config,
        checkpoint=replace(section, enable=False, create_seed_checkpoint=False),
        metrics=replace(config.metrics, enable_tensorboard=False, enable_wandb=False, enable_mllog=False),
        validation=replace(validation, enable=holds_out, eval_freq=0, target_loss=None),
    )
    with tempfile.TemporaryDirectory() as scratch:  # in which all of it is checked, as of any run
        save_config(config, Path(scratch) / CONFIG_FILE)
        return load_config([f"--job.config_file={Path(scratch) / CONFIG_FILE}", *options], world, quiet=True)


def share_out(config: JobConfig, update_size: int | None, world: int) -> JobConfig:
    """The configuration for processes that all see different samples, of the same updates."""
    if not update_size or update_size % world:
        among = ", ".join(map(str, divisors(update_size))) if update_size else "as many processes as the run had"
        raise ValueError(f"--other-layout: {world} processes cannot share an update of the run: use {among}")
    local = max(size for size in divisors(update_size // world) if size <= config.training.local_batch_size)
    parallelism = replace(
        config.parallelism,
        data_parallel_replicate_degree=1,
        data_parallel_shard_degree=world,
        context_parallel_degree=1,
        tensor_parallel_degree=1,
    )
    return replace(
        config,
        parallelism=parallelism,
        training=replace(config.training, local_batch_size=local, global_batch_size=update_size),
    )


class MicroBatch(NamedTuple):
    """What a rank computes on, and what comes out of it."""

    raw: RawBatch
    inputs: dict[str, Any]
    losses_B: Tensor  # as far as the rank has the samples' tokens


class ReplayTrainer(FluxTrainer):
    """A trainer that keeps the batches of the last step."""

    def __init__(self, config: JobConfig, folder: Path, layout: Layout):
        super().__init__(config, folder, layout)
        self.batches: list[MicroBatch] = []
        self._raw: RawBatch
        self.run_micro_batch = partial(self._keep, self.run_micro_batch)

    def prepare(self, raw: RawBatch, encoded: EncodedBatch) -> dict[str, Any]:
        self._raw = raw
        return super().prepare(raw, encoded)

    def _keep(self, run: Any, inputs: dict[str, Any], elements: int) -> tuple[Tensor, Tensor]:
        loss, errors_B = run(inputs, elements)
        losses_B = errors_B / self._raw.draws.noise_BTC[0].numel()  # a copy, since a recorded graph writes there again
        self.batches.append(MicroBatch(self._raw, inputs, losses_B))
        return loss, errors_B


def replay(trainer: ReplayTrainer, step: int) -> dict[int, Figures]:
    """Makes all updates up to a step, whose batches the trainer then has. Returns the figures of each."""
    batches = islice(trainer.loader, (step - trainer.step) * trainer.accumulation)
    steps = range(trainer.step + 1, step + 1)
    shown = trainer.layout.rank == 0
    found = {}
    for number in tqdm(steps, desc="replay", unit="step", leave=False, disable=None if shown else True):
        trainer.batches.clear()
        loss, grad_norm = trainer.train_step(batches)
        losses = trainer.layout.gather(loss.double()[None])[..., 0]
        total = losses[:, :, 0].sum()  # tp ranks have the same
        figures = Figures(losses.flatten().tolist(), total.item(), total.float().item(), grad_norm.item())
        found[number] = figures
        if not math.isfinite(figures.loss + figures.grad_norm) and shown:
            log.info("step %d: loss %g, gradient norm %g: left out", number, figures.loss, figures.grad_norm)
    return found


def gather_samples(trainer: ReplayTrainer) -> list[Sample]:
    """All samples of the kept step, on rank 0, those that stand out first."""
    layout = trainer.layout
    own = []
    for raw, _, losses_B in trainer.batches:
        counts = raw.counts_B.tolist() if raw.counts_B is not None else [1] * len(raw.samples)
        rows = zip(raw.samples, raw.draws.t_B.tolist(), losses_B.tolist(), counts, strict=True)
        own += [(position, name, time, loss) for (position, name), time, loss, count in rows if count]
    found: dict[int, Sample] = {}
    for rank, text in enumerate(layout.gather_texts("replayed samples", json.dumps(own))):
        if rank % layout.degrees.tp:
            continue  # tp ranks have the same
        for position, name, time, loss in json.loads(text):  # cp ranks have parts of the same
            first = found.get(position, Sample(position, name, time, 0.0, rank))
            found[position] = first._replace(loss=first.loss + loss)
    return sorted(found.values(), key=lambda sample: -sample.weight)


def save_batches(path: Path, trainer: ReplayTrainer, step: int) -> None:
    """Writes this rank's part of the kept step."""
    tensors: dict[str, Tensor] = {}
    for number, (raw, inputs, losses_B) in enumerate(trainer.batches):
        for name, tensor in (*_tensors(raw, "raw."), *_tensors(inputs, "inputs."), ("losses_B", losses_B)):
            tensors[f"{number}.{name}"] = tensor
    samples = [sample for raw, _, _ in trainer.batches for sample in raw.samples]
    metadata = {"step": str(step), "rank": str(trainer.layout.rank), "samples": json.dumps(samples)}
    if trainer.layout.degrees.world > 1:
        path = path.with_name(f"{path.stem}-rank-{trainer.layout.rank}{path.suffix}")
    write_safetensors(path, lazy_all(tensors), None, metadata)


def _tensors(value: Any, prefix: str) -> Iterable[tuple[str, Tensor]]:
    """All tensors in a dictionary or a dataclass, by their names."""
    items = (
        value.items() if isinstance(value, Mapping) else [(one.name, getattr(value, one.name)) for one in fields(value)]
    )
    for name, item in items:
        if isinstance(item, Tensor):
            yield prefix + name, item
        elif isinstance(item, Mapping) or name == "draws":
            yield from _tensors(item, f"{prefix}{name}.")


def show(
    records: Records, step: int, trainer: ReplayTrainer, start: int, figures: Figures, samples: Sequence[Sample]
) -> None:
    """Prints the figures of the step."""
    print(f"step {step} of {records.folder}, replayed from step {start} on {trainer.layout.describe()}")
    by_rank = f", by rank {', '.join(f'{loss:.6g}' for loss in figures.losses)}" if len(figures.losses) > 1 else ""
    print(f"  loss {figures.loss!r}{by_rank}\n  gradient norm {figures.grad_norm!r}")
    bad = sum(not math.isfinite(sample.loss) for sample in samples)
    finite = [sample.loss for sample in samples if math.isfinite(sample.loss)]
    usual = f", median loss {statistics.median(finite):.4g}" if finite else ""
    print(f"  {len(samples)} samples{usual}, {bad} not finite; those that stand out come first")
    print(f"    {'position':>12}  {'loss':>10}  {'time':>6}  {'rank':>4}  sample")
    for sample in samples[:SHOWN]:
        row = f"{sample.position:>12}  {sample.loss:>10.5g}  {sample.time:>6.4f}  {sample.rank:>4}  {sample.name}"
        print(f"    {redact(row)}")
    if len(samples) > SHOWN:
        print(f"    and {len(samples) - SHOWN} more")


def judge(
    records: Records, step: int, found: Mapping[int, Figures], samples: Sequence[Sample], trainer: ReplayTrainer
) -> bool:
    """Prints how the step compares with what was recorded of it. Whether it differs."""
    layout, here = trainer.layout, found[step]
    incident, line = records.incidents.get(step), records.logged.get(step)
    sources: list[tuple[str, list[str]]] = []
    ranks: list[str] = []
    if incident:
        texts, ranks = compare_incident(here, samples, incident, layout.describe())
        sources.append((str(incident_path(Path(), step)), texts))
    if line:
        sources.append((METRICS_NAME, compare_logged(here, line)))
    for name, texts in sources:
        print(f"  {name}: {'; '.join(texts) or EQUAL}")
    on_the_way = [number for number in found if number < step and number in records.logged]
    if not sources:
        print(f"  nothing was recorded of it: no {INCIDENTS} file, and no line in {METRICS_NAME}")
    if not any(texts for _, texts in sources):
        if incident:
            print("  its samples, weights and settings make these numbers: no machine has failed")
        return False
    first = next((number for number in on_the_way if compare_logged(found[number], records.logged[number])), None)
    changes = find_version_changes(records.state_of(step), read_versions())
    is_exact = layout.device.type == "cpu" or trainer.config.debug.deterministic
    print(f"  {explain(layout.describe(), records.layout_of(step), changes, is_exact, ranks, first)}")
    return True


def main(argv: list[str], rank: int = 0, world_size: int = 1) -> int:
    """Returns the exit code, the same on all ranks."""
    arguments, options = build_parser().parse_known_args(argv)
    step, target = arguments.step, arguments.save
    if target and (target.suffix != ".safetensors" or not target.absolute().parent.is_dir()):
        raise ValueError(
            f"--save={str(target)!r} must be a file FILE.safetensors in a folder that is there: name another"
        )
    records = read_records(arguments.run)
    records.check_step(step)
    start = records.find_start(step, arguments.start)
    config = find_config(records, step, start, world_size, arguments.other_layout, options)
    apply_determinism(config.debug.deterministic, config.debug.deterministic_warn_only)
    layout = build_run_layout(config, world_size)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = ReplayTrainer(config, Path(scratch), layout)
        start = trainer.step
        if start >= step:
            raise ValueError(f"--step={step}: the run begins after step {start}: name a later step")
        log.info("replays %d steps, from %d to %d", step - start, start + 1, step)
        found = replay(trainer, step)
        samples = gather_samples(trainer)
        if target:
            save_batches(target, trainer, step)
        differs = False
        if layout.rank == 0:
            show(records, step, trainer, start, found[step], samples)
            differs = judge(records, step, found, samples, trainer)
        differs = layout.any(differs)
        trainer.checkpointer.close()
        if trainer.metrics:
            trainer.metrics.close()
    close_layout(layout)
    return exit_codes.ERROR if differs else exit_codes.OK


if __name__ == "__main__":
    with closed_to_others(), recorded_exit(0, EXIT_CODES) as end:
        end.rank, ranks = read_ranks(os.environ)
        setup_logging(end.rank)
        sys.exit(main(sys.argv[1:], end.rank, ranks))
