"""Memory that runs out in the place where the model is trained, and what only looks like it."""

import pytest
import torch

from training.out_of_memory import is_out_of_memory


def fill_memory() -> RuntimeError:
    """What torch really says on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "devices"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), {"cpu", "cuda"}),
        (RuntimeError("CUDA error: out of memory"), {"cuda"}),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), {"cuda"}),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), {"cuda"}),
        (fill_memory(), {"cpu"}),
        (MemoryError(), {"cpu"}),
        (RuntimeError("CUDA error: device-side assert triggered"), set()),
        (ValueError("out of memory"), set()),
        (None, set()),
    ],
)
def test_the_memory_that_counts_is_the_models(error, devices):
    assert {device for device in ("cpu", "cuda") if is_out_of_memory(error, device)} == devices
