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

    Splits are views of the given tensors.

    Raises:
        ValueError: keys that no rule knows, or a fused tensor whose rows do not divide as its rule says.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state_dict.items():
        for rule in rules:
            if (names := _match(rule.native, key)) is not None:
                others = [_fill(pattern, names) for pattern in rule.other]
                parts = _split(_apply(rule.op, tensor), key, state_dict, len(others))
                converted.update(zip(others, parts, strict=True))
                break
        else:
            unknown.append(key)
    _check_nothing_left(unknown)
    return converted


def from_hf(state_dict: Mapping[str, Tensor], rules: Sequence[RuleLike]) -> dict[str, Tensor]:
    """The other layout -> ours; the inverse of `to_hf`.

    Raises:
        ValueError: keys that no rule knows, or a fused tensor of which a part is missing.
    """
    converted: dict[str, Tensor] = {}
    unknown, missing = [], []
    for key in state_dict:
        for rule in rules:
            if (names := _match_any(rule.other, key)) is not None:
                native = _fill(rule.native, names)
                others = [_fill(pattern, names) for pattern in rule.other]
                absent = [name for name in others if name not in state_dict]
                missing += [name for name in absent if name not in missing]
                if native not in converted and not absent:
                    converted[native] = _apply(_INVERSE.get(rule.op, rule.op), _join([state_dict[n] for n in others]))
                break
        else:
            unknown.append(key)
    _check_nothing_left(unknown)
    if missing:
        raise ValueError(f"state dict lacks {_listed(missing)}: their other parts are there and cannot be joined alone")
    return converted


_INVERSE: dict[str | None, str] = {"linear": "conv"}  # "swap" is its own inverse


def _apply(op: str | None, tensor: Tensor) -> Tensor:
    if op == "swap":
        upper, lower = tensor.chunk(2)
        return torch.cat((lower, upper))
    if op == "linear":
        return tensor.flatten(1)
    if op == "conv":
        return tensor[:, :, None, None]
    return tensor


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


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    """`a.{i}.{leaf}` -> a regular expression with one group for each placeholder."""
    pieces = re.split(r"\{(\w+)\}", pattern)
    for place, name in enumerate(pieces):
        pieces[place] = (
            re.escape(name) if place % 2 == 0 else rf"(?P<{name}>{'weight|bias' if name == 'leaf' else '[0-9]+'})"
        )
    return re.compile("".join(pieces))


def _match(pattern: str, key: str) -> dict[str, str] | None:
    found = _regex(pattern).fullmatch(key)
    return found.groupdict() if found else None


def _match_any(patterns: Iterable[str], key: str) -> dict[str, str] | None:
    return next((names for pattern in patterns if (names := _match(pattern, key)) is not None), None)


def _fill(pattern: str, names: Mapping[str, str]) -> str:
    return pattern.format(**names)


def _check_nothing_left(unknown: Sequence[str]) -> None:
    if unknown:
        raise ValueError(
            f"state dict has {len(unknown)} keys that no rule knows: {_listed(unknown)}; "
            "is this a checkpoint of another architecture?"
        )


def _listed(keys: Sequence[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
