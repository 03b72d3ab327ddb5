"""Every TOML of the repository."""

from pathlib import Path

import pytest

from config.keys import KEYS
from config.parse import parse
from tests.unit.config.torchtitan_files import TORCHTITAN_FILES, lookup

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = sorted((REPOSITORY / "train_configs").glob("*.toml"))


def test_there_are_files():
    assert {file.stem for file in FILES} >= {"flux_tiny", "flux_debug", "flux_schnell", "flux_dev"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_loads_without_warnings(file):
    _, warnings = parse(["--job.config_file", str(file)])
    assert warnings == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_header_says_the_command_the_hardware_and_what_to_expect(file):
    header = file.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "./run_train.sh" in header
    assert "# Hardware" in header and "# Expect" in header
    if file.stem != "flux_tiny":  # the default of run_train.sh
        assert f"CONFIG_FILE=train_configs/{file.name} ./run_train.sh" in header


@pytest.mark.parametrize("name", ["debug", "dev", "schnell"])
def test_hyper_parameters_are_torchtitans(name):
    config, _ = parse(["--job.config_file", str(REPOSITORY / "train_configs" / f"flux_{name}.toml")])
    ours = ("training.dataset", "encoder.max_t5_encoding_len")
    for key, value in TORCHTITAN_FILES[name].items():
        if key in KEYS and key.startswith(("model.", "optimizer.", "lr_scheduler.", "training.")) and key not in ours:
            assert lookup(config, key) == value, key
    assert config.encoder.max_t5_encoding_len == TORCHTITAN_FILES[name]["encoder.max_t5_encoding_len"]
