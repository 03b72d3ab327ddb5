"""Pre-trains a FLUX-style text-to-image transformer. Read top to bottom, this file is the recipe.

    python train.py --job.config_file train_configs/flux_tiny.toml [--section.key value ...]

What the parts of a run are made of stands in build.py.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function as region

from build import (
    EMA_EXPORT_FILE,
    EXPORT_FILE,
    EXPORT_FOLDER,
    build_checkpointer,
    build_encoders,
    build_mllog,
    build_model,
    build_optimizer,
    build_run_layout,
    compute_dtype,
    describe_model,
    draw_seed,
    enter_run_folder,
    export_weights,
    measure_peaks,
    start_weights,
    warn_of_tiny_autoencoder,
)
from checkpoint.errors import CheckpointError
from config.job_config import JobConfig
from config.parse import load_config
from config.resume import settle_seed
from config.write import CONFIG_FILE, format_config, save_config
from evaluate import EvaluationStopped, Evaluator
from flux.batch import EncodedBatch, RawBatch
from flux.data.build import Deal, build_training_loader, build_validation_loader, open_data
from flux.data.errors import DataError
from flux.data.tokenizers import build_tokenizer
from flux.encode_ahead import EncodeAhead
from flux.flops import training_flops
from flux.flow import squared_errors
from flux.inputs import make_inputs
from flux.plans import make_plan
from flux.spec import SPECS
from memory_advice import out_of_memory_told
from parallel.compile import compile_loss
from parallel.context_parallel import gather_sequence, shard_sequence
from parallel.degrees import read_ranks
from parallel.gradients import clip_grad_norm_, group_by_module
from parallel.mesh import Layout, close_layout
from parallel.quantize import after_update
from parallel.replicas import ReplicasDiffer
from parallel.updates import copy_parts, middle_blocks, update_ratios
from preflight import check_run, look_alone
from redact import redact_values
from run_state import check_shards, checkpoint_tensors, describe_run, find_start, take_over, tell_changes, weight_bits
from runtime import exit_codes
from runtime.exit_record import RunEnd, recorded_exit
from runtime.log import log_stage, setup_logging
from runtime.run_folder import closed_to_others
from runtime.stop import Preempted, check_grace
from runtime.watchdog import Watchdog
from step_guard import WAIT_SECONDS, StepGuard
from step_report import StepReport
from training.cuda_graph import CudaGraph
from training.determinism import apply_determinism
from training.ema import update_ema
from training.loss_parts import LossParts
from training.lr_schedule import build_lr_scheduler
from training.metrics import METRICS_NAME, MetricsLogger
from training.optimizer import ExactWeights, step_unless
from training.plots import save_loss_curve
from training.profiling import Profiler
from training.step_timer import StepTimer

log = logging.getLogger("train")  # by name: run as a program, this module is called __main__
EXIT_CODES = {
    DataError: exit_codes.DATA,
    ValueError: exit_codes.CONFIG,
    FloatingPointError: exit_codes.DIVERGED,
    ReplicasDiffer: exit_codes.DIVERGED,
    CheckpointError: exit_codes.CHECKPOINT,
}
STAGES = 6
LOSS_CURVE = "loss.png"  # in the run folder


class FluxTrainer:
    """One training run: built in six steps, then `train()`. All ranks make one and do the same."""

    def __init__(self, config: JobConfig, folder: Path, layout: Layout, watchdog: Watchdog | None = None):
        watchdog = watchdog or Watchdog(RunEnd(layout.rank), enabled=False)
        self.checkpointer = build_checkpointer(config, folder, layout)
        found = find_start(config, self.checkpointer)
        saved = found.train_state if found else {}
        self.config = config = settle_seed(config, saved.get("seed"), partial(draw_seed, layout))
        self.seed, self.folder, self.layout = cast(int, config.debug.seed), folder, layout
        training, validation, degrees = config.training, config.validation, layout.degrees
        self.step, self.cursor = (found.step, found.samples_seen) if found else (0, 0)  # updates done, positions used
        self.device, self.dtype = layout.device, compute_dtype(config)
        self.peaks = measure_peaks(layout, self.dtype)
        log_stage(1, STAGES, "mesh", f"{layout.describe()}, {torch.get_num_threads()} threads, {self.peaks.describe()}")

        self.spec = SPECS[config.model.flavor]
        self.update_size, self.accumulation = training.update_size(degrees.dp), training.accumulation(degrees.dp)
        watchdog.rest()  # indexing takes as long as it takes
        data = open_data(training, validation, config.data, config.encoder, self.spec, show_progress=layout.rank == 0)
        watchdog.expect("the building of the run", config.reliability.phase_limit_seconds)
        self.shards = data.describe_shards()
        check_shards(config, saved, self.shards, self.update_size)
        tokenizer = build_tokenizer(config.encoder, training.test_mode) if data.needed_parts - {"autoencoder"} else None
        deal = Deal(self.seed, layout.dp_rank, degrees.dp, degrees.cp)
        self.loader = build_training_loader(data, tokenizer, deal, self.cursor)
        log_stage(2, STAGES, "data", f"{data.describe()}, {training.describe_update(degrees.dp)}")

        self.encoders = build_encoders(config, self.spec, tokenizer, layout, data.needed_parts)
        log_stage(3, STAGES, "encoders", f"{self.encoders.describe()}, {config.encoder.dtype}")
        warn_of_tiny_autoencoder(training.dataset, self.encoders)

        self.plan = make_plan(self.spec.transformer)
        self.model = build_model(config, self.spec, layout)
        start_weights(config, self.spec, self.model, layout, found)
        self.loss = compile_loss(squared_errors, config.compile)
        self.run_micro_batch = CudaGraph(self.add_gradients) if config.compile.cuda_graph else self.add_gradients
        log_stage(4, STAGES, "model", describe_model(config, self.spec, self.model))

        self.optimizer = build_optimizer(config, self.model)
        self.weights = ExactWeights(self.optimizer, dict(self.model.named_parameters()))
        self.ema = take_over(config, self.checkpointer, found, self.model, self.optimizer, self.weights)
        done = found.schedule_step if found else 0
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.lr_scheduler, training.steps, done)
        warmup = f"warm-up {config.lr_scheduler.warmup_steps} of {training.steps} steps"
        log_stage(5, STAGES, "optimizer", f"{config.optimizer.describe(training.dtype)}, {warmup}")

        self.metrics: MetricsLogger | None = None  # on rank 0
        if layout.rank == 0:
            mllog = build_mllog(config, folder, layout, data) if config.metrics.enable_mllog else None
            self.metrics = MetricsLogger(folder, config.metrics, redact_values(asdict(config)), self.step, mllog)
        self.timer = StepTimer(self.device.type == "cuda")
        self.ahead = EncodeAhead(self.encoders, config.encoder.encode_ahead, self.timer.waiting, self.timer.encoding)
        self.guard = StepGuard(config, folder, layout, watchdog, self.metrics, saved.get("spike_window"))
        self.must_evaluate = not saved.get("is_evaluated", True)  # the run was stopped while it did, or at its target
        self.saved_step = self.step if found and found.is_own else -1
        tools = self.metrics, self.timer, self.peaks
        self.report = StepReport(config, folder, layout, *tools, self.step, self.cursor)
        self.loss_parts = LossParts(self.device, training.classifier_free_guidance_prob > 0)
        self.by_module, self.watched = group_by_module(self.model), middle_blocks(self.model, self.plan.blocks)
        self.evaluator: Evaluator | None = None
        if validation.enable:
            held_out = build_validation_loader(data, tokenizer, deal)
            parts = (self.spec, self.ahead, self.model, held_out, self.squared_errors, self.predict, self.dtype)
            more = (self.ema, self._after_change, self.poll, self.metrics)
            self.evaluator = Evaluator(config, folder, layout, *parts, *more)
        plan = f"validation every {validation.freq} steps" if validation.enable else "no validation"
        check_grace(saved.get("save_seconds", 0.0))
        log_stage(6, STAGES, "run", f"{folder}, {found.describe() if found else 'new'}; {plan}")
        tell_changes(config, saved, self.update_size)

    def save(self) -> None:
        """Saves a checkpoint of what the last update left."""
        self.guard.limit_writing(f"the save of step {self.step}", self.step)
        self.guard.tell(self.step + 1)
        self.report.tell_all(self.step, self.cursor)
        state = describe_run(self.config, self.layout, self.shards, self.update_size) | {
            "step": self.step,
            "samples_seen": self.cursor,
            "schedule_step": self.lr_scheduler.last_epoch,
            "is_evaluated": not self.must_evaluate,
            "spike_window": self.guard.state(),
            "save_seconds": self.checkpointer.longest_save,
        }
        self.checkpointer.save(self.step, checkpoint_tensors(self.model, self.optimizer, self.ema, to_save=True), state)
        self.saved_step = self.step
        check_grace(self.checkpointer.longest_save)

    def predict(self, **inputs: Tensor | None) -> Tensor:
        """The transformer's velocity of all tokens, on every rank; for sampling, without gradients."""
        cp = self.layout.axis("cp")
        return gather_sequence(self.model(**shard_sequence(inputs, self.plan.sequence_tensors, cp)), cp)

    def sample_flops(self, tokens: int) -> float:
        """Floating-point operations of training on one picture of so many tokens."""
        return training_flops(self.spec.transformer, tokens, self.config.encoder.max_t5_encoding_len)

    def prepare(self, raw: RawBatch, encoded: EncodedBatch) -> dict[str, Any]:
        """Batch -> arguments of `errors`: what this rank computes on."""
        with region("inputs"):
            inputs, target_BTC = make_inputs(encoded, raw.draws, self.spec, self.config.training.guidance, self.dtype)
        named = {**inputs, "target_BTC": target_BTC, "counts_B": raw.counts_B}
        # Identity unless context parallel ranks share the tokens.
        return shard_sequence(named, self.plan.sequence_tensors, self.layout.axis("cp"))

    def errors(self, target_BTC: Tensor, counts_B: Tensor | None, **inputs: Tensor | None) -> Tensor:
        """Squared error of every sample's velocity, [B], summed over this rank's tokens of it; 0 for one that only
        fills up the batch.
        """
        with region("forward"):
            velocity_BTC = self.model(**inputs)
        with region("loss"):
            errors_B = self.loss(velocity_BTC, target_BTC)
        return errors_B if counts_B is None else errors_B * counts_B

    def squared_errors(self, raw: RawBatch, encoded: EncodedBatch) -> Tensor:
        """Batch -> `errors`. Training and validation share these lines."""
        return self.errors(**self.prepare(raw, encoded))

    def add_gradients(self, inputs: Mapping[str, Any], elements: int) -> tuple[Tensor, Tensor]:
        """Forward and backward pass of one micro-batch: its part of the loss of `elements`, and `errors`."""
        errors_B = self.errors(**inputs)
        micro_loss = errors_B.sum() / elements
        with region("backward"):
            micro_loss.backward()
        return micro_loss.detach(), errors_B.detach()

    def forward_backward(self, batches: Iterator[RawBatch]) -> Tensor:
        """Gradients of one update, and this rank's part of its loss.

        Every part is divided by the element count of the whole update, so sums over micro-batches and ranks are exact.
        """
        loss = torch.zeros((), device=self.device)
        self.loss_parts.begin_update()
        for _ in range(self.accumulation):
            raw, encoded = self.ahead.take(batches)
            self.report.bad += raw.bad
            self.guard.note(raw)
            sample_elements = raw.draws.noise_BTC[0].numel()
            inputs = self.prepare(raw, encoded)
            micro_loss, errors_B = self.run_micro_batch(inputs, sample_elements * raw.update_samples)
            self.ahead.look_ahead(batches)  # while a GPU is still at work on this one
            loss += micro_loss
            self.loss_parts.add(errors_B / sample_elements, raw.draws.t_B, raw.uncaptioned_B, raw.counts_B)
        self.timer.count(raw.update_samples, raw.update_samples * self.sample_flops(raw.draws.noise_BTC.shape[1]))
        return loss

    def train_step(self, batches: Iterator[RawBatch]) -> tuple[Tensor, Tensor]:
        """One update. Returns this rank's part of its loss and the gradient norm before clipping, on the device."""
        # A recorded graph adds to the gradients where they were.
        self.optimizer.zero_grad(set_to_none=not self.config.compile.cuda_graph)
        loss = self.forward_backward(batches)
        with region("clip"):
            grad_norm = self.clip_gradients()
        skip = self.guard.judge(self.step + 1, self.cursor, loss, grad_norm)
        self.loss_parts.end_update(skip)
        before = copy_parts(self.watched) if self._is_logged(self.step + 1) else None
        with region("optimizer"):
            step_unless(self.optimizer, skip)
        ratios = update_ratios(self.watched, before) if before else {}
        self.update_ratios = {f"update_ratio/{name}": ratio for name, ratio in ratios.items()}
        self.lr_scheduler.step()
        self._after_change()
        self.step += 1
        if self.ema:
            with region("ema"):
                update_ema(self.ema, self.weights, self.config.ema.decay, self.step, skip)
        self.cursor += self.update_size
        return loss, grad_norm

    def clip_gradients(self) -> Tensor:
        """Scales the gradients down to training.max_norm; their norm before that."""
        norm, norms = clip_grad_norm_(self.by_module, self.config.training.max_norm)
        self.grad_norms = {f"grad_norm/{name}": own for name, own in norms.items()}
        return norm

    def train(self, after_step: Callable[[], object] = lambda: None) -> None:
        """Runs to training.steps, calling `after_step` each time; exports the weights and draws the loss curve.

        Raises:
            Preempted: the run was asked to stop, and has saved what it had.
        """
        if self.config.checkpoint.create_seed_checkpoint:
            self.save()
            return self.checkpointer.finish()
        if self.step >= self.config.training.steps:
            log.info("all %d steps are done already: to go on, raise training.steps", self.config.training.steps)
        self.report.start(self.step)
        with self.guard.stop if self.checkpointer.saves else nullcontext():
            self._take_steps(after_step)
        self._finish()

    def _take_steps(self, after_step: Callable[[], object]) -> None:
        steps = self.config.training.steps
        batches = islice(self.loader, (steps - self.step) * self.accumulation)
        reached = self.must_evaluate and self._evaluate()
        self.guard.limit_phase("the first step", self.step)
        while not reached and self.step < steps and self.guard.stop_reason is None:
            lr = self.lr_scheduler.get_last_lr()[0]
            loss, grad_norm = self.train_step(batches)
            self.report.advance()
            self.checkpointer.poll()
            # Of the step before: the device works on this one meanwhile.
            self.guard.tell(self.step)
            self.report.tell()
            if self._is_logged(self.step):
                self._log_step(loss, grad_norm, float(lr))
            with self.timer.paused():
                after_step()
                self.guard.check_replicas(self.step, partial(weight_bits, self.model, self.optimizer))
                reached = self._evaluate()
                if self._must_save(reached):
                    self.save()
                    self.guard.poll()
            self.guard.limit_step(self.step)
        self.guard.limit_writing("the end of the run", self.step)
        self.guard.tell(self.step + 1)
        self.report.close()
        if self.guard.stop_reason and not reached:
            if self.saved_step != self.step:
                self.save()
            self.checkpointer.finish()
            raise Preempted(f"{self.guard.stop_reason}: saved step {self.step}, the same command goes on from there")

    def _evaluate(self) -> bool:
        """Validates and draws where that is due. Whether validation.target_loss is reached."""
        self.must_evaluate = False
        if self.evaluator is None or not self.evaluator.is_due(self.step):
            return False
        self.guard.tell(self.step + 1)
        self.report.tell()
        self.guard.limit_phase("an evaluation", self.step)
        try:
            reached = self.evaluator.evaluate(self.step, self.cursor)
        except EvaluationStopped:
            self.must_evaluate = True  # from the beginning, when the run goes on
            return False
        self.guard.poll()  # ranks go on together: one of them alone scores pictures
        self.must_evaluate = reached  # when the run is started again, which may be to reach more
        return reached

    def poll(self) -> bool:
        """Between two batches of an evaluation: whether the run is to stop. All ranks must call it."""
        self.guard.limit_phase("an evaluation", self.step)
        return self.checkpointer.saves and self.guard.poll()

    def _after_change(self) -> None:
        """Computes anew what follows from the weights."""
        after_update(self.model, self.config.model.converters, self.config.quantize)

    def _is_logged(self, step: int) -> bool:
        return step == 1 or self.config.training.is_due(self.config.metrics.log_freq, step)

    def _must_save(self, is_last: bool) -> bool:
        """By steps, or by the minutes that had passed at a logged step."""
        is_due = self.checkpointer.is_due(self.step, is_last or self.step == self.config.training.steps)
        return is_due or self.report.save_is_overdue

    def _finish(self) -> None:
        """Waits for the last checkpoint, exports the weights, and draws the loss curve."""
        self.checkpointer.finish()
        self.guard.limit_writing("the export of the weights", self.step)
        section, folder = self.config.checkpoint, self.folder / EXPORT_FOLDER
        self.layout.set_timeout(section.timeout_seconds + 2 * WAIT_SECONDS)  # rank 0 writes while the others wait
        if section.last_save_model_only or not section.enable:
            for name, tensors in (EXPORT_FILE, self.weights), (EMA_EXPORT_FILE, self.ema):
                export_weights(self.config, self.layout, folder / name, self.step, tensors)
        if self.metrics:
            self.metrics.close()
            save_loss_curve(self.folder / METRICS_NAME, self.folder / LOSS_CURVE)
            log.info("done: weights in %s, loss curve in %s", folder, self.folder / LOSS_CURVE)

    def _log_step(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Puts the figures of this step on their way, for which the host does not wait."""
        figures = {"grad_norm": grad_norm, **self.grad_norms, **self.update_ratios}
        overdue = self.checkpointer.is_overdue()
        self.report.send(self.step, self.cursor, self.loss_parts, loss, figures, lr, overdue)


def main(argv: list[str]) -> None:
    with closed_to_others(), recorded_exit(0, EXIT_CODES) as end, ExitStack() as within:
        end.rank, world_size = read_ranks(os.environ)
        setup_logging(end.rank)
        config = load_config(argv, world_size, quiet=end.rank > 0)
        end.resumes = config.checkpoint.saves
        if config.comm.mode == "fake_backend":
            raise ValueError('comm.mode="fake_backend" trains nothing: use ./run_train.sh or python -m scripts.dry_run')
        apply_determinism(config.debug.deterministic, config.debug.deterministic_warn_only)
        problems = look_alone(config, os.environ)
        layout = build_run_layout(config, world_size)
        end.may_speak = layout.is_first_to_fail
        end.folder = enter_run_folder(config, layout)
        check_run(config, layout, problems)
        watchdog = within.enter_context(Watchdog(end, config.reliability.watchdog))
        watchdog.expect("the start of the run", config.reliability.phase_limit_seconds)
        with out_of_memory_told(config, layout, in_step=False):
            trainer = FluxTrainer(config, end.folder, layout, watchdog)
        if end.rank == 0:
            save_config(trainer.config, end.folder / CONFIG_FILE)
            if config.job.print_config:
                log.info("%s", format_config(trainer.config))
        profiler = Profiler(config.profiling, end.folder, end.rank, layout.device.type, trainer.step)
        try:
            with out_of_memory_told(config, layout, in_step=True), profiler:
                trainer.train(profiler.step)
        finally:
            end.step, end.save_seconds = trainer.step, trainer.checkpointer.longest_save or None
            try:
                trainer.checkpointer.close()
            finally:
                if trainer.metrics:
                    trainer.metrics.close(in_haste=True)
        close_layout(layout)


if __name__ == "__main__":
    main(sys.argv[1:])
