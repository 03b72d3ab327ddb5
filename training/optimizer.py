"""The optimizer."""

from collections.abc import Iterable

import torch
from torch import nn

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
