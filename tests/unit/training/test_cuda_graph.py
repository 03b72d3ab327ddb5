"""What a replay reads, adds to and gives, on a stand-in that repeats operations without Python."""

import pytest
import torch
from torch import Tensor

from tests.unit.training.recorded_kernels import use_recorded_kernels
from training.cuda_graph import WARM_UP, CudaGraph

CALLS = WARM_UP + 4


class Layer:
    """A weight, and a function that adds to its gradient; counts how often its Python runs."""

    def __init__(self):
        self.weight = torch.tensor([1.0, -2.0], requires_grad=True)
        self.runs = 0

    def add_gradients(self, inputs, constant: int) -> tuple[Tensor, Tensor]:
        self.runs += 1
        errors_B = (inputs["x_BC"] * self.weight).square().sum(dim=1)
        if inputs["mask_B"] is not None:
            errors_B = errors_B * inputs["mask_B"]
        loss = errors_B.sum() / constant
        loss.backward()
        return loss.detach(), errors_B.detach()


def make_inputs(seed: int, masked: bool = False) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    mask_B = torch.tensor([1.0, 0.0, 1.0]) if masked else None
    return {"x_BC": torch.randn(3, 2, generator=generator), "mask_B": mask_B}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_replay_computes_the_same_bits_without_python(monkeypatch, accumulation, masked):
    graphs = use_recorded_kernels(monkeypatch)
    plain, recorded = Layer(), Layer()
    graph = CudaGraph(recorded.add_gradients)
    for call in range(CALLS * accumulation):
        if call % accumulation == 0:
            plain.weight.grad = None
            if recorded.weight.grad is not None:
                recorded.weight.grad.zero_()
        inputs = make_inputs(call, masked)
        expected = plain.add_gradients(inputs, 7)
        told = graph(inputs, 7)
        assert all(torch.equal(one, other) for one, other in zip(told, expected, strict=True)), call
        assert torch.equal(recorded.weight.grad, plain.weight.grad), call
        with torch.no_grad():
            for layer in (plain, recorded):
                layer.weight -= 0.1 * layer.weight.grad  # in place, where the recorded kernels read it
    assert recorded.runs == WARM_UP + 1 and len(graphs) == 1 and graphs[0].operations


def test_inputs_are_copied_and_left_alone(monkeypatch):
    use_recorded_kernels(monkeypatch)
    graph = CudaGraph(Layer().add_gradients)
    batches = [make_inputs(seed) for seed in range(CALLS)]
    for batch in batches:
        graph(batch, 7)
    assert all(torch.equal(batch["x_BC"], make_inputs(seed)["x_BC"]) for seed, batch in enumerate(batches))


def test_control_gradients_that_are_dropped_are_not_found_again(monkeypatch):
    """Why they are zeroed in place."""
    use_recorded_kernels(monkeypatch)
    layer = Layer()
    graph = CudaGraph(layer.add_gradients)
    for seed in range(WARM_UP + 1):
        graph(make_inputs(seed), 7)
    layer.weight.grad = None
    graph(make_inputs(0), 7)
    assert layer.weight.grad is None


@pytest.mark.parametrize("calls", [1, WARM_UP + 1])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda inputs: inputs | {"x_BC": inputs["x_BC"][:2]}, r"x_BC was \[3, 2\] torch.float32 and is \[2, 2\]"),
        (lambda inputs: inputs | {"x_BC": inputs["x_BC"][:1]}, r"and is \[1, 2\] torch.float32"),  # would be spread out
        (lambda inputs: inputs | {"x_BC": inputs["x_BC"].double()}, r"and is \[3, 2\] torch.float64"),
        (lambda inputs: inputs | {"mask_B": torch.ones(3)}, r"mask_B was None and is \[3\]"),
    ],
    ids=["shape", "one row", "dtype", "mask"],
)
def test_other_batches_are_refused(monkeypatch, change, name, calls):
    use_recorded_kernels(monkeypatch)
    graph = CudaGraph(Layer().add_gradients)
    for seed in range(calls):
        graph(make_inputs(seed), 7)
    with pytest.raises(ValueError, match=f"compile.cuda_graph=true replays batches of one shape, .*{name}"):
        graph(change(make_inputs(0)), 7)


def test_another_size_of_the_update_is_refused(monkeypatch):
    use_recorded_kernels(monkeypatch)
    graph = CudaGraph(Layer().add_gradients)
    graph(make_inputs(0), 7)
    with pytest.raises(ValueError, match="the number of elements of an update was 7 and is 8"):
        graph(make_inputs(0), 8)
