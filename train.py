"""Pre-trains a FLUX-style text-to-image transformer. Read top to bottom, this file is the recipe.

    python train.py --job.config_file train_configs/flux_tiny.toml [--section.key value ...]

The build functions below are the only place where a model, its encoders or its data are put together; scripts and
benchmarks call them too.
"""

import logging
import math
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint.export import EXPORT_FILE, load_export, save_export
from config.job_config import JobConfig
from config.parse import load_config
from config.write import format_config, save_config
from flux.autoencoder import AutoencoderConfig, load_autoencoder
from flux.batch import RawBatch
from flux.codec import LatentCodec
from flux.conditioner import Sharding, build_conditioner, check_tokenizer
from flux.data.build import build_training_loader, build_validation_loader
from flux.data.errors import DataError
from flux.data.loader import Loader
from flux.data.shape_score import can_score, describe_scores, score_pictures
from flux.data.tokenizers import FluxTokenizer, build_tokenizer
from flux.encoders import Encoders
from flux.flops import training_flops, with_unit
from flux.flow import squared_error_sum
from flux.inputs import make_inputs
from flux.model import FluxTransformer, init_weights
from flux.pictures import make_images, save_grid
from flux.plans import make_plan
from flux.prompts import load_prompts
from flux.sampling import draw_pictures
from flux.spec import PIXELS_PER_TOKEN, SPECS, ModelSpec
from parallel.compile import compile_loss
from parallel.context_parallel import gather_sequence, shard_sequence
from parallel.data_parallel import apply_frozen_fsdp, reshard
from parallel.degrees import Degrees, read_ranks, resolve_degrees
from parallel.gradients import clip_grad_norm_, group_by_mesh
from parallel.mesh import Layout, build_layout, choose_device, close_layout
from parallel.parallelize import Techniques, check_techniques, parallelize
from parallel.quantize import after_update
from parallel.shards import copy_full_, gather_state_dict
from runtime import exit_codes
from runtime.exit_record import recorded_exit
from runtime.log import StepLog, log_stage, setup_logging
from runtime.run_folder import claim_run_folder
from training.determinism import apply_determinism
from training.lr_schedule import build_lr_scheduler
from training.metrics import METRICS_NAME, MetricsLogger, peak_memory_gib
from training.optimizer import build_optimizer
from training.plots import save_loss_curve
from training.step_timer import StepTimer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
log = logging.getLogger("train")  # by name: run as a program, this module is called __main__
EXIT_CODES = {DataError: exit_codes.DATA, ValueError: exit_codes.CONFIG, FloatingPointError: exit_codes.DIVERGED}
STAGES = 6
CONFIG_FILE, EXPORT_FOLDER, LOSS_CURVE = "config.toml", "export", "loss.png"  # in the run folder


def build_run_layout(config: JobConfig, world_size: int) -> Layout:
    """This process among the others, who must all call it."""
    training = config.training
    by_fsdp = training.dtype != training.mixed_precision_param or training.enable_cpu_offload
    return build_layout(resolve_degrees(config.parallelism, world_size), config.comm, needs_groups=by_fsdp)


def build_encoders(config: JobConfig, spec: ModelSpec, tokenizer: FluxTokenizer, layout: Layout) -> Encoders:
    """The frozen text encoders and autoencoder. T5 is split over all ranks of a copy of the weights."""
    encoder, device, mesh = config.encoder, layout.device, layout.encoder
    sharding = None if mesh is None else Sharding(partial(apply_frozen_fsdp, mesh=mesh), copy_full_)
    channels, dtype = spec.codec.latent_channels, DTYPES[encoder.dtype]
    autoencoder = load_autoencoder(encoder.autoencoder_path, channels, dtype, device)
    conditioner = build_conditioner(encoder, spec.transformer, config.training.test_mode, device, sharding)
    check_tokenizer(tokenizer, conditioner)
    return Encoders(tokenizer, conditioner, LatentCodec(autoencoder, spec.codec), device)


def build_model(config: JobConfig, spec: ModelSpec, layout: Layout) -> FluxTransformer:
    """The transformer on the meta device, parallelized: it has no weights yet."""
    with torch.device("meta"):
        model = FluxTransformer(spec.transformer).to(DTYPES[config.training.dtype])
    parallelize(model, make_plan(spec.transformer), layout, choose_techniques(config))
    return model


