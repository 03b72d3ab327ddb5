"""The speed comparison: that all sides do the same work, what is told, and to whom."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

import train
from benchmarks import train_step
from benchmarks.clock import Clock, compare, measure
from benchmarks.train_step import main

SMALL = ["--training.local_batch_size=2", "--training.img_size=32", "--encoder.max_t5_encoding_len=4"]
FEW = ["--steps", "2", "--warmup", "1"]
TOLERANCE = 1e-5  # fp32 rounding of the two predictions
REGIONS = {"data", "encode", "inputs", "forward", "loss", "backward", "clip", "optimizer"}


def run(tmp_path, *options: str) -> dict:
    path = tmp_path / "new" / "figures.json"
    main([*FEW, "--json", str(path), *SMALL, *options])
    return json.loads(path.read_text())


def test_against_both(tmp_path, capsys):
    pytest.importorskip("diffusers")
    figures = run(tmp_path, "--against", "naive", "diffusers")
    assert figures["prediction_difference"] < TOLERANCE
    assert set(figures["steps"]) == {"update", "naive", "transformer", "diffusers"}
    assert set(figures["steps"]["naive"]["region_percent"]) == REGIONS
    for name, one in figures["steps"].items():
        samples = 2
        assert one["samples_per_s"] == pytest.approx(samples / one["seconds"]), name
        assert one["tflops"] == pytest.approx(one["samples_per_s"] * figures["tflop_per_sample"])
        assert sum(one["region_percent"].values()) <= 100
    low, middle, high = figures["ratios"]["update / naive"]
    assert 0 < low <= middle <= high
    assert "of their size" in capsys.readouterr().out
    assert train.region is torch.profiler.record_function, "left as it was"


@pytest.mark.parametrize("inputs", ["encoded", "pictures"])
def test_alone_in_bf16_with_accumulation(tmp_path, capsys, inputs):
    options = ("--training.mixed_precision_param=bfloat16", "--training.global_batch_size=4")
    figures = run(tmp_path, "--inputs", inputs, *options)
    update = figures["steps"]["update"]
    assert figures["samples"] == 4 and figures["dtype"] == "bfloat16" and figures["weights"] == "float32"
    assert update["peak_gib"] > 0 and set(update["region_percent"]) == REGIONS
    assert not figures["ratios"] and "prediction_difference" not in figures
    assert "4 x (4 image + 4 text tokens)" in capsys.readouterr().out


def test_variants(tmp_path, capsys):
    variant = "training.mixed_precision_param=bfloat16 ema.enable=true"
    figures = run(tmp_path, "--variant", variant)
    assert set(figures["steps"]) == {"update", variant} and list(figures["ratios"]) == [f"{variant} / update"]
    assert "ema" in figures["steps"][variant]["region_percent"]
    assert f"{variant} / update = " in capsys.readouterr().out


def test_a_variant_is_counted_by_its_own_configuration(tmp_path):
    variant = "training.local_batch_size=4"
    figures = run(tmp_path, "--variant", variant)["steps"]
    assert figures[variant]["samples_per_s"] * figures[variant]["seconds"] == pytest.approx(4)
    work = {name: one["tflops"] * one["seconds"] for name, one in figures.items()}
    assert work[variant] == pytest.approx(2 * work["update"])


def test_naive_is_recomputed_and_not_compiled(monkeypatch, tmp_path):
    """The other side has what the options ask for; naive has not."""
    seen = []

    def remember(config, layout, folder):
        seen.append(config)
        return lambda: None

    monkeypatch.setattr(train_step, "build_update", remember)
    run(tmp_path, "--against", "naive", "--compile.enable=true", "--activation_checkpoint.mode=none")
    update, naive = seen
    assert update.compile.enable and not naive.compile.enable
    assert update.activation_checkpoint.mode == "none" and naive.activation_checkpoint.mode == "full"
    assert naive.training == update.training


def test_weights_are_random_everywhere(tmp_path):
    config = train_step.load_config([*train_step.DEFAULTS, *SMALL], 1)
    trainer = train_step.build_trainer(config, train_step.build_run_layout(config, 1), tmp_path)
    assert all(parameter.std() > 0 for parameter in trainer.model.parameters())


def test_sides_take_turns_and_regions_are_theirs():
    clock, calls = Clock(torch.device("cpu")), []

    def step(name: str) -> None:
        calls.append(name)
        with clock.region(f"of {name}"):
            pass

    times = measure({name: lambda name=name: step(name) for name in ("a", "b")}, clock, rounds=2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert {name: (len(one.steps), list(one.regions)) for name, one in times.items()} == {
        "a": (2, ["of a"]),
        "b": (2, ["of b"]),
    }


def test_ratio_is_that_of_neighbors():
    assert compare([1.0, 20.0, 3.0, 4.0, 5.0], [2.0, 40.0, 6.0, 8.0, 5.0]) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "arguments, environment, answer",
    [
        (["--steps", "0"], {}, "0 is below 1"),
        (["--against", "diffusers"], {}, "pip install -r requirements-dev.txt"),
        (["--against", "peers"], {}, "invalid choice: 'peers'"),
    ],
)
def test_what_cannot_run(arguments, environment, answer, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert answer in capsys.readouterr().err


def test_diffusers_is_for_one_process(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["--against", "diffusers"])
    assert "compares on one process" in capsys.readouterr().err


def test_a_mistake_in_the_configuration_is_one_line():
    with pytest.raises(ValueError, match=r"training\.img_size=100 must be a multiple of 16"):
        main([*FEW, "--training.img_size=100"])
