"""Context parallelism: outputs and gradients are one process's, and a layer moves the bytes that it should."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flux.model import Attention, FluxTransformer
from flux.positions import image_ids
from flux.spec import SPECS
from parallel import context_parallel
from parallel.context_parallel import (
    AllGatherAttention,
    RingAttention,
    UlyssesAttention,
    apply_context_parallel,
    attend_block,
    attend_block_backward,
    attend_nothing,
    gather_sequence,
    merge,
    shard_sequence,
)
from tests.distributed.ranks import run_ranks

TOLERANCE = 1e-6  # relative; fp32 rounding of one layer of attention whose sums run in another order
BF16_TOLERANCE = 0.02  # relative; bf16 keeps 8 bits of inputs, outputs and sums over ranks
MODEL_TOLERANCE = 5e-6  # relative; fp32 rounding of one layer, grown through six blocks with large weights
FAULT = 0.05  # relative; every fault put in on purpose shows by more than this

METHODS = {"ulysses": UlyssesAttention, "allgather": AllGatherAttention, "ring": RingAttention}
BATCH, TEXT, IMAGE, HEAD_DIM = 2, 8, 20, 16


class Layer(nn.Module):
    """Something with an attention in it."""

    def __init__(self, attention: nn.Module | None = None):
        super().__init__()
        self.attention = attention or Attention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return 2 * self.attention(q, k, v, mask)


class CausalAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def build_mesh(world_size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("cp",))


def share(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`[text, image]` of all ranks -> of this one."""
    parts = dict(zip(("text", "image"), x.split((TEXT, IMAGE), dim=1), strict=True))
    return torch.cat(list(shard_sequence(parts, parts, mesh).values()), dim=1).clone()


def attend(layer: nn.Module, tensors: list[Tensor], mask: Tensor | None, weight: Tensor) -> list[Tensor]:
    """Output and the gradients of q, k and v, of a loss in which every output counts differently."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    output = layer(*leaves, mask)
    (output * weight).sum().backward()
    return [output.detach(), *(x.grad for x in leaves)]


@contextmanager
def gradients_of_others_lost():
    """Each ring backward keeps what a rank's queries add to its own keys and forgets the rest."""
    calls, right = count(), context_parallel.attend_block_backward

    def wrong(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = right(*args)
        own = next(calls) % dist.get_world_size() == 0
        return dq, dk * own, dv * own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_parallel, "attend_block_backward", wrong)
        yield


def recompute_all_but_attention(forward, *args):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "attention" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    context = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=context)


class Case(NamedTuple):
    """One comparison; `variant` is a way of running, or a fault."""

    method: str
    variant: str = ""
    masked: bool = False
    heads: int = 4
    dtype: torch.dtype = torch.float32


def compare_attentions(rank: int, world_size: int, cases: list[Case]) -> list[list[float]]:
    return [compare_attention(world_size, case) for case in cases]


