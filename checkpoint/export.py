"""The final export: one safetensors file of the transformer under its own names."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

EXPORT_FILE = "transformer.safetensors"


def save_export(folder: Path, state_dict: dict[str, Tensor], dtype: torch.dtype, metadata: dict[str, str]) -> Path:
    """Writes `folder`/transformer.safetensors; the file appears whole or not at all.

    Args:
        folder: made when missing.
        state_dict: full tensors under the model's own names.
        dtype: floating tensors are cast to it.
        metadata: strings stored in the header ("flavor", "step").
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EXPORT_FILE
    unfinished = path.with_suffix(".tmp")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)
    return path


def load_export(path: Path, model: nn.Module, flavor: str) -> dict[str, str]:
    """Gives a model the tensors of an export, strictly. The model may be on the meta device.

    Returns:
        The metadata of the file.

    Raises:
        ValueError: no such file, not a whole safetensors file, another flavor, other names or shapes.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run has not finished, or this is not the folder of a run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): export it again") from error
    if metadata.get("flavor", flavor) != flavor:
        raise ValueError(
            f"{path} holds a {metadata['flavor']}, but model.flavor={flavor!r}: use the run's own config.toml"
        )
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(
            f"{path} does not fit model.flavor={flavor!r}: {len(wrong)} names or shapes differ, such as {wrong[0]!r}"
        )
    model.load_state_dict(tensors, assign=True)
    return metadata
