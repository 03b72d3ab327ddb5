"""Writes random samples in MLPerf's format, to measure speed, or to try out a cluster, without data."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from flux.data.mlperf import ARRAYS, EMPTY_FILES, EMPTY_FOLDER, STATE_FILE
from flux.spec import LATENT_STRIDE, ModelSpec

_FILE = "data-00000-of-00001.arrow"


def write_random_samples(folder: Path, spec: ModelSpec, img_size: int, text_length: int, samples: int) -> Path:
    """A data set for training.dataset="mlperf" of normally distributed features. Returns the folder to be named there.

    Args:
        folder: must exist.
        spec: the flavor, whose widths the features have.
        img_size: side of the pictures, pixels.
        text_length: rows of T5's features.
        samples: how many there are.
    """
    side, transformer = img_size // LATENT_STRIDE, spec.transformer
    assert transformer.pooled_dim, f"{spec.name} has no pooled text"
    text, pooled = (text_length, transformer.context_dim), (transformer.pooled_dim,)
    latent = (spec.codec.latent_channels, side, side)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    data = folder / "random"
    data.mkdir()
    schema = pa.schema([("__key__", pa.string()), *((name, pa.binary()) for name in ARRAYS), ("timestep", pa.int32())])
    with pa.OSFile(str(data / _FILE), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for number in range(samples):
            tensors = zip(ARRAYS, (draw(*text), draw(*pooled), draw(*latent), draw(*latent) - 4), strict=True)
            arrays = {name: _to_npy(tensor.bfloat16().view(torch.uint16).numpy()) for name, tensor in tensors}
            row = {"__key__": str(number), **arrays, "timestep": None}
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))
    (data / STATE_FILE).write_text(json.dumps({"_data_files": [{"filename": _FILE}]}))
    (folder / EMPTY_FOLDER).mkdir()
    for kind, shape in (("t5", text), ("clip", pooled)):
        np.save(folder / EMPTY_FOLDER / EMPTY_FILES[kind], draw(1, *shape).half().numpy())
    return data


def _to_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
