"""The optimizer."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from training.compact_adam import REMAINDER, Boxes, CompactAdam
from training.config import Optimizer

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


def build_optimizer(
    groups: Sequence[list[nn.Parameter]], section: Optimizer, boxes: Boxes, key: Callable[[Tensor], int]
) -> torch.optim.Optimizer:
    """Adam or AdamW, the same for all groups of parameters, in the implementation that `[optimizer]` names.

    Args:
        groups: parameters that one call of a fused or foreach implementation can take together.
        section: [optimizer].
        boxes, key: as for CompactAdam.

    Raises:
        ValueError: see `check_optimizer`.
    """
    check_optimizer(section)
    if section.state_dtype != "float32" or any(one.dtype == torch.bfloat16 for group in groups for one in group):
        return CompactAdam(groups, section, boxes, key)
    return OPTIMIZERS[section.name](
        [{"params": group} for group in groups],
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=section.implementation == "fused",
        foreach=section.implementation == "foreach",
    )


def check_optimizer(section: Optimizer) -> None:
    """Raises ValueError for number formats that need what is not installed."""
    if section.state_dtype == "8bit" and importlib.util.find_spec("torchao") is None:
        raise ValueError(
            'optimizer.state_dtype="8bit" needs torchao: install it with `pip install torchao==0.18.0`, or use '
            '"bfloat16"'
        )


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One update of the weights, or none: then they and all that the optimizer remembers stay as they are, to the bit,
    whatever the gradients are.

    The fused implementation decides on the device. The others, and parameters that are kept in the CPU's memory, wait
    for the device to tell.

    Args:
        skip: float32 `[]`, 1 to leave the update out and 0 to make it.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's mark of those that take `found_inf`
        if not skip.item():
            optimizer.step()
        return
    # torch would copy it to the CPU without waiting until it is there.
    places = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
    found_inf = skip.to("cpu") if "cpu" in places else skip
    optimizer.grad_scale, optimizer.found_inf = None, found_inf  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


class ExactWeights(Mapping[str, Tensor]):
    """Parameters by their names; in float32 where the optimizer keeps the bits that they have no room for."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]):
        self._optimizer, self._parameters = optimizer, parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if REMAINDER not in self._optimizer.state.get(parameter, {}):
            return parameter
        assert isinstance(self._optimizer, CompactAdam)
        return self._optimizer.exact(parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter, as `<name>.<kind>`; all zero before its first step.

    The tensors are its own: what is copied into them, it goes on from. Remainders are a part of the weights and not
    among them.
    """
    if not optimizer.state:
        _fill_state(optimizer)
    return {
        f"{names[parameter]}.{kind}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
        if kind != REMAINDER
    }


def find_remainders(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The bits that bfloat16 weights have no room for, by the names of these; int16."""
    states = optimizer.state.items()
    return {names[parameter]: state[REMAINDER] for parameter, state in states if REMAINDER in state}


@torch.no_grad()
def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer makes its state in its first step: it gets one that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
