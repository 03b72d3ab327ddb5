"""The text of --help: every key with meaning, range and default."""

import inspect
import textwrap
from dataclasses import fields

from config.accepted import NO_EFFECT_YET, NOT_USED_HERE
from config.job_config import JobConfig
from config.keys import KEYS, Key, show

_WIDTH = 110
_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list"}

_HEAD = """\
usage: ./run_train.sh [--section.key value ...]
       python train.py --job.config_file FILE [--section.key value ...]
       python -m scripts.check_config FILE [--section.key value ...]

A key stands in a TOML file as `key = value` below its [section], or on the command line as
`--section.key value` or `--section.key=value`. The command line wins. A true/false key needs no
value for true; `none` takes back a key that may be unset; a list is written with commas."""


def help_text() -> str:
    """Everything that can be configured, section by section."""
    parts = [_HEAD]
    for section in fields(JobConfig):
        meaning = inspect.cleandoc(type(getattr(JobConfig(), section.name)).__doc__ or "").splitlines()[0]
        keys = [key for name, key in KEYS.items() if name.startswith(f"{section.name}.")]
        parts.append("\n".join([f"[{section.name}]  {meaning}", *map(_describe, keys)]))
    parts.append(_name_list("Accepted from torchtitan's files, without effect yet:", list(NO_EFFECT_YET)))
    parts.append(_name_list("Accepted from torchtitan's files, not used here:", list(NOT_USED_HERE)))
    return "\n\n".join(parts)


def _describe(key: Key) -> str:
    kind = "" if key.choices and key.kind is str else _KINDS[key.kind]
    if key.kind is list:
        kind = "list of tables" if key.item_keys else {str: "list of texts", int: "list of whole numbers"}[key.item]
    default = "not set" if key.default is None else show(key.default)
    rule = f"each {key.rule}" if key.kind is list and key.rule else key.rule
    facts = f"{', '.join(filter(None, [kind, rule]))}; default: {default}"
    lines = [
        f"  --{key.name}",
        textwrap.fill(key.help, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
        textwrap.fill(f"({facts})", _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 7),
    ]
    return "\n".join(lines + [_in_table(item) for item in key.item_keys])


def _in_table(key: Key) -> str:
    """A key of a table in a list: in a file only."""
    default = "" if key.default is None else f"; default: {show(key.default)}"
    return textwrap.fill(f"{key.name}: {key.help}{default}", _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 10)


def _name_list(title: str, names: list[str]) -> str:
    return "\n".join([title, *(f"  --{name}" for name in names)])
