"""--help teaches every key."""

import pytest

from config.accepted import NO_EFFECT_YET, NOT_USED_HERE
from config.help import help_text
from config.keys import KEYS, show
from config.parse import load_config


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--training.steps", "nonsense", "--help"]])
def test_help_is_printed_and_the_process_ends_well(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(argv)
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == help_text()


def test_every_key_has_meaning_range_and_default():
    blocks = {block.split("\n")[0]: " ".join(block.split()) for block in help_text().split("\n  --")}
    for name, key in KEYS.items():
        block = blocks[name]
        assert key.help in block
        assert f"default: {'not set' if key.default is None else show(key.default)}" in block
        if key.interval is not None and key.kind is not str:
            assert str(key.interval) in block
        assert all(choice in block for choice in key.choices)
    for name in NO_EFFECT_YET | NOT_USED_HERE:
        assert name in blocks


def test_lists_say_that_they_are_some():
    """How each is written on the command line stands at the top; an empty list is its own default."""
    blocks = {block.split("\n")[0]: " ".join(block.split()) for block in help_text().split("\n  --")}
    assert "a list is written with commas" in " ".join(help_text().split())
    assert '(list of texts, each model or loss; default: ["model", "loss"])' in blocks["compile.components"]
    assert "(list of texts; default: [])" in blocks["quantize.linear.float8.filter_fqns"]
    assert "(list of whole numbers, each at least 1; default: [])" in blocks["data.buckets.img_sizes"]
    assert "weight: share of the samples that come from here" in blocks["data.sources"]
    for name, key in KEYS.items():
        assert any(f"(list of {what}" in blocks[name] for what in ("texts", "whole", "tables")) == (key.kind is list)


def test_lines_fit_a_terminal():
    assert max(map(len, help_text().splitlines())) <= 110
