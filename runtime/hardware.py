"""What accelerators can do, as their makers say: plain data for plans and for shares of the peak; and CPU cores to use.

No torch here.
"""

import os
from dataclasses import dataclass


def usable_cores() -> int:
    """The CPU cores that this process may run on: a container or a job system may give it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Accelerator:
    """One chip in the kind of server that it is usually sold in.

    Args:
        name: short, such as "h100".
        device_names: what `torch.cuda.get_device_name()` calls it. Other boards with the same chip (PCIe, NVL) are
            slower, and are not meant.
        bf16_tflops: dense matrix products with float32 sums, 10^12 floating-point operations per second.
        fp8_tflops: the same of 8-bit operands; None: the hardware has no such products.
        memory_gib: what a program can allocate, GiB; a few percent less than the maker's GB.
        memory_gb_per_s: of that memory, 10^9 bytes per second.
        link_gb_per_s: to the other accelerators of the server, in one direction; collectives reach about three
            quarters of it.
        network_gb_per_s: to other servers, in one direction; it is the server's, so another cluster may have less.
    """

    name: str
    device_names: tuple[str, ...]
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float


def _amd(model: str) -> tuple[str, ...]:
    """The names of a whole card, and of one that is handed through to a virtual machine."""
    return tuple(f"AMD Instinct {model}{suffix}" for suffix in ("", " OAM", " VF"))


# Speeds and bandwidths: the makers' datasheets, where NVIDIA's give products with sparsity, twice the dense ones here.
# (A100 80GB, H100, H200 Tensor Core GPU; HGX B200 and B300; GB200 and GB300 NVL72; Ada architecture whitepaper; L40S;
# Instinct MI300X, MI325X, MI355X.) Memory: what PyTorch reports. Network: one NIC for each GPU in the makers' servers.
ACCELERATORS = {
    one.name: one
    for one in (
        Accelerator("a100", ("NVIDIA A100-SXM4-80GB",), 312, None, 79.1, 2039, 300, 25),
        Accelerator("h100", ("NVIDIA H100 80GB HBM3",), 989, 1979, 79.1, 3350, 450, 50),
        Accelerator("h200", ("NVIDIA H200",), 989, 1979, 139.8, 4800, 450, 50),
        Accelerator("b200", ("NVIDIA B200",), 2250, 4500, 178.3, 8000, 900, 50),
        Accelerator("b300", ("NVIDIA B300 SXM6 AC",), 2250, 4500, 267.6, 8000, 900, 100),
        Accelerator("gb200", ("NVIDIA GB200",), 2500, 5000, 184.3, 8000, 900, 50),
        Accelerator("gb300", ("NVIDIA GB300",), 2500, 5000, 276.5, 8000, 900, 100),
        Accelerator("mi300x", _amd("MI300X"), 1307, 2615, 191.9, 5300, 448, 50),
        Accelerator("mi325x", _amd("MI325X"), 1307, 2615, 255.9, 6000, 448, 50),
        Accelerator("mi355x", _amd("MI355X"), 2517, 5033, 287.9, 8000, 537, 50),
        # Without links of their own: PCIe 4.0 with 16 lanes, and the network of a workstation and of a server.
        Accelerator("rtx4090", ("NVIDIA GeForce RTX 4090",), 165, 330, 23.6, 1008, 32, 1.25),
        Accelerator("l40s", ("NVIDIA L40S",), 362, 733, 44.4, 864, 32, 12.5),
    )
}


def find_accelerator(device_name: str) -> Accelerator | None:
    """The accelerator that torch calls `device_name`; None: it is not known."""
    return next((one for one in ACCELERATORS.values() if device_name in one.device_names), None)
