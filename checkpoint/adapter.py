"""Renames, splits and joins the tensors of a state dict by a table of rules that is handed in.

A rule has the fields `native` (our key pattern), `other` (the patterns of the other layout) and `op`; flux/rules.py
explains them and holds the tables. Both directions are strict: a key that no rule knows, or a part that is missing, is
an error, because a weight that is silently dropped shows up weeks later as a model that is a little worse.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class RuleLike(Protocol):
    """What this module needs to know of a rule."""

    @property
    def native(self) -> str: ...
    @property
    def other(self) -> tuple[str, ...]: ...
    @property
    def op(self) -> str | None: ...


def to_hf(state_dict: Mapping[str, Tensor], rules: Sequence[RuleLike]) -> dict[str, Tensor]:
    """Our layout -> the other one (Hugging Face diffusers, or whatever the rules describe).

    Tensors that are only renamed or split share their memory with the given ones, here and in `from_hf`.

    Raises:
        ValueError: keys that no rule knows, or a fused tensor that does not divide as its rule says.
    """
    converted: dict[str, Tensor] = {}
    for key, rule, names in _find_all(state_dict, [(rule.native, rule) for rule in rules]):
        others = [_fill(pattern, names) for pattern in rule.other]
        parts = _split(_apply(rule.op, state_dict[key]), key, state_dict, len(others))
        converted.update(zip(others, parts, strict=True))
    return converted


def from_hf(state_dict: Mapping[str, Tensor], rules: Sequence[RuleLike]) -> dict[str, Tensor]:
    """The other layout -> ours; the inverse of `to_hf`.

    Raises:
        ValueError: keys that no rule knows, or a fused tensor of which a part is missing.
    """
    found = _find_all(state_dict, [(pattern, rule) for rule in rules for pattern in rule.other])
    needed = {_fill(rule.native, names): (rule, names) for _, rule, names in found}
    converted: dict[str, Tensor] = {}
    for native, (rule, names) in needed.items():
        others = [_fill(pattern, names) for pattern in rule.other]
        if missing := [name for name in others if name not in state_dict]:
            raise ValueError(f"{native} cannot be joined from its parts: state dict lacks {_listed(missing)}")
        parts = [state_dict[name] for name in others]
        converted[native] = _undo(rule.op, parts[0] if len(parts) == 1 else torch.cat(parts))
    return converted


def _apply(op: str | None, tensor: Tensor) -> Tensor:
    if op == "linear":
        return tensor.flatten(1)
    return _swap(tensor) if op == "swap" else tensor


def _undo(op: str | None, tensor: Tensor) -> Tensor:
    if op == "linear":
        return tensor[:, :, None, None]
    return _swap(tensor) if op == "swap" else tensor


def _swap(tensor: Tensor) -> Tensor:
    upper, lower = tensor.chunk(2)
    return torch.cat((lower, upper))


def _split(tensor: Tensor, key: str, state_dict: Mapping[str, Tensor], parts: int) -> tuple[Tensor, ...]:
    """Cut the rows: all parts but the last are as tall as the module's weight is wide."""
    if parts == 1:
        return (tensor,)
    weight = state_dict.get(key.rpartition(".")[0] + ".weight")
    if weight is None:
        raise ValueError(f"{key} cannot be split without the weight of its module: hand in both")
    width = weight.shape[1]
    last = tensor.shape[0] - width * (parts - 1)
    if last <= 0:
        raise ValueError(f"{key} has {tensor.shape[0]} rows: too few for {parts} parts of a width of {width}")
    return tensor.split([width] * (parts - 1) + [last])


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    """`a.{i}.{leaf}` -> a regular expression with one group for each placeholder."""
    pieces = re.split(r"\{(\w+)\}", pattern)
    for place, name in enumerate(pieces):
        pieces[place] = (
            re.escape(name) if place % 2 == 0 else rf"(?P<{name}>{'weight|bias' if name == 'leaf' else '[0-9]+'})"
        )
    return re.compile("".join(pieces))


def _find_all(
    keys: Iterable[str], patterns: Sequence[tuple[str, RuleLike]]
) -> list[tuple[str, RuleLike, dict[str, str]]]:
    """For each key its rule and what the placeholders stand for."""
    found, unknown = [], []
    for key in keys:
        for pattern, rule in patterns:
            if match := _regex(pattern).fullmatch(key):
                found.append((key, rule, match.groupdict()))
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"state dict has {len(unknown)} keys that no rule knows: {_listed(unknown)}; "
            "is this a checkpoint of another architecture?"
        )
    return found


def _fill(pattern: str, names: Mapping[str, str]) -> str:
    return pattern.format(**names)


def _listed(keys: Sequence[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
