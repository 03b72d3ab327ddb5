"""Code that must not wait for the device: it may not look at a number that is computed there."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class Unread(TorchDispatchMode):
    """Inside, reading a number is an AssertionError: `item`, `if`, `float` and what selects by a mask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
