"""The bill before the run: what is shown, what is proposed, and whether the proposal holds."""

import json
from pathlib import Path

import pytest

from config.parse import ConfigError, load_config
from estimate import cached_bytes, needed_encoders
from flux.encoder_costs import EncoderCost
from flux.flops import training_flops
from flux.spec import SPECS
from runtime.hardware import ACCELERATORS
from scripts.plan import (
    Machines,
    Plan,
    changed_options,
    main,
    make_plan,
    propose,
    validation_seconds,
)

ROOT = Path(__file__).resolve().parents[3]
DEV = [f"--job.config_file={ROOT / 'train_configs' / 'flux_dev.toml'}"]
TINY = [f"--job.config_file={ROOT / 'train_configs' / 'flux_tiny.toml'}"]
NO_ENCODERS: dict[str, EncoderCost] = {}


def plan_for(gpus: int, chip: str, *options: str) -> tuple[Plan, Machines]:
    machines = Machines(ACCELERATORS[chip], gpus, 8)
    return make_plan(load_config([*DEV, *options], gpus, quiet=True), machines, NO_ENCODERS), machines


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*DEV, "--gpus", "64", "--gpu", "h200", "--json", str(tmp_path / "plan.json")])
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "plan.json").read_text())
    assert "flux-dev, 11,901,408,320 parameters" in shown and "dp_shard 64" in shown
    assert "and 33% to compute again" in shown, "its configuration recomputes every block"
    assert record["parameters"] == 11_901_408_320 and record["gpus"] == 64
    assert record["samples"] == 30_000 * 64 * 32
    configured, proposed = record["configured"], record["proposed"]
    assert configured["fits"] and proposed["fits"]
    assert configured["memory"]["weights"] == pytest.approx(4 * 11_901_408_320 / 64, rel=0.01)
    assert configured["memory"]["encoders"] > 2 * 4.76e9 / 64
    flops = training_flops(SPECS["flux-dev"].transformer, 256, 512)
    assert configured["flop_per_sample"] == pytest.approx(4 / 3 * flops, rel=1e-6)
    assert proposed["seconds"]["ceiling"] < configured["seconds"]["ceiling"]
    assert proposed["update_size"] == configured["update_size"]
    for option in record["options"]:
        assert option in shown


def test_the_proposed_options_give_the_proposed_plan() -> None:
    plan, machines = plan_for(16, "h100")
    proposal = propose(plan, machines, NO_ENCODERS)
    assert proposal is not None and proposal.fits(machines)
    again, _ = plan_for(16, "h100", *changed_options(plan, proposal))
    assert (again.degrees, again.memory, again.seconds) == (proposal.degrees, proposal.memory, proposal.seconds)
    assert again.update_size == plan.update_size


def test_a_proposal_makes_room_where_the_configuration_has_none() -> None:
    everything = ["--activation_checkpoint.mode=none", "--training.local_batch_size=64"]
    plan, machines = plan_for(16, "h100", *everything)
    assert not plan.fits(machines)
    proposal = propose(plan, machines, NO_ENCODERS)
    assert proposal is not None and proposal.fits(machines)
    assert proposal.config.activation_checkpoint.mode != "none" or proposal.config.training.local_batch_size < 64


def test_nothing_fits_on_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main([*DEV, "--gpus", "1", "--gpu", "h100"])
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown and "nothing fits" in shown and "proposed" not in shown


