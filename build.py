"""Puts the parts of a run together, each in one function: the only place where a layout, encoders, a model or a
checkpointer are built. The trainer, scripts and benchmarks call them.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.adapter import from_hf, from_native
from checkpoint.checkpointer import Checkpointer, Found
from checkpoint.exchange import DIFFUSERS_FOLDER, DIFFUSERS_STEM, open_weights
from checkpoint.lazy import LazyTensor, cast_all, lazy_all
from checkpoint.safetensors_file import write_safetensors, write_sharded
from checkpoint.steps import write_folder
from config.job_config import JobConfig
from flux.autoencoder import AutoencoderConfig, load_autoencoder
from flux.codec import LatentCodec
from flux.conditioner import Sharding, build_conditioner, check_tokenizer
from flux.config import Encoder
from flux.data.build import RunData
from flux.data.tokenizers import FluxTokenizer
from flux.encoders import ALL_PARTS, Encoders
from flux.flops import training_flops, with_unit
from flux.identify import check_fits
from flux.initialization import init_weights
from flux.model import FluxTransformer
from flux.pipeline_folder import save_pipeline_parts
from flux.plans import make_plan
from flux.rng import keyed_bits
from flux.rules import AUTOENCODER_DIFFUSERS_RULES, LAYOUTS, Rule
from flux.spec import SPECS, ModelSpec
from flux.text_files import TensorSource
from parallel.data_parallel import apply_frozen_fsdp
from parallel.degrees import resolve_degrees
from parallel.gradients import group_by_mesh
from parallel.mesh import Layout, build_layout
from parallel.parallelize import Techniques, check_techniques, parallelize
from parallel.shards import copy_full_, gather_state_dict, local_views
from runtime.exit_record import announce_folder
from runtime.hardware import find_accelerator
from runtime.preflight import read_package_versions
from runtime.run_folder import claim_run_folder
from training.mllog import MLLOG_NAME, MLPerfLog, MLPerfRun, now_ms, read_submission
from training.optimizer import build_optimizer as build_section_optimizer
from training.optimizer import check_optimizer
from training.peaks import Peaks, measure_matmul

log = logging.getLogger("train")
name_autoencoder = partial(from_hf, rules=AUTOENCODER_DIFFUSERS_RULES)  # diffusers' names to ours
STARTED_MS = now_ms()  # about when the program began
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPORT_FOLDER = "export"  # in the run folder
# In the folder of exports.
EXPORT_FILE, EMA_EXPORT_FILE = "transformer.safetensors", "transformer_ema.safetensors"
PIPELINE_FOLDER = "diffusers"


def build_run_layout(config: JobConfig, world_size: int) -> Layout:
    """This process among the others, who must all call it."""
    training = config.training
    by_fsdp = training.dtype != training.mixed_precision_param or training.enable_cpu_offload
    needs_groups = by_fsdp or config.encoder.cpu_offload
    return build_layout(resolve_degrees(config.parallelism, world_size), config.comm, needs_groups)


def measure_peaks(layout: Layout, dtype: torch.dtype) -> Peaks:
    """What all processes together could compute; they measure at the same time, as they train."""
    device = layout.device
    own = torch.tensor(measure_matmul(device, dtype), dtype=torch.float64, device=device)
    known = find_accelerator(torch.cuda.get_device_name()) if device.type == "cuda" else None
    datasheet = known.bf16_tflops * layout.degrees.world if known else None
    return Peaks(layout.gather(own).sum().item(), datasheet)


def build_encoders(
    config: JobConfig,
    spec: ModelSpec,
    tokenizer: FluxTokenizer | None,
    layout: Layout,
    parts: Collection[str] = ALL_PARTS,
) -> Encoders:
    """The frozen text encoders and autoencoder, as far as they are needed. T5 is split over all ranks of a copy of the
    weights.
    """
    encoder, device, mesh = config.encoder, layout.device, layout.encoder
    if mesh is None and encoder.cpu_offload:  # FSDP does it, of one rank too
        assert layout.weights is not None
        mesh = layout.weights["dp_replicate", "fsdp"]
    sharding = None
    if mesh is not None:
        sharding = Sharding(partial(apply_frozen_fsdp, mesh=mesh, cpu_offload=encoder.cpu_offload), copy_full_)
    dtype = DTYPES[encoder.dtype]
    autoencoder = None
    if "autoencoder" in parts:
        autoencoder = load_autoencoder(encoder.autoencoder_path, spec.codec, dtype, device, name_autoencoder)
    conditioner = build_conditioner(encoder, spec.transformer, config.training.test_mode, device, sharding, parts)
    if tokenizer is not None:
        check_tokenizer(tokenizer, conditioner)
    return Encoders(tokenizer, conditioner, LatentCodec(autoencoder, spec.codec), device)


def warn_of_tiny_autoencoder(dataset: str, encoders: Encoders) -> None:
    autoencoder = encoders.codec.autoencoder
    if dataset != "shapes" and autoencoder and autoencoder.config != AutoencoderConfig():
        log.warning("the tiny autoencoder blurs photographs: set encoder.autoencoder_path to FLUX.1's")


def build_model(config: JobConfig, spec: ModelSpec, layout: Layout) -> FluxTransformer:
    """The transformer on the meta device, parallelized: it has no weights yet."""
    with torch.device("meta"):
        model = FluxTransformer(spec.transformer).to(DTYPES[config.training.dtype])
    parallelize(model, make_plan(spec.transformer), layout, choose_techniques(config))
    return model


def describe_model(config: JobConfig, spec: ModelSpec, model: FluxTransformer) -> str:
    """One line for the log."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = training_flops(spec.transformer, config.training.img_tokens, config.encoder.max_t5_encoding_len)
    dtype = str(compute_dtype(config)).removeprefix("torch.")
    recompute = f"recompute {config.activation_checkpoint.mode}, compile {'on' if config.compile.enable else 'off'}"
    cost = f"{with_unit(flops)}FLOP per training sample"
    return f"{spec.name} {parameters:,} parameters, {cost}, {dtype}, {recompute}"