def choose_techniques(config: JobConfig) -> Techniques:
    """What the configuration wants to be done to the model."""
    return Techniques(
        config.parallelism,
        config.activation_checkpoint,
        config.compile,
        config.quantize,
        config.model.converters,
        param_dtype=compute_dtype(config),
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        cpu_offload=config.training.enable_cpu_offload,
    )


def draw_weights(config: JobConfig, model: FluxTransformer, layout: Layout) -> None:
    """Gives the model of `build_model` fresh weights; a rank never holds more than its part and one whole tensor."""
    model.to_empty(device="cpu" if config.training.enable_cpu_offload else layout.device)
    init_weights(model, _seed(config), layout.device, copy_full_)


def compute_dtype(config: JobConfig) -> torch.dtype:
    """Number format of the transformer's computation."""
    training = config.training
    return DTYPES[training.mixed_precision_param if training.dtype == "float32" else training.dtype]


class TrainedRun(NamedTuple):
    """What a finished run left, ready to draw with."""

    config: JobConfig
    spec: ModelSpec
    model: FluxTransformer
    encoders: Encoders
    step: int


def load_run(folder: Path) -> TrainedRun:
    """The exported weights of a run with its encoders.

    Raises:
        ValueError: not the folder of a finished run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}: give the folder of a finished run, such as outputs/tiny")
    config = load_config([f"--job.config_file={folder / CONFIG_FILE}"])
    spec, layout = SPECS[config.model.flavor], Layout(Degrees(), choose_device())
    with torch.device("meta"):
        model = FluxTransformer(spec.transformer)
    metadata = load_export(folder / EXPORT_FOLDER / EXPORT_FILE, model, spec.name)
    tokenizer = build_tokenizer(config.encoder, config.training.test_mode)
    encoders = build_encoders(config, spec, tokenizer, layout)
    return TrainedRun(config, spec, model.to(layout.device).eval(), encoders, int(metadata.get("step", 0)))


def _seed(config: JobConfig) -> int:
    assert config.debug.seed is not None, "main() draws a seed where the configuration has none"
    return config.debug.seed


class FluxTrainer:
    """One training run: built in six steps, then `train()`. All ranks make one and do the same."""

    def __init__(self, config: JobConfig, folder: Path, layout: Layout):
        self.config, self.folder, self.layout = config, folder, layout
        training, validation, degrees = config.training, config.validation, layout.degrees
        self.step = 0  # finished updates
        self.cursor = 0  # positions that finished updates have used
        self.device, self.dtype = layout.device, compute_dtype(config)
        log_stage(1, STAGES, "mesh", f"{layout.describe()}, {torch.get_num_threads()} threads")

        self.spec = SPECS[config.model.flavor]
        self.update_size, self.accumulation = training.update_size(degrees.dp), training.accumulation(degrees.dp)
        tokenizer = build_tokenizer(config.encoder, training.test_mode)
        data = (training, validation, config.encoder, self.spec, tokenizer, _seed(config), layout.dp_rank, degrees.dp)
        self.loader = build_training_loader(*data, self.cursor)
        update = training.describe_update(degrees.dp)
        log_stage(2, STAGES, "data", f"{training.dataset} at {training.img_size} px, {update}")

        self.encoders = build_encoders(config, self.spec, tokenizer, layout)
        log_stage(3, STAGES, "encoders", f"{self.encoders.describe()}, {config.encoder.dtype}")
        if training.dataset != "shapes" and self.encoders.codec.autoencoder.config != AutoencoderConfig():
            log.warning("the tiny autoencoder blurs photographs: set encoder.autoencoder_path to FLUX.1's")

        self.plan = make_plan(self.spec.transformer)
        self.model = build_model(config, self.spec, layout)
        draw_weights(config, self.model, layout)
        self.loss_sum = compile_loss(squared_error_sum, config.compile)
        tokens = (training.img_size // PIXELS_PER_TOKEN) ** 2
        self.flops_per_sample = training_flops(self.spec.transformer, tokens, config.encoder.max_t5_encoding_len)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        cost = f"{with_unit(self.flops_per_sample)}FLOP per training sample"
        recompute = f"recompute {config.activation_checkpoint.mode}, compile {'on' if config.compile.enable else 'off'}"
        dtype = str(self.dtype).removeprefix("torch.")
        log_stage(4, STAGES, "model", f"{self.spec.name} {parameters:,} parameters, {cost}, {dtype}, {recompute}")

        self.optimizer = build_optimizer(group_by_mesh(self.model.parameters()), config.optimizer)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.lr_scheduler, training.steps)
        warmup = f"warm-up {config.lr_scheduler.warmup_steps} of {training.steps} steps"
        log_stage(5, STAGES, "optimizer", f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {warmup}")

        self.metrics = MetricsLogger(folder, config.metrics, asdict(config)) if layout.rank == 0 else None
        self.timer = StepTimer()
        self.validation_loader: Loader | None = None
        if validation.enable:
            self.validation_loader = build_validation_loader(*data)
            self.prompts = (
                load_prompts(validation.prompts_path, "validation.prompts_path")[: validation.save_img_count]
                if validation.prompts_path
                else self.validation_loader.captions(validation.save_img_count)
            )
        plan = f"validation every {validation.freq} steps" if validation.enable else "no validation"
        log_stage(6, STAGES, "run", f"{folder}, new; {plan}")

    def predict(self, **inputs: Tensor | None) -> Tensor:
        """The transformer's velocity of all tokens, on every rank; for sampling, without gradients."""
        cp = self.layout.axis("cp")
        return gather_sequence(self.model(**shard_sequence(inputs, self.plan.sequence_tensors, cp)), cp)

    def squared_error(self, raw: RawBatch, weight_B: Tensor | None = None) -> Tensor:
        """Batch -> sum of squared errors of the predicted velocity, over this rank's tokens of it.

        Training and validation share these lines.
        """
        raw = raw.to(self.device)
        encoded = self.encoders.encode(raw)
        inputs, target_BTC = make_inputs(encoded, raw.draws, self.spec, self.config.training.guidance, self.dtype)
        # Identity unless context parallel ranks share the tokens.
        local = shard_sequence({**inputs, "target_BTC": target_BTC}, self.plan.sequence_tensors, self.layout.axis("cp"))
        local_target_BTC = local.pop("target_BTC")
        return self.loss_sum(self.model(**local), local_target_BTC, weight_B)

    def forward_backward(self, batches: Iterator[RawBatch]) -> Tensor:
        """Gradients of one update, and this rank's part of its loss.

        Every part is divided by the element count of the whole update, so sums over micro-batches and ranks are exact.
        """
        loss = torch.zeros((), device=self.device)
        for _ in range(self.accumulation):
            with self.timer.waiting():
                raw = next(batches)
            update_elements = raw.draws.noise_BTC[0].numel() * self.update_size
            micro_loss = self.squared_error(raw) / update_elements
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def train_step(self, batches: Iterator[RawBatch]) -> tuple[Tensor, Tensor]:
        """One update. Returns this rank's part of its loss and the gradient norm before clipping, on the device."""
        self.optimizer.zero_grad()
        loss = self.forward_backward(batches)
        grad_norm = self.clip_gradients()
        self.optimizer.step()
        self.lr_scheduler.step()
        after_update(self.model, self.config.model.converters, self.config.quantize)
        self.step += 1
        self.cursor += self.update_size
        self.timer.count(self.update_size)
        return loss, grad_norm

    def clip_gradients(self) -> Tensor:
        """Scales the gradients down to training.max_norm; their norm before that."""
        return clip_grad_norm_(self.model.parameters(), self.config.training.max_norm)

    def train(self) -> None:
        """Runs to training.steps, then exports the weights and draws the loss curve."""
        training, validation = self.config.training, self.config.validation
        batches = iter(self.loader)
        steps = StepLog(training.steps, shown=self.layout.rank == 0)
        while self.step < training.steps:
            lr = self.lr_scheduler.get_last_lr()[0]
            loss, grad_norm = self.train_step(batches)
            steps.advance()
            if self.step == 1 or self._due(self.config.metrics.log_freq):
                steps.report(self.step, self._log_step(self.layout.sum(loss).item(), grad_norm.item(), float(lr)))
            if self.step == 1:
                self.layout.set_timeout(self.config.comm.train_timeout_seconds)
            with self.timer.paused():
                if validation.enable and self._due(validation.freq):
                    log.info("step %d: validation loss %.4f", self.step, self.validate())
                if validation.enable and self._due(validation.eval_freq):
                    log.info("step %d: %s", self.step, self.draw_grid())
        steps.close()
        self._finish()

    def _due(self, freq: int) -> bool:
        """Every `freq` steps and at the last one; 0: never."""
        return freq > 0 and (self.step % freq == 0 or self.step == self.config.training.steps)

    def _finish(self) -> None:
        dtype = DTYPES[self.config.checkpoint.export_dtype]
        state_dict = gather_state_dict(self.model, dtype, keep=self.metrics is not None)
        if self.metrics is None:
            return
        metadata = {"flavor": self.spec.name, "step": str(self.step)}
        path = save_export(self.folder / EXPORT_FOLDER, state_dict, dtype, metadata)
        self.metrics.close()
        save_loss_curve(self.folder / METRICS_NAME, self.folder / LOSS_CURVE)
        log.info("done: weights in %s, loss curve in %s", path, self.folder / LOSS_CURVE)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean squared error over the held-out samples, with fixed noise and times."""
        loader = self.validation_loader
        assert loader is not None and loader.end is not None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for raw in loader:
            counts_B = raw.position_B < loader.end  # the rest fills up the last batches
            total += self.squared_error(raw, counts_B.to(self.device, torch.float32))
        reshard(self.model)
        loss = self.layout.sum(total).item() / (loader.end * raw.draws.noise_BTC[0].numel())
        if self.metrics:
            self.metrics.log(self.step, {"validation_loss": loss})
        return loss

    def draw_grid(self) -> str:
        """Draws the prompt grid, with the same noise every time, and says where it is and what share of it is right."""
        validation, side, layout = self.config.validation, self.config.training.img_size, self.layout
        # All groups draw equally many, since ranks wait for each other: the last prompt fills up.
        share = -(-len(self.prompts) // layout.degrees.dp)
        mine = [min(layout.dp_rank * share + place, len(self.prompts) - 1) for place in range(share)]
        pixels_BCHW = draw_pictures(
            self.predict,
            self.spec,
            self.encoders,
            [self.prompts[number] for number in mine],
            seeds=mine,
            height=side,
            width=side,
            steps=validation.denoising_steps,
            guidance=self.config.training.guidance,
            cfg_scale=validation.cfg_scale,
            batch_size=validation.local_batch_size,
            dtype=self.dtype,
        )
        reshard(self.model)
        pixels_BCHW = layout.gather_samples(pixels_BCHW.to(self.device))[: len(self.prompts)]
        path = self.folder / validation.save_img_folder / f"step-{self.step:06d}.png"
        if self.metrics is None:
            return str(path)
        images = make_images(pixels_BCHW.cpu())
        save_grid(images, path)
        self.metrics.log_image(self.step, "samples", path)
        if not can_score(self.prompts):
            return str(path)
        scores = score_pictures(images, self.prompts)
        self.metrics.log(self.step, scores)
        return f"{path} has right {describe_scores(scores)}"

    def _log_step(self, loss: float, grad_norm: float, lr: float) -> dict[str, float]:
        values = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "samples_seen": self.cursor,
            **self.timer.read(),
            "memory_gib": peak_memory_gib(self.device.type),
        }
        values["tflops"] = values["samples_per_s"] * self.flops_per_sample / 1e12
        if self.metrics:
            self.metrics.log(self.step, values)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {self.step}: the loss is {loss}: lower optimizer.lr={self.config.optimizer.lr:g} or"
                f" training.max_norm={self.config.training.max_norm:g}, or warm up for longer"
            )
        return values


def main(argv: list[str]) -> None:
    with recorded_exit(0, EXIT_CODES) as end:
        end.rank, world_size = read_ranks(os.environ)
        setup_logging(end.rank)
        config = load_config(argv, world_size, quiet=end.rank > 0)
        if config.comm.mode == "fake_backend":
            raise ValueError('comm.mode="fake_backend" trains nothing: use ./run_train.sh or python -m scripts.dry_run')
        apply_determinism(config.debug.deterministic, config.debug.deterministic_warn_only)
        layout = build_run_layout(config, world_size)
        end.may_speak = layout.is_first_to_fail
        check_techniques(choose_techniques(config), layout.device.type)
        if config.debug.seed is None:
            seed = int(layout.from_rank_0("seed", lambda: str(secrets.randbelow(2**32))))
            config = replace(config, debug=replace(config.debug, seed=seed))
        end.folder = Path(layout.from_rank_0("folder", lambda: str(claim_run_folder(config.job.dump_folder))))
        if end.rank == 0:
            if end.folder != Path(config.job.dump_folder):
                log.info("%s is in use: this run writes to %s", config.job.dump_folder, end.folder)
            save_config(config, end.folder / CONFIG_FILE)
            if config.job.print_config:
                log.info("%s", format_config(config))
        trainer = FluxTrainer(config, end.folder, layout)
        try:
            trainer.train()
        finally:
            end.step = trainer.step
        close_layout(layout)


if __name__ == "__main__":
    main(sys.argv[1:])
