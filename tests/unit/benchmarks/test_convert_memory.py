"""The measurement of memory: what it lays down is a model, and what it prints are the conversion's figures."""

import re

import pytest
import torch

from benchmarks.convert_memory import lay_down_hole, main
from checkpoint.exchange import open_weights
from flux.identify import check_fits
from flux.rules import BFL_RULES, LAYOUTS
from flux.spec import SPECS


@pytest.mark.parametrize("flavor", SPECS)
def test_the_file_is_a_model_and_takes_no_room(tmp_path, flavor):
    path = tmp_path / "x.safetensors"
    total, largest = lay_down_hole(path, flavor)
    weights = open_weights(path, LAYOUTS)
    check_fits(weights.tensors, SPECS[flavor], "x.safetensors")
    assert LAYOUTS[weights.layout] == BFL_RULES
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.bfloat16}
    assert sum(tensor.bytes for tensor in weights.tensors.values()) == total < path.stat().st_size
    assert max(tensor.bytes for tensor in weights.tensors.values()) == largest
    assert path.stat().st_blocks * 512 < 1_000_000


@pytest.mark.slow
def test_every_layout_is_measured(tmp_path, capfd):
    main(["--flavor", "flux-tiny", "--to", "bfl", "diffusers", "dcp", "--folder", str(tmp_path)])
    out = capfd.readouterr().out
    for layout in ("bfl", "diffusers", "dcp"):
        line = re.search(rf"^ *{layout}: peak ([\d.]+) GB resident, ([\d.]+) GB anonymous", out, re.MULTILINE)
        assert line and 0 < float(line[2]) < float(line[1]), out
    assert list(tmp_path.iterdir()) == []
