"""Two runs that differ in an option: the same curve for what is the same, another for what is not."""

import json

import pytest

from benchmarks import loss_curves
from benchmarks.loss_curves import compare, main, smooth

SMALL = ["--training.local_batch_size=2", "--training.img_size=32", "--encoder.max_t5_encoding_len=4"]


def test_the_same_twice_and_something_else(tmp_path, capsys):
    same, other = "optimizer.implementation=fused", "debug.seed=1"
    path = tmp_path / "new" / "curves.json"
    main(["--variant", same, "--variant", other, "--json", str(path), "--training.steps=3", *SMALL])
    curves = json.loads(path.read_text())
    assert len(curves[""]) == 3 and curves[same] == curves[""] and curves[other] != curves[""]
    out = capsys.readouterr().out
    assert f"{same}: last loss" in out and "nowhere farther than 0.00 %" in out


def test_distances():
    plain = [2.0] * 40
    assert smooth(plain) == [2.0] * 19
    late = [2.0] * 30 + [2.2] * 10
    found = compare(late, plain)
    assert found["last_loss"] == pytest.approx(2.2)
    assert found["last_percent"] == found["largest_percent"] == pytest.approx(10)


def test_no_variant(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--variant" in capsys.readouterr().err


def test_a_variant_that_needs_another_layout():
    main(["--variant", "training.mixed_precision_param=bfloat16", "--training.steps=1", *SMALL])


@pytest.mark.parametrize(
    ("variant", "answer"),
    [
        ("training.img_size=100", r"training\.img_size=100"),
        ("optimizer.nonsense=3", "nonsense"),
        ("training.steps=2", "different lengths"),
    ],
)
def test_a_mistake_in_a_variant_is_found_before_the_first_run(variant, answer, monkeypatch):
    monkeypatch.setattr(loss_curves, "FluxTrainer", None)
    with pytest.raises(ValueError, match=answer):
        main(["--variant", variant, "--training.steps=1", *SMALL])


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--variant", "a='b"], "No closing quotation"),
        (["--variant", ""], "no options"),
        (["--variant", "ema.enable=true", "--json", "."], "is a folder"),
    ],
)
def test_what_cannot_be_read_or_written(arguments, answer, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert answer in capsys.readouterr().err
