"""Whether a checkpoint holds exactly what a run needs: names, shapes and dtypes, before anything is loaded.

DCP alone leaves out what the run does not ask for, and casts dtypes, both without a word.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint.config import PARTS
from checkpoint.slices import Slices


def part_of(name: str) -> str:
    """Which part of a checkpoint a tensor belongs to: one of PARTS, or "model"."""
    first = name.partition(".")[0]
    return first if first in PARTS else "model"


def check_tensors(
    path: Path,
    entries: Mapping[str, TensorStorageMetadata],
    wanted: Mapping[str, Slices],
    ignored: Collection[str],
    may_cast: bool,
) -> None:
    """Compares what a checkpoint has with what a run wants.

    Args:
        path: of the checkpoint, for messages.
        ignored: parts of the checkpoint that the run leaves where they are.
        may_cast: weights of another run may have another dtype.

    Raises:
        ValueError: with the first differences and the remedy.
    """
    has = {name for name in entries if part_of(name) not in ignored}
    for names, text, remedy in (
        (wanted.keys() - has, "has no", "let it start anew"),
        (has - wanted.keys(), "also has", "switch it on as it was, or leave it behind"),
    ):
        parts = sorted({part_of(name) for name in names})
        if "model" in parts:
            remedy = "use the flavor and the settings that it was made with"
        elif parts:
            remedy += f" with checkpoint.exclude_from_loading={','.join(parts)}"
        if "optimizer" in parts and all("optimizer" in map(part_of, names) for names in (has, wanted)):
            remedy = f"set optimizer.state_dtype as it was, or {remedy}"
        if names:
            raise ValueError(f"{path} {text} {_listed(names)}, unlike this run: {remedy}")
    for name, slices in wanted.items():
        entry = entries[name]
        if entry.size != slices.shape:
            raise ValueError(
                f"{path} has {name} of shape {list(entry.size)}, and this run of shape {list(slices.shape)}: "
                "use the flavor that it was made with"
            )
        if entry.properties.dtype != slices.dtype and not may_cast:
            remedy = "training.dtype and optimizer.bf16_rounding as they were, or start another run from it with"
            remedy += " checkpoint.initial_load_path"
            if part_of(name) == "optimizer":
                remedy = "optimizer.state_dtype as it was, or let it start anew with "
                remedy += "checkpoint.exclude_from_loading=optimizer"
            formats = f"in {_dtype(entry.properties.dtype)}, and this run in {_dtype(slices.dtype)}"
            raise ValueError(f"{path} has {name} {formats}: set {remedy}")


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Collection[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more tensors"
