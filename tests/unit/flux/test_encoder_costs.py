"""Sizes and operations of the frozen encoders, against published ones and against the loaded networks."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

from flux.autoencoder import Autoencoder, AutoencoderConfig
from flux.config import Encoder
from flux.encoder_costs import count_encoders
from flux.spec import SPECS
from flux.text_folders import CLIP_NAME, T5_NAME

# Published counts; the autoencoder has both halves, of which only the encoder runs.
T5_XXL_ENCODER, CLIP_L_TEXT, AUTOENCODER = 4_762_310_656, 123_060_480, 83_819_683

HELD_TOLERANCE = 0.02  # of statistics of norms, which the tracker has no place for


def flux_encoders(**changes: object) -> Encoder:
    settings = {"t5_encoder": T5_NAME, "clip_encoder": CLIP_NAME, "autoencoder_path": "not/yet/there.safetensors"}
    return Encoder(**settings | {"max_t5_encoding_len": 256} | changes)  # type: ignore[arg-type]


def test_encoders_of_flux_before_they_are_downloaded() -> None:
    costs = count_encoders(flux_encoders(), SPECS["flux-dev"], False, 256)
    parameters = {name: cost.parameters for name, cost in costs.items()}
    assert parameters == {"t5": T5_XXL_ENCODER, "clip": CLIP_L_TEXT, "autoencoder": AUTOENCODER}
    # Every token meets every weight of a block, but not the table of embeddings; the rest is attention.
    block = costs["t5"].largest_block
    attention = 24 * 4 * 256 * 256 * 4096
    assert costs["t5"].flops == 2 * 256 * (24 * 12 * 4096**2 + 24 * 3 * 4096 * 10240 - 24 * 8 * 4096**2) + attention
    assert block == pytest.approx(T5_XXL_ENCODER / 24, rel=0.05)
    longer = count_encoders(flux_encoders(max_t5_encoding_len=512), SPECS["flux-dev"], False, 512)
    assert longer["t5"].flops > 2 * costs["t5"].flops
    assert longer["autoencoder"].flops == pytest.approx(4 * costs["autoencoder"].flops, rel=0.1)


def test_encoders_of_a_laptop_and_of_test_mode() -> None:
    tiny = count_encoders(Encoder(), SPECS["flux-tiny"], False, 64)
    assert all(cost.parameters < 10**6 for cost in tiny.values())
    random = count_encoders(Encoder(), SPECS["flux-debug"], True, 64)
    assert random["t5"].parameters > tiny["t5"].parameters
    full = sum(one.numel() for one in Autoencoder(AutoencoderConfig()).parameters())
    assert tiny["autoencoder"].parameters < full == AUTOENCODER


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="t5_encoder='nowhere' must be a folder"):
        count_encoders(flux_encoders(t5_encoder="nowhere"), SPECS["flux-dev"], False, 256)


def tracked_by_torch(model: nn.Module, *shape: int) -> int:
    """Numbers that torch's memory tracker sees beside the weights, on a CPU that only pretends to compute."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu")
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            model(torch.empty(shape))
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return sum(size for kind, size in snapshot.items() if kind in (_MemRefType.ACT, _MemRefType.TEMP)) // 4


def test_what_an_encoder_holds_at_work() -> None:
    costs = {side: count_encoders(flux_encoders(), SPECS["flux-dev"], False, side) for side in (256, 512)}
    small, large = (costs[side]["autoencoder"].at_work for side in (256, 512))
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig())
    autoencoder.forward = autoencoder.encode  # type: ignore[method-assign]
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # tensors change their class
    try:
        tracked = tracked_by_torch(autoencoder, 1, 3, 256, 256)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    assert small == pytest.approx(tracked, rel=HELD_TOLERANCE)
    assert large == pytest.approx(4 * small, rel=HELD_TOLERANCE), "as many pixels more"
