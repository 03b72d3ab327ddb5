"""The optimizer."""

from collections.abc import Iterable

import torch
from torch import nn

from training.config import Optimizer

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


def build_optimizer(parameters: Iterable[nn.Parameter], section: Optimizer) -> torch.optim.Optimizer:
    """Adam or AdamW over all parameters, in the implementation that `[optimizer]` names."""
    return OPTIMIZERS[section.name](
        parameters,
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=section.implementation == "fused",
        foreach=section.implementation == "foreach",
    )
