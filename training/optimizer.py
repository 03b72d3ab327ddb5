"""The optimizer."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from training.config import Optimizer

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


def build_optimizer(groups: Iterable[list[nn.Parameter]], section: Optimizer) -> torch.optim.Optimizer:
    """Adam or AdamW, the same for all groups of parameters, in the implementation that `[optimizer]` names.

    Args:
        groups: parameters that one call of a fused or foreach implementation can take together.
        section: [optimizer].
    """
    return OPTIMIZERS[section.name](
        [{"params": group} for group in groups],
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=section.implementation == "fused",
        foreach=section.implementation == "foreach",
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter, as `<name>.<kind>`; all zero before its first step.

    The tensors are its own: what is copied into them, it goes on from.
    """
    if not optimizer.state:
        _fill_state(optimizer)
    return {
        f"{names[parameter]}.{kind}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


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
