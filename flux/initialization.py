"""The weights with which training begins."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flux.rng import keyed_generator


@torch.no_grad()
def init_weights(
    model: nn.Module,
    seed: int,
    device: torch.device | str = "cpu",
    copy_: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Set every parameter in place, as MLPerf's FLUX.1 reference does.

    Each parameter's numbers are keyed by its name, so they do not depend on the order or place of initialization. They
    are drawn whole, one parameter at a time, and `copy_(parameter, value)` takes from them what this process keeps.

    Args:
        device: where the numbers are drawn; CPUs and GPUs draw different ones.
    """
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        generator = keyed_generator(seed, "init", name, device)
        if name.endswith("norm.weight"):
            value.fill_(1.0)
        elif name.endswith(".bias") or "_mod." in name or "modulation" in name or name.startswith("final_layer."):
            value.zero_()  # every block starts as the identity, and the first prediction is 0
        elif name.startswith(("time_in.", "vector_in.", "guidance_in.")):
            value.normal_(std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(value, generator=generator)
        copy_(parameter, value)
