"""Recomputation: the same numbers from less memory, with exactly the operators repeated that should be."""

import copy
import types
from collections import Counter
from functools import cache

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.activation_checkpoint import apply_activation_checkpoint, parse_selective_option, recomputed_blocks
from parallel.collectives import CollectiveCounter
from parallel.compile import apply_compile
from parallel.config import ActivationCheckpoint, Compile
from tests.distributed.ranks import run_ranks
from tests.unit.parallel.tiny_model import Result, blocks_of, build_tiny, largest_distance, make_inputs, run, shard

EXACT = 0.0  # the same kernels on the same numbers, only later
SHARDED = 2e-6  # fp32 rounding: ranks add up gradients of samples in another order; most in the few weights of a norm
NONE = ActivationCheckpoint(mode="none")
FULL = ActivationCheckpoint(mode="full")
HALF = ActivationCheckpoint(mode="full", ratio=0.5)
SECOND = ActivationCheckpoint(mode="selective", selective_ac_option="2")
OPERATORS = ActivationCheckpoint(mode="selective", selective_ac_option="op")
EAGER = {"full": FULL, "half": HALF, "second": SECOND, "operators": OPERATORS}


class Watch(TorchDispatchMode):
    """Counts operators, and the bytes that they have allocated and that are still there."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls[str(function).split(".")[1] if "." in str(function) else str(function)] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live_bytes(self, model: nn.Module) -> int:
        for parameter in model.parameters():
            self.storages.pop(parameter.untyped_storage().data_ptr(), None)
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def build(section: ActivationCheckpoint):
    model = build_tiny()
    apply_activation_checkpoint(blocks_of(model), section)
    return model


def watch(section: ActivationCheckpoint) -> tuple[int, Counter[str]]:
    """Bytes kept by the forward pass, operators of the backward pass."""
    model = build(section)
    with Watch() as forward:
        velocity_BTC = model(**make_inputs())
    kept = forward.live_bytes(model)
    with Watch() as backward:
        velocity_BTC.square().sum().backward()
    return kept, backward.calls


@cache
def expected() -> Result:
    return run(build_tiny())


@pytest.mark.parametrize(
    ("section", "count", "chosen"),
    [
        (NONE, 6, []),
        (FULL, 6, [0, 1, 2, 3, 4, 5]),
        (HALF, 6, [1, 3, 5]),
        (ActivationCheckpoint(mode="full", ratio=0.0), 6, []),
        (ActivationCheckpoint(mode="full", ratio=0.3), 10, [3, 6, 9]),
        (SECOND, 6, [1, 3, 5]),
        (ActivationCheckpoint(mode="selective", selective_ac_option="3"), 7, [2, 5]),
        (OPERATORS, 3, [0, 1, 2]),
        (ActivationCheckpoint(mode="memory_budget"), 6, []),
    ],
)
def test_which_blocks_are_recomputed(section, count, chosen):
    assert recomputed_blocks(section, count) == chosen


@pytest.mark.parametrize("percent", range(101))
def test_a_ratio_is_met_however_it_rounds(percent):
    assert len(recomputed_blocks(ActivationCheckpoint(mode="full", ratio=percent / 100), 100)) == percent


@pytest.mark.parametrize("text", ["0", "-1", "ops", "1.5", "", "²"])
def test_an_option_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match='must be "op", or n for every n-th block'):
        parse_selective_option(text)
    with pytest.raises(ValueError, match="selective_ac_option"):
        build(ActivationCheckpoint(mode="selective", selective_ac_option=text))


@pytest.mark.parametrize("name", EAGER)
def test_gradients_are_the_same(name):
    model = build(EAGER[name])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in build_tiny().named_parameters()]
    assert largest_distance(run(model), expected()) == EXACT


def test_a_block_that_differs_when_it_is_recomputed_is_noticed():
    """Control: the comparison above sees a single block whose second forward pass gives something else."""
    model = build_tiny()
    block = blocks_of(model)[2]
    calls = iter(range(1, 10))

    class Forgetful(type(block)):
        def forward(self, x_BSD, *args):
            return super().forward(x_BSD * next(calls), *args)

    block.__class__ = Forgetful
    apply_activation_checkpoint(blocks_of(model), FULL)
    assert largest_distance(run(model), expected()) > 1e-3


def test_what_is_kept_and_what_is_repeated():
    kept, calls = {}, {}
    for name, section in {"none": NONE, **EAGER}.items():
        kept[name], calls[name] = watch(section)
    assert kept["full"] < kept["operators"] < kept["second"] < kept["none"]
    assert kept["second"] == kept["half"]

    def products(name):
        return calls[name]["mm"] + calls[name]["addmm"] - calls["none"]["mm"] - calls["none"]["addmm"]

    attention = {name: calls[name]["_scaled_dot_product_flash_attention_for_cpu"] for name in calls}
    # Of six blocks the last is in either, and its first layer is two products: only one of them makes the text's part.
    assert products("full") - 1 == 2 * (products("half") - 1) > 0
    assert attention == {"none": 0, "full": 6, "half": 3, "second": 3, "operators": 0}
    assert products("operators") == 0
    assert calls["operators"]["gelu"] > calls["none"]["gelu"]  # the rest is repeated


def test_a_copy_of_a_block_recomputes_itself():
    model = build(FULL)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert largest_distance(run(other), expected()) == EXACT


@pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.slow), "operators"])
def test_compiled_blocks_recompute(name):
    torch._dynamo.reset()
    model = build(EAGER[name])
    apply_compile(blocks_of(model), Compile(enable=True, backend="aot_eager"))
    assert largest_distance(run(model), expected()) < SHARDED
    with Watch() as forward:
        velocity_BTC = model(**make_inputs())
    with Watch() as backward:
        velocity_BTC.square().sum().backward()
    assert forward.live_bytes(model) < 0.7 * watch(NONE)[0]
    products, plain = (calls["mm"] + calls["addmm"] for calls in (backward.calls, watch(NONE)[1]))
    assert (products > plain) == (name == "full")


def test_memory_budget_sets_the_compiler_and_other_modes_reset_it():
    blocks = blocks_of(build_tiny())
    apply_activation_checkpoint(blocks, ActivationCheckpoint(mode="memory_budget", memory_budget=0.25))
    assert torch._functorch.config.activation_memory_budget == 0.25
    assert not any("forward" in vars(block) for block in blocks)
    apply_activation_checkpoint(blocks, NONE)
    assert torch._functorch.config.activation_memory_budget == 1.0


@pytest.mark.slow
def test_memory_budget_keeps_less():
    kept = []
    for budget in (0.0, 0.5, 1.0):
        torch._dynamo.reset()
        model = build(ActivationCheckpoint(mode="memory_budget", memory_budget=budget))
        apply_compile(blocks_of(model), Compile(enable=True, backend="aot_eager"))
        assert largest_distance(run(model), expected()) < SHARDED
        with Watch() as forward:
            velocity_BTC = model(**make_inputs())
        kept.append(forward.live_bytes(model))
        del velocity_BTC
    apply_activation_checkpoint([], NONE)
    assert kept[0] < kept[1] < kept[2]


class Exchange(nn.Module):
    """Stands for context parallel attention: its result comes from other ranks."""

    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, x):
        return funcol.wait_tensor(funcol.all_to_all_single_autograd(x.sin(), None, None, self.group)).cos()


def _sharded(rank: int, world_size: int) -> dict[str, float]:
    answers = {}
    for name, section in {"full": FULL, "operators": OPERATORS}.items():
        model = build(section)
        shard(model, init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp_replicate", "fsdp")), torch.float32)
        own = run(model, {name: value[rank : rank + 1] for name, value in make_inputs().items()})
        whole = Result(expected().velocity_BTC[rank : rank + 1], expected().gradients)
        full = Result(own.velocity_BTC, {n: p.full_tensor() for n, p in own.gradients.items()})
        answers[name] = largest_distance(full, whole)
    group = torch.distributed.group.WORLD
    for name, section in {"none": NONE, "full": FULL, "operators": OPERATORS}.items():
        block = Exchange(group)
        apply_activation_checkpoint([block], section)
        x = torch.arange(4.0, requires_grad=True)
        with CollectiveCounter() as collectives:
            block(x).sum().backward()
        answers[f"exchanges_{name}"] = collectives.calls["all-to-all"]
    return answers


def test_two_ranks_recompute_under_fsdp_and_do_not_repeat_communication_per_operator():
    for answer in run_ranks(_sharded, 2):
        assert answer.pop("exchanges_none") == 2  # there and back
        assert answer.pop("exchanges_operators") == 2
        assert answer.pop("exchanges_full") == 3
        assert max(answer.values()) < SHARDED


def test_forward_is_a_method_of_the_block():
    block = blocks_of(build(FULL))[0]
    assert isinstance(block.forward, types.MethodType) and block.forward.__self__ is block
