"""How memory that runs out is told from other faults."""

import torch

# What others than a device's own allocator say, where the model is trained on that kind of device.
_SAYINGS = {"cpu": ("can't allocate memory",), "cuda": ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")}


def is_out_of_memory(error: BaseException | None, device_type: str) -> bool:
    """Whether the memory that the model is trained in was too small.

    The host's memory is another one where that is a GPU's: what makes room in one may take it from the other.

    Args:
        device_type: "cpu" or "cuda", where the model is trained.
    """
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, MemoryError) and device_type == "cpu"):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS[device_type])