def choose_techniques(config: JobConfig) -> Techniques:
    """What the configuration wants to be done to the model."""
    return Techniques(
        config.parallelism,
        config.activation_checkpoint,
        config.compile,
        config.quantize,
        config.model.converters,
        config.model.attention_backend,
        has_mask=config.encoder.mask_padding,
        param_dtype=compute_dtype(config),
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        cpu_offload=config.training.enable_cpu_offload,
    )


def start_weights(
    config: JobConfig, spec: ModelSpec, model: FluxTransformer, layout: Layout, found: Found | None
) -> None:
    """What a run starts from: the weights of initial_load_path, or fresh ones, or room for those of a checkpoint."""
    if found:
        make_room(config, model, layout)
    elif config.checkpoint.initial_load_in_hf:
        load_weights(config, spec, model, layout)
    else:
        draw_weights(config, model, layout)


def draw_weights(config: JobConfig, model: FluxTransformer, layout: Layout) -> None:
    """Gives the model of `build_model` fresh weights; a rank never holds more than its part and one whole tensor."""
    make_room(config, model, layout)
    assert config.debug.seed is not None, "settle_seed gives a configuration without a seed one"
    init_weights(model, config.debug.seed, layout.device, copy_full_)


def load_weights(config: JobConfig, spec: ModelSpec, model: FluxTransformer, layout: Layout) -> None:
    """Gives the model of `build_model` the weights of checkpoint.initial_load_path, one whole tensor at a time."""
    tensors = open_initial_weights(config, spec)
    make_room(config, model, layout)
    for name, parameter in model.named_parameters():
        copy_full_(parameter, tensors[name].read())


def open_initial_weights(config: JobConfig, spec: ModelSpec) -> Mapping[str, LazyTensor]:
    """The weights of checkpoint.initial_load_path, a folder or a file of others, under our names. None is read.

    Raises:
        ValueError: nothing is there, or it is of another flavor.
    """
    assert config.checkpoint.initial_load_path is not None
    path = Path(config.checkpoint.initial_load_path)
    tensors = open_weights(path, LAYOUTS).tensors
    check_fits(tensors, spec, f"checkpoint.initial_load_path={str(path)!r}")
    return tensors


def make_room(config: JobConfig, model: FluxTransformer, layout: Layout) -> None:
    """Memory for the weights of the model of `build_model`, without values."""
    model.to_empty(device="cpu" if config.training.enable_cpu_offload else layout.device)


def compute_dtype(config: JobConfig) -> torch.dtype:
    """Number format of the transformer's computation."""
    training = config.training
    return DTYPES[training.mixed_precision_param if training.dtype == "float32" else training.dtype]


