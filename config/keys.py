"""Every configuration key as data, derived from the section dataclasses, and the check of a single value."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from config.accepted import NO_EFFECT_YET, NOT_USED_HERE
from config.job_config import JobConfig
from redact import redact

_WANTED = {
    bool: "true or false",
    int: "a whole number such as 4",
    float: "a number such as 0.5",
    str: 'a text in quotes such as "name"',
}
_WANTED_LISTS = {str: 'a list of texts such as ["a", "b"]', int: "a list of whole numbers such as [1, 2]"}
_MAX_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Interval:
    """Allowed numbers in mathematical notation, `[1, inf)`, or with one number more, `-1 or [1, inf)`.

    On a text it bounds the number of characters.
    """

    notation: str

    def _parts(self) -> tuple[float | None, str]:
        extra, _, interval = self.notation.rpartition(" or ")
        return (float(extra) if extra else None), interval

    def __contains__(self, value: float) -> bool:
        extra, interval = self._parts()
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        return value == extra or (above and below)

    def __str__(self) -> str:
        extra, interval = self._parts()
        low, high = (bound.strip() for bound in interval[1:-1].split(","))
        words = [f"at least {low}" if interval[0] == "[" else f"greater than {low}"]
        if high != "inf":
            words.append(f"at most {high}" if interval[-1] == "]" else f"less than {high}")
        return (f"{extra:g}, or " if extra is not None else "") + " and ".join(words)


@dataclass(frozen=True)
class Key:
    """One key: how it is called, what it may be, what it means."""

    name: str  # "training.dataloader.num_workers"
    kind: type  # bool, int, float, str, list, or object for anything
    optional: bool = False  # None means "not set"
    choices: tuple[str, ...] = ()
    interval: Interval | None = None
    help: str = ""
    default: Any = None
    item: type = str  # of a list: str, int, or a dataclass whose fields are the keys of a table
    item_keys: "tuple[Key, ...]" = ()  # those keys

    @property
    def rule(self) -> str:
        """The allowed values in words, empty when the kind says all."""
        if self.choices:
            return " or ".join([", ".join(self.choices[:-1]), self.choices[-1]] if self.choices[1:] else self.choices)
        return "" if self.interval is None or self.kind is str else str(self.interval)

    def from_text(self, text: str) -> Any:
        """A command line value in the key's kind; text that does not fit comes back as it is and fails in `checked`."""
        if self.optional and text.lower() == "none":
            return None
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[text.lower()]
            if self.kind in (int, float):
                return self.kind(text)
        except (KeyError, ValueError):
            return text
        if self.kind is not list or self.item_keys:
            return text
        items = [item.strip() for item in text.split(",") if item.strip()]
        return [int(item) if self.item is int and _is_whole(item) else item for item in items]

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        if self.item_keys:
            return f"a list of tables: write [[{self.name}]] and its keys in a TOML file, once for each"
        return _WANTED_LISTS[self.item] if self.kind is list else _WANTED[self.kind]

    def checked(self, value: Any) -> Any:
        """The value, an int turned into a float where one is due.

        Raises:
            ValueError: wrong kind, not among the choices or out of range; the message has key, value, rule and remedy.
        """
        if value is None and self.optional:
            return None
        shown = f"{self.name}={show(value)}"
        must_be = f": it must be {self.rule}" if self.rule else ""
        if self.kind is float and type(value) is int:
            value = _to_float(value)
        if self.kind is not object and type(value) is not self.kind:
            raise ValueError(f"{shown} must be {self.wanted}{self._quotes_hint(value)}")
        if self.item_keys:
            return [self._checked_table(f"{self.name}[{number}]", table) for number, table in enumerate(value)]
        if self.kind is str and not _is_unicode(value):
            raise ValueError(f"{shown} is not Unicode text: write it in UTF-8")
        if self.kind is list and any(type(item) is not self.item for item in value):
            raise ValueError(f"{shown} must be {self.wanted}")
        for item in value if self.kind is list else [value]:
            if self.choices and item not in self.choices:
                nearest = get_close_matches(item, self.choices, n=1)
                hint = f" - did you mean {show(nearest[0])}?" if nearest else ":"
                named = f"{show(item)} in {self.name}" if self.kind is list else shown
                raise ValueError(f"{named} is not a known choice{hint} use {self.rule}")
        if self.kind is float and not math.isfinite(value):
            raise ValueError(f"{shown} is not finite{must_be}")
        if self.kind is int and abs(value) >= 2**63:
            raise ValueError(f"{shown} does not fit in 64 bits{must_be}")
        measures = value if self.kind is list else [len(value) if self.kind is str else value]
        if self.interval is not None and any(measure not in self.interval for measure in measures):
            if self.kind is str:
                raise ValueError(f"{shown} must not be empty: give a value, or leave the key out")
            raise ValueError(f"{shown} is out of range{must_be}")
        return value

    def _checked_table(self, name: str, table: Any) -> Any:
        """One table of a list, as the dataclass that it fills."""
        if type(table) is not dict:
            raise ValueError(f"{name}={show(table)} must be a table: {self.wanted.partition(': ')[2]}")
        keys = {key.name: key for key in self.item_keys}
        values = {}
        for field_name, value in table.items():
            if field_name not in keys:
                nearest = get_close_matches(field_name, keys, n=1)
                hint = f" - did you mean '{nearest[0]}'?" if nearest else f": use {', '.join(keys)}"
                raise ValueError(f"key '{name}.{field_name}' is unknown{hint}")
            values[field_name] = replace(keys[field_name], name=f"{name}.{field_name}").checked(value)
        return self.item(**values)

    def _quotes_hint(self, value: Any) -> str:
        """A quoted number or boolean is the common slip in TOML."""
        if type(value) is str and self.kind in (bool, int, float) and self.from_text(value) != value:
            return ": remove the quotes"
        return ""


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_unicode(text: str) -> bool:
    """False for the lone surrogates that Python makes of command line bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def show(value: object) -> str:
    """A value as TOML writes it, short and without secrets, for messages."""
    if isinstance(value, bool | str | list | dict):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = str(value)
    text = redact(text.encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _make_key(name: str, hint: Any, **rest: Any) -> Key:
    """A Key from a type hint such as `int | None`, `Literal["a", "b"]`, `list[str]` or `Any`."""
    optional = False
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        assert len(members) == 1, f"{name}: one kind and None is all that a key may be"
        hint, optional = members[0], True
    if get_origin(hint) is Literal:
        return Key(name, str, optional, choices=get_args(hint), **rest)
    if hint == list[int]:
        return Key(name, list, optional, item=int, **rest)
    if get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
        item: type[Any] = get_args(hint)[0]
        return Key(name, list, optional, item=item, item_keys=tuple(_section_keys("", item())), **rest)
    return Key(name, object if hint is Any else get_origin(hint) or hint, optional, **rest)


def _section_keys(prefix: str, section: Any) -> Iterator[Key]:
    for field_name, hint in get_type_hints(type(section), include_extras=True).items():
        name, default = f"{prefix}.{field_name}".lstrip("."), getattr(section, field_name)
        if is_dataclass(default):
            yield from _section_keys(name, default)
            continue
        assert get_origin(hint) is Annotated, f"{name} needs Annotated[type, help, rule]"
        kind, help_text, *rule = get_args(hint)
        rest: dict[str, Any] = {}
        if rule:
            rest = {"interval": Interval(rule[0])} if isinstance(rule[0], str) else {"choices": rule[0]}
        yield _make_key(name, kind, help=help_text, default=default, **rest)


KEYS: dict[str, Key] = {
    key.name: key
    for section in fields(JobConfig)
    for key in _section_keys(section.name, getattr(JobConfig(), section.name))
}
ACCEPTED: dict[str, Key] = {name: _make_key(name, hint) for name, hint in (NO_EFFECT_YET | NOT_USED_HERE).items()}
# Tables that keys live in: "training", "training.dataloader", "parallelism", ...
TABLES: frozenset[str] = frozenset(
    name.rsplit(".", depth)[0] for name in KEYS | ACCEPTED for depth in range(1, name.count(".") + 1)
)


def find_key(name: str) -> Key | None:
    """The key of this full name, or the wildcard of `ACCEPTED` that covers it."""
    if name in KEYS or name in ACCEPTED:
        return KEYS.get(name) or ACCEPTED[name]
    covering = (key for pattern, key in ACCEPTED.items() if pattern.endswith("*") and name.startswith(pattern[:-1]))
    return next(covering, None)
