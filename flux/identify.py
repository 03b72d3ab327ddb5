"""Says from names and shapes alone which model flavor some weights are, and whether they fit the one that is wanted."""

import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple, Protocol

import torch

from flux.model import FluxTransformer
from flux.spec import SPECS, ModelSpec, TransformerConfig

Shape = tuple[int, ...]


class Shaped(Protocol):
    @property
    def shape(self) -> Shape: ...


class _Outline(NamedTuple):
    """What tells flavors apart at first sight; None: cannot be seen."""

    hidden: int | None
    double: int
    single: int
    guidance: bool
    channels: int | None
    context: int | None
    pooled: int | None

    def __str__(self) -> str:
        guidance = f"guidance_in {'present' if self.guidance else 'absent'}"
        return f"hidden {self.hidden or 'unknown'}, {self.double} + {self.single} blocks, {guidance}"


@cache
def expected_shapes(config: TransformerConfig) -> dict[str, Shape]:
    """Every name of a transformer with its shape."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in FluxTransformer(config).state_dict().items()}


def find_flavor(tensors: Mapping[str, Shaped]) -> str | None:
    """The flavor that these weights are, complete or not; None if they look like none.

    Args:
        tensors: under the model's own names; only their shapes are looked at.
    """
    outline = _outline(_shapes(tensors))
    fitting = (name for name, spec in SPECS.items() if _outline(expected_shapes(spec.transformer)) == outline)
    return next(fitting, None)


def describe(tensors: Mapping[str, Shaped]) -> str:
    """What is there, for weights that are no known flavor."""
    return str(_outline(_shapes(tensors)))


def check_fits(tensors: Mapping[str, Shaped], spec: ModelSpec, where: str) -> None:
    """Compares names and shapes with the model's, both ways.

    Args:
        tensors: under the model's own names.
        where: how the message calls what holds them.

    Raises:
        ValueError: another flavor; or a tensor is missing, foreign or of another shape.
    """
    shapes, expected = _shapes(tensors), expected_shapes(spec.transformer)
    found, wanted = _outline(shapes), _outline(expected)
    if found != wanted:
        flavor = find_flavor(tensors)
        kind = f"a {flavor}" if flavor else "a transformer of no known flavor"
        remedy = f"set model.flavor={flavor!r} or take other weights" if flavor else "take other weights"
        raise ValueError(
            f"{where} holds {kind} ({found}{_rest(found, wanted)}), but model.flavor={spec.name!r} ({wanted}): {remedy}"
        )
    faults = {
        "lacks": [name for name in expected if name not in shapes],
        "has the foreign": [name for name in shapes if name not in expected],
        "has another shape for": [
            f"{name} ({list(shapes[name])}, not {list(expected[name])})"
            for name in expected
            if name in shapes and shapes[name] != expected[name]
        ],
    }
    told = [f"{verb} {_some(names)}" for verb, names in faults.items() if names]
    if told:
        raise ValueError(f"{where} does not fit model.flavor={spec.name!r}, it {', '.join(told)}: take whole weights")


def _outline(shapes: Mapping[str, Shape]) -> _Outline:
    def size(name: str, dim: int) -> int | None:
        return shapes[name][dim] if len(shapes.get(name, ())) > dim else None

    def count(kind: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(rf"{kind}\.(\d+)\.", name))})

    return _Outline(
        hidden=size("img_in.weight", 0),
        double=count("double_blocks"),
        single=count("single_blocks"),
        guidance=any(name.startswith("guidance_in.") for name in shapes),
        channels=size("img_in.weight", 1),
        context=size("txt_in.weight", 1),
        pooled=size("vector_in.in_layer.weight", 1),
    )


def _shapes(tensors: Mapping[str, Shaped]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _rest(found: _Outline, wanted: _Outline) -> str:
    """The differences that are not in every description."""
    names = ("channels", "context", "pooled")
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in names]
    return "".join(f", {name} {ours} instead of {theirs}" for name, ours, theirs in pairs if ours != theirs)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
