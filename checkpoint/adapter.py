"""Renames, splits and joins the tensors of a state dict by a table of rules that is handed in.

A rule has the fields `native` (our key pattern), `other` (the patterns of the other layout) and `op`; flux/rules.py
explains them and holds the tables. Both directions are strict: a key that no rule knows, or a part that is missing, is
an error, because a weight that is silently dropped shows up weeks later as a model that is a little worse.

Conversion looks at names and shapes alone. The values follow when a converted tensor is read, and then only those that
it is made of: a model larger than the memory is converted one tensor at a time.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, reduce
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from checkpoint.lazy import LazyTensor, lazy_all, read_all


class RuleLike(Protocol):
    """What this module needs to know of a rule."""

    @property
    def native(self) -> str: ...
    @property
    def other(self) -> tuple[str, ...]: ...
    @property
    def op(self) -> str | None: ...


def to_hf(state_dict: Mapping[str, Tensor], rules: Sequence[RuleLike]) -> dict[str, Tensor]:
    """`from_native` for tensors that are in memory; what is only renamed or split shares it, here and in `from_hf`."""
    return read_all(from_native(lazy_all(state_dict), rules))


def from_hf(state_dict: Mapping[str, Tensor], rules: Sequence[RuleLike]) -> dict[str, Tensor]:
    """`to_native` for tensors that are in memory."""
    return read_all(to_native(lazy_all(state_dict), rules))


def from_native(tensors: Mapping[str, LazyTensor], rules: Sequence[RuleLike]) -> dict[str, LazyTensor]:
    """Our layout -> the other one (Hugging Face diffusers, or whatever the rules describe).

    Raises:
        ValueError: keys that no rule knows, or a tensor that does not divide as its rule says.
    """
    converted: dict[str, LazyTensor] = {}
    for key, rule, names in _find_all(tensors, [(rule.native, rule) for rule in rules]):
        others = [_fill(pattern, names) for pattern in rule.other]
        parts = _split(_apply(rule.op, key, tensors[key]), key, tensors, len(others))
        converted.update(zip(others, parts, strict=True))
    return converted


def to_native(tensors: Mapping[str, LazyTensor], rules: Sequence[RuleLike]) -> dict[str, LazyTensor]:
    """The other layout -> ours; the inverse of `from_native`.

    Raises:
        ValueError: keys that no rule knows, or a fused tensor of which a part is missing or does not fit.
    """
    found = _find_all(tensors, [(pattern, rule) for rule in rules for pattern in rule.other])
    needed = {_fill(rule.native, names): (rule, names) for _, rule, names in found}
    converted: dict[str, LazyTensor] = {}
    for native, (rule, names) in needed.items():
        others = [_fill(pattern, names) for pattern in rule.other]
        if missing := [name for name in others if name not in tensors]:
            raise ValueError(f"{native} cannot be joined from its parts: state dict lacks {_listed(missing)}")
        converted[native] = _undo(rule.op, native, _join(native, [tensors[name] for name in others]))
    return converted


def knows_all(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether every name fits one of the patterns, as far as names alone can tell."""
    patterns = list(patterns)
    return all(any(_regex(pattern).fullmatch(name) for pattern in patterns) for name in names)


def _apply(op: str | None, key: str, tensor: LazyTensor) -> LazyTensor:
    if op == "linear":
        if len(tensor.shape) != 4 or tensor.shape[2:] != (1, 1):
            raise ValueError(f"{key} must be a convolution [O, I, 1, 1] and has the shape {list(tensor.shape)}")
        return _changed(tensor, lambda values: values.flatten(1), tensor.shape[:2])
    return _swap(key, tensor) if op == "swap" else tensor


def _undo(op: str | None, key: str, tensor: LazyTensor) -> LazyTensor:
    if op == "linear":
        if len(tensor.shape) != 2:
            raise ValueError(f"{key} must come from a weight [O, I], and that has the shape {list(tensor.shape)}")
        return _changed(tensor, lambda values: values[:, :, None, None], (*tensor.shape, 1, 1))
    return _swap(key, tensor) if op == "swap" else tensor


def _swap(key: str, tensor: LazyTensor) -> LazyTensor:
    if not tensor.shape or tensor.shape[0] % 2:
        raise ValueError(f"{key} must have two halves of rows to exchange and has the shape {list(tensor.shape)}")
    return _changed(tensor, lambda values: torch.cat(values.chunk(2)[::-1]), tensor.shape)


def _changed(tensor: LazyTensor, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, tensor.dtype, lambda: change(tensor.read()))


def _split(tensor: LazyTensor, key: str, tensors: Mapping[str, LazyTensor], parts: int) -> list[LazyTensor]:
    """Cut the rows: all parts but the last are as tall as the module's weight is wide."""
    if parts == 1:
        return [tensor]
    weight = tensors.get(key.rpartition(".")[0] + ".weight")
    if weight is None:
        raise ValueError(f"{key} cannot be split without the weight of its module: hand in both")
    if len(weight.shape) != 2 or not tensor.shape:
        raise ValueError(f"{key} cannot be split: the weight of its module has the shape {list(weight.shape)}")
    width, rows = weight.shape[1], tensor.shape[0]
    if rows <= width * (parts - 1):
        raise ValueError(f"{key} has {rows} rows: too few for {parts} parts of a width of {width}")
    edges = [width * part for part in range(parts)] + [rows]
    return [_cut(tensor, start, stop) for start, stop in pairwise(edges)]


def _cut(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    return LazyTensor(
        (stop - start, *tensor.shape[1:]),
        tensor.dtype,
        lambda: tensor.read_rows(start, stop),
        lambda first, last: tensor.read_rows(start + first, min(start + last, stop)),
    )


def _join(key: str, parts: Sequence[LazyTensor]) -> LazyTensor:
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[1:] for part in parts if part.shape}) != 1 or not all(part.shape for part in parts):
        shapes = " and ".join(str(list(part.shape)) for part in parts)
        raise ValueError(f"{key} cannot be joined from its parts: their shapes are {shapes}")
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    return LazyTensor(shape, dtype, lambda: torch.cat([part.read() for part in parts]))


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
