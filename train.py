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
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from checkpoint.export import EXPORT_FILE, load_export, save_export
from config.job_config import JobConfig
from config.parse import load_config
from config.write import format_config, save_config
from flux.autoencoder import AutoencoderConfig, load_autoencoder
from flux.batch import RawBatch
from flux.codec import LatentCodec
from flux.conditioner import build_conditioner, check_tokenizer
from flux.data.errors import DataError
from flux.data.loader import (
    VALIDATION_TIMES,
    Loader,
    PositionBatches,
    PositionedDataset,
    TrainingDraws,
    ValidationDraws,
)
from flux.data.shape_score import can_score, score_pictures
from flux.data.sources import Split, build_source
from flux.data.tokenizers import FluxTokenizer, build_tokenizer
from flux.encoders import Encoders
from flux.flops import training_flops
from flux.flow import squared_error_sum
from flux.inputs import make_inputs
from flux.model import FluxTransformer, init_weights
from flux.pictures import make_images, save_grid
from flux.prompts import load_prompts
from flux.sampling import draw_pictures
from flux.spec import PIXELS_PER_TOKEN, SPECS, ModelSpec
from runtime import exit_codes
from runtime.exit_record import recorded_exit
from runtime.log import StepLog, log_stage, setup_logging
from runtime.run_folder import claim_run_folder
from training.lr_schedule import build_lr_scheduler
from training.metrics import METRICS_NAME, MetricsLogger, peak_memory_gib
from training.optimizer import build_optimizer
from training.plots import save_loss_curve
from training.step_timer import StepTimer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
log = logging.getLogger("train")  # by name: run as a program, this module is called __main__
EXIT_CODES = {
    DataError: exit_codes.DATA,
    ValueError: exit_codes.CONFIG,
    FloatingPointError: exit_codes.DIVERGED,
}
STAGES = 6
CONFIG_FILE, EXPORT_FOLDER, LOSS_CURVE = "config.toml", "export", "loss.png"  # in the run folder


