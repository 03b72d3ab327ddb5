"""Generated over every key: misspelled, of the wrong kind, out of range."""

import json
import math
import re
from dataclasses import asdict

import pytest

from config.keys import ACCEPTED, KEYS, Interval, find_key
from config.parse import ConfigError, parse
from config.write import save_config
from flux.config import DataSource

NAMED = [name for name in KEYS | ACCEPTED if not name.endswith("*")]
CHOOSING = [name for name, key in (KEYS | ACCEPTED).items() if key.choices]
WRONG = {
    bool: ["yes", 1, 0.5],
    int: ["4", 1.5, True, [1]],
    float: ["0.5", True],
    str: [5, True, ["a"]],
    list: ["a", 5],
}


def error_of(tmp_path, name, value) -> str:
    """The one error that a file with this key alone gives."""
    section, _, key = name.rpartition(".")
    file = tmp_path / "run.toml"
    file.write_text(f"# the key stands on line 4\n\n[{section}]\n{key} = {json.dumps(value)}\n")
    with pytest.raises(ConfigError) as caught:
        parse(["--job.config_file", str(file)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{file}:4: ")
    return lines[0]


@pytest.mark.parametrize("name", KEYS)
def test_key_is_described(name):
    key = KEYS[name]
    assert key.help
    if key.kind in (int, float):
        assert key.interval is not None, "numbers have a range"
    assert key.checked(key.default) == key.default
    assert key.optional == (key.default is None), "save_config comments out what is None"


@pytest.mark.parametrize("name", NAMED)
def test_misspelled_key_suggests_the_right_one(tmp_path, name):
    letters = name.rpartition(".")[2]
    swapped = letters[1] + letters[0] + letters[2:]
    for wrong in {letters + letters[-1], swapped, letters.replace("_", "-")} - {letters}:
        misspelled = name.removesuffix(letters) + wrong
        error = error_of(tmp_path, misspelled, 1)
        assert f"key '{misspelled}' is unknown - did you mean '{name}'?" in error


@pytest.mark.parametrize("name", NAMED)
def test_wrong_kind_is_refused(tmp_path, name):
    for value in WRONG.get(find_key(name).kind, []):
        error = error_of(tmp_path, name, value)
        assert f"{name}={json.dumps(value)} must be " in error


@pytest.mark.parametrize("name", CHOOSING)
def test_unknown_choice_lists_the_known_ones(tmp_path, name):
    key = find_key(name)
    if key.kind is list:
        error = error_of(tmp_path, name, [key.choices[0], "nonsense"])
        assert f'"nonsense" in {name} is not a known choice' in error
    else:
        error = error_of(tmp_path, name, "nonsense")
        assert f'{name}="nonsense" is not a known choice' in error
    assert all(choice in error for choice in key.choices)


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.kind is list and key.item is str])
def test_lists_hold_texts_only(tmp_path, name):
    key = KEYS[name]
    for value in ([1], [["a"]], ["a", True]):
        assert f"{name}={json.dumps(value)} must be a list of texts" in error_of(tmp_path, name, value)
    good = list(key.choices) or ["a", "b, c"]
    assert key.checked(good) == good and key.checked([]) == []


def test_lists_of_whole_numbers(tmp_path):
    name = "data.buckets.img_sizes"
    for value in (["a"], [1.5], [True]):
        assert f"{name}={json.dumps(value)} must be a list of whole numbers" in error_of(tmp_path, name, value)
    assert f"{name}=[256, 0] is out of range: it must be at least 1" in error_of(tmp_path, name, [256, 0])
    assert parse([f"--{name}=256, 512"])[0].data.buckets.img_sizes == [256, 512]


SOURCES = """
[training]
dataset = "mixture"
[[data.sources]]
dataset = "shapes"
weight = 3
[[data.sources]]
dataset = "imagefolder"
dataset_path = "photos"
random_crop = false
"""