def compare_attention(world_size: int, case: Case) -> list[float]:
    """Distances of this rank's output and gradients of q, k, v from its share of one process's."""
    mesh = build_mesh(world_size)
    if case.variant == "one axis of two":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "cp"))["cp"]
    generator, tokens = torch.Generator().manual_seed(0), TEXT + IMAGE
    q, k, v, weight = (torch.randn(BATCH, tokens, case.heads, HEAD_DIM, generator=generator) for _ in range(4))
    mask = None
    if case.masked:  # of the second prompt only the last rank has tokens
        mask = torch.arange(tokens).expand(BATCH, -1) >= torch.tensor([[1], [TEXT - TEXT // world_size]])
    expected = [share(x, mesh) for x in attend(Layer(), [q, k, v], mask, weight)]

    layer = Layer(CausalAttention() if case.variant == "causal" else None)
    if case.variant != "own keys":
        apply_context_parallel(layer, "attention", mesh, case.method)
        assert isinstance(layer.attention, METHODS[case.method])
    if case.variant == "compiled":
        layer.compile(fullgraph=True, backend="aot_eager")
    if case.variant == "recomputed":
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if case.variant == "recomputed in part":
        layer.forward = partial(recompute_all_but_attention, layer.forward)
    inputs = [share(x, mesh).to(case.dtype) for x in (q, k, v)]
    with gradients_of_others_lost() if case.variant == "lost gradients" else nullcontext():
        local_mask = None if mask is None else share(mask, mesh)
        if local_mask is not None and case.variant == "mask turned around":
            local_mask = local_mask.flip(1)
        found = attend(layer, inputs, local_mask, share(weight, mesh).to(case.dtype))
    assert {x.dtype for x in found} == {case.dtype} and {type(x) for x in found} == {Tensor}
    return [distance(a, b) for a, b in zip(found, expected, strict=True)]


def distances(world_size: int, cases: list[Case]) -> dict[Case, list[float]]:
    """Of output, dq, dk and dv, the largest distance on any rank."""
    answers = run_ranks(compare_attentions, world_size, cases)
    by_case = zip(cases, *answers, strict=True)
    return {case: [max(column) for column in zip(*found, strict=True)] for case, *found in by_case}


# --- one layer of attention


@pytest.mark.parametrize(("world_size", "heads"), [(2, 4), (4, 8)])
def test_attention_is_one_process_s(world_size, heads):
    cases = [Case(method, masked=masked, heads=heads) for method in METHODS for masked in (False, True)]
    cases.remove(Case("ring", masked=True, heads=heads))
    for case, found in distances(world_size, cases).items():
        assert max(found) < TOLERANCE, (case, found)


def test_attention_in_bf16():
    for case, found in distances(2, [Case(method, dtype=torch.bfloat16) for method in METHODS]).items():
        assert TOLERANCE < max(found) < BF16_TOLERANCE, (case, found)


def test_the_axis_may_be_one_of_several():
    for case, found in distances(4, [Case(method, "one axis of two") for method in METHODS]).items():
        assert max(found) < TOLERANCE, (case, found)


def test_attention_compiles_without_graph_breaks():
    cases = [Case(method, "compiled", masked) for method in METHODS for masked in (False, True)]
    cases.remove(Case("ring", "compiled", True))
    for case, found in distances(2, cases).items():
        assert max(found) < TOLERANCE, (case, found)


def test_attention_recomputes():
    cases = [Case(method, f"recomputed{part}", method != "ring") for method in METHODS for part in ("", " in part")]
    for case, found in distances(2, cases).items():
        assert max(found) < TOLERANCE, (case, found)


def test_the_comparison_sees_faults():
    cases = [Case(method, "causal") for method in ("ulysses", "allgather")]
    cases += [Case(method, "mask turned around", masked=True) for method in ("ulysses", "allgather")]
    cases += [Case("none", "own keys")]
    ring = Case("ring", "lost gradients")
    found = distances(2, [*cases, ring])
    assert min(min(found[case]) for case in cases) > FAULT, found
    output, dq, dk, dv = found[ring]
    assert max(output, dq) < TOLERANCE and min(dk, dv) > FAULT, found


def devices() -> list:
    gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    return ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_keys_add_up(device, dtype):
    """What a ring does, on one device: any split of the keys gives attention to all, and its gradients."""
    tolerance = TOLERANCE if dtype is torch.float32 and device == "cpu" else BF16_TOLERANCE  # GPUs may use TF32
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, 21, 4, 32, generator=generator) for _ in range(4))
    expected = attend(Attention(), [q, k, v], None, weight)
    q, k, v, weight = (x.to(device, dtype) for x in (q, k, v, weight))
    (k1, k2), (v1, v2) = k.split((8, 13), dim=1), v.split((8, 13), dim=1)

    attn, lse = merge(*merge(*attend_nothing(q), *attend_block(q, k1, v1)), *attend_block(q, k2, v2))
    assert attn.dtype == lse.dtype == torch.float32 and lse.shape == (2, 4, 21)
    dq1, dk1, dv1 = attend_block_backward(weight, q, k1, v1, attn.to(dtype), lse)
    dq2, dk2, dv2 = attend_block_backward(weight, q, k2, v2, attn.to(dtype), lse)
    found = [attn, dq1 + dq2, torch.cat((dk1, dk2), dim=1), torch.cat((dv1, dv2), dim=1)]
    assert all(distance(a.cpu(), b) < tolerance for a, b in zip(found, expected, strict=True))

    _, lse1 = attend_block(q, k1, v1)  # control: a block's own log-sum-exp in the place of everyone's
    wrong = attend_block_backward(weight, q, k1, v1, attn.to(dtype), lse1.contiguous())
    assert distance(wrong[2].cpu(), expected[3][:, :8]) > FAULT


def test_the_kernels_of_other_devices_take_these_arguments():
    """Shapes only: meta tensors take the way of CUDA."""
    q, k, v, grad = (torch.randn(2, length, 4, 32, device="meta") for length in (21, 8, 8, 21))
    attn, lse = attend_block(q, k, v)
    assert attn.shape == q.shape and lse.shape == (2, 4, 21)
    assert [x.shape for x in attend_block_backward(grad, q, k, v, attn, lse)] == [q.shape, k.shape, v.shape]


# --- sequences


def round_trip(rank: int, world_size: int) -> list[bool]:
    mesh = build_mesh(world_size)
    tensors = {
        "img": torch.arange(2 * 12 * 3.0).reshape(2, 12, 3),
        "ids": torch.arange(12).expand(2, 12),
        "mask": torch.arange(12).expand(2, 12) > 4,
        "none": None,
        "t": torch.arange(12.0),
    }
    mine = shard_sequence(tensors, {"img", "ids", "mask", "none"}, mesh)
    size, kept = 12 // world_size, mine["none"] is None and mine["t"] is tensors["t"]
    right = [torch.equal(mine[name], tensors[name][:, rank * size :][:, :size]) for name in ("img", "ids", "mask")]
    back = [torch.equal(gather_sequence(mine[name], mesh), tensors[name]) for name in ("img", "ids", "mask")]
    swapped = gather_sequence(mine["ids"].flip(1), mesh)  # control
    return [kept, *right, *back, not torch.equal(swapped, tensors["ids"])]


@pytest.mark.parametrize("world_size", [2, 4])
def test_sequences_are_shared_and_put_together(world_size):
    assert all(all(answer) for answer in run_ranks(round_trip, world_size))


@pytest.fixture
def fake_mesh(request):
    """A mesh of `request.param` ranks of which only this process is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield build_mesh(request.param)
    dist.destroy_process_group()


@pytest.mark.parametrize("fake_mesh", [5], indirect=True)
def test_a_length_that_the_degree_does_not_divide(fake_mesh):
    with pytest.raises(ValueError, match=r"context_parallel_degree=5 must divide the 12 tokens of img"):
        shard_sequence({"img": torch.zeros(2, 12, 3)}, ["img"], fake_mesh)


# --- the whole transformer


def build_transformer() -> FluxTransformer:
    """Weights large enough that every branch matters: fresh ones have closed gates."""
    model, generator = FluxTransformer(SPECS["flux-tiny"].transformer), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6 / parameter.shape[-1] ** 0.5, generator=generator)
    return model


def make_inputs(masked: bool) -> tuple[dict[str, Tensor | None], Tensor]:
    spec, generator = SPECS["flux-tiny"], torch.Generator().manual_seed(1)
    config = spec.transformer
    img, target = torch.randn(2, BATCH, 4 * 6, config.in_channels, generator=generator)
    inputs = {
        "img_BTC": img,
        "img_ids_BTA": image_ids(spec.positions, 4, 6).expand(BATCH, -1, -1),
        "txt_BLE": torch.randn(BATCH, TEXT, config.context_dim, generator=generator),
        "txt_ids_BLA": torch.zeros(BATCH, TEXT, 3, dtype=torch.int64),
        "t_B": torch.tensor([0.3, 0.8]),
        "pooled_BV": torch.randn(BATCH, config.pooled_dim or 0, generator=generator),
        "txt_mask_BL": torch.arange(TEXT).expand(BATCH, -1) < torch.tensor([[5], [TEXT]]) if masked else None,
    }
    return inputs, target


def train_step(model: nn.Module, inputs: dict, target: Tensor) -> dict[str, Tensor]:
    """Loss and gradients, by name."""
    model.zero_grad()
    loss = (model(**inputs) - target).square().sum() / target.shape[-1]
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def compare_transformers(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[float]:
    """Largest distance from one process of the loss and of any parameter's gradient, summed over ranks, per case."""
    mesh, found = build_mesh(world_size), []
    for method, fault in cases:
        model = build_transformer()
        inputs, target = make_inputs(masked=method != "ring")
        expected = {name: value.clone() for name, value in train_step(model, inputs, target).items()}
        if fault == "causal":
            for block in (*model.double_blocks, *model.single_blocks):
                block.attention = CausalAttention()
        apply_context_parallel(model, "*_blocks.*.attention", mesh, method)
        if fault == "positions":  # every rank believes that it holds the first tokens
            inputs["img_ids_BTA"] = inputs["img_ids_BTA"].roll(rank * 24 // world_size, dims=1)
        inputs = shard_sequence(inputs, [name for name in inputs if name.startswith(("img", "txt"))], mesh)
        target = shard_sequence({"target": target}, ["target"], mesh)["target"]
        with gradients_of_others_lost() if fault == "lost gradients" else nullcontext():
            sums = train_step(model, inputs, target)
        for value in sums.values():
            dist.all_reduce(value)
        found.append(max(distance(sums[name], expected[name]) for name in expected))
    return found


def test_the_transformer_is_one_process_s():
    faults = [("ulysses", "causal"), ("allgather", "positions"), ("ring", "lost gradients")]
    for found in run_ranks(compare_transformers, 2, [(method, "") for method in METHODS] + faults):
        assert max(found[:3]) < MODEL_TOLERANCE, found
        assert min(found[3:]) > FAULT, found  # the same comparison with a fault put in


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fake_mesh", [2], indirect=True)
def test_every_attention_is_replaced_and_no_name_changes(method, fake_mesh):
    with torch.device("meta"):
        model = FluxTransformer(SPECS["flux-tiny"].transformer)
    names = list(model.state_dict())
    before = {name for name, module in model.named_modules() if isinstance(module, Attention)}
    apply_context_parallel(model, "*_blocks.*.attention", fake_mesh, method)
    after = {name for name, module in model.named_modules() if isinstance(module, METHODS[method])}
    assert len(before) == 6 and before == after
    assert list(model.state_dict()) == names == [name for name, _ in model.named_parameters()]
    inner = sum(type(module) is Attention for module in model.modules())
    assert inner == (0 if method == "ring" else 6)


@pytest.mark.parametrize("fake_mesh", [2], indirect=True)
def test_patterns_that_fit_nothing_or_something_with_parameters(fake_mesh):
    for pattern, error, message in (
        ("attentoin", ValueError, "no module of Layer is called attentoin"),
        ("attention", AssertionError, "attention has parameters"),
    ):
        with pytest.raises(error, match=message):
            apply_context_parallel(Layer(nn.Linear(2, 2)), pattern, fake_mesh, "ulysses")


@pytest.mark.parametrize("fake_mesh", [2], indirect=True)
def test_what_a_method_cannot_do(fake_mesh):
    q, mask = torch.zeros(1, 4, 3, 8), torch.ones(1, 4, dtype=torch.bool)
    for method, given, message in (("ring", mask, "no mask"), ("ulysses", None, "3 heads cannot be shared by 2")):
        layer = Layer()
        apply_context_parallel(layer, "attention", fake_mesh, method)
        with pytest.raises(AssertionError, match=message):
            layer(q, q, q, given)


# --- what it moves


class CountTraffic(TorchDispatchMode):
    """Counts collectives, and the bytes that other ranks send to this one."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.calls, self.bytes = ranks, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and name not in {"wait_tensor", "_wrap_tensor_autograd"}:
            received = {"all_gather_into_tensor": result.nbytes * (self.ranks - 1) // self.ranks}
            if name == "all_to_all_single":
                sizes = args[1]  # of what comes from each rank; this process is rank 0
                received[name] = result.nbytes * sum(sizes[1:]) // sum(sizes)
            self.calls[name] += 1
            self.bytes += received[name]
        return result


def traffic(method: str, mesh: DeviceMesh, tokens: int = 4096 + 512) -> CountTraffic:
    """Of a layer of flux-dev in bf16 at 1024 px, forward."""
    ranks, config = mesh.size(), SPECS["flux-dev"].transformer
    layer = Layer()
    apply_context_parallel(layer, "attention", mesh, method)
    shape = (1, tokens // ranks, config.num_heads, config.head_dim)
    q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, device="meta") for _ in range(3))
    with CountTraffic(ranks) as count:
        assert layer(q, k, v, None).shape == shape
    return count


@pytest.mark.parametrize("fake_mesh", [8], indirect=True)
def test_ulysses_moves_a_quarter_of_what_gathering_does(fake_mesh):
    counts = {method: traffic(method, fake_mesh) for method in METHODS}
    assert counts["ulysses"].calls == {"all_to_all_single": 2}
    assert counts["allgather"].calls == {"all_gather_into_tensor": 1}
    assert counts["ring"].calls == {"all_to_all_single": 7}
    queries = 4608 // 8 * 3072 * 2  # bytes of one rank's share
    assert counts["ulysses"].bytes == 4 * queries * 7 // 8
    assert counts["allgather"].bytes == counts["ring"].bytes == 2 * 7 * queries
    assert counts["ulysses"].bytes <= counts["allgather"].bytes / 4


@pytest.mark.parametrize("fake_mesh", [4], indirect=True)
def test_a_quarter_takes_eight_ranks(fake_mesh):
    """The count's control: with half of the ranks the two are closer."""
    assert traffic("ulysses", fake_mesh).bytes == traffic("allgather", fake_mesh).bytes / 2
