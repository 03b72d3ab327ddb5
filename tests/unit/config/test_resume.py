"""What a run that goes on makes of the configuration that its checkpoint was saved with."""

import json
from dataclasses import asdict, replace

import pytest

from config.job_config import JobConfig
from config.parse import parse
from config.resume import find_changes, find_version_changes, restore_config, settle_seed
from redact import redact_values

COMMAND = [
    "--training.img_size=64",
    "--model.flavor=flux-debug",
    "--optimizer.lr=1e-5",
    "--ema.enable",
    "--debug.seed=7",
]


def test_a_saved_configuration_comes_back():
    config, _ = parse([*COMMAND, "--checkpoint.exclude_from_loading=optimizer,ema"])
    assert restore_config(json.loads(json.dumps(asdict(config))), "step-1") == config != JobConfig()


def test_keys_that_were_not_there_yet_get_their_default():
    saved = asdict(JobConfig())
    del saved["ema"], saved["training"]["dataloader"]
    assert restore_config(saved, "step-1") == JobConfig()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"training": {"image_size": 64}}, "step-1 was saved with the unknown key training.image_size"),
        ({"training": {"steps": "many"}}, "training.steps=.*must be a whole number"),
        ({"training": {"steps": 0}}, "training.steps=0 is out of range"),
        ({"training": 3}, "unknown key training"),
        ([1], "unknown key config"),
    ],
)
def test_what_no_run_has_saved(saved, message):
    with pytest.raises(ValueError, match=message):
        restore_config(saved, "step-1")


def with_seed(seed: int | None) -> JobConfig:
    return replace(JobConfig(), debug=replace(JobConfig().debug, seed=seed))


@pytest.mark.parametrize(
    ("own", "saved", "settled"), [(None, None, 99), (5, None, 5), (None, 7, 7), (7, 7, 7), (0, None, 0), (None, 0, 0)]
)
def test_the_seed_is_the_checkpoints_else_the_own_else_drawn(own, saved, settled):
    draws = []

    def draw() -> int:
        draws.append(1)
        return 99

    assert settle_seed(with_seed(own), saved, draw) == with_seed(settled)
    assert len(draws) == (settled == 99)  # all ranks must agree, so nobody draws without need


@pytest.mark.parametrize(("own", "saved"), [(5, 7), (0, 7), (7, 0)])
def test_another_seed_than_the_checkpoints_is_refused(own, saved):
    with pytest.raises(ValueError, match=f"debug.seed={own} is not the seed of the checkpoint: .* debug.seed={saved}$"):
        settle_seed(with_seed(own), saved, lambda: 99)


def changes(*arguments: str, before: tuple[str, ...] = ()) -> list[str]:
    """From one command to another, by way of the JSON in a checkpoint."""
    saved = json.loads(json.dumps({"config": asdict(parse(list(before))[0]), "update_size": 8}))
    return find_changes(saved, parse(list(arguments))[0], update_size=8)


def test_the_same_configuration_has_no_changes():
    assert changes() == changes(*COMMAND, before=tuple(COMMAND)) == []


@pytest.mark.parametrize(
    "argument",
    [
        "--optimizer.lr=0.5",
        "--lr_scheduler.warmup_steps=3",
        "--training.global_batch_size=64",
        "--training.img_size=64",
        "--training.steps=7",
        "--training.mixed_precision_param=float32",
        "--training.guidance=1.5",
        "--training.dtype=bfloat16",
        "--optimizer.state_dtype=8bit",
        "--optimizer.bf16_rounding=stochastic",
        "--ema.enable",
        "--encoder.max_t5_encoding_len=64",
        "--model.flavor=flux-debug",
    ],
)
def test_what_means_other_numbers_is_a_change(argument):
    (text,) = changes(argument)
    name = argument.removeprefix("--").partition("=")[0]
    assert text.startswith(f"{name} ") and " -> " in text
    assert len(changes(before=(argument,))) == 1  # also the other way round


@pytest.mark.parametrize(
    "argument",
    [
        "--job.dump_folder=elsewhere",
        "--training.local_batch_size=2",
        "--optimizer.implementation=foreach",
        "--parallelism.tensor_parallel_degree=2",
        "--metrics.log_freq=3",
        "--checkpoint.interval=7",
        "--compile.enable",
        "--debug.seed=7",
    ],
)
def test_what_computes_the_same_numbers_in_another_way_is_none(argument):
    assert changes(argument) == []


def test_keys_that_one_of_them_does_not_know_are_no_change():
    saved = asdict(JobConfig())
    del saved["ema"]
    saved["optimizer"]["gone"] = 1
    assert find_changes({"config": saved}, JobConfig(), update_size=8) == []


def test_more_processes_that_make_a_larger_update_are_told():
    """training.global_batch_size=-1 makes the update as large as there are processes."""
    assert find_changes({"update_size": 8}, parse([])[0], update_size=16) == [
        "samples per update 8 -> 16 (training.global_batch_size keeps them)"
    ]
    assert find_changes({}, parse([])[0], update_size=16) == []  # only the weights of another run


def test_another_signature_is_no_other_data():
    """A checkpoint keeps no secret, and one that did tells none."""
    urls = [
        f"https://{login}@host/{file}.tar?sig={login}" for login, file in (("a:b", "x"), ("c:d", "x"), ("c:d", "y"))
    ]
    was, signed_again, other = (
        parse(["--training.dataset=webdataset", f"--training.dataset_path={url}"])[0] for url in urls
    )
    for saved in (asdict(was), redact_values(asdict(was))):
        assert find_changes({"config": saved}, signed_again, update_size=8) == []
        (text,) = find_changes({"config": saved}, other, update_size=8)
        assert "a:b" not in text and "c:d" not in text and "********@host/x.tar" in text


def test_other_versions_than_then():
    saved = {"versions": {"torch": "2.12.0", "numpy": "2.4.6", "driver": "580"}}
    now = {"torch": "2.13.0", "numpy": "2.4.6", "pillow": "13.0.0"}
    assert find_version_changes(saved, now) == ["torch 2.12.0 -> 2.13.0"]
    assert find_version_changes({}, now) == []  # only the weights of another run
