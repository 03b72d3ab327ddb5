"""The count of what kernels read and write."""

import pytest
import torch

from benchmarks import pointwise_traffic
from benchmarks.pointwise_traffic import PlainTraffic, count
from flux import model
from flux.model import SingleBlock
from flux.spec import SPECS


def test_plain_operations():
    x = torch.ones(4, 8)
    with PlainTraffic() as traffic:
        y = x.t().exp()  # a view moves nothing
        y.add_(1)
        x @ y  # a product is not counted
    assert traffic.bytes == 4 * 32 * (2 + 2)


@pytest.mark.slow
def test_compiled_rotation_is_fused(monkeypatch):
    """The compiler moves less than plain operations, and less than where two halves of a rotation are put together."""

    def stacked(x_BSNK, rotary):
        (a, b), (cos, sin) = x_BSNK.float().unflatten(-1, (-1, 2)).unbind(-1), rotary.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x_BSNK.dtype)

    monkeypatch.setattr(pointwise_traffic, "IMAGE_TOKENS", 24)
    config = SPECS["flux-tiny"].transformer
    found = count(config, SingleBlock)
    assert sum(found["compiled"]) < 0.5 * sum(found["plain"])
    monkeypatch.setattr(model, "rotate", stacked)
    assert sum(count(config, SingleBlock)["compiled"]) > 1.08 * sum(found["compiled"])
