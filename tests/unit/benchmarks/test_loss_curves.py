"""Two runs that differ in an option: the same curve for what is the same, another for what is not."""

import json

import pytest

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


def test_a_mistake_in_a_variant(tmp_path):
    with pytest.raises(ValueError, match=r"training\.img_size=100"):
        main(["--variant", "training.img_size=100", "--training.steps=1", *SMALL])
