"""The speed comparison: that both sides do the same work, and what a user is told."""

import importlib.util
import json

import pytest
import torch

from benchmarks.train_step import main, measure

SMALL = ["--batch", "1", "--img-size", "32", "--text-tokens", "2", "--steps", "2", "--warmup", "1", "--device", "cpu"]
TOLERANCE = 1e-5  # fp32 rounding of the two predictions


def test_against_diffusers(tmp_path, capsys):
    pytest.importorskip("diffusers")
    path = tmp_path / "new" / "figures.json"
    main([*SMALL, "--against", "diffusers", "--json", str(path)])
    figures = json.loads(path.read_text())
    assert figures["prediction_difference"] < TOLERANCE
    for side in ("this", "diffusers"):
        assert figures[side]["samples_per_s"] == pytest.approx(1 / figures[side]["seconds_per_step"])
    assert "of its time" in capsys.readouterr().out


def test_alone(capsys):
    main([*SMALL, "--dtype", "bfloat16", "--against", "none"])
    out = capsys.readouterr().out
    assert "9,105,984 parameters" in out and "4 image + 2 text tokens" in out and "samples/s" in out


def test_sides_take_turns():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) or torch.zeros(1) for name in ("a", "b")}
    seconds = measure(steps, rounds=2, warmup=1, device=torch.device("cpu"))
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [len(times) for times in seconds.values()] == [2, 2]


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (["--img-size", "100"], "100 is not a multiple of 16: use 96"),
        (["--batch", "0"], "0 is below 1"),
        (["--against", "diffusers"], "pip install -r requirements-dev.txt"),
        (["--device", "cuda"], "torch finds no GPU"),
    ],
)
def test_what_cannot_run(arguments, answer, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert answer in capsys.readouterr().err