def test_a_list_of_tables_becomes_a_list_of_sections(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(SOURCES)
    config = parse(["--job.config_file", str(file)])[0]
    assert config.data.sources == [
        DataSource("shapes", weight=3.0),
        DataSource("imagefolder", "photos", random_crop=False),
    ]
    save_config(config, tmp_path / "again.toml")
    assert parse(["--job.config_file", str(tmp_path / "again.toml")])[0] == config
    assert KEYS["data.sources"].checked(asdict(config)["data"]["sources"]) == config.data.sources


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("wieght = 1", "key 'data.sources[2].wieght' is unknown - did you mean 'weight'?"),
        ('weight = "1"', 'data.sources[2].weight="1" must be a number such as 0.5: remove the quotes'),
        ("weight = -1", "data.sources[2].weight=-1 is out of range: it must be at least 0"),
        (
            'dataset = "webdatset"',
            'data.sources[2].dataset="webdatset" is not a known choice - did you mean "webdataset"',
        ),
    ],
)
def test_faults_in_a_table_are_named(tmp_path, line, error):
    file = tmp_path / "run.toml"
    file.write_text(f"{SOURCES}[[data.sources]]\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        parse(["--job.config_file", str(file)])
    assert error in str(caught.value) and str(caught.value).startswith(f"{file}:4: ")


def test_tables_are_for_files():
    with pytest.raises(ConfigError, match=r"data.sources=.* must be a list of tables: write \[\[data.sources\]\]"):
        parse(["--data.sources=shapes"])
    with pytest.raises(ValueError, match=r"data.sources\[0\]=1 must be a table: write \[\[data.sources\]\]"):
        KEYS["data.sources"].checked([1])


@pytest.mark.parametrize(
    ("text", "value"),
    [("model", ["model"]), ("model,loss", ["model", "loss"]), ("loss, model,", ["loss", "model"]), ("", [])],
)
def test_lists_on_the_command_line(text, value):
    assert parse([f"--compile.components={text}"])[0].compile.components == value
    assert parse(["--compile.components", text])[0].compile.components == value


def bounds(notation: str) -> tuple[float | None, float, bool, float, bool]:
    """(extra value, low, low allowed, high, high allowed) of `-1 or [1, inf)`, read apart from the product's parser."""
    match = re.fullmatch(r"(?:(\S+) or )?([\[(])(\S+), (\S+)([\])])", notation)
    assert match, notation
    return float(match[1]) if match[1] else None, float(match[3]), match[2] == "[", float(match[4]), match[5] == "]"


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.kind in (int, float)])
def test_range_ends_where_it_says(tmp_path, name):
    key = KEYS[name]
    extra, low, low_allowed, high, high_allowed = bounds(key.interval.notation)
    inside, outside = [] if extra is None else [extra], []
    for bound, allowed, away in ((low, low_allowed, -1), (high, high_allowed, 1)):
        if math.isinf(bound):
            continue
        beyond = bound + away if key.kind is int else math.nextafter(bound, away * math.inf)
        beyond += away if beyond == extra else 0
        (inside if allowed else outside).append(bound)
        outside.append(beyond)
    assert outside, "some number must be out of range"
    # The largest seed is not a float.
    inside, outside = ([value for value in values if abs(value) < 2**53] for values in (inside, outside))
    for value in inside:
        assert key.checked(key.kind(value)) == value
    for value in outside:
        error = error_of(tmp_path, name, key.kind(value))
        assert f"{name}={key.kind(value)} is out of range: it must be {key.rule}" in error


@pytest.mark.parametrize("name", [name for name, key in (KEYS | ACCEPTED).items() if key.kind is float])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_are_finite(name, value):
    with pytest.raises(ConfigError, match="is not finite"):
        parse([f"--{name}={value}"])


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.kind is str and key.interval])
def test_names_and_paths_are_not_empty(tmp_path, name):
    assert "must not be empty" in error_of(tmp_path, name, "")


@pytest.mark.parametrize("name", [name for name, key in (KEYS | ACCEPTED).items() if key.kind is int])
def test_whole_numbers_fit_in_64_bits(name):
    with pytest.raises(ConfigError, match="does not fit in 64 bits"):
        parse([f"--{name}={2**63}"])


@pytest.mark.parametrize(
    ("notation", "inside", "outside", "words"),
    [
        ("[1, inf)", [1, 10**9], [0, -1], "at least 1"),
        ("(0, inf)", [1e-300], [0, -1], "greater than 0"),
        ("[0, 1)", [0, 0.999], [1, -0.001], "at least 0 and less than 1"),
        ("[0, 1]", [0, 1], [1.001], "at least 0 and at most 1"),
        ("-1 or [1, inf)", [-1, 1], [0, -2], "-1, or at least 1"),
    ],
)
def test_interval(notation, inside, outside, words):
    interval = Interval(notation)
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in outside)
    assert str(interval) == words


def test_an_int_serves_as_a_float():
    config, _ = parse(["--optimizer.lr", "1", "--training.max_norm=2"])
    assert type(config.optimizer.lr) is float and config.optimizer.lr == 1
    assert type(config.training.max_norm) is float


def test_not_set_can_be_said_on_the_command_line(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[debug]\nseed = 3\n[training]\ntimestep_shift = 'resolution'\n")
    config, _ = parse(["--job.config_file", str(file), "--debug.seed", "none", "--training.timestep_shift", "none"])
    assert config.debug.seed is None
    assert config.training.timestep_shift == "none"
