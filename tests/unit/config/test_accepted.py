"""torchtitan's keys are accepted, and what has no effect is said once per kind."""

import pytest

from config.accepted import NO_EFFECT_YET, NOT_USED_HERE
from config.keys import KEYS
from config.parse import ConfigError, parse
from tests.unit.config.torchtitan_files import TORCHTITAN_FILES, lookup, make_toml


@pytest.mark.parametrize("name", TORCHTITAN_FILES)
def test_torchtitans_file_loads_unchanged(tmp_path, name):
    file = tmp_path / f"flux_{name}.toml"
    file.write_text(make_toml(TORCHTITAN_FILES[name]))
    config, warnings = parse(["--job.config_file", str(file)])
    for key, value in TORCHTITAN_FILES[name].items():
        if key in KEYS:
            assert lookup(config, key) == value, key

    (warning,) = warnings
    assert "not used here" in warning, "all others have an effect"
    named = warning.partition(":")[2].replace(",", " ").split()
    assert named == [key for key in TORCHTITAN_FILES[name] if key in NOT_USED_HERE], "in the file's order"


def test_a_key_has_an_effect_or_a_reason_for_none():
    assert not NO_EFFECT_YET.keys() & NOT_USED_HERE.keys()
    assert not (NO_EFFECT_YET | NOT_USED_HERE).keys() & KEYS.keys()


def test_values_without_effect_are_checked_all_the_same():
    with pytest.raises(ConfigError, match=r"training.gc_freq=\"often\" must be a whole number"):
        parse(["--training.gc_freq", "often"])
    with pytest.raises(ConfigError, match=r"parallelism.context_parallel_rotate_method=\"some\" is not a known choice"):
        parse(["--parallelism.context_parallel_rotate_method", "some"])


def test_wildcards_take_any_key_and_value(tmp_path):
    file = tmp_path / "quantize.toml"
    file.write_text('[quantize.grouped_mm]\nfqns = ["a"]\nemulate = true\n[quantize.grouped_mm.mx]\nany = {b = 1}\n')
    _, warnings = parse(["--job.config_file", str(file)])
    assert len(warnings) == 1
    for name in ("fqns", "emulate", "mx"):
        assert f"quantize.grouped_mm.{name}" in warnings[0]


def test_a_wildcard_covers_no_key_beside_it():
    with pytest.raises(ConfigError, match=r"key 'quantize.linear.grouped_mm' is unknown"):
        parse(["--quantize.linear.grouped_mm", "1"])


def test_bare_booleans_and_lists_without_effect():
    name = "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns"
    _, warnings = parse(["--training.gc_debug", f"--{name}", "a,b", "--training.gc_debug", "false"])
    assert warnings == ["these keys have no effect yet: training.gc_debug", f"these keys are not used here: {name}"]
