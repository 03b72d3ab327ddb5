"""Token order, normalization and posterior of the latent codec."""

from pathlib import Path

import pytest
import torch

from flux.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from flux.codec import LatentCodec, draw_noise, to_grid, to_tokens
from flux.spec import SPECS, CodecConfig

ROUNDING = 1e-6  # fp32, on values of about 1
SAMPLING_ERROR = 0.02  # of a deviation measured on 32,768 numbers: five times its standard error

CONFIG = CodecConfig()


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    """Random weights: what the codec does holds for any."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(32, (1, 1, 1, 1), blocks_per_level=1))
    return LatentCodec(autoencoder.requires_grad_(False).eval(), CONFIG)


def make_pixels(batch=2, height=32, width=64):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tokens_there_and_back():
    x_BCHW = torch.randn(2, 16, 6, 10)
    x_BTC = to_tokens(x_BCHW)
    assert x_BTC.shape == (2, 15, 64)
    assert torch.equal(to_grid(x_BTC, (3, 5)), x_BCHW)
    assert not torch.equal(to_grid(x_BTC, (5, 3)).flatten(), x_BCHW.flatten())


def test_token_order():
    """Token 1 is right of token 0; its channels are ordered channel, row, column."""
    x_BCHW = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    patch_CHW = x_BCHW[0, :, 0:2, 2:4]
    assert torch.equal(to_tokens(x_BCHW)[0, 1], patch_CHW.flatten())


def test_token_order_is_that_of_diffusers():
    flux_pipeline = pytest.importorskip("diffusers").FluxPipeline
    x_BCHW = torch.randn(2, 16, 6, 10)
    packed_BTC = flux_pipeline._pack_latents(x_BCHW, 2, 16, 6, 10)
    assert torch.equal(to_tokens(x_BCHW), packed_BTC)
    transposed_BTC = to_tokens(x_BCHW.transpose(2, 3).contiguous())
    assert not torch.equal(transposed_BTC, packed_BTC)


def test_noise_is_that_of_diffusers():
    """A seed gives the noise FluxPipeline draws, here for a picture of 48 x 80 pixels."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.FluxPipeline(None, None, None, None, None, None, None)
    generator = torch.Generator().manual_seed(7)
    theirs_BTC, _ = pipeline.prepare_latents(1, 16, 48, 80, torch.float32, "cpu", generator)
    ours_TC = draw_noise(torch.Generator().manual_seed(7), CONFIG, (3, 5))
    assert ours_TC.dtype == torch.float32
    assert torch.equal(ours_TC, theirs_BTC[0])
    in_token_order_TC = torch.randn(15, 64, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(in_token_order_TC, theirs_BTC[0])


def test_encode_normalizes_the_mean(codec):
    pixels_BCHW = make_pixels()
    latents_BTC = codec.encode(pixels_BCHW)
    assert latents_BTC.shape == (2, 2 * 4, 64)
    mean_BCHW = codec.autoencoder.encode(pixels_BCHW)[:, :16]
    torch.testing.assert_close(to_grid(latents_BTC, (2, 4)), (mean_BCHW - 0.1159) * 0.3611, atol=ROUNDING, rtol=0)


def test_decode_inverts_the_normalization(codec):
    native_BCHW = torch.randn(2, 16, 4, 8)
    latents_BTC = to_tokens((native_BCHW - 0.1159) * 0.3611)
    pixels_BCHW = codec.decode(latents_BTC, (2, 4))
    assert pixels_BCHW.shape == (2, 3, 32, 64)
    expected_BCHW = codec.autoencoder.decode(native_BCHW)
    torch.testing.assert_close(pixels_BCHW, expected_BCHW.clamp(-1, 1), atol=10 * ROUNDING, rtol=0)


def test_decode_stays_in_range(codec):
    pixels_BCHW = codec.decode(100 * torch.randn(1, 4, 64), (2, 2))
    assert pixels_BCHW.abs().max() <= 1


def test_posterior_noise_moves_latents_by_the_deviation(codec):
    """latents = mean + deviation * noise, with noise, latents and normalization in one token order."""
    moments_BCHW = torch.randn(2, 32, 4, 8)
    noise_BTC = torch.randn(2, 8, 64)
    moved_BTC = codec.latents(moments_BCHW, noise_BTC) - codec.latents(moments_BCHW)
    std_BCHW = torch.exp(0.5 * moments_BCHW[:, 16:])
    torch.testing.assert_close(
        moved_BTC, to_tokens(std_BCHW * to_grid(noise_BTC, (2, 4)) * 0.3611), atol=ROUNDING, rtol=1e-5
    )
    assert torch.equal(codec.latents(moments_BCHW, torch.zeros_like(noise_BTC)), codec.latents(moments_BCHW))


def test_posterior_samples_have_the_deviation_of_the_moments(codec):
    moments_BCHW = torch.zeros(8, 32, 16, 16)
    moments_BCHW[:, 16:] = 2.0
    grid = (8, 8)
    noise_BTC = torch.stack([draw_noise(torch.Generator().manual_seed(i), CONFIG, grid) for i in range(8)])
    std = codec.latents(moments_BCHW, noise_BTC).std() / CONFIG.scale
    assert abs(std.item() / torch.tensor(2.0).mul(0.5).exp().item() - 1) < SAMPLING_ERROR


def test_extreme_log_variances_stay_finite(codec):
    moments_BCHW = torch.full((1, 32, 2, 2), 500.0)
    assert codec.latents(moments_BCHW, torch.ones(1, 1, 64)).isfinite().all()


def test_no_graph_but_usable_in_one():
    """The autoencoder is trainable here, and still nothing is recorded; inference tensors would fail in backward."""
    codec = LatentCodec(Autoencoder(AutoencoderConfig(32, (1, 1, 1, 1), blocks_per_level=1)), CONFIG)
    latents_BTC = codec.encode(make_pixels(), torch.randn(2, 8, 64))
    assert not latents_BTC.requires_grad
    assert latents_BTC.grad_fn is None
    assert not latents_BTC.is_inference()
    weight = torch.ones(64, requires_grad=True)
    (latents_BTC * weight).sum().backward()
    torch.testing.assert_close(weight.grad, latents_BTC.sum(dim=(0, 1)))
    assert not codec.decode(latents_BTC, (2, 4)).requires_grad


def test_latents_are_fp32_whatever_the_autoencoder_computes_in():
    autoencoder = Autoencoder(AutoencoderConfig(32, (1, 1, 1, 1), blocks_per_level=1)).to(torch.bfloat16)
    codec = LatentCodec(autoencoder, CONFIG)
    assert codec.moments(make_pixels()).dtype == torch.bfloat16
    latents_BTC = codec.encode(make_pixels())
    assert latents_BTC.dtype == torch.float32
    assert codec.decode(latents_BTC, (2, 4)).dtype == torch.float32


def test_a_picture_does_not_depend_on_its_batch(codec):
    pixels_BCHW = make_pixels(batch=3)
    alone_BTC = codec.encode(pixels_BCHW[1:2])
    torch.testing.assert_close(codec.encode(pixels_BCHW)[1:2], alone_BTC, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flavor", SPECS)
def test_every_flavor_fits_the_embedded_autoencoder(flavor):
    spec = SPECS[flavor]
    path = Path(__file__).parents[3] / "assets/tiny/autoencoder.safetensors"
    autoencoder = load_autoencoder(path, spec.codec, torch.float32, "cpu")
    latents_BTC = LatentCodec(autoencoder, spec.codec).encode(make_pixels())
    assert latents_BTC.shape[-1] == spec.transformer.in_channels
