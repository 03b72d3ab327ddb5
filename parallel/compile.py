"""Compilation of the parts of a run that are worth it: every block of the model, and the loss.

Blocks are compiled one by one, in place: blocks of one kind share their code, so a model of 57 blocks compiles as fast
as one of two, and what lies between them (the hooks of FSDP) stays as it is. Nothing is compiled before it is called.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from parallel.config import Compile

P = ParamSpec("P")
R = TypeVar("R")

# Code variants of one function: kinds of blocks x training and validation x first size and any size make 8, where
# torch gives up by default.
_VARIANTS = 64

_REMEDY = "or set compile.enable=false, or compile.backend=aot_eager, which traces but generates no code"


def compiles_model(section: Compile) -> bool:
    return section.enable and "model" in section.components


def apply_compile(blocks: Sequence[nn.Module], section: Compile) -> None:
    """Compiles each block at its first call, in place; no name changes.

    A block that is not one graph raises. Sizes are fixed at first; a second size makes a variant that serves the rest.
    """
    if compiles_model(section):
        torch._dynamo.config.recompile_limit = _VARIANTS
        for block in blocks:
            block.compile(fullgraph=True, backend=section.backend)


def compile_loss(loss: Callable[P, R], section: Compile) -> Callable[P, R]:
    """The loss, compiled at its first call; as it is where it is not to be compiled."""
    if section.enable and "loss" in section.components:
        return torch.compile(loss, fullgraph=True, backend=section.backend)
    return loss


def check_compiler(section: Compile, device_type: str) -> None:
    """Is there all that the section needs? Asked at the start, since code is generated only in the first step.

    Raises:
        ValueError: the backend is unknown, or a compiler that it calls is missing, or a GPU.
    """
    if section.cuda_graph and device_type != "cuda":
        raise ValueError(
            f"compile.cuda_graph=true records the kernels of a GPU, and this is a {device_type}: leave it out"
        )
    if not section.enable or not section.components:
        return
    if section.backend not in torch._dynamo.list_backends(exclude_tags=()):
        usual = ", ".join(torch._dynamo.list_backends())
        raise ValueError(f'compile.backend="{section.backend}" is no backend of torch: use {usual} or aot_eager')
    if section.backend == "inductor":
        missing = _missing_for_cuda() if device_type == "cuda" else _missing_for_cpu()
        if missing:
            raise ValueError(f'compile.backend="inductor" on {device_type} needs {missing}, {_REMEDY}')


def _missing_for_cpu() -> str | None:
    from torch._inductor import cpp_builder, exc  # seconds of import, for this backend alone

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "a C++ compiler: install g++, or name yours in the environment variable CXX"
    return None


def _missing_for_cuda() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton: install the CUDA build of torch, which brings it"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # as triton looks for it
        return "a C compiler for triton: install gcc, or name yours in the environment variable CC"
    return None
