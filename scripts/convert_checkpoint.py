"""Converts the weights of a transformer between the layouts that people use.

    python -m scripts.convert_checkpoint --to diffusers outputs/run/checkpoint/step-1000 exported
    python -m scripts.convert_checkpoint --to bfl       outputs/run/checkpoint/step-1000 flux.safetensors
    python -m scripts.convert_checkpoint --to dcp       FLUX.1-schnell                   start

SOURCE is recognized by itself: a checkpoint (step-N) of a run or of torchtitan, the export of a run, a safetensors file
of Black Forest Labs or of diffusers, a diffusers folder. TARGET appears when it is whole. One tensor at a time is in
memory, so that any machine converts any model.

  diffusers  a folder that diffusers loads: from a run's checkpoint the complete pipeline with its encoders, else and
             with --transformer-only the transformer, in shards of 10 GB
  bfl        one safetensors file under Black Forest Labs' names
  dcp        a folder for checkpoint.initial_load_path and for torchtitan
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import CheckpointException
from tqdm import tqdm

from build import DTYPES, save_pipeline
from checkpoint.adapter import from_native
from checkpoint.dcp import read_train_state, save_weights
from checkpoint.exchange import CHECKPOINT_LAYOUT, DIFFUSERS_STEM, open_weights
from checkpoint.lazy import LazyTensor, cast_all
from checkpoint.safetensors_file import SUFFIX, write_safetensors, write_sharded
from checkpoint.steps import unfinished_path, write_folder
from config.resume import restore_config
from flux.config import Encoder
from flux.identify import check_fits, describe, find_flavor
from flux.pipeline_folder import make_transformer_config
from flux.rules import BFL_RULES, LAYOUTS
from flux.spec import SPECS, ModelSpec
from runtime.exit_record import recorded_exit
from train import EXIT_CODES

_METADATA = {"format": "pt"}  # diffusers asks for it


class Source(NamedTuple):
    """What is converted."""

    tensors: dict[str, LazyTensor]  # under the model's own names
    spec: ModelSpec
    state: dict[str, Any]  # of a run's checkpoint; else empty


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="weights to convert; they stay as they are")
    add("target", type=Path, metavar="TARGET", help="what to write: a folder (diffusers, dcp) or a file (bfl)")
    add("--to", choices=("diffusers", "bfl", "dcp"), required=True, help="layout to write")
    add("--ema", action="store_true", help="take the running mean of the weights that a checkpoint holds beside them")
    add("--dtype", choices=tuple(DTYPES), help="number format to write (as in SOURCE)")
    add("--transformer-only", action="store_true", help="leave the encoders out of a diffusers folder")
    add("--flavor", choices=tuple(SPECS), help="what SOURCE is, if that cannot be told from its names and shapes")
    return parser


def open_source(arguments: argparse.Namespace) -> Source:
    """Raises ValueError if it is nothing known, or not whole."""
    weights = open_weights(arguments.source, LAYOUTS, "ema" if arguments.ema else "model")
    state = read_train_state(arguments.source) if weights.layout == CHECKPOINT_LAYOUT else {}
    flavor = arguments.flavor or find_flavor(weights.tensors)
    if flavor is None:
        raise ValueError(
            f"{arguments.source} holds none of {', '.join(SPECS)} but a transformer of {describe(weights.tensors)}: "
            "if it is one of them, add --flavor to be told what is wrong with it"
        )
    check_fits(weights.tensors, SPECS[flavor], str(arguments.source))
    return Source(cast_all(weights.tensors, arguments.dtype and DTYPES[arguments.dtype]), SPECS[flavor], state)


def check_target(target: Path, to: str, needed: int) -> None:
    """Raises ValueError if something is there already, or if there is no room for it."""
    if target.exists() and not (to != "bfl" and target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already and is not replaced: name another TARGET, or remove it")
    if to == "bfl" and target.suffix != SUFFIX:
        raise ValueError(
            f"{target} must end in {SUFFIX}, as --to bfl writes one file: use {target.with_suffix(SUFFIX)}"
        )
    home = next(parent for parent in target.absolute().parents if parent.exists())
    if not home.is_dir():
        raise ValueError(f"{target} cannot be written, {home} is a file: name another TARGET")
    free = shutil.disk_usage(home).free
    if free < needed:
        raise ValueError(f"{target} takes {needed / 1e9:.1f} GB and {home} has {free / 1e9:.1f} GB: make room")


def followed(tensors: Mapping[str, LazyTensor], bar: tqdm) -> dict[str, LazyTensor]:
    """The same tensors; reading them moves the bar."""

    def follow(tensor: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            bar.update(tensor.bytes)
            return tensor.read()

        return LazyTensor(tensor.shape, tensor.dtype, read)

    return {name: follow(tensor) for name, tensor in tensors.items()}


def encoders_of(source: Source, path: Path) -> tuple[Encoder, bool]:
    """The [encoder] section and training.test_mode of the run that a checkpoint is from."""
    if "config" not in source.state:
        raise ValueError(f"{path} does not say which encoders it was trained with: add --transformer-only")
    config = restore_config(source.state["config"], str(path))
    return config.encoder, config.training.test_mode


def write_dcp(target: Path, tensors: Mapping[str, LazyTensor], source: Source) -> None:
    """Like `write_folder`; save_weights itself writes into the hidden folder."""
    hidden = unfinished_path(target)
    shutil.rmtree(hidden, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        target.rmdir()  # it is empty
    known = {name: value for name, value in source.state.items() if name != "format"}
    try:
        save_weights(target, tensors, {"step": 0, "samples_seen": 0, **known, "flavor": source.spec.name})
    except CheckpointException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        cause, _ = next(iter(error.failures.values()))  # of the one process that there is
        raise cause from None


def write_diffusers(
    target: Path, tensors: Mapping[str, LazyTensor], spec: ModelSpec, encoders: tuple[Encoder, bool] | None
) -> None:
    """A pipeline, or without encoders the transformer's folder alone."""

    def fill(folder: Path) -> None:
        if encoders:
            save_pipeline(folder, spec, *encoders, tensors)
        else:
            (folder / "config.json").write_text(json.dumps(make_transformer_config(spec), indent=2) + "\n")
            write_sharded(folder, DIFFUSERS_STEM, tensors, None, _METADATA)

    write_folder(target, fill)


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    to, target = arguments.to, arguments.target
    if arguments.transformer_only and to != "diffusers":
        raise ValueError(f"--transformer-only has no effect with --to {to}, which holds nothing else: leave it out")
    source = open_source(arguments)
    whole = to == "diffusers" and not arguments.transformer_only
    encoders = encoders_of(source, arguments.source) if whole else None
    rules = {"bfl": BFL_RULES, "diffusers": source.spec.diffusers_rules}.get(to)
    converted = from_native(source.tensors, rules) if rules else source.tensors
    size = sum(tensor.bytes for tensor in converted.values())
    check_target(target, to, size)
    with tqdm(total=size, desc="converting", unit="B", unit_scale=True, disable=None) as bar:
        tensors = followed(converted, bar)
        try:
            if to == "bfl":
                write_safetensors(target, tensors, None, _METADATA)
            elif to == "dcp":
                write_dcp(target, tensors, source)
            else:
                write_diffusers(target, tensors, source.spec, encoders)
        except OSError as error:
            raise ValueError(f"{target} cannot be written: {error}") from error
    print(f"{target}: {source.spec.name}, {len(converted)} tensors, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    with recorded_exit(0, EXIT_CODES):
        main(sys.argv[1:])
