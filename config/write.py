"""JobConfig -> TOML with comments, which `load_config` reads back to an equal JobConfig, but for secrets of URLs."""

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from config.job_config import JobConfig
from config.keys import KEYS, Key
from redact import redact

CONFIG_FILE = "config.toml"  # in the run folder

_HEAD = "# The complete configuration of a run. Train it again with: python train.py --job.config_file THIS_FILE\n"


def save_config(config: JobConfig, path: str | Path) -> None:
    """Writes every key with its meaning; keys that are not set are commented out."""
    Path(path).write_text(format_config(config), encoding="utf-8")


def format_config(config: JobConfig) -> str:
    """The text that `save_config` writes and `job.print_config` prints."""
    lines = [_HEAD]
    for section in fields(JobConfig):
        lines.append(f"[{section.name}]")
        for key in (key for name, key in KEYS.items() if name.startswith(f"{section.name}.")):
            lines.append(_line(key, section.name, _lookup(config, key.name)))
        lines.append("")
    return "\n".join(lines)


def _line(key: Key, section: str, value: Any) -> str:
    name = key.name.removeprefix(f"{section}.")
    note = f"  # {key.help}" + (f" ({key.rule})" if key.rule else "")
    if key.name == "job.config_file":
        return f"# started from: {_toml(value) if value else 'no file, defaults and command line only'}"
    return f"# {name} =" + note if value is None else f"{name} = {_toml(value)}{note}"


def _lookup(config: JobConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _toml(value: Any) -> str:
    """A TOML literal of a value, a list of them, or a dataclass of them, which is a table without what is not set."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = [f"{name} = {_toml(item)}" for name, item in asdict(value).items() if item is not None]
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        value = redact(value)
    if isinstance(value, bool | str):
        # JSON's strings are TOML's, except that TOML wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)  # of a float: the shortest text that gives all its bits back