def build_optimizer(config: JobConfig, model: FluxTransformer) -> torch.optim.Optimizer:
    """The optimizer of all weights of a model that has room for them."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    def key(parameter: Tensor) -> int:
        return keyed_bits(config.debug.seed or 0, "rounding", names[parameter]) >> 1

    return build_section_optimizer(group_by_mesh(model.parameters()), config.optimizer, local_views, key)


def check_machine(config: JobConfig, device_type: str) -> None:
    """Raises ValueError for what this machine has not got."""
    check_techniques(choose_techniques(config), device_type)
    check_optimizer(config.optimizer)


def build_checkpointer(config: JobConfig, folder: Path, layout: Layout) -> Checkpointer:
    """What saves and finds the checkpoints of a run; without checkpoints, it does neither."""
    section = config.checkpoint
    is_used = section.enable or section.initial_load_path is not None
    group = layout.make_cpu_group(section.timeout_seconds) if is_used else None
    return Checkpointer(folder / section.folder, section, group)


def save_pipeline(
    folder: Path, spec: ModelSpec, encoder: Encoder, test_mode: bool, tensors: Mapping[str, LazyTensor]
) -> None:
    """Writes the folder that diffusers' FluxPipeline loads, in which the transformer's weights come last.

    Args:
        folder: not visible yet; it is whole when this returns.
        encoder: the [encoder] section of the run.
        test_mode: its training.test_mode.
        tensors: of the transformer, under diffusers' names.
    """
    metadata = {"format": "pt"}  # diffusers and transformers ask for it

    def write(folder: Path, stem: str, tensors: Mapping[str, TensorSource], rules: Sequence[Rule] | None) -> None:
        lazy = {name: LazyTensor(tensor.shape, tensor.dtype, tensor.read) for name, tensor in tensors.items()}
        write_sharded(folder, stem, from_native(lazy, rules) if rules else lazy, None, metadata)

    save_pipeline_parts(folder, spec, encoder, test_mode, write, name_autoencoder)
    write_sharded(folder / DIFFUSERS_FOLDER, DIFFUSERS_STEM, tensors, None, metadata)


def export_weights(config: JobConfig, layout: Layout, path: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Writes the weights of a run's end, or their average, as one file; the weights as a diffusers folder too, where
    that is wanted. Without tensors nothing. All ranks must call it; rank 0 writes.
    """
    whole = lazy_all(gather_state_dict(tensors, keep=layout.rank == 0))
    if whole:
        spec, weights = SPECS[config.model.flavor], cast_all(whole, DTYPES[config.checkpoint.export_dtype])
        write_safetensors(path, weights, None, {"flavor": spec.name, "step": str(step)})
        if path.name == EXPORT_FILE and config.checkpoint.last_save_in_hf:
            export_pipeline(path.parent / PIPELINE_FOLDER, spec, config, weights)


def export_pipeline(folder: Path, spec: ModelSpec, config: JobConfig, weights: Mapping[str, LazyTensor]) -> None:
    """Writes the diffusers folder of a run's end, in place of that of an earlier end.

    Args:
        weights: under the model's own names.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tensors = from_native(weights, spec.diffusers_rules)
    test_mode = config.training.test_mode
    write_folder(folder, lambda hidden: save_pipeline(hidden, spec, config.encoder, test_mode, tensors))


def enter_run_folder(config: JobConfig, layout: Layout) -> Path:
    """The folder that this run writes into; the same on all ranks, which must all call it."""
    wanted, resumable = config.job.dump_folder, config.checkpoint.folder if config.checkpoint.enable else None
    folder = Path(layout.from_rank_0("folder", partial(claim_run_folder, wanted, resumable)))
    if folder != Path(wanted):
        log.info("%s is in use: this run writes to %s", wanted, folder)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        announce_folder(folder)
    return folder


def read_versions() -> dict[str, str]:
    """Of everything that a rank computes with, by name."""
    cuda = torch.version.cuda
    return {**read_package_versions(), **({"CUDA": cuda} if cuda else {})}


def build_mllog(config: JobConfig, folder: Path, layout: Layout, data: RunData) -> MLPerfLog:
    """MLPerf's log of a run, on rank 0."""
    training, validation = config.training, config.validation
    kind = torch.cuda.get_device_name(layout.device) if layout.device.type == "cuda" else "CPU"
    compute = str(compute_dtype(config)).removeprefix("torch.")
    degrees = layout.degrees
    assert config.debug.seed is not None, "settle_seed gives a configuration without a seed one"
    run = MLPerfRun(
        submission=read_submission(os.environ, f"{degrees.world}x {kind}"),
        config_file=config.job.config_file or "none",
        local_batch_size=training.local_batch_size,
        seed=config.debug.seed,
        global_batch_size=training.update_size(degrees.dp),
        accumulation=training.accumulation(degrees.dp),
        max_norm=training.max_norm,
        train_samples=sum(len(opened.source) for opened in data.sources),
        eval_samples=sum(len(opened.source) for opened in data.held_out),
        eval_steps=validation.freq,
        target_loss=validation.target_loss,
        linear_precision="float8" if config.model.converters else compute,
        attention_precision=compute,
        communication_precision="bfloat16" if "bfloat16" in (compute, training.mixed_precision_reduce) else "float32",
        tensor_parallel=degrees.tp,
        context_parallel=degrees.cp,
    )
    return MLPerfLog(folder / MLLOG_NAME, run, config.optimizer, config.lr_scheduler, STARTED_MS)


def draw_seed(layout: Layout) -> int:
    """A seed that is the same on all ranks."""
    return int(layout.from_rank_0("seed", lambda: secrets.randbelow(2**32)))
