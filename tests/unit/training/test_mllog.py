"""Log lines that MLPerf's checkers accept. What they ask for is restated here."""

import io
import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from training.config import LRScheduler, Optimizer
from training.mllog import ROOT, MLLogger, MLPerfLog, MLPerfRun, Submission, describe_run, read_submission

RUN = MLPerfRun(
    submission=Submission("nobody", "a laptop"),
    config_file="train_configs/flux_schnell_mlperf.toml",
    seed=7,
    local_batch_size=32,
    global_batch_size=512,
    accumulation=2,
    max_norm=1.0,
    train_samples=1_099_776,
    eval_samples=29_696,
    eval_steps=512,
    target_loss=0.586,
    linear_precision="bfloat16",
    attention_precision="bfloat16",
    communication_precision="float32",
    tensor_parallel=2,
    context_parallel=4,
)
OPTIMIZER = Optimizer(lr=2e-4)
SCHEDULE = LRScheduler(warmup_steps=1600)
ONCE = {
    # Of all benchmarks.
    *("submission_org", "submission_platform", "submission_division", "submission_benchmark"),
    *("init_stop", "run_start", "run_stop", "train_samples", "eval_samples", "gradient_accumulation_steps"),
    *("config_filename", "micro_batch_size"),
    *(f"lowest_numerical_precision_in_{part}" for part in ("linear", "attn", "comm")),
    *(f"{kind}_parallelism" for kind in ("tensor", "pipeline", "context", "expert")),
    # Of FLUX.1.
    *("evaluation_frequency", "opt_name", "opt_base_learning_rate", "opt_learning_rate_warmup_steps"),
    *(f"opt_adamw_{name}" for name in ("beta_1", "beta_2", "epsilon", "weight_decay")),
    "opt_gradient_clip_norm",
}
AT_LEAST_ONCE = {
    *("cache_clear", "init_start", "global_batch_size"),
    *("block_start", "block_stop", "eval_start", "eval_stop", "eval_accuracy"),
}
TYPES = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}


def parse(text: str) -> list[dict]:
    found = []
    for line in text.splitlines():
        assert line.startswith(":::MLLOG "), line
        found.append(json.loads(line.removeprefix(":::MLLOG ")))
    return found


def write_run(target, losses: list[float]) -> None:
    log = MLPerfLog(target, RUN, OPTIMIZER, SCHEDULE, started_ms=1_000)
    log.start_run()
    for number, loss in enumerate(losses, 1):
        step = number * RUN.eval_steps
        log.log(step, {"loss": 2 * loss, "lr": 1e-4, "samples_per_s": 30.0})
        log.start_validation(step)
        log.log(step, {"validation_loss": loss})
    log.close()


def read_run(tmp_path, losses: list[float]) -> list[dict]:
    path = tmp_path / "mllog.txt"
    write_run(path, losses)
    return parse(path.read_text())


def test_a_log_has_every_required_line(tmp_path):
    lines = read_run(tmp_path, [0.7, 0.6, 0.585])
    counts = Counter(line["key"] for line in lines)
    assert {key for key in ONCE if counts[key] != 1} == set()
    assert {key for key in AT_LEAST_ONCE if not counts[key]} == set()
    assert list(lines[0]) == ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
    for line in lines:
        kind = line["key"].rpartition("_")[2]
        assert line["event_type"] == TYPES.get(kind, "POINT_IN_TIME"), line


def test_the_values_are_those_that_closed_submissions_must_have(tmp_path):
    values = {line["key"]: line["value"] for line in read_run(tmp_path, [0.585])}
    assert {key: value for key, value in values.items() if key.startswith(("opt_", "submission_", "lowest_"))} == {
        "submission_benchmark": "flux1",
        "submission_org": "nobody",
        "submission_division": "closed",
        "submission_status": "onprem",
        "submission_platform": "a laptop",
        "opt_name": "adamw",
        "opt_base_learning_rate": 2e-4,
        "opt_learning_rate_warmup_steps": 1600,
        "opt_adamw_beta_1": 0.9,
        "opt_adamw_beta_2": 0.95,
        "opt_adamw_epsilon": 1e-8,
        "opt_adamw_weight_decay": 0.1,
        "opt_gradient_clip_norm": 1.0,
        "lowest_numerical_precision_in_linear": "bfloat16",
        "lowest_numerical_precision_in_attn": "bfloat16",
        "lowest_numerical_precision_in_comm": "fp32",
    }
    assert (values["train_samples"], values["eval_samples"]) == (1_099_776, 29_696)
    assert values["evaluation_frequency"] == 262_144
    assert (values["tensor_parallelism"], values["context_parallelism"]) == (2, 4)
    assert (values["config_filename"], values["micro_batch_size"]) == ("train_configs/flux_schnell_mlperf.toml", 32)
    assert (values["gradient_accumulation_steps"], values["seed"], values["target_accuracy"]) == (2, 7, 0.586)
    assert values["cache_clear"] is False, "nothing here clears caches"


