"""The autoencoder against diffusers' AutoencoderKL, through the rule table, and its full size without its weights."""

import json
import struct
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from checkpoint.adapter import from_hf, to_hf
from flux.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Downsample,
    check_shapes,
    config_from_shapes,
    read_shapes,
)
from flux.rules import AUTOENCODER_DIFFUSERS_RULES

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4  # fp32 rounding of some thirty layers, on outputs of about 1
CONFIGS = {
    "widths that grow": AutoencoderConfig(32, (1, 2, 3, 3), blocks_per_level=2, latent_channels=16),
    "one block": AutoencoderConfig(32, (1, 1, 1, 2), blocks_per_level=1, latent_channels=16),
    "FLUX.1's groups": AutoencoderConfig(128, (1, 1, 1, 1), blocks_per_level=1, latent_channels=4),
}


def build_diffusers(config: AutoencoderConfig):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(config.widths),
        layers_per_block=config.blocks_per_level,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_pair(config: AutoencoderConfig):
    """Both models with the same weights, every one of which matters: norms and biases are random too."""
    ours = Autoencoder(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ours.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    theirs = build_diffusers(config)
    theirs.load_state_dict(to_hf(ours.state_dict(), AUTOENCODER_DIFFUSERS_RULES), strict=True)
    return ours, theirs


@torch.no_grad()
def largest_errors(ours, theirs) -> tuple[float, float]:
    """Of the moments and of the decoded pixels, as a share of the size of the outputs. The picture is not square."""
    generator = torch.Generator().manual_seed(4)
    pixels_BCHW = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    latents_BCHW = torch.randn(2, ours.config.latent_channels, 4, 6, generator=generator)
    moments_BCHW = theirs.encode(pixels_BCHW).latent_dist.parameters
    decoded_BCHW = theirs.decode(latents_BCHW).sample
    return (
        ((ours.encode(pixels_BCHW) - moments_BCHW).abs().max() / moments_BCHW.std()).item(),
        ((ours.decode(latents_BCHW) - decoded_BCHW).abs().max() / decoded_BCHW.std()).item(),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
    moments_error, pixels_error = largest_errors(*build_pair(CONFIGS[name]))
    assert moments_error < TOLERANCE
    assert pixels_error < TOLERANCE


def test_control_symmetric_padding(monkeypatch):
    """The usual padding of a strided convolution fits the shapes and is wrong."""
    ours, theirs = build_pair(CONFIGS["widths that grow"])
    monkeypatch.setattr(Downsample, "forward", lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias, 2, 1))
    moments_error, pixels_error = largest_errors(ours, theirs)
    assert moments_error > 100 * TOLERANCE
    assert pixels_error < TOLERANCE


@pytest.mark.parametrize(
    "fault, one, other",
    [
        ("decoder levels in the other order", "decoder.up.0.block", "decoder.up.3.block"),
        ("keys as values", "mid.attn_1.k", "mid.attn_1.v"),
        ("blocks around the attention", "mid.block_1", "mid.block_2"),
        ("norms of a block", "norm1", "norm2"),
    ],
)
def test_control_exchanged_weights(fault, one, other):
    """All levels have the same width here, so weights under each other's names load without a word."""
    ours, theirs = build_pair(CONFIGS["FLUX.1's groups"])
    exchanged = {
        key.replace(one, "?").replace(other, one).replace("?", other): tensor
        for key, tensor in ours.state_dict().items()
    }
    ours.load_state_dict(exchanged, strict=True)
    assert max(largest_errors(ours, theirs)) > 100 * TOLERANCE, fault


def test_rules_there_and_back():
    ours, theirs = build_pair(CONFIGS["widths that grow"])
    back = from_hf(theirs.state_dict(), AUTOENCODER_DIFFUSERS_RULES)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in ours.state_dict().items())


def write_header(path, shapes):
    """A safetensors file with real names and shapes whose 335 MB of weights are a hole in the file."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


@pytest.fixture(scope="module")
def published_shapes():
    """The names and shapes of `ae.safetensors`: diffusers' full-size model, renamed."""
    with torch.device("meta"):
        theirs = build_diffusers(AutoencoderConfig())
    assert theirs.config.norm_num_groups == 32
    native = from_hf(theirs.state_dict(), AUTOENCODER_DIFFUSERS_RULES)
    return {key: tuple(tensor.shape) for key, tensor in native.items()}


def test_full_size_file_passes_the_check(tmp_path, published_shapes):
    path = tmp_path / "ae.safetensors"
    write_header(path, published_shapes)
    shapes = read_shapes(path)
    config = config_from_shapes(shapes, path)
    assert config == AutoencoderConfig()
    check_shapes(shapes, config, path)
    assert len(shapes) == 244
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 83_819_683


def test_full_size_control_other_model(tmp_path, published_shapes):
    """A missing, a foreign or a reshaped tensor is found, and FLUX.2's autoencoder is not FLUX.1's."""
    path = tmp_path / "ae.safetensors"
    faults = {
        "lacks decoder.up.2.block.1.conv1.bias": {"decoder.up.2.block.1.conv1.bias": None},
        "foreign encoder.quant_conv.weight": {"encoder.quant_conv.weight": (32, 32, 1, 1)},
        "another shape for encoder.mid.attn_1.q.weight": {"encoder.mid.attn_1.q.weight": (512, 512)},
    }
    for message, changes in faults.items():
        changed = {key: shape for key, shape in (published_shapes | changes).items() if shape is not None}
        write_header(path, changed)
        shapes = read_shapes(path)
        with pytest.raises(ValueError, match=message):
            check_shapes(shapes, config_from_shapes(shapes, path), path)
    with pytest.raises(ValueError, match="another shape"):
        check_shapes(published_shapes, replace(AutoencoderConfig(), latent_channels=32), path)
