"""Opens the weights of a transformer in any layout that people use. What a file is, its names tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.adapter import RuleLike, knows_all, to_native
from checkpoint.dcp import open_checkpoint
from checkpoint.lazy import LazyTensor
from checkpoint.safe_metadata import METADATA
from checkpoint.safetensors_file import open_indexed, open_safetensors, read_header_metadata
from checkpoint.steps import find_steps

DIFFUSERS_FOLDER, DIFFUSERS_STEM = "transformer", "diffusion_pytorch_model"  # the folder's name within a pipeline's
OWN_LAYOUT, CHECKPOINT_LAYOUT = "this recipe's", "checkpoint"
ACCEPTED = (
    "a checkpoint (step-N) of this recipe or of torchtitan, a safetensors file of this recipe, of Black Forest Labs or "
    "of diffusers, or a diffusers folder"
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Weights:
    """The weights of a transformer as they lie in a file or folder.

    Args:
        tensors: under the model's own names; read when asked for.
        layout: what the names are, a key of the tables that were handed in, `OWN_LAYOUT` or `CHECKPOINT_LAYOUT`.
        metadata: strings in the header of a single safetensors file; an export has "flavor" and "step".
    """

    tensors: dict[str, LazyTensor]
    layout: str
    metadata: dict[str, str]


def open_weights(path: Path, tables: Mapping[str, Sequence[RuleLike]], part: str = "model") -> Weights:
    """Recognizes what lies at `path` from names alone; no tensor is read.

    Args:
        path: see `ACCEPTED`.
        tables: layout -> its rules, the first that knows all names is taken.
        part: "model", or "ema" for their running mean, which only a checkpoint has.

    Raises:
        ValueError: nothing that is accepted, damaged, quantized, or without that part.
    """
    natives = {rule.native for rules in tables.values() for rule in rules}
    if (path / METADATA).is_file():
        tensors = _without_prefix(_checked(open_checkpoint(path, part), path))
        if not knows_all(tensors, natives):
            raise ValueError(_unknown(path, tensors, [OWN_LAYOUT]))
        return Weights(tensors, CHECKPOINT_LAYOUT, {})
    if part != "model":
        raise ValueError(
            f"{path} is no checkpoint, and only a checkpoint holds an average of the weights beside them: name one, or "
            "leave --ema out"
        )
    if path.is_dir():
        tensors, metadata = _open_folder(path), {}
    elif path.exists():
        tensors, metadata = open_safetensors([path]), read_header_metadata(path)
    else:
        raise ValueError(f"{path} is missing: name {ACCEPTED}")
    _checked(tensors, path)
    if knows_all(tensors, natives):
        return Weights(tensors, OWN_LAYOUT, metadata)
    for layout, rules in tables.items():
        if knows_all(tensors, [pattern for rule in rules for pattern in rule.other]):
            try:
                return Weights(to_native(tensors, rules), layout, metadata)
            except ValueError as error:
                raise ValueError(f"{path} has the names of {layout}, but {error}") from None
    raise ValueError(_unknown(path, tensors, [*tables, OWN_LAYOUT]))


def _open_folder(folder: Path) -> dict[str, LazyTensor]:
    """The transformer of a diffusers pipeline's folder, or a folder of it alone."""
    inner = folder / DIFFUSERS_FOLDER
    home = inner if inner.is_dir() else folder
    if any(home.glob(f"{DIFFUSERS_STEM}.safetensors*")):
        return open_indexed(home, DIFFUSERS_STEM)
    if unsafe := sorted(file.name for pattern in _UNSAFE for file in home.glob(pattern)):
        raise ValueError(f"{home} holds {unsafe[0]}, and only safetensors is safe to open: fetch the safetensors files")
    if steps := find_steps(folder) or find_steps(folder / "checkpoint"):
        raise ValueError(f"{folder} holds checkpoints: name one of them, such as {steps[max(steps)]}")
    if (folder / "model_index.json").is_file() or (home / "config.json").is_file():
        raise ValueError(f"{home} must hold {DIFFUSERS_STEM}.safetensors and does not: fetch the folder again")
    raise ValueError(f"{folder} holds no weights that are known: name {ACCEPTED}")


def _without_prefix(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """MLPerf's reference saves with a torchtitan that still kept the weights below `model`; the names are the same."""
    prefix = "model."
    if not all(name.startswith(prefix) for name in tensors):
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _checked(tensors: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Raises ValueError for numbers that are not plain floating point."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path} holds {name} as {kind}: quantized weights cannot be used, take the original ones")
    return tensors


def _unknown(path: Path, tensors: Mapping[str, LazyTensor], layouts: Sequence[str]) -> str:
    names = ", ".join(list(tensors)[:5]) or "none"
    known = ", ".join(layouts)
    return f"{path} holds {len(tensors)} tensors under unknown names ({names}, ...): the known names are {known}"
