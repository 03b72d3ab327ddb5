"""Conversion by rules: what happens to rows, and that nothing is lost or left in silence."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from checkpoint.adapter import from_hf, from_native, knows_all, to_hf, to_native
from checkpoint.lazy import LazyTensor, lazy_all, read_all


@dataclass(frozen=True)
class Rule:
    native: str
    other: tuple[str, ...]
    op: str | None = None


RULES = (
    Rule("in.{leaf}", ("embedder.{leaf}",)),
    Rule("blocks.{i}.fused.{leaf}", ("layers.{i}.q.{leaf}", "layers.{i}.k.{leaf}", "layers.{i}.mlp.{leaf}")),
    Rule("blocks.{i}.part.{j}.weight", ("layers.{i}.parts.{j}.scale",)),
    Rule("final.{leaf}", ("out.{leaf}",), "swap"),
    Rule("conv.weight", ("linear.weight",), "linear"),
)
WIDTH = 3


def rows(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count).float()[:, None].expand(-1, WIDTH)


def native() -> dict[str, Tensor]:
    return {
        "in.weight": rows(0, 2),
        "in.bias": torch.ones(2),
        "blocks.11.fused.weight": rows(0, 2 * WIDTH + 5),
        "blocks.11.fused.bias": torch.arange(2 * WIDTH + 5.0),
        "blocks.0.part.2.weight": torch.ones(4),
        "final.weight": rows(0, 4),
        "conv.weight": torch.arange(6.0).reshape(2, 3, 1, 1),
    }


def test_to_the_other_layout():
    other = to_hf(native(), RULES)
    assert set(other) == {
        *("embedder.weight", "embedder.bias", "layers.0.parts.2.scale", "out.weight", "linear.weight"),
        *(f"layers.11.{part}.{leaf}" for part in ("q", "k", "mlp") for leaf in ("weight", "bias")),
    }
    assert other["layers.11.q.weight"][:, 0].tolist() == other["layers.11.q.bias"].tolist() == [0, 1, 2]
    assert other["layers.11.k.weight"][:, 0].tolist() == other["layers.11.k.bias"].tolist() == [3, 4, 5]
    assert other["layers.11.mlp.weight"][:, 0].tolist() == other["layers.11.mlp.bias"].tolist() == [6, 7, 8, 9, 10]
    assert other["out.weight"][:, 0].tolist() == [2, 3, 0, 1]
    assert other["linear.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_and_back(order):
    other = dict(list(to_hf(native(), RULES).items())[::order])
    back = from_hf(other, RULES)
    assert back.keys() == native().keys()
    assert all(torch.equal(back[name], value) for name, value in native().items())


@pytest.mark.parametrize("convert", [to_hf, from_hf])
@pytest.mark.parametrize("key", ["unheard.weight", "in.weight.more", "embedder", "blocks.x.fused.weight", "final.gain"])
def test_key_that_no_rule_knows(convert, key):
    weights = native() if convert is to_hf else to_hf(native(), RULES)
    with pytest.raises(ValueError, match=f"1 keys that no rule knows: {key}"):
        convert({**weights, key: torch.ones(1)}, RULES)


def test_rule_that_is_gone():
    """Dropping a rule from the table must not drop the weight with it."""
    for rule in RULES:
        rest = tuple(other for other in RULES if other is not rule)
        with pytest.raises(ValueError, match="no rule knows"):
            to_hf(native(), rest)
        with pytest.raises(ValueError, match="no rule knows"):
            from_hf(to_hf(native(), RULES), rest)


def test_part_that_is_gone():
    other = to_hf(native(), RULES)
    del other["layers.11.k.bias"]
    with pytest.raises(ValueError, match=r"blocks\.11\.fused\.bias .* lacks layers\.11\.k\.bias"):
        from_hf(other, RULES)


def test_tensor_that_cannot_be_split():
    with pytest.raises(ValueError, match=r"6 rows: too few for 3 parts of a width of 3"):
        to_hf({"blocks.0.fused.weight": rows(0, 6)}, RULES)
    with pytest.raises(ValueError, match="without the weight of its module"):
        to_hf({"blocks.0.fused.bias": torch.ones(11)}, RULES)


def test_many_unknown_keys_are_counted_not_poured_out():
    with pytest.raises(ValueError, match=r"60 keys .*: x\.0, x\.1, x\.2, x\.3, x\.4 and 55 more;"):
        from_hf({f"x.{i}": torch.ones(1) for i in range(60)}, RULES)


def test_renaming_takes_no_memory():
    weights = native()
    other = to_hf(weights, RULES)
    assert other["embedder.weight"].data_ptr() == weights["in.weight"].data_ptr()
    assert from_hf(other, RULES)["in.weight"].data_ptr() == weights["in.weight"].data_ptr()


def noted(tensors: dict[str, Tensor], reads: list[str]) -> dict[str, LazyTensor]:
    """The tensors as if they lay in a file; notes what is read of them."""

    def note(name: str, tensor: Tensor) -> LazyTensor:
        def read() -> Tensor:
            reads.append(name)
            return tensor

        def read_rows(start: int, stop: int) -> Tensor:
            reads.append(f"{name}[{start}:{stop}]")
            return tensor[start:stop]

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read, read_rows)

    return {name: note(name, tensor) for name, tensor in tensors.items()}


def test_a_tensor_is_read_when_it_is_asked_for_and_only_what_it_is_made_of():
    reads: list[str] = []
    other = from_native(noted(native(), reads), RULES)
    assert {name: tensor.shape for name, tensor in other.items()} == {
        name: tuple(tensor.shape) for name, tensor in to_hf(native(), RULES).items()
    }
    assert reads == []
    assert other["layers.11.k.weight"].read()[:, 0].tolist() == [3, 4, 5]
    assert other["layers.11.k.weight"].read_rows(1, 2)[:, 0].tolist() == [4]
    assert reads == ["blocks.11.fused.weight[3:6]", "blocks.11.fused.weight[4:5]"]

    reads.clear()
    back = to_native(noted(to_hf(native(), RULES), reads), RULES)
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tuple(tensor.shape) for name, tensor in native().items()
    }
    assert reads == []
    assert torch.equal(back["blocks.11.fused.bias"].read(), native()["blocks.11.fused.bias"])
    assert reads == ["layers.11.q.bias", "layers.11.k.bias", "layers.11.mlp.bias"]


def test_rows_of_everything_that_is_converted():
    """`read_rows` is `read` and then the rows, also where rows are exchanged, joined or reshaped."""
    for converted in (from_native(lazy_all(native()), RULES), to_native(lazy_all(to_hf(native(), RULES)), RULES)):
        whole = read_all(converted)
        for name, tensor in converted.items():
            assert torch.equal(tensor.read_rows(1, 2), whole[name][1:2]), name


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("final.weight", (3, WIDTH), "two halves of rows"),
        ("final.bias", (), "two halves of rows"),
        ("conv.weight", (2, 3, 3, 3), r"must be a convolution \[O, I, 1, 1\]"),
        ("conv.weight", (2, 3), r"must be a convolution \[O, I, 1, 1\]"),
        ("blocks.11.fused.weight", (12,), "the weight of its module has the shape"),
    ],
)
def test_shapes_that_a_rule_does_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message):
        from_native(lazy_all(native() | {name: torch.ones(shape)}), RULES)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("linear.weight", (6,), r"must come from a weight \[O, I\]"),
        ("layers.11.k.weight", (3, WIDTH + 1), "cannot be joined from its parts: their shapes are"),
        ("layers.11.k.bias", (), "cannot be joined from its parts: their shapes are"),
    ],
)
def test_shapes_that_do_not_come_together(name, shape, message):
    with pytest.raises(ValueError, match=message):
        to_native(lazy_all(to_hf(native(), RULES) | {name: torch.ones(shape)}), RULES)


def test_parts_of_several_precisions_join_without_loss():
    other = to_hf(native(), RULES)
    other["layers.11.k.bias"] = other["layers.11.k.bias"].bfloat16()
    joined = to_native(lazy_all(other), RULES)["blocks.11.fused.bias"]
    assert joined.dtype == joined.read().dtype == torch.float32
    assert torch.equal(joined.read(), native()["blocks.11.fused.bias"])


def test_knows_all():
    patterns = [rule.native for rule in RULES]
    assert knows_all(native(), patterns)
    assert not knows_all([*native(), "blocks.1.other.weight"], patterns)
    assert not knows_all(["in.weight.more"], patterns) and not knows_all(["in.scale"], patterns)
