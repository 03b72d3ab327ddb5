"""Compilation: the same numbers, one code for all blocks of a kind, a word when a compiler is missing."""

import importlib.util
import shutil
from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters

from flux.flow import squared_errors
from flux.model import FluxTransformer
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.compile import apply_compile, check_compiler, compile_loss
from parallel.config import ActivationCheckpoint, Compile
from tests.unit.parallel.tiny_model import CONFIG, blocks_of, build_tiny, fill, largest_distance, run

# fp32: the compiler turns queries and keys in real arithmetic and adds up in another order.
TOLERANCE = 1e-5
TRACED = Compile(enable=True, backend="aot_eager")
GENERATED = Compile(enable=True, backend="inductor")
KINDS = 3  # of blocks: double, single, and the last single one, which leaves the text out
TORCHS_LIMIT = 8  # variants of one function, by default


@pytest.fixture(autouse=True)
def no_code_yet():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "section", [TRACED, pytest.param(GENERATED, marks=pytest.mark.slow)], ids=["traced", "generated"]
)
def test_compiled_blocks_compute_the_same(section):
    model, plain = build_tiny(), build_tiny()
    apply_compile(blocks_of(model), section)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert largest_distance(run(model), run(plain)) < TOLERANCE
    assert graphs() == KINDS and not counters["graph_break"]
    with torch.no_grad():  # control: the comparison sees one weight
        blocks_of(plain)[-1].linear2.weight[0, 0] += 0.1
    assert largest_distance(run(model), run(plain)) > 10 * TOLERANCE


def test_blocks_of_one_kind_share_their_code():
    config = replace(CONFIG, hidden_size=64, num_heads=2, depth=5, depth_single=20)
    model = FluxTransformer(config)
    fill(model)
    apply_compile(blocks_of(model), TRACED)
    run(model)
    assert graphs() == KINDS


def test_a_second_size_makes_code_for_every_size():
    """Training and validation of recomputed blocks at many sizes: more variants of one function than torch's limit."""

    class Sine(nn.Module):
        def forward(self, x):
            return x.sin()

    class Cosine(nn.Module):
        def forward(self, x):
            return x.cos()

    class Tangent(nn.Module):
        def forward(self, x):
            return x.tan()

    blocks = [Sine(), Cosine(), Tangent()]
    apply_activation_checkpoint(blocks, ActivationCheckpoint(mode="full"))
    apply_compile(blocks, TRACED)
    made = []
    for size in range(2, 7):
        x = torch.arange(float(size), requires_grad=True)
        for block, function in zip(blocks, (torch.sin, torch.cos, torch.tan), strict=True):
            torch.testing.assert_close(block(x), function(x))
            with torch.no_grad():
                block(x)
        made.append(graphs())
    assert made[-1] == made[1] > TORCHS_LIMIT


@pytest.mark.parametrize(
    ("section", "blocks", "loss"),
    [
        (TRACED, True, True),
        (replace(TRACED, components=["loss"]), False, True),
        (replace(TRACED, components=["model"]), True, False),
        (replace(TRACED, enable=False), False, False),
    ],
)
def test_only_what_is_listed_is_compiled(section, blocks, loss):
    block = nn.Linear(2, 2)
    apply_compile([block], section)
    assert (block._compiled_call_impl is not None) == blocks
    assert (compile_loss(squared_errors, section) is not squared_errors) == loss


def test_compiled_loss():
    generator = torch.Generator().manual_seed(0)
    velocity_BTC, target_BTC = torch.randn(2, 2, 6, 4, generator=generator)
    arguments = (velocity_BTC, target_BTC)
    expected = squared_errors(*arguments)
    torch.testing.assert_close(compile_loss(squared_errors, TRACED)(*arguments), expected, rtol=TOLERANCE, atol=0)
    assert graphs() == 1


def test_a_block_of_several_graphs_is_refused():
    class Broken(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    block = Broken()
    apply_compile([block], TRACED)
    with pytest.raises(Exception, match="graph_break"):
        block(torch.ones(1))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r'compile.backend="inductr" is no backend of torch: use .*inductor'):
        check_compiler(replace(TRACED, backend="inductr"), "cpu")
    check_compiler(replace(TRACED, backend="inductr", enable=False), "cpu")
    check_compiler(TRACED, "cpu")


def test_missing_compiler_on_cpu():
    # Its own patch: pytest's leaves a setting of the compiler behind as one that does not exist.
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(ValueError, match=r"needs a C\+\+ compiler: install g\+\+.*compile.backend=aot_eager"):
        check_compiler(GENERATED, "cpu")
    check_compiler(TRACED, "cpu")


def test_missing_compilers_on_cuda(monkeypatch):
    found = {"triton": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name])
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match=r"on cuda needs triton: .*compile\.enable=false"):
        check_compiler(GENERATED, "cuda")
    found["triton"] = object()
    with pytest.raises(ValueError, match="needs a C compiler for triton: install gcc"):
        check_compiler(GENERATED, "cuda")
    monkeypatch.setenv("CC", "cc")
    check_compiler(GENERATED, "cuda")
