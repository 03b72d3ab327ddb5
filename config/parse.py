"""TOML file + command line -> JobConfig, with every error of both at once."""

import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from config.accepted import NO_EFFECT_YET
from config.checks import find_doubts, find_faults
from config.help import help_text
from config.job_config import JobConfig
from config.keys import ACCEPTED, KEYS, TABLES, find_key
from config.sources import DEFAULTS, Entry, Fault, Place, read_command_line, read_file
from redact import has_token, redact


class ConfigError(ValueError):
    """Everything that is wrong with a configuration; its text is the complete list, one error per line."""


def load_config(argv: list[str], world_size: int | None = None, quiet: bool = False) -> JobConfig:
    """The configuration that a command line asks for; warnings go to stderr.

    Args:
        argv: `--section.key value`, `--section.key=value` or `--section.key` for true; among them
            `--job.config_file FILE`. The command line wins over the file, a later option over an earlier one.
            `--help` prints every key and exits with 0.
        world_size: number of processes that train; None: not known here, and what depends on it is not checked.
        quiet: keep the warnings back: all processes of a run have the same ones.

    Raises:
        ConfigError: with all errors of file and command line.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    config, warnings = parse(argv, world_size)
    for warning in [] if quiet else warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return config


def read_process_count(environment: Mapping[str, str]) -> int | None:
    """Number of processes that run_train.sh is to start; None: $NGPU is not set.

    Raises:
        ConfigError: it is no such number.
    """
    text = environment.get("NGPU", "")
    if text and not (text.isascii() and text.isdecimal() and int(text)):
        raise ConfigError(f"NGPU={text} must be a number of processes, 1 or more")
    return int(text) if text else None


def read_number(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    """A number that a job system tells.

    Raises:
        ConfigError: it is none, or below `least`.
    """
    text = environment.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise ConfigError(f"{name}={text} must be a number of at least {least}")
    return int(text)


def parse(argv: list[str], world_size: int | None = None) -> tuple[JobConfig, list[str]]:
    """As `load_config`, but hands the warnings back instead of printing them."""
    entries, faults = read_command_line(argv)
    file_faults: list[Fault] = []
    file_entries: list[Entry] = []
    for option in [entry for entry in entries if entry.name == "job.config_file"][-1:]:
        file_entries, file_faults = read_file(option.value)
        entries = file_entries + entries
    file_is_lost = bool(file_faults) and not file_entries

    values: dict[str, Any] = {}
    places: dict[str, Place] = {}
    without_effect: list[str] = []
    broken: set[str] = set()
    for entry in entries:
        try:
            value = _read_entry(entry)
        except ValueError as error:
            faults.append((entry.place, str(error)))
            broken.add(entry.name)
            continue
        if entry.name in KEYS:
            values[entry.name], places[entry.name] = value, entry.place
        else:
            without_effect.append(entry.name)

    config = build_config(JobConfig, "", values)
    for names, text in find_faults(config, world_size):
        # A rule about a key whose value could not be read would only be about its default.
        if broken.isdisjoint(names) and not file_is_lost:
            faults.append((max((places[name] for name in names if name in places), default=DEFAULTS), text))
    if faults or file_faults:
        lines = dict.fromkeys(f"{place}{text}" for place, text in sorted(faults + file_faults))
        raise ConfigError(redact("\n".join(lines)))
    return config, [redact(text) for text in (*_effect_warnings(without_effect), *find_doubts(config))]


def _read_entry(entry: Entry) -> Any:
    """The checked value of a known key.

    Raises:
        ValueError: unknown key, a token in the value, or a value that does not fit.
    """
    if has_token(entry.value):
        raise ValueError(
            f"{entry.name} holds what looks like an access token: remove it, revoke it if anyone could have seen it, "
            "and log in with `hf auth login` or `wandb login` instead"
        )
    if entry.name in TABLES:
        raise ValueError(f"'{entry.name}' is a section, not a key: set the keys in it (--help lists them)")
    key = find_key(entry.name)
    if key is None:
        raise ValueError(_unknown_key(entry.name))
    return key.checked(key.from_text(entry.value) if entry.is_text else entry.value)


def _unknown_key(name: str) -> str:
    """Suggests the same word in another section, else the most similar key."""
    known = [key for key in KEYS | ACCEPTED if not key.endswith("*")]
    same_word = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = sorted(same_word, key=lambda key: SequenceMatcher(None, name, key).ratio(), reverse=True)
    nearest = nearest or get_close_matches(name, known, n=1)
    choices = " or ".join(f"'{key}'" for key in nearest[:2])
    hint = f" - did you mean {choices}?" if nearest else ": --help lists every key"
    return f"key '{name}' is unknown{hint}"


def build_config(cls: Any, prefix: str, values: Mapping[str, Any]) -> Any:
    """A tree of section dataclasses with the given values, defaults elsewhere."""
    arguments: dict[str, Any] = {}
    default = cls()
    for field in fields(cls):
        name, value = prefix + field.name, getattr(default, field.name)
        is_section = is_dataclass(value)
        arguments[field.name] = build_config(type(value), f"{name}.", values) if is_section else values.get(name, value)
    return cls(**arguments)


def _effect_warnings(names: list[str]) -> Iterator[str]:
    """One warning per kind of key without effect."""
    names = list(dict.fromkeys(names))
    later = [name for name in names if (key := find_key(name)) and key.name in NO_EFFECT_YET]
    unread = [name for name in names if name not in later]
    for kind, members in (("have no effect yet", later), ("are not used here", unread)):
        if members:
            text = f"these keys {kind}: {', '.join(members)}"
            yield textwrap.fill(text, 110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
