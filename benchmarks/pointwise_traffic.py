"""Bytes that a block reads and writes beside its matrix products and attention: what there is to gain by fusing.

    python -m benchmarks.pointwise_traffic --flavor flux-schnell

Counted, not timed: for the plain block the operands and results of every operation, for the compiled block those of
every kernel that the compiler makes of it, here for a CPU. The unit is the size of one activation, [tokens, width] in
bfloat16, so a result is good for other sizes too.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux.model import DoubleBlock, SingleBlock, rotary_table
from flux.spec import SPECS, TransformerConfig

BATCH, IMAGE_TOKENS, TEXT_TOKENS = 2, 256, 256
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten._scaled_dot_product")  # names of operators begin so


class PlainTraffic(TorchDispatchMode):
    """Adds up what operations read and write; those that only look at the same memory in another way move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        is_view = any(one.alias_info and not one.alias_info.is_write for one in operator._schema.arguments)
        if not is_view and not str(operator).startswith(PRODUCTS):
            self.bytes += sum(
                one.numel() * one.itemsize for one in tree_leaves((args, result)) if isinstance(one, Tensor)
            )
        return result


class CompiledTraffic:
    """Adds up what the compiler's kernels read and write, by its own account, of all that it compiles inside."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> None:
        original = self._original = GraphLowering.codegen

        def codegen(graph: GraphLowering) -> Any:
            code = original(graph)
            nodes = [node for node in graph.scheduler.nodes if not isinstance(node, ExternKernelSchedulerNode)]
            self.bytes += sum(node.get_read_write_buffers_sizes() for node in nodes)
            return code

        setattr(GraphLowering, "codegen", codegen)  # noqa: B010  the types of the two differ in a name

    def __exit__(self, *_: object) -> None:
        setattr(GraphLowering, "codegen", self._original)  # noqa: B010


def make_call(config: TransformerConfig, block: nn.Module) -> Callable[[], Tensor]:
    """Calls the block with random inputs; returns the sum of what comes out."""
    width, dtype, tokens = config.hidden_size, torch.bfloat16, IMAGE_TOKENS + TEXT_TOKENS
    lengths = [IMAGE_TOKENS, TEXT_TOKENS] if isinstance(block, DoubleBlock) else [tokens]
    streams = [torch.randn(BATCH, length, width, dtype=dtype, requires_grad=True) for length in lengths]
    vec_BD = torch.randn(BATCH, width, dtype=dtype, requires_grad=True)
    ids_BSA = torch.arange(tokens).expand(len(config.axes_dim), BATCH, -1).permute(1, 2, 0)
    rotary = rotary_table(ids_BSA, config.axes_dim, config.theta)
    return lambda: sum((one.sum() for one in tree_leaves(block(*streams, vec_BD, rotary))), torch.zeros(()))


def count(config: TransformerConfig, kind: type[nn.Module]) -> dict[str, tuple[float, float]]:
    """Units of the forward and of the backward pass, plain and compiled."""
    block = kind(config).bfloat16()
    unit = BATCH * (IMAGE_TOKENS + TEXT_TOKENS) * config.hidden_size * 2
    call, plain, compiled = make_call(config, block), PlainTraffic(), CompiledTraffic()
    with plain:
        total = call()
        forward = plain.bytes
        total.backward()
    found = {"plain": (forward / unit, (plain.bytes - forward) / unit)}
    torch._dynamo.reset()
    # What is compiled already would be taken from the disk, uncounted.
    with compiled, inductor_config.patch(force_disable_caches=True):
        block.compile(fullgraph=True)
        total = call()
        forward = compiled.bytes
        total.backward()
    return found | {"compiled": (forward / unit, (compiled.bytes - forward) / unit)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pointwise_traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--flavor", choices=sorted(SPECS), default="flux-debug", help="(default: %(default)s)")
    config = SPECS[parser.parse_args(argv).flavor].transformer
    print(f"{'block':<8}{'':<10}{'forward':>9}{'backward':>10}{'both':>8}")
    for name, kind in (("double", DoubleBlock), ("single", SingleBlock)):
        for how, (forward, backward) in count(config, kind).items():
            print(f"{name:<8}{how:<10}{forward:>9.1f}{backward:>10.1f}{forward + backward:>8.1f}")


if __name__ == "__main__":
    main()
