"""Which of torch's kernels computes attention: chosen by length, from outside of the modules that call it.

On an H100 with heads of 128 dims cuDNN's is the fastest up to about 1024 tokens and FlashAttention-3 above (arXiv
2407.08608). That one is a package of its own, which torch calls in place of its own FlashAttention-2.
"""

import importlib.util
import logging
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from parallel.names import find_modules

log = logging.getLogger(__name__)

SHORT_FOR_CUDNN = 1024  # tokens
FLASH3_PACKAGE, FLASH3_CAPABILITY = "flash_attn_interface", 9
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def choose_kernels(wanted: str, tokens: int, is_masked: bool) -> list[SDPBackend]:
    """What may compute attention on a GPU, best first: torch takes the first that can.

    Args:
        wanted: model.attention_backend.
        tokens: that are attended to.
        is_masked: which FlashAttention cannot be.
    """
    if wanted != "auto":
        return [KERNELS[wanted]]
    if is_masked:
        return [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if tokens > SHORT_FOR_CUDNN:
        fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    return [*fast, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class ChosenAttention(nn.Module):
    """Calls the module that was there, with the kernels that may serve it."""

    def __init__(self, inner: nn.Module, wanted: str):
        super().__init__()
        self.inner, self.wanted = inner, wanted

    def forward(self, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        with sdpa_kernel(choose_kernels(self.wanted, k_BSNK.shape[1], mask_BS is not None), set_priority=True):
            return self.inner(q_BSNK, k_BSNK, v_BSNK, mask_BS)


def apply_attention_backend(model: nn.Module, attention: str, wanted: str, device_type: str) -> None:
    """Lets the wanted kernel serve every module whose name matches the pattern `attention`, in place.

    On a CPU "auto" changes nothing. Whether torch's FlashAttention is the third holds for the whole process.
    """
    if device_type == "cpu" and wanted == "auto":
        return
    use_flash3(device_type == "cuda" and wanted in ("auto", "flash3"))
    for name, inner in find_modules(model, [attention]).items():
        model.set_submodule(name, ChosenAttention(inner, wanted))


def use_flash3(wanted: bool) -> bool:
    """Puts FlashAttention-3 in the place of torch's own, or takes it away. Whether it is there now."""
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    if not wanted or importlib.util.find_spec(FLASH3_PACKAGE) is None:
        return False
    if torch.cuda.get_device_capability()[0] != FLASH3_CAPABILITY:
        return False
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch
        log.warning("%s does not load, FlashAttention-2 stands in: %s", FLASH3_PACKAGE, " ".join(str(error).split()))
        return False
    return True


def check_attention(wanted: str, device_type: str, dtype: torch.dtype, is_masked: bool) -> None:
    """Tries the wanted kernel, which would fail only in the first step.

    Args:
        wanted: model.attention_backend.
        dtype: of the computation.
        is_masked: encoder.mask_padding.

    Raises:
        ValueError: it does not run here.
    """
    if wanted == "auto" or _runs(wanted, device_type, dtype, is_masked):
        return
    running = [f'"{name}"' for name in KERNELS if name != wanted and _runs(name, device_type, dtype, is_masked)]
    case = f"{device_type} in {str(dtype).removeprefix('torch.')}{', with encoder.mask_padding=true' * is_masked}"
    needs = f" (the package {FLASH3_PACKAGE}, on a GPU of compute capability 9)" if wanted == "flash3" else ""
    raise ValueError(
        f'model.attention_backend="{wanted}"{needs} does not run on this {case}: use {", ".join(running)} or "auto"'
    )


def _runs(name: str, device_type: str, dtype: torch.dtype, is_masked: bool) -> bool:
    """Forward and backward, on a few tokens."""
    if use_flash3(device_type == "cuda" and name == "flash3") != (name == "flash3"):
        return False
    x_BNSK = torch.zeros(1, 1, 16, 128, dtype=dtype, device=device_type, requires_grad=True)
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool, device=device_type) if is_masked else None
    try:
        with warnings.catch_warnings(action="ignore"), sdpa_kernel(KERNELS[name]):  # which tell why not
            F.scaled_dot_product_attention(x_BNSK, x_BNSK, x_BNSK, attn_mask=mask).sum().backward()
    except RuntimeError:
        return False
    return True
