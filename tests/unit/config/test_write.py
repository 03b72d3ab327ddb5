"""A configuration that is written down gives the same configuration when it is read."""

import tempfile
import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.job_config import JobConfig
from config.keys import KEYS, Key
from config.parse import load_config, parse
from config.write import format_config, save_config

ALL_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12)


# What must divide something.
DIVIDING = {
    "training.global_batch_size",
    "parallelism.context_parallel_degree",
    "parallelism.tensor_parallel_degree",
}
NEEDING_OTHERS = {"checkpoint.folder", "checkpoint.create_seed_checkpoint", "checkpoint.initial_load_in_hf"}
NEEDING_OTHERS |= {"compile.cuda_graph", "reliability.stop_after_minutes"}


def values_of(key: Key) -> st.SearchStrategy:
    """Values of a key that no rule between keys forbids."""
    if key.name in ("training.img_size", "inference.img_size"):
        values = st.integers(1, 64).map(lambda tokens: 16 * tokens)
    elif key.name == "training.local_batch_size":
        values = st.integers(1, 9).map(lambda samples: 32 * samples)  # tokens that 8-bit converters can take
    elif key.name in DIVIDING | NEEDING_OTHERS:
        values = st.just(key.default)
    elif key.name == "activation_checkpoint.mode":
        values = st.sampled_from(["none", "selective", "full"])
    elif key.name == "activation_checkpoint.selective_ac_option":
        values = st.sampled_from(["op", "1", "7"])
    elif key.name.endswith(
        (
            ".enable_fsdp_float8_all_gather",
            ".precompute_float8_dynamic_scale_for_fsdp",
            "activation_checkpoint.cpu_offload",
        )
    ):
        values = st.just(False)
    elif key.name == "training.mixed_precision_param":
        values = st.just("bfloat16")
    elif key.name == "debug.seed":
        values = st.integers(0, 2**63 - 1)
    elif key.name.endswith(".num_workers"):
        values = st.integers(1, 9)
    elif key.name == "profiling.profile_freq":
        values = st.integers(1024, 4096)  # warm-up and trace are shorter
    elif key.name.endswith("_folder") and key.name.startswith(("metrics.", "validation.", "profiling.")):
        values = st.text("aé .", min_size=1, max_size=12).filter(lambda text: text.strip(" ."))  # plain names
    elif key.name.endswith(".dataset_path"):
        return ALL_TEXT
    elif key.name.endswith(".dataset"):
        # Neither what needs data.sources nor what needs encoder.mask_padding=false.
        values = st.sampled_from([choice for choice in key.choices if choice not in ("mixture", "mlperf")])
    elif key.name in ("data.sources", "data.buckets.enable", "data.buckets.step"):
        values = st.just(key.default)
    elif key.name.endswith("max_aspect"):
        values = st.floats(1, 9)
    elif key.kind is list and key.item is int:
        values = st.lists(st.integers(1, 512), max_size=3)
    elif key.kind is list:
        values = st.lists(st.sampled_from(key.choices) if key.choices else ALL_TEXT, max_size=1 if key.choices else 3)
    elif key.choices:
        values = st.sampled_from(key.choices)
    elif key.kind is bool:
        values = st.booleans()
    elif key.kind is str:
        values = ALL_TEXT
    elif key.kind is int:
        values = st.integers(16, 512)  # inside every range
    else:
        values = st.floats(0, 1, exclude_min=True, exclude_max=True)
    return st.none() | values if key.optional else values


@st.composite
def configs(draw):
    def fill(section, prefix):
        return replace(
            section,
            **{
                field.name: fill(value, f"{prefix}{field.name}.")
                if is_dataclass(value := getattr(section, field.name))
                else draw(values_of(KEYS[prefix + field.name]))
                for field in fields(section)
            },
        )

    return fill(JobConfig(), "")


@given(configs())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_round_trip(config):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        save_config(config, file)
        assert parse(["--job.config_file", str(file)])[0] == config


def test_lists_and_nested_tables_come_back(tmp_path):
    config = load_config(
        [
            "--model.converters=quantize.linear.float8",
            "--compile.components=loss",
            '--quantize.linear.float8.filter_fqns=a.b,"c,\\d#',
            "--quantize.linear.float8.enable_fsdp_float8_all_gather",
            "--quantize.linear.mx.recipe_name=mxfp8_emulated",
            "--parallelism.tensor_parallel_degree=1",
        ]
    )
    assert config.quantize.linear.float8.filter_fqns == ["a.b", '"c', "\\d#"]
    save_config(config, tmp_path / "config.toml")
    assert load_config(["--job.config_file", str(tmp_path / "config.toml")]) == config
    tables = tomllib.loads((tmp_path / "config.toml").read_text())
    assert tables["quantize"]["linear"]["float8"]["filter_fqns"] == ["a.b", '"c', "\\d#"]
    assert tables["compile"]["components"] == ["loss"] and tables["quantize"]["linear"]["mx"]["filter_fqns"] == []


def test_equality_sees_every_key_but_the_file_it_came_from():
    base = JobConfig()
    assert replace(base, job=replace(base.job, config_file="x.toml")) == base
    assert replace(base, job=replace(base.job, dump_folder="x")) != base


def test_the_written_file_shows_every_key_with_its_meaning():
    text = format_config(replace(JobConfig(), debug=replace(JobConfig().debug, seed=5)))
    assert "seed = 5  # seed of the weights" in text
    assert "\n# total_steps =" in text, "not set: commented out, so that it can be filled in"
    for name, key in KEYS.items():
        if name != "job.config_file":
            assert f"{name.partition('.')[2]} =" in text
            assert key.help in text


def test_where_it_came_from_is_noted_but_not_followed(tmp_path):
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text("[training]\nsteps = 300\n")
    config = load_config(["--job.config_file", str(first), "--optimizer.lr", "1e-5"])
    save_config(config, second)
    first.unlink()
    again = load_config(["--job.config_file", str(second)])
    assert again == config
    assert again.optimizer.lr == 1e-5
    assert f'# started from: "{first}"' in second.read_text()


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-8, 5e-324, 1.7976931348623157e308, 1e22])
def test_floats_keep_every_bit(tmp_path, value):
    file = tmp_path / "config.toml"
    config = replace(JobConfig(), optimizer=replace(JobConfig().optimizer, lr=value))
    save_config(config, file)
    assert load_config(["--job.config_file", str(file)]).optimizer.lr == value


def test_secrets_of_urls_are_blacked_out_and_the_rest_comes_back(tmp_path):
    path = """https://reader:p4ss"@host/a.tar?sig=5ign\\"x"""
    config, _ = parse([f"--training.dataset_path={path}", "--training.dataset=webdataset"])
    save_config(config, tmp_path / "config.toml")
    text = (tmp_path / "config.toml").read_text()
    assert "p4ss" not in text and "5ign" not in text
    again, _ = parse(["--job.config_file", str(tmp_path / "config.toml")])
    assert "********" in again.training.dataset_path
    assert replace(again, training=replace(again.training, dataset_path=path)) == config