def test_a_laptop_configuration_fits(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--gpus", "1", "--gpu", "rtx4090"])
    shown = capsys.readouterr().out
    assert "fits" in shown and "DOES NOT FIT" not in shown


def test_a_cached_sample_is_what_mlperf_stores() -> None:
    config = load_config([*DEV, "--encoder.max_t5_encoding_len=256"], 8, quiet=True)
    # 256 rows of T5, CLIP's vector, mean and log-variance of 16 x 32 x 32, in 16 bits.
    assert cached_bytes(config, 256) == 2 * (256 * 4096 + 768 + 2 * 16 * 32 * 32) == 2_164_224


def test_cost_of_validation() -> None:
    chip = ACCELERATORS["h100"]
    plan, _ = plan_for(8, "h100")
    loss, grid = validation_seconds(plan, chip)
    forward = training_flops(SPECS["flux-dev"].transformer, 256, 512) / 3 / (989e12 * 0.8)
    assert loss == pytest.approx(2 * 32 * forward), "12 batches of 32, dealt to 8 groups and filled up"
    assert grid == pytest.approx(7 * 50 * 2 * forward), "50 pictures, of 50 steps with guidance"
    wide, _ = plan_for(64, "h100")
    assert validation_seconds(wide, chip) == (pytest.approx(32 * forward), pytest.approx(100 * forward))
    averaged, _ = plan_for(8, "h100", "--ema.enable=true")
    assert validation_seconds(averaged, chip) == (pytest.approx(2 * loss), pytest.approx(2 * grid))
    assert validation_seconds(plan_for(8, "h100", "--validation.steps=-1")[0], chip)[0] is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--activation_checkpoint.cpu_offload=true"],
            "GiB (activations) of each rank are in the host's memory, which",
        ),
        (["--encoder.cpu_offload=true"], "GiB (T5's weights) of each rank are in the host's memory, which"),
        (["--training.enable_cpu_offload=true"], "in the host's memory, which the times leave out"),
        (["--training.mixed_precision_param=float32"], "in float32 they take many times as long"),
        (["--data.buckets.enable=true"], "not of the shapes of [data.buckets]"),
        (["--model.flavor=flux-debug", "--training.local_batch_size=1"], "is most of so short an update"),
        (["--validation.steps=-1", "--ema.enable=true"], "all held-out samples, and again for the average"),
    ],
)
def test_what_the_figures_do_not_know_is_said(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*DEV, *options])
    assert told in capsys.readouterr().out
    main(DEV)
    assert told not in capsys.readouterr().out


def test_a_memory_budget_is_a_range(capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--activation_checkpoint.mode=memory_budget", "--compile.enable=true"]
    plan, _ = plan_for(8, "h100", *budget)
    full, _ = plan_for(8, "h100", "--activation_checkpoint.mode=full", "--compile.enable=true")
    main([*DEV, *budget])
    shown = capsys.readouterr().out
    low, high = (f"{one.memory.activations / 2**30:.2f} GiB" for one in (full, plan))
    assert f"{low} to {high}" in shown and "memory_budget 0.5" in shown


def test_an_offloaded_configuration_gets_no_proposal(capsys: pytest.CaptureFixture[str]) -> None:
    main([*DEV, "--training.enable_cpu_offload=true"])
    assert "proposed" not in capsys.readouterr().out


def test_stored_data_need_no_encoders() -> None:
    stored = ["--training.dataset=cache", "--training.dataset_path=somewhere"]
    assert set(needed_encoders(load_config(DEV, 8, quiet=True))) == {"t5", "clip", "autoencoder"}
    drawn = needed_encoders(load_config([*DEV, *stored], 8, quiet=True))
    assert {cost.flops for cost in drawn.values()} == {0} and all(cost.parameters for cost in drawn.values())
    assert needed_encoders(load_config([*DEV, *stored, "--validation.eval_freq=0"], 8, quiet=True)) == {}


def test_bad_input() -> None:
    for options, told in (
        (["--gpus", "0"], "--gpus=0 must be at least 1"),
        (["--samples", "-5"], "--samples=-5 must be at least 1"),
        (["--gpus", "6", "--parallelism.tensor_parallel_degree=4"], "must divide the 6 processes"),
    ):
        with pytest.raises((ValueError, ConfigError), match=told):
            main([*DEV, *options])
    with pytest.raises(SystemExit):
        main([*DEV, "--gpu", "h9000"])
    with pytest.raises(ValueError, match=r"--json=/dev/null/plan\.json cannot be written"):
        main([*DEV, "--json", "/dev/null/plan.json"])
    with pytest.raises(ValueError, match="needs 8-bit products, which a100 has not"):
        main([*DEV, "--gpu", "a100", "--model.converters=quantize.linear.float8"])
