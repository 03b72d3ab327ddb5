"""Parts of the trainer that need no run."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.config import Checkpoint
from train import FluxTrainer


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_weight_too_large_for_the_exports_format_is_told(tmp_path, dtype):
    trainer = SimpleNamespace(
        layout=SimpleNamespace(rank=0),
        config=SimpleNamespace(checkpoint=Checkpoint(export_dtype=dtype)),
        spec=SimpleNamespace(name="flux-tiny"),
        step=1,
    )
    path = tmp_path / "x.safetensors"
    if dtype == "float16":
        with pytest.raises(ValueError, match=r"img_in\.weight reaches 7e\+04, too large for float16"):
            FluxTrainer._export(trainer, path, {"img_in.weight": torch.tensor([1.0, 7e4])})
        assert not path.exists()
    FluxTrainer._export(trainer, path, {"img_in.weight": torch.tensor([1.0, -6e4])})
    assert load_file(path)["img_in.weight"].dtype == getattr(torch, dtype)
