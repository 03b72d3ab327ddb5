"""Opens what a run has left, or anybody's weights, ready to draw with."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from build import EMA_EXPORT_FILE, EXPORT_FILE, EXPORT_FOLDER, build_encoders
from checkpoint.dcp import read_train_state
from checkpoint.exchange import CHECKPOINT_LAYOUT, Weights, open_weights
from checkpoint.lazy import LazyTensor
from checkpoint.safetensors_file import read_header_metadata
from checkpoint.steps import find_steps
from config.job_config import JobConfig
from config.parse import load_config
from config.resume import restore_config
from config.write import CONFIG_FILE
from flux.config import Model
from flux.data.tokenizers import build_tokenizer
from flux.encoders import Encoders
from flux.identify import check_fits, describe, find_flavor
from flux.model import FluxTransformer
from flux.pipeline_folder import is_pipeline, use_pipeline
from flux.rules import LAYOUTS
from flux.spec import SPECS, ModelSpec
from parallel.degrees import Degrees
from parallel.mesh import build_layout

# Its encoders are part of the repository; those of every other flavor somebody has to name.
EMBEDDED_FLAVOR = "flux-tiny"

log = logging.getLogger(__name__)


class TrainedRun(NamedTuple):
    """A trained transformer with its encoders."""

    path: Path  # of the weights
    step: int  # 0: not known
    config: JobConfig  # of the run, or the defaults
    spec: ModelSpec
    model: FluxTransformer
    encoders: Encoders


class Opened(NamedTuple):
    """Weights that are there, and not read yet."""

    path: Path
    weights: Weights
    step: int  # 0: not known
    config: JobConfig | None  # None: nothing there tells


def load_run(
    path: Path, part: str = "model", config_file: Path | None = None, dtype: torch.dtype | None = None
) -> TrainedRun:
    """The weights at `path` on this process's device, with the encoders that belong to them.

    Args:
        path: the folder of a run, of which the latest weights are taken, a checkpoint (step-N), a safetensors file or a
            diffusers folder.
        part: "model", or "ema" for their running mean, which runs and checkpoints may have.
        config_file: names the encoders; None: what the run or the folder itself says.
        dtype: of the transformer; None: that of the weights.

    Raises:
        ValueError: nothing of the kind, damaged, or without encoders that are known.
    """
    given = None if config_file is None else load_config([f"--job.config_file={config_file}"], quiet=True)
    opened = open_trained(path, part)
    config = given or opened.config or _find_config(opened)
    spec = SPECS[config.model.flavor]
    check_fits(opened.weights.tensors, spec, str(opened.path))
    layout = build_layout(Degrees(), config.comm, needs_groups=config.encoder.cpu_offload)
    model = _load_model(spec, opened.weights.tensors, dtype, layout.device)
    tokenizer = build_tokenizer(config.encoder, config.training.test_mode)
    encoders = build_encoders(config, spec, tokenizer, layout)
    return TrainedRun(opened.path, opened.step, config, spec, model, encoders)


def open_trained(path: Path, part: str = "model") -> Opened:
    """The weights at `path`, as `load_run` finds them.

    Raises:
        ValueError: nothing of the kind, or damaged.
    """
    return _open_run(path, part) if (path / CONFIG_FILE).is_file() else _open(path, part)


def _open_run(folder: Path, part: str) -> Opened:
    """The newest that a run has left and that can be read: a checkpoint, or its export unless that is older."""
    config = load_config([f"--job.config_file={folder / CONFIG_FILE}"], quiet=True)
    export = folder / EXPORT_FOLDER / (EMA_EXPORT_FILE if part == "ema" else EXPORT_FILE)
    found = [(step, path, part) for step, path in find_steps(folder / config.checkpoint.folder).items()]
    faults: list[ValueError] = []
    if export.is_file():
        try:
            found.append((_read_step(read_header_metadata(export)), export, "model"))
        except ValueError as error:
            faults.append(error)
    # Of one step the export comes first, which is smaller.
    for _, path, kind in sorted(found, key=lambda one: (one[0], one[1] == export), reverse=True):
        try:
            opened = _open(path, kind)
        except ValueError as error:
            faults.append(error)
            continue
        for fault in faults:
            log.warning("%s; others are taken", fault)
        return opened._replace(config=config)
    what = "average of the weights" if part == "ema" else "weights"
    remedy = "leave --ema out" if part == "ema" else "let the run save first"
    told = f" ({faults[0]})" if faults else ""
    raise ValueError(f"{folder} holds no {what} that can be read{told}: {remedy}, or name another run")


def _open(path: Path, part: str) -> Opened:
    weights = open_weights(path, LAYOUTS, part)
    if weights.layout != CHECKPOINT_LAYOUT:
        return Opened(path, weights, _read_step(weights.metadata), None)
    state = read_train_state(path)
    config = restore_config(state["config"], str(path)) if "config" in state else None
    return Opened(path, weights, _read_step(state), config)


def _read_step(state: Mapping[str, Any]) -> int:
    """0 where nobody has written it, or somebody else something else."""
    text = str(state.get("step", 0))
    return int(text) if text.isascii() and text.isdecimal() else 0


def _find_config(opened: Opened) -> JobConfig:
    """The defaults, with the encoders that lie beside the weights or in this repository."""
    path, tensors = opened.path, opened.weights.tensors
    flavor = find_flavor(tensors)
    if flavor is None:
        raise ValueError(f"{path} is none of {', '.join(SPECS)} ({describe(tensors)}): take other weights")
    defaults = JobConfig(model=Model(flavor=flavor))
    if is_pipeline(path):
        return replace(defaults, encoder=use_pipeline(path, SPECS[flavor], defaults.encoder))
    if flavor != EMBEDDED_FLAVOR:
        raise ValueError(
            f"{path} holds a {flavor} without its encoders: name a configuration that has them, such as "
            f"--config train_configs/{flavor.replace('-', '_')}.toml"
        )
    return defaults


def _load_model(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None, device: torch.device
) -> FluxTransformer:
    with torch.device("meta"):
        model = FluxTransformer(spec.transformer).to(dtype or next(iter(tensors.values())).dtype)
    model.to_empty(device=device).requires_grad_(False)
    for name, parameter in model.named_parameters():  # one at a time: the peak is the model itself
        parameter.copy_(tensors[name].read())
    return model.eval()
