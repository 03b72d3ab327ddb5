"""The final export: whole, strict, and helpful when it is not what it should be."""

import pytest
import torch
from torch import nn

from checkpoint.export import load_export, save_export


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_round_trip(model, tmp_path):
    path = save_export(tmp_path / "export", model.state_dict(), torch.float32, {"flavor": "tiny", "step": "7"})
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert load_export(path, other, "tiny") == {"flavor": "tiny", "step": "7"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_export_dtype(model, tmp_path):
    path = save_export(tmp_path, model.state_dict(), torch.bfloat16, {})
    load_export(path, model, "tiny")
    weight = model[0].weight
    assert torch.equal(weight, weight.bfloat16().float())


def spoil(path, change):
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif change == "garbage":
        path.write_bytes(b"not safetensors at all")


@pytest.mark.parametrize(
    "change, message", [("missing", "is missing"), ("truncated", "not a whole"), ("garbage", "not a whole")]
)
def test_faulty_files(model, tmp_path, change, message):
    path = save_export(tmp_path, model.state_dict(), torch.float32, {"flavor": "tiny"})
    spoil(path, change)
    with pytest.raises(ValueError, match=message):
        load_export(path, model, "tiny")


def test_another_flavor(model, tmp_path):
    path = save_export(tmp_path, model.state_dict(), torch.float32, {"flavor": "flux-dev"})
    with pytest.raises(ValueError, match=r"holds a flux-dev, but model\.flavor='tiny'"):
        load_export(path, model, "tiny")


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))])
def test_other_names_or_shapes(model, tmp_path, other):
    path = save_export(tmp_path, other.state_dict(), torch.float32, {"flavor": "tiny"})
    with pytest.raises(ValueError, match="names or shapes differ"):
        load_export(path, model, "tiny")
