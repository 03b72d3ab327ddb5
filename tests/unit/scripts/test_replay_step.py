"""What cannot be replayed is said in one line, before anything is built; and with which settings a step is replayed."""

import json
from dataclasses import asdict, replace

import pytest

from checkpoint.dcp import FORMAT, TRAIN_STATE
from config.parse import load_config
from config.write import save_config
from scripts.replay_step import find_config, main, share_out
from step_records import read_records

TINY = ["--job.config_file=train_configs/flux_tiny.toml", "--training.steps=100", "--debug.seed=1"]


@pytest.fixture
def run(tmp_path):
    """Of 2 ranks, stopped after step 40; with another learning rate since step 20, and a third one since step 30."""
    folder = tmp_path / "run"
    rates = {10: "1e-3", 20: "1e-3", 30: "2e-3", None: "3e-3"}
    for step, rate in rates.items():
        config = load_config([*TINY, f"--optimizer.lr={rate}", "--validation.enable"], quiet=True)
        if step is None:
            save_config(config, folder / "config.toml")
            break
        place = folder / "checkpoint" / f"step-{step}"
        place.mkdir(parents=True)
        state = {"format": FORMAT, "step": step, "layout": "2 ranks = dp_shard 2, gloo on cpu", "update_size": 12}
        (place / TRAIN_STATE).write_text(json.dumps(state | {"config": asdict(config)}))
    lines = [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in (10, 20, 30, 40)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5')
    return folder


def refused(*argv: object) -> str:
    with pytest.raises(ValueError) as error:
        main([str(word) for word in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_run(tmp_path):
    assert "is no run, it has no config.toml: name the folder of a run" in refused(tmp_path, "--step=1")


@pytest.mark.parametrize("step", [0, -3, 51, 101])
def test_a_step_that_the_run_has_not_come_to(run, step):
    assert "which has come to step 40 of 100" in refused(run, f"--step={step}")


@pytest.mark.parametrize(("told", "done"), [(47, 47), (None, 40)])  # None: of a rank that was killed, nobody can say
def test_the_record_of_the_end_tells_of_later_steps(run, told, done):
    (run / "exit.json").write_text(json.dumps({"code": 1, "step": told}))
    assert f"which has come to step {done} of 100" in refused(run, "--step=99")


def test_control_steps_after_the_last_logged_one_may_have_been_made(run):
    records = read_records(run)
    assert records.config.metrics.log_freq == 10
    records.check_step(50)


def test_no_checkpoint_before_the_step(run):
    said = refused(run, "--step=10")
    assert "has no checkpoint before step 10, the oldest is of step 10: replay all 10 steps" in said
    assert "--start 0, or name a later step" in said
    (run / "checkpoint").rename(run / "elsewhere")
    assert "has no checkpoint: replay all 11 steps from its beginning with --start 0" in refused(run, "--step=11")


def test_a_start_that_is_not_there(run):
    said = refused(run, "--step=25", "--start=30")
    assert "--start=30 must be a checkpoint before step 25: there are 10, 20, or take 0" in said


def test_the_newest_checkpoint_before_the_step(run):
    records = read_records(run)
    assert [records.find_start(step, None) for step in (11, 20, 21, 45)] == [10, 10, 20, 30]
    assert [records.find_start(25, wanted) for wanted in (0, 10, 20)] == [0, 10, 20]


def test_another_number_of_processes(run):
    said = refused(run, "--step=25")
    assert "step 25 was made by 2 ranks = dp_shard 2, gloo on cpu, and this is 1" in said
    assert f"`torchrun --nproc_per_node=2 -m scripts.replay_step {run} --step 25`" in said


def test_a_file_that_cannot_be_written(run, tmp_path):
    for name in ("batch.pt", "none/batch.safetensors"):
        assert "must be a file FILE.safetensors" in refused(run, "--step=25", f"--save={tmp_path / name}")


def test_a_setting_that_does_not_fit(run):
    assert "data.shuffle_windo" in refused(run, "--step=25", "--other-layout", "--data.shuffle_windo=3")


@pytest.mark.parametrize(("step", "rate"), [(11, 1e-3), (20, 1e-3), (21, 2e-3), (30, 2e-3), (31, 3e-3)])
def test_the_settings_that_the_step_was_made_with(run, step, rate):
    """Who has saved the next checkpoint has made it; the steps after the last one were made by the latest start."""
    records = read_records(run)
    config = find_config(records, step, records.find_start(step, None), 2, False, [])
    assert config.optimizer.lr == rate
    section = config.checkpoint
    assert section.initial_load_path == str(records.steps[records.find_start(step, None)])
    assert not section.saves and not section.initial_load_model_only


def test_samples_that_are_held_out_stay_so(run):
    records = read_records(run)
    assert find_config(records, 35, 30, 2, False, []).validation.enable
    elsewhere = replace(records.config, validation=replace(records.config.validation, dataset="shapes"))
    assert not find_config(replace(records, config=elsewhere), 35, 30, 2, False, []).validation.enable


def test_what_writes_is_off(run):
    options = ["--metrics.enable_tensorboard", "--metrics.enable_mllog", "--checkpoint.enable"]
    save_config(load_config([*TINY, *options], quiet=True), run / "config.toml")
    config = find_config(read_records(run), 35, 30, 2, False, [])
    metrics = config.metrics
    assert not (config.checkpoint.saves or metrics.enable_tensorboard or metrics.enable_mllog or metrics.enable_wandb)


def test_a_part_that_the_run_has_started_anew_once(run):
    options = ["--checkpoint.exclude_from_loading=optimizer"]
    save_config(load_config([*TINY, *options], quiet=True), run / "config.toml")
    assert find_config(read_records(run), 35, 30, 2, False, []).checkpoint.exclude_from_loading == ["optimizer"]
    path = run / "checkpoint" / "step-30" / TRAIN_STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started_anew": ["optimizer"]}))
    assert find_config(read_records(run), 35, 30, 2, False, []).checkpoint.exclude_from_loading == []


@pytest.mark.parametrize(("world", "local"), [(1, 6), (2, 6), (3, 4), (4, 3), (12, 1)])
def test_other_processes_share_the_same_updates(world, local):
    config = load_config([*TINY, "--training.local_batch_size=7"], quiet=True)
    shared = share_out(config, 12, world)
    assert shared.training.local_batch_size == local
    assert shared.training.update_size(world) == 12 and shared.parallelism.data_parallel_shard_degree == world


@pytest.mark.parametrize(("size", "use"), [(12, "1, 2, 3, 4, 6, 12"), (None, "as many processes as the run had")])
def test_processes_that_cannot_share_an_update(size, use):
    with pytest.raises(ValueError, match=f"5 processes cannot share an update of the run: use {use}"):
        share_out(load_config(TINY, quiet=True), size, 5)