def test_lines_stand_in_the_order_of_the_run(tmp_path):
    lines = read_run(tmp_path, [0.7, 0.585])
    facts = len(describe_run(RUN, OPTIMIZER, SCHEDULE))
    keys = [line["key"] for line in lines]
    assert keys[:2] == ["cache_clear", "init_start"]
    assert keys.index("global_batch_size") < keys.index("evaluation_frequency"), (
        "the checker needs the one for the other"
    )
    block = ["block_start", "tracked_stats", "block_stop", "eval_start", "eval_accuracy", "eval_stop"]
    assert keys[2 + facts :] == ["init_stop", "run_start", *block, *block, "run_stop"]
    assert [line["time_ms"] for line in lines[:2]] == [1_000, 1_000], "the start of the program, not of the log"
    times = [line["time_ms"] for line in lines]
    assert times == sorted(times)
    assert times[2] > 1_600_000_000_000, "milliseconds since 1970"


def test_intervals_say_how_many_samples_were_seen(tmp_path):
    lines = read_run(tmp_path, [0.7, 0.585])
    seen = [(line["key"], line["metadata"].get("samples_count")) for line in lines if "block" in line["key"]]
    assert seen == [("block_start", 0), ("block_stop", 262_144), ("block_start", 262_144), ("block_stop", 524_288)]
    for line in lines:
        if line["key"].startswith(("eval_st", "eval_acc", "tracked")):
            assert line["metadata"]["samples_count"] == 512 * line["metadata"]["step"] > 0
    assert [line["value"] for line in lines if line["key"] == "eval_accuracy"] == [0.7, 0.585]


@pytest.mark.parametrize(
    ("losses", "status"),
    [([0.7, 0.586], "success"), ([0.7, 0.5861], "aborted"), ([float("nan")], "aborted"), ([], "aborted")],
)
def test_success_is_a_validation_loss_no_higher_than_the_target(tmp_path, losses, status):
    last = read_run(tmp_path, losses)[-1]
    assert last["key"] == "run_stop"
    assert last["metadata"]["status"] == status


def test_without_a_target_no_run_succeeds(tmp_path):
    path = tmp_path / "mllog.txt"
    log = MLPerfLog(path, replace(RUN, target_loss=None), OPTIMIZER, SCHEDULE)
    log.start_run()
    log.start_validation(1)
    log.log(1, {"validation_loss": 0.0})
    log.close()
    assert parse(path.read_text())[-1]["metadata"]["status"] == "aborted"


def test_time_stops_when_the_target_is_reached_not_when_all_is_saved():
    stream = io.StringIO()
    log = MLPerfLog(stream, RUN, OPTIMIZER, SCHEDULE)
    log.start_run(step=512)
    log.start_validation(1024)
    log.log(1024, {"validation_loss": 0.5})
    assert parse(stream.getvalue())[-1]["key"] == "run_stop"


def test_figures_that_mlperf_does_not_know_have_no_line():
    stream = io.StringIO()
    log = MLPerfLog(stream, RUN, OPTIMIZER, SCHEDULE)
    before = stream.getvalue()
    log.log(3, {"bad_samples/damaged": 2, "samples_to_target_loss": 9})
    assert stream.getvalue() == before


def test_a_line_names_the_place_that_wrote_it():
    stream = io.StringIO()
    log = MLLogger(stream)
    log.event("answer", 42, kind="test")
    (line,) = parse(stream.getvalue())
    file, number = line["metadata"]["file"], line["metadata"]["lineno"]
    assert file == "tests/unit/training/test_mllog.py"
    assert 'log.event("answer", 42' in (ROOT / file).read_text().splitlines()[number - 1]
    assert line["metadata"]["kind"] == "test"


def test_lines_are_added_to_a_file_at_once(tmp_path):
    path = tmp_path / "mllog.txt"
    path.write_text("before\n")
    log = MLLogger(path)
    log.start("epoch_start")
    assert re.fullmatch(r'before\n:::MLLOG \{"namespace": "", .*"INTERVAL_START", .*\}\n', path.read_text())
    log.close()


def test_who_submits_is_read_from_the_environment():
    assert read_submission({}, "2x CPU") == Submission("none", "2x CPU")
    given = {"MLPERF_SUBMISSION_ORG": "us", "MLPERF_SUBMISSION_PLATFORM": "ours"}
    assert read_submission(given, "2x CPU") == Submission("us", "ours")
