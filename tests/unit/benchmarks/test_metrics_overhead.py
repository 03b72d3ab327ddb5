"""The benchmark of figures measures what it says; how much they cost is no matter of a test."""

import re

import pytest

from benchmarks import metrics_overhead
from benchmarks.metrics_overhead import Turn
from tests.integration.short_runs import TINY


def test_overhead_is_that_of_the_mean_step():
    turn = Turn(plain=1.0, between=1.01, logged=1.1)
    assert turn.overhead(1) == pytest.approx(0.1)
    assert turn.overhead(10) == pytest.approx((9 * 0.01 + 0.1) / 10)


@pytest.mark.slow
def test_each_kind_of_step_does_what_it_is_called(monkeypatch, capsys):
    monkeypatch.setattr(metrics_overhead, "TURNS", 2)
    calls = []

    def count(name: str, owner: type, method: str) -> None:
        original = getattr(owner, method)
        monkeypatch.setattr(
            owner, method, lambda self, *args, **kw: (calls.append(name), original(self, *args, **kw))[1]
        )

    count("step", metrics_overhead.FluxTrainer, "train_step")
    count("add", metrics_overhead.LossParts, "add")
    count("line", metrics_overhead.FluxTrainer, "_log_step")
    metrics_overhead.main([option for option in TINY if not option.startswith("--job.")])
    assert [calls.count(name) for name in ("step", "add", "line")] == [9, 6, 3]
    told = capsys.readouterr().out
    assert re.search(r"^median step without figures \d+ ms$", told, re.MULTILINE)
    assert len(re.findall(r"^a line every +(\d+) steps: [+-][\d.]+% \(.* \.\. .*\)$", told, re.MULTILINE)) == 2
