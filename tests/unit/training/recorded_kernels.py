"""A CUDA graph for a CPU: notes the operations of a recording with the tensors they worked on, undoes what they did to
these, and repeats them without any Python of the recorded function.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a recording cannot wait for a number"
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):  # which is no input
            self.before.setdefault(id(made), (made, made))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, results in self.operations:
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording:
    """In the place of torch.cuda.graph."""

    def __init__(self, graph: Graph, stream: object, capture_error_mode: str):
        self.graph = graph

    def __enter__(self):
        self.graph.__enter__()

    def __exit__(self, *error):
        self.graph.__exit__(*error)
        with torch.no_grad():
            for tensor, value in self.graph.before.values():
                if tensor is not value:
                    tensor.copy_(value)  # while it is recorded, nothing is computed


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


def use_recorded_kernels(monkeypatch) -> list[Graph]:
    """From here on torch.cuda records on the CPU. Returns the graphs that are made."""
    made: list[Graph] = []

    def make() -> Graph:
        made.append(Graph())
        return made[-1]

    for name, stand_in in (
        ("CUDAGraph", make),
        ("graph", Recording),
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", lambda stream: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made
