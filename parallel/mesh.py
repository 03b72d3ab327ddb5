"""Degrees -> process groups: which ranks share what, and the little that ranks tell each other outside of the model."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import Comm
from parallel.degrees import Degrees

# torch 2.13's name for what was all_gather_into_tensor.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Layout:
    """Where this process stands among the others."""

    degrees: Degrees
    device: torch.device
    rank: int = 0
    weights: DeviceMesh | None = None  # dp_replicate x fsdp x tp: who holds which part of a parameter
    samples: DeviceMesh | None = None  # dp x cp x tp: who works on which samples and tokens
    encoder: DeviceMesh | None = (
        None  # dp_replicate x replica: the ranks of one copy, who share the frozen text encoder
    )

    def describe(self) -> str:
        """Such as `8 ranks = dp_replicate 2 x dp_shard 2 x cp 2, gloo on cpu`."""
        kind = self.device.type
        if self.degrees.world == 1:
            return f"1 process on {kind}"
        return f"{self.degrees.world} ranks = {self.degrees}, {'nccl' if kind == 'cuda' else 'gloo'} on {kind}"

    @property
    def dp_rank(self) -> int:
        """Which of the `degrees.dp` groups of samples this rank works on."""
        return self.rank // (self.degrees.cp * self.degrees.tp)

    def axis(self, name: str) -> DeviceMesh | None:
        """The ranks along cp or tp; None when this one is alone."""
        if getattr(self.degrees, name) == 1:
            return None
        assert self.samples is not None and self.weights is not None
        return self.weights["tp"] if name == "tp" else self.samples[name]

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks that hold different samples or tokens; tp ranks hold the same."""
        if self.degrees.dp * self.degrees.cp > 1:
            assert self.samples is not None
            value = value.clone()
            for name in ("dp", "cp"):
                dist.all_reduce(value, group=self.samples[name].get_group())
        return value

    def gather(self, value: Tensor) -> Tensor:
        """What each rank has, on all of them: [dp, cp, tp, ...]. One collective."""
        degrees, parts = self.degrees, value[None]
        if degrees.world > 1:
            parts = value.new_empty(degrees.world, *value.shape)
            all_gather_single(parts.flatten(), value.flatten())
        return parts.unflatten(0, (degrees.dp, degrees.cp, degrees.tp))

    def gather_samples(self, value: Tensor) -> Tensor:
        """Concatenation along dim 0 of what the groups of samples hold, in the order of their ranks."""
        if self.degrees.dp == 1:
            return value
        assert self.samples is not None
        parts = [torch.empty_like(value) for _ in range(self.degrees.dp)]
        dist.all_gather(parts, value.contiguous(), group=self.samples["dp"].get_group())
        return torch.cat(parts)

    def from_rank_0(self, name: str, make: Callable[[], object]) -> str:
        """What rank 0 makes, as text, on every rank. When it fails there, all end, and the word is its own."""
        if self.degrees.world == 1:
            return str(make())
        store = dist.distributed_c10d._get_default_store()
        if self.rank:
            kind, _, text = store.get(name).decode().partition(":")
            if kind != "value":
                raise SystemExit(1)
            return text
        try:
            text = str(make())
        except BaseException:
            store.set(name, "failed:")
            raise
        store.set(name, f"value:{text}")
        return text

    def gather_texts(self, name: str, text: str, seconds: float | None = None) -> list[str]:
        """What the ranks have to say, on rank 0, in their order; nothing on the others.

        Args:
            name: not used before.
            text: empty on ranks that have nothing to say.
            seconds: after that the text of a rank that is silent is taken to be empty; None: it is waited for.
        """
        if self.degrees.world == 1:
            return [text]
        store = dist.distributed_c10d._get_default_store()
        if self.rank:
            store.set(f"{name}/{self.rank}", text)
            return []
        texts, deadline = [text], None if seconds is None else time.monotonic() + seconds
        for key in (f"{name}/{rank}" for rank in range(1, self.degrees.world)):
            try:
                if deadline is not None:
                    store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
                texts.append(store.get(key).decode())
            except RuntimeError:  # each kind of store has its own
                if deadline is None:
                    raise
                texts.append("")
        return texts

    def max(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.degrees.world == 1:
            return value
        word = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        return word.item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank, of all of them."""
        return bool(self.max(float(flag)))

    def is_first_to_fail(self) -> bool:
        """True on the first rank that asks: it says what happened, the others mostly fail because of it."""
        if self.degrees.world == 1 or not dist.is_initialized():
            return True
        try:
            return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
        except RuntimeError:  # the process that keeps the store is gone
            return True

    def make_cpu_group(self, seconds: int) -> dist.ProcessGroup | None:
        """All ranks once more, with a time limit of its own that `set_timeout` leaves alone; None: there is one rank.

        For a thread beside training: two threads must not communicate over one group.
        """
        if self.degrees.world == 1:
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def set_timeout(self, seconds: float) -> None:
        """Limit on every communication of training from here on."""
        meshes = [mesh for mesh in (self.weights, self.samples, self.encoder) if mesh is not None]
        groups = {group for mesh in meshes for group in mesh.get_all_groups()}
        for group in [dist.group.WORLD, *groups] if meshes else []:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def choose_device() -> torch.device:
    """The accelerator of this process if there is one, else the CPU.

    Raises:
        ValueError: more processes than GPUs on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise ValueError(f"{processes} processes must not be more than this machine's {gpus} GPUs: use NGPU={gpus}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def build_layout(degrees: Degrees, comm: Comm, needs_groups: bool) -> Layout:
    """Joins the other processes and gives every group of ranks its name.

    Args:
        degrees: the layout, whose product is WORLD_SIZE.
        comm: [comm].
        needs_groups: a single process makes groups, of itself alone, only on demand: mixed precision is FSDP's work.
    """
    fake = comm.mode == "fake_backend"
    device = torch.device("cpu") if fake else choose_device()
    if degrees.world == 1 and not needs_groups and not fake:
        return Layout(degrees, device)
    if not dist.is_initialized():
        _init_process_group(degrees.world, device, comm, fake)

    def mesh(**axes: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    replica = degrees.fsdp * degrees.tp
    return Layout(
        degrees,
        device,
        rank=dist.get_rank(),
        weights=mesh(dp_replicate=degrees.dp_replicate, fsdp=degrees.fsdp, tp=degrees.tp),
        samples=mesh(dp=degrees.dp, cp=degrees.cp, tp=degrees.tp),
        encoder=mesh(dp_replicate=degrees.dp_replicate, replica=replica) if replica > 1 else None,
    )


def _init_process_group(world_size: int, device: torch.device, comm: Comm, fake: bool) -> None:
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    elif world_size == 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        # On GPUs gloo stands by for what is kept on the CPU: offloaded gradients.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)


def close_layout(layout: Layout) -> None:
    """Leaves the other processes in good order."""
    if layout.weights is not None and dist.is_initialized():
        dist.destroy_process_group()
