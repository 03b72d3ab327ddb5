"""A few layers, one for each way in which a parameter is spread, on the layouts that parallel/ knows."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from parallel.tensor_parallel import apply_tensor_parallel, fsdp_placement

# name -> sizes of the axes of the mesh, by name
LAYOUTS = {
    "fsdp_3": {"fsdp": 3},
    "hsdp_2_2": {"dp_replicate": 2, "fsdp": 2},
    "tp_2": {"tp": 2},
    "fsdp_2_tp_2": {"fsdp": 2, "tp": 2},
    "copies_2_tp_2": {"dp_replicate": 2, "fsdp": 1, "tp": 2},
}
COLUMN, ROW, HEAD_NORMS = {"packed_rows": 3, "rows": 1}, {"packed_columns": 5, "columns": 1}, ["head_norm"]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed_rows = nn.Linear(12, 3 * 8)
        self.packed_columns = nn.Linear(5 * 8, 12)
        self.rows = nn.Linear(12, 8)
        self.columns = nn.Linear(8, 5, bias=False)  # 5 rows over 3 ranks of fsdp: 2, 2, 1
        self.whole = nn.Linear(7, 1)  # 1 row: some ranks hold nothing
        self.head_norm = nn.RMSNorm(4)


def world_size(layout: str) -> int:
    size = 1
    for count in LAYOUTS[layout].values():
        size *= count
    return size


def build_layers(layout: str, placement: Callable[[nn.Parameter], Shard] = fsdp_placement) -> Layers:
    """Spread over the layout's mesh, on the CPU, without values."""
    mesh = init_device_mesh("cpu", tuple(LAYOUTS[layout].values()), mesh_dim_names=tuple(LAYOUTS[layout]))
    with torch.device("meta"):
        layers = Layers()
    if "tp" in LAYOUTS[layout]:
        apply_tensor_parallel(layers, mesh["tp"], COLUMN, ROW, HEAD_NORMS)
    if "fsdp" in LAYOUTS[layout]:
        fully_shard(layers, mesh=data_mesh(mesh), shard_placement_fn=placement)
    layers.to_empty(device="cpu")
    return layers


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tp")
    return mesh[names]


def make_full(layers: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """The same random values for all parameters on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in layers.named_parameters()}
