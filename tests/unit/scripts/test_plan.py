"""The bill before the run: what is shown, what is proposed, and whether the proposal holds."""

import json
import math
from pathlib import Path

import pytest

from config.parse import ConfigError, load_config
from flux.encoder_costs import EncoderCost
from flux.flops import training_flops
from flux.spec import SPECS
from runtime.hardware import ACCELERATORS
from scripts.plan import Machines, Plan, cached_bytes, changed_options, main, make_plan, propose, validation_flops

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
    plan, _ = plan_for(8, "h100")
    loss, grid = validation_flops(plan.config, plan.degrees)
    forward = training_flops(SPECS["flux-dev"].transformer, 256, 512) / 3
    assert loss == pytest.approx(12 * 32 * 8 * forward) and grid == pytest.approx(50 * 50 * 2 * forward)
    averaged, _ = plan_for(8, "h100", "--ema.enable=true", "--validation.all_timesteps=true")
    assert validation_flops(averaged.config, averaged.degrees) == (pytest.approx(16 * loss), pytest.approx(2 * grid))
    unknown, _ = plan_for(8, "h100", "--validation.steps=-1")
    assert math.isnan(validation_flops(unknown.config, unknown.degrees)[0])


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
