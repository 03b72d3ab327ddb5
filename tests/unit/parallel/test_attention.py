"""Which kernel computes attention: by length and mask, the same numbers from each, and a word where one is missing."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from flux.model import Attention
from parallel import attention
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.attention import (
    KERNELS,
    SHORT_FOR_CUDNN,
    ChosenAttention,
    apply_attention_backend,
    check_attention,
    choose_kernels,
)
from parallel.compile import apply_compile
from parallel.config import ActivationCheckpoint, Compile
from tests.unit.parallel.tiny_model import blocks_of, build_tiny, largest_distance, make_inputs, run

TOLERANCE = 1e-5  # relative; fp32, sums in another order
PATTERN = "*_blocks.*.attention"
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


@pytest.mark.parametrize(
    ("tokens", "is_masked", "kernels"),
    [
        (512, False, [CUDNN, FLASH, EFFICIENT, MATH]),
        (SHORT_FOR_CUDNN, False, [CUDNN, FLASH, EFFICIENT, MATH]),
        (SHORT_FOR_CUDNN + 1, False, [FLASH, CUDNN, EFFICIENT, MATH]),
        (512, True, [EFFICIENT, CUDNN, MATH]),
        (4608, True, [EFFICIENT, CUDNN, MATH]),
    ],
)
def test_a_gpu_takes_the_fastest_that_can(tokens, is_masked, kernels):
    assert choose_kernels("auto", tokens, is_masked) == kernels


@pytest.mark.parametrize("wanted", KERNELS)
def test_a_named_kernel_has_no_stand_in(wanted):
    assert choose_kernels(wanted, 512, False) == choose_kernels(wanted, 4608, True) == [KERNELS[wanted]]


def test_a_cpu_is_left_as_it_is():
    model = build_tiny()
    apply_attention_backend(model, PATTERN, "auto", "cpu")
    assert all(type(block.attention) is Attention for block in blocks_of(model))


@pytest.fixture
def served(monkeypatch) -> list[SDPBackend]:
    """The kernels that were allowed at each call."""
    calls: list[SDPBackend] = []
    original = attention.F.scaled_dot_product_attention

    def noting(*args, **kwargs):
        calls.extend(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))
        return original(*args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noting)
    return calls


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("wanted", ["math", "flash"])
def test_kernels_agree(served, wanted, is_masked):
    inputs = make_inputs()
    if is_masked:
        inputs["txt_mask_BL"] = torch.arange(inputs["txt_BLE"].shape[1]).expand(2, -1) < 20
    plain, chosen = build_tiny(), build_tiny()
    apply_attention_backend(chosen, PATTERN, wanted, "cpu")
    assert list(chosen.state_dict()) == list(plain.state_dict())
    expected = run(plain, inputs)
    served.clear()
    assert largest_distance(run(chosen, inputs), expected) < TOLERANCE
    assert served == [KERNELS[wanted]] * len(blocks_of(chosen))
    if is_masked:  # control: the comparison sees the mask
        assert largest_distance(run(chosen, make_inputs()), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("wanted", ["math", "flash"])
def test_compiled_and_recomputed_blocks_keep_their_kernel(wanted, mode):
    torch._dynamo.reset()
    model, plain = build_tiny(), build_tiny()
    apply_attention_backend(model, PATTERN, wanted, "cpu")
    apply_activation_checkpoint(blocks_of(model), ActivationCheckpoint(mode, selective_ac_option="op"))
    apply_compile(blocks_of(model), Compile(enable=True, backend="aot_eager"))  # which raises where a graph breaks
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    assert largest_distance(run(model), run(plain)) < TOLERANCE
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


def test_what_is_compiled_runs_the_wanted_kernel():
    torch._dynamo.reset()
    x_BSNK = torch.randn(1, 16, 2, 16)
    names = {}
    for wanted in ("math", "flash"):
        compiled = torch.compile(ChosenAttention(Attention(), wanted), fullgraph=True, backend="aot_eager")
        with torch.profiler.profile() as profile, torch.no_grad():
            compiled(x_BSNK, x_BSNK, x_BSNK)
        names[wanted] = {event.key for event in profile.key_averages()}
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert flash in names["flash"] and flash not in names["math"]


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("wanted", ["auto", "math", "flash"])
def test_a_cpu_has_these(wanted, is_masked):
    for dtype in (torch.float32, torch.bfloat16):
        check_attention(wanted, "cpu", dtype, is_masked)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cudnn", ' does not run on this cpu in bfloat16: use "flash", "math" or "auto"'),
        ("efficient", ' does not run on this cpu in bfloat16: use "flash", "math" or "auto"'),
        ("flash3", " (the package flash_attn_interface, on a GPU of compute capability 9) does not run on this cpu"),
    ],
)
def test_a_missing_kernel_is_told(wanted, message):
    with pytest.raises(ValueError) as caught:
        check_attention(wanted, "cpu", torch.bfloat16, False)
    assert str(caught.value).startswith(f'model.attention_backend="{wanted}"{message}') and "\n" not in str(
        caught.value
    )


def test_flash3_is_used_where_it_is_installed_and_can_run(monkeypatch, caplog):
    active: list[str] = []
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: active[-1] if active else None)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", active.clear)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert attention.use_flash3(True) and active == ["FA3"]
    assert not attention.use_flash3(False) and not active
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert not attention.use_flash3(True) and not active
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def fail(name):
        raise ImportError("undefined\nsymbol")

    monkeypatch.setattr(attention, "activate_flash_attention_impl", fail)
    assert not attention.use_flash3(True)
    assert "flash_attn_interface does not load, FlashAttention-2 stands in: undefined symbol" in caplog.text
