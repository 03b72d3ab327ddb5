"""A run whose forward and backward passes are replayed, on a stand-in for a GPU's recording."""

import json

import pytest
import torch

from config.parse import ConfigError, load_config
from parallel.degrees import Degrees
from parallel.mesh import Layout
from tests.integration.short_runs import TINY
from tests.unit.training.recorded_kernels import use_recorded_kernels
from train import FluxTrainer, main
from training.cuda_graph import WARM_UP

STEPS = WARM_UP + 3
CLOCKS = ("samples_per_s", "tflops", "percent", "memory")
OPTIONS = [f"--training.steps={STEPS}", "--validation.freq=2", "--validation.eval_freq=0", "--ema.enable"]


def train(folder, *options: str) -> tuple[FluxTrainer, list[dict]]:
    """Its figures, validation included, without those of clocks."""
    folder.mkdir()
    config = load_config([*TINY, *OPTIONS, f"--job.dump_folder={folder}", *options])
    trainer = FluxTrainer(config, folder, Layout(Degrees(), torch.device("cpu")))
    trainer.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trainer, [{k: v for k, v in line.items() if not any(clock in k for clock in CLOCKS)} for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--training.local_batch_size=4", "--training.global_batch_size=8", "--encoder.mask_padding"),
        ("--activation_checkpoint.mode=full", "--training.classifier_free_guidance_prob=0.5"),
    ],
    ids=["plain", "accumulated, masked", "recomputed"],
)
def test_a_replayed_run_has_the_same_bits(tmp_path, monkeypatch, options):
    plain, expected = train(tmp_path / "plain", *options)
    graphs = use_recorded_kernels(monkeypatch)
    replayed, figures = train(tmp_path / "replayed", "--compile.cuda_graph", *options)
    assert len(graphs) == 1, "one recording"
    assert figures == expected
    pairs = zip(plain.model.parameters(), replayed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert len({line["loss"] for line in figures if "loss" in line}) == STEPS, "control: each step has its own loss"


def test_control_gradients_that_are_not_zeroed_in_place_are_seen(tmp_path, monkeypatch):
    _, expected = train(tmp_path / "plain")
    use_recorded_kernels(monkeypatch)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)
    _, figures = train(tmp_path / "replayed", "--compile.cuda_graph")
    assert figures != expected


def test_a_cpu_is_refused(tmp_path, capfd):
    with pytest.raises(SystemExit):
        main([*TINY, f"--job.dump_folder={tmp_path}", "--compile.cuda_graph"])
    told = capfd.readouterr().err
    assert "compile.cuda_graph=true records the kernels of a GPU, and this is a cpu: leave it out" in told


@pytest.mark.parametrize(
    ("options", "other"),
    [
        (("--data.buckets.enable", "--data.buckets.step=16"), "data.buckets.enable=true has batches of many shapes"),
        (("--training.enable_cpu_offload",), "training.enable_cpu_offload=true copies"),
        (
            (
                "--model.converters=quantize.linear.float8",
                "--quantize.linear.float8.enable_fsdp_float8_all_gather",
                "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
            ),
            "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp=true puts scales",
        ),
        (
            ("--parallelism.fsdp_reshard_after_forward=always",),
            'parallelism.fsdp_reshard_after_forward="always" leaves',
        ),
    ],
)
def test_what_cannot_be_replayed_is_refused(options, other):
    load_config([*TINY, *options])
    load_config([*TINY, "--compile.cuda_graph"])
    with pytest.raises(ConfigError) as caught:
        load_config([*TINY, "--compile.cuda_graph", *options])
    assert f"compile.cuda_graph=true replays what it has recorded, and {other}" in str(caught.value)
