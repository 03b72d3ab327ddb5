"""What the machine could compute at best, and what share of that training makes of it."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

SIDES = {"cuda": 8192, "cpu": 1024}  # of the square matrices that are multiplied
SECONDS = {"cuda": 0.3, "cpu": 0.1}  # for which that is repeated
IN_A_ROW = {"cuda": 10, "cpu": 1}  # so many together, so that a GPU need not wait for the host


@dataclass(frozen=True)
class Peaks:
    """Of all processes together, in 10^12 floating-point operations per second.

    Args:
        matmul: measured in large matrix products.
        datasheet: what the makers promise for bfloat16; None: the hardware is not known.
    """

    matmul: float
    datasheet: float | None

    def shares(self, tflops: float) -> dict[str, float]:
        """matmul_percent and, on known hardware, mfu_percent (model FLOPs utilization, arXiv 2204.02311)."""
        shares = {"matmul_percent": 100 * tflops / self.matmul}
        return shares if self.datasheet is None else shares | {"mfu_percent": 100 * tflops / self.datasheet}

    def describe(self) -> str:
        """Such as `6150.2 TFLOP/s in matrix products (datasheet: 7912 in bfloat16)`."""
        promised = "" if self.datasheet is None else f" (datasheet: {self.datasheet:g} in bfloat16)"
        return f"{round(self.matmul, 3):g} TFLOP/s in matrix products{promised}"


@torch.no_grad()
def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """10^12 floating-point operations per second of this process in large square matrix products: the best of several.

    Of random numbers: with zeros a GPU takes less power, and is faster than it ever is in training. The random state
    stays as it is, and no memory is kept; the GPU's peak of allocated memory begins anew.
    """
    kind = device.type
    side, generator = SIDES[kind], torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.mm(left, right)  # also chooses kernels and wakes threads
    best, started = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - started < SECONDS[kind]:
        best = min(best, _time_products(left, right, product))
    if kind == "cuda":
        del left, right, product
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return 2 * side**3 / best / 1e12


def _time_products(left: Tensor, right: Tensor, product: Tensor) -> float:
    """Seconds of one."""
    count = IN_A_ROW[left.device.type]
    started = _now(left.device)
    for _ in range(count):
        torch.mm(left, right, out=product)
    return (_now(left.device) - started) / count


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
