"""Modules by name pattern."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name fits a pattern part by part: `*` stands for one part or a piece of one."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def find_modules(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that fit one of the patterns, in the order of the patterns and then of the model.

    Raises:
        ValueError: a pattern fits nothing: the model is not the one that the plan was made for.
    """
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = {name: module for name, module in model.named_modules() if matches(name, pattern)}
        if not fitting:
            raise ValueError(f"no module of {type(model).__name__} is called {pattern}")
        found |= fitting
    return found
