"""The same bits from run to run, also where a GPU's fastest kernels add up in an order of their own."""

import os

import torch


def apply_determinism(enable: bool, warn_only: bool) -> None:
    """Lets torch use deterministic kernels only; an operation that has none raises, or warns with `warn_only`."""
    if not enable:
        return
    # cuBLAS reads it when it starts; without it torch refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