def build_device() -> torch.device:
    """The accelerator if there is one. One process for now: more would train unsynchronized copies."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(f"WORLD_SIZE={world_size}, but this version trains on one process: use NGPU=1")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_training_loader(config: JobConfig, spec: ModelSpec, tokenizer: FluxTokenizer, cursor: int) -> Loader:
    """The endless training batches from position `cursor` on."""
    training = config.training
    split: Split = "train" if config.validation.enable and not _validates_elsewhere(config) else "all"
    source = build_source(training.dataset, training.dataset_path, training.img_size, split, "training")
    draws = TrainingDraws(
        seed=_seed(config),
        timestep_distribution=training.timestep_distribution,
        shift_by_resolution=training.timestep_shift == "resolution",
        drop_prob=training.classifier_free_guidance_prob,
        drop_jointly=training.prompt_dropout == "joint",
        sample_posterior=config.encoder.sample_posterior,
    )
    dataset = PositionedDataset(source, tokenizer, spec, training.img_size, draws)
    return Loader(dataset, PositionBatches(cursor, training.local_batch_size), training.dataloader)


def build_validation_loader(config: JobConfig, spec: ModelSpec, tokenizer: FluxTokenizer) -> Loader:
    """Held-out samples, the same ones with the same noise and times at every pass."""
    training, validation = config.training, config.validation
    if _validates_elsewhere(config):
        name = validation.dataset or training.dataset
        split: Split = "validation" if name == "shapes" else "all"
        source = build_source(name, validation.dataset_path, training.img_size, split, "validation")
    else:
        source = build_source(training.dataset, training.dataset_path, training.img_size, "validation", "training")
    end = max(len(source), VALIDATION_TIMES)  # a few pictures are shown at every time rather than each at one
    if validation.steps != -1:
        end = min(end, validation.steps * validation.local_batch_size)
    draws = ValidationDraws(seed=_seed(config), sample_posterior=config.encoder.sample_posterior)
    dataset = PositionedDataset(source, tokenizer, spec, training.img_size, draws)
    return Loader(dataset, PositionBatches(0, validation.local_batch_size, end=end), validation.dataloader)


def _validates_elsewhere(config: JobConfig) -> bool:
    """Whether validation has a data set of its own; otherwise a part of the training data is held out for it."""
    return config.validation.dataset is not None or config.validation.dataset_path is not None


def build_encoders(config: JobConfig, spec: ModelSpec, tokenizer: FluxTokenizer, device: torch.device) -> Encoders:
    """The frozen text encoders and autoencoder."""
    autoencoder = load_autoencoder(
        config.encoder.autoencoder_path, spec.codec.latent_channels, DTYPES[config.encoder.dtype], device
    )
    conditioner = build_conditioner(config.encoder, spec.transformer, config.training.test_mode, device)
    check_tokenizer(tokenizer, conditioner)
    return Encoders(
        tokenizer=tokenizer,
        conditioner=conditioner,
        codec=LatentCodec(autoencoder, spec.codec),
        device=device,
    )


def build_model(config: JobConfig, spec: ModelSpec, device: torch.device) -> FluxTransformer:
    """The transformer with freshly drawn weights, built without ever holding two copies."""
    with torch.device("meta"):
        model = FluxTransformer(spec.transformer).to(DTYPES[config.training.dtype])
    model = model.to_empty(device=device)
    init_weights(model, _seed(config))
    return model


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
    spec, device = SPECS[config.model.flavor], build_device()
    with torch.device("meta"):
        model = FluxTransformer(spec.transformer)
    metadata = load_export(folder / EXPORT_FOLDER / EXPORT_FILE, model, spec.name)
    tokenizer = build_tokenizer(config.encoder, config.training.test_mode)
    encoders = build_encoders(config, spec, tokenizer, device)
    return TrainedRun(config, spec, model.to(device).eval(), encoders, int(metadata.get("step", 0)))


def _seed(config: JobConfig) -> int:
    assert config.debug.seed is not None, "main() draws a seed where the configuration has none"
    return config.debug.seed


class FluxTrainer:
    """One training run: built in six steps, then `train()`."""

    def __init__(self, config: JobConfig, folder: Path):
        self.config, self.folder = config, folder
        training, validation = config.training, config.validation
        self.step = 0  # finished updates
        self.cursor = 0  # positions that finished updates have used

        self.device = build_device()
        log_stage(1, STAGES, "mesh", f"1 process on {self.device.type}, {torch.get_num_threads()} threads")

        self.spec = SPECS[config.model.flavor]
        self.update_size = max(training.global_batch_size, training.local_batch_size)
        self.accumulation = self.update_size // training.local_batch_size
        tokenizer = build_tokenizer(config.encoder, training.test_mode)
        self.loader = build_training_loader(config, self.spec, tokenizer, self.cursor)
        arithmetic = f"{training.local_batch_size} per step x {self.accumulation} accumulated = {self.update_size}"
        log_stage(2, STAGES, "data", f"{training.dataset} at {training.img_size} px, {arithmetic} per update")

        self.encoders = build_encoders(config, self.spec, tokenizer, self.device)
        log_stage(3, STAGES, "encoders", f"{self.encoders.describe()}, {config.encoder.dtype}")
        if training.dataset != "shapes" and self.encoders.codec.autoencoder.config != AutoencoderConfig():
            log.warning(
                "the tiny autoencoder blurs photographs: set encoder.autoencoder_path to FLUX.1's for real work"
            )

        self.model = build_model(config, self.spec, self.device)
        self.dtype = DTYPES[training.mixed_precision_param if training.dtype == "float32" else training.dtype]
        tokens = (training.img_size // PIXELS_PER_TOKEN) ** 2
        self.flops_per_sample = training_flops(self.spec.transformer, tokens, config.encoder.max_t5_encoding_len)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        cost = f"{_with_unit(self.flops_per_sample)}FLOP per training sample"
        log_stage(4, STAGES, "model", f"{self.spec.name} {parameters:,} parameters, {cost}, {_name(self.dtype)}")

        self.optimizer = build_optimizer(self.model.parameters(), config.optimizer)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.lr_scheduler, training.steps)
        warmup = f"warm-up {config.lr_scheduler.warmup_steps} of {training.steps} steps"
        log_stage(5, STAGES, "optimizer", f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {warmup}")

        self.metrics = MetricsLogger(folder, config.metrics, asdict(config))
        self.timer = StepTimer()
        self.validation_loader: Loader | None = None
        if validation.enable:
            self.validation_loader = build_validation_loader(config, self.spec, tokenizer)
            self.prompts = (
                load_prompts(validation.prompts_path, "validation.prompts_path")[: validation.save_img_count]
                if validation.prompts_path
                else self.validation_loader.captions(validation.save_img_count)
            )
        plan = f"validation every {validation.freq} steps" if validation.enable else "no validation"
        log_stage(6, STAGES, "run", f"{folder}, new; {plan}")

    def predict(self, **inputs: Tensor | None) -> Tensor:
        """The transformer's velocity, computed in self.dtype.

        Weights kept in another dtype are rounded for the pass, and their gradients come back in their own: the mixed
        precision of FSDP, without autocast's list of exceptions.
        """
        if DTYPES[self.config.training.dtype] == self.dtype:
            return self.model(**inputs)
        rounded = {name: weight.to(self.dtype) for name, weight in self.model.named_parameters()}
        return functional_call(self.model, rounded, kwargs=inputs)

    def squared_error(self, raw: RawBatch) -> Tensor:
        """Batch -> sum of squared errors of the predicted velocity. Training and validation share these lines."""
        raw = raw.to(self.device)
        encoded = self.encoders.encode(raw)
        inputs, target_BTC = make_inputs(encoded, raw.draws, self.spec, self.config.training.guidance, self.dtype)
        return squared_error_sum(self.predict(**inputs), target_BTC)

    def forward_backward(self, batches: Iterator[RawBatch]) -> Tensor:
        """Gradients of one update, and its loss.

        Every micro-batch is divided by the element count of the whole update, so accumulation is exact.
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
        """One update. Returns its loss and the gradient norm before clipping, still on the device."""
        self.optimizer.zero_grad()
        loss = self.forward_backward(batches)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.max_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.step += 1
        self.cursor += self.update_size
        self.timer.count(self.update_size)
        return loss, grad_norm

    def train(self) -> None:
        """Runs to training.steps, then exports the weights and draws the loss curve."""
        training, validation = self.config.training, self.config.validation
        batches = iter(self.loader)
        steps = StepLog(training.steps)
        while self.step < training.steps:
            lr = self.lr_scheduler.get_last_lr()[0]
            loss, grad_norm = self.train_step(batches)
            steps.advance()
            if self.step == 1 or self._due(self.config.metrics.log_freq):
                steps.report(self.step, self._log_step(loss.item(), grad_norm.item(), float(lr)))
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
        metadata = {"flavor": self.spec.name, "step": str(self.step)}
        dtype = DTYPES[self.config.checkpoint.export_dtype]
        path = save_export(self.folder / EXPORT_FOLDER, self.model.state_dict(), dtype, metadata)
        self.metrics.close()
        save_loss_curve(self.folder / METRICS_NAME, self.folder / LOSS_CURVE)
        log.info("done: weights in %s, loss curve in %s", path, self.folder / LOSS_CURVE)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean squared error over the held-out samples, with fixed noise and times."""
        assert self.validation_loader is not None
        total, elements = 0.0, 0
        for raw in self.validation_loader:
            total += self.squared_error(raw).item()
            elements += raw.draws.noise_BTC.numel()
        self.metrics.log(self.step, {"validation_loss": total / elements})
        return total / elements

    def draw_grid(self) -> str:
        """Draws the prompt grid, with the same noise every time, and says where it is and what share of it is right."""
        validation, side = self.config.validation, self.config.training.img_size
        pixels_BCHW = draw_pictures(
            self.predict,
            self.spec,
            self.encoders,
            self.prompts,
            seeds=list(range(len(self.prompts))),
            height=side,
            width=side,
            steps=validation.denoising_steps,
            guidance=self.config.training.guidance,
            cfg_scale=validation.cfg_scale,
            batch_size=validation.local_batch_size,
            dtype=self.dtype,
        )
        images = make_images(pixels_BCHW)
        path = self.folder / validation.save_img_folder / f"step-{self.step:06d}.png"
        save_grid(images, path)
        self.metrics.log_image(self.step, "samples", path)
        if not can_score(self.prompts):
            return str(path)
        scores = score_pictures(images, self.prompts)
        self.metrics.log(self.step, scores)
        shares = [f"{name.removesuffix('_accuracy').replace('_', ' ')} {share:.0%}" for name, share in scores.items()]
        return f"{path} has right {', '.join(shares)}"

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
        self.metrics.log(self.step, values)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {self.step}: the loss is {loss}: lower optimizer.lr={self.config.optimizer.lr:g} or"
                f" training.max_norm={self.config.training.max_norm:g}, or warm up for longer"
            )
        return values


def _with_unit(number: float) -> str:
    unit, size = next(((unit, size) for unit, size in (("T", 1e12), ("G", 1e9)) if number >= size), ("M", 1e6))
    return f"{number / size:.3g} {unit}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: list[str]) -> None:
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank)
    with recorded_exit(rank, EXIT_CODES) as end:
        config = load_config(argv)
        if config.debug.seed is None:
            config = replace(config, debug=replace(config.debug, seed=secrets.randbelow(2**32)))
        build_device()  # refuses what cannot run before a folder is made
        end.folder = claim_run_folder(config.job.dump_folder)
        if end.folder != Path(config.job.dump_folder):
            log.info("%s is in use: this run writes to %s", config.job.dump_folder, end.folder)
        save_config(config, end.folder / CONFIG_FILE)
        if config.job.print_config:
            log.info("%s", format_config(config))
        trainer = FluxTrainer(config, end.folder)
        try:
            trainer.train()
        finally:
            end.step = trainer.step


if __name__ == "__main__":
    main(sys.argv[1:])
