"""The benchmark of saves measures what it says; how fast they are is no matter of a test."""

import re

import pytest

from benchmarks import checkpoint_stall
from tests.integration.short_runs import TINY


@pytest.mark.slow
def test_every_mode_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_stall, "CYCLES", 1)
    monkeypatch.setattr(checkpoint_stall, "STEPS", 1)
    saved = []
    original = checkpoint_stall.FluxTrainer.save
    monkeypatch.setattr(checkpoint_stall.FluxTrainer, "save", lambda self: (saved.append(1), original(self)))
    checkpoint_stall.main([option for option in TINY if not option.startswith("--job.")])
    rows = re.findall(r"^(\w[\w ]*?) +(\d+) ms +(\d+)% +([\d.]+) x$", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == list(checkpoint_stall.MODES)
    assert rows[0][1:] == ("0", "0", "1.00") and all(int(row[1]) > 0 for row in rows[1:])
    assert len(saved) == len(checkpoint_stall.MODES) - 1
