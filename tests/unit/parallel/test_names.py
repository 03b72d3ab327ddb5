"""Module names and patterns."""

import pytest
from torch import nn

from parallel.names import find_modules, matches


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("blocks.0", "blocks.*", True),
        ("blocks.0.norm", "blocks.*", False),  # a star is one part
        ("blocks.10.img_attn.qkv", "blocks.*.*_attn.qkv", True),
        ("blocks.10.img_mlp.0", "blocks.*.*_attn.*", False),
        ("blocks", "blocks.*", False),
    ],
)
def test_matches(name, pattern, fits):
    assert matches(name, pattern) is fits


def test_modules_come_in_the_order_of_patterns_and_model():
    model = nn.ModuleDict({"a": nn.ModuleList([nn.ReLU(), nn.ReLU()]), "b": nn.ModuleList([nn.ReLU()])})
    assert list(find_modules(model, ["b.*", "a.*"])) == ["b.0", "a.0", "a.1"]
    with pytest.raises(ValueError, match=r"no module of ModuleDict is called c\.\*"):
        find_modules(model, ["a.*", "c.*"])
