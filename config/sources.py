"""The two places where keys are written, TOML file and command line, read into one list of entries."""

import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from config.keys import TABLES, find_key, show
from config.toml_lines import find_lines


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written. Sorts file first, then command line, each from front to back."""

    rank: int  # 0 file, 1 command line, 2 nowhere: a default
    number: int = 0  # line of the file, 0 for the file as a whole; or place on the command line
    file: str = ""

    def __str__(self) -> str:
        file = f"{self.file}:{self.number}: " if self.number else f"{self.file}: "
        return (file, "command line: ", "")[self.rank]


DEFAULTS = Place(2)


@dataclass(frozen=True)
class Entry:
    """One key and its value as they were written."""

    name: str
    value: Any
    place: Place
    is_text: bool  # from the command line: still to be converted


Fault = tuple[Place, str]


def read_command_line(argv: list[str]) -> tuple[list[Entry], list[Fault]]:
    """Reads `--key value`, `--key=value` and `--key` for true."""
    entries: list[Entry] = []
    faults: list[Fault] = []
    position = 0
    while position < len(argv):
        option, place = argv[position], Place(1, position)
        position += 1
        if not option.startswith("--"):
            faults.append((place, f"{show(option)} stands alone: write --section.key value"))
            continue
        name, equals, value = option[2:].partition("=")
        key = find_key(name)
        has_follower = position < len(argv) and not argv[position].startswith("--")
        if not equals and has_follower:
            value, position = argv[position], position + 1
        elif not equals and (key is None or key.kind in (bool, object)):
            value = "true"
        elif not equals:
            faults.append((place, f"{name} needs a value: write --{name} VALUE"))
            continue
        entries.append(Entry(name, value, place, is_text=True))
    return entries, faults


def read_file(file: str) -> tuple[list[Entry], list[Fault]]:
    """Reads a TOML file; one that cannot be read is a single fault."""
    place = Place(0, file=file)
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        document = tomllib.loads(text)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        remedy = "give the path of a TOML file such as train_configs/flux_tiny.toml"
        return [], [(place, f"job.config_file={show(file)} cannot be read ({reason}): {remedy}")]
    except UnicodeDecodeError as error:
        return [], [(place, f"byte {error.start} is not UTF-8: save the file as UTF-8 text")]
    except (ValueError, RecursionError) as error:
        line = re.search(r"\(at line (\d+)", str(error))
        reason = re.sub(r" \(at .*\)$", "", str(error))
        return [], [(Place(0, int(line[1]) if line else 0, file), f"not valid TOML: {reason}")]
    return _flatten(document, find_lines(text), file)


def _flatten(document: dict[str, Any], lines: dict[tuple[str, ...], int], file: str) -> tuple[list[Entry], list[Fault]]:
    """Descends into tables that hold keys and stops at everything else."""
    entries: list[Entry] = []
    faults: list[Fault] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((name,), value) for name, value in document.items()]
    while waiting:
        path, value = waiting.pop()
        # A quoted key may contain dots, and `"training.steps" = 1` is not training.steps.
        name = ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else show(part) for part in path)
        place = Place(0, lines[path], file)
        if isinstance(value, dict) and path[0] not in TABLES:
            faults.append((place, _unknown_section(name)))
        elif isinstance(value, dict) and (name in TABLES or (value and find_key(name) is None)):
            waiting += [((*path, key), item) for key, item in value.items()]
        else:
            entries.append(Entry(name, value, place, is_text=False))
    return sorted(entries, key=lambda entry: entry.place), faults


def _unknown_section(name: str) -> str:
    sections = sorted(table for table in TABLES if "." not in table)
    nearest = get_close_matches(name, sections, n=1)
    hint = f" - did you mean [{nearest[0]}]?" if nearest else f": the sections are {', '.join(sections)}"
    return f"section [{name}] is unknown{hint}"
