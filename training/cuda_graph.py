"""Kernels that are recorded once and launched together from then on (https://pytorch.org/docs/stable/notes/cuda.html,
"CUDA Graphs"): the host gives one order instead of thousands, for batches that are too small to hide it.
"""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.profiler import record_function as region

log = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor | None]
WARM_UP = 3  # calls before the recording: they choose kernels, compile, connect ranks and make gradients


class CudaGraph:
    """Calls a function as it is a few times, then records its kernels, then replays them at every call.

    A replay runs no Python and asks for no memory: it reads and writes where the recorded kernels did. So inputs are
    copied into buffers, gradients must be zeroed in place, and results are overwritten by the next call.

    Args:
        function: (inputs, constant) -> tensors without history; never waits for the GPU.
    """

    def __init__(self, function: Callable[[Inputs, int], tuple[Tensor, ...]]):
        self._function = function
        self._calls = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._buffers: dict[str, Tensor | None] = {}
        self._constant = 0
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, inputs: Inputs, constant: int) -> tuple[Tensor, ...]:
        """What the function returns.

        Raises:
            ValueError: the inputs are not of the shapes of the first call, or the constant is another.
        """
        if self._calls == 0:
            self._constant = constant
            self._buffers = {name: None if x is None else torch.empty_like(x).copy_(x) for name, x in inputs.items()}
        else:
            self._copy_in(inputs, constant)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._call_aside()
        if self._graph is None:
            self._graph = self._record()
        with region("replay"):
            self._graph.replay()
        return self._results

    def _call_aside(self) -> tuple[Tensor, ...]:
        """On the stream on which will be recorded, so that nothing remembers another one."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = self._function(self._buffers, self._constant)
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Only this thread has to keep still: others pin memory for batches, and watch over communication.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._results = self._function(self._buffers, self._constant)
        log.info("the kernels of a forward and backward pass are recorded, and replayed from here on")
        return graph

    def _copy_in(self, inputs: Inputs, constant: int) -> None:
        now, recorded = _describe(inputs, constant), _describe(self._buffers, self._constant)
        for name in now.keys() | recorded.keys():
            if now.get(name) != recorded.get(name):
                raise ValueError(
                    f"compile.cuda_graph=true replays batches of one shape, and {name} was {recorded.get(name)} and is "
                    f"{now.get(name)}: set compile.cuda_graph=false, or give it such batches only"
                )
        for name, buffer in self._buffers.items():
            if buffer is not None:
                value = inputs[name]
                assert value is not None
                buffer.copy_(value)


def _describe(inputs: Inputs, constant: int) -> dict[str, str]:
    texts = {name: "None" if x is None else f"{list(x.shape)} {x.dtype}" for name, x in inputs.items()}
    return texts | {"the number of elements of an update": str(constant)}
