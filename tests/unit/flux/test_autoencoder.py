"""Sizes, loading and refusals of the autoencoder, and the quality of the embedded one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux.autoencoder import (
    MIN_RECONSTRUCTION_DB,
    Autoencoder,
    AutoencoderConfig,
    load_autoencoder,
    make_smooth_picture,
    reconstruction_psnr,
)
from flux.codec import LatentCodec
from flux.data.shapes import COLORS, Scene, render
from flux.spec import CodecConfig
from scripts.train_autoencoder import make_held_out_shapes, make_held_out_textures, measure_psnr, to_pixels_CHW

TINY = Path(__file__).parents[3] / "assets/tiny/autoencoder.safetensors"
TINY_CONFIG = AutoencoderConfig(channels=32, channel_multipliers=(1, 1, 1, 2), blocks_per_level=1)
MIN_SHAPES_DB = 32.0  # 28 is the promise
MAX_SAMPLING_LOSS_DB = 1.0  # between the posterior's mean and its samples
MAX_COLOR_ERROR = 4.0  # of 255, of a background's mean color: far less than the distance of any two colors
MAX_SPREAD_ERROR = 0.1  # of the normalized latents' mean and deviation, over pictures never trained on
MAX_BYTES = 4_000_000
ROOM_DB = 5.0  # on both sides of the limit between trained and not


@pytest.fixture(scope="module")
def tiny() -> Autoencoder:
    return load_autoencoder(TINY, CodecConfig(), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def shapes_BCHW():
    return make_held_out_shapes(32)


def test_full_size_is_the_published_one():
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig())
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_819_683


def test_shapes_of_moments_and_pixels():
    autoencoder = Autoencoder(TINY_CONFIG)
    with torch.no_grad():
        moments_BCHW = autoencoder.encode(torch.zeros(2, 3, 32, 64))
        assert moments_BCHW.shape == (2, 32, 4, 8)
        assert autoencoder.decode(moments_BCHW[:, :16]).shape == (2, 3, 32, 64)


def test_loaded_is_frozen_and_as_the_file_says(tiny):
    assert tiny.config == TINY_CONFIG
    assert not tiny.training
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    weights = load_file(TINY)
    assert all(torch.equal(weights[key], tensor) for key, tensor in tiny.state_dict().items())


def test_loads_in_bfloat16(shapes_BCHW):
    autoencoder = load_autoencoder(str(TINY), CodecConfig(), dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in autoencoder.parameters()} == {torch.bfloat16}
    codec = LatentCodec(autoencoder, CodecConfig())
    decoded_BCHW = codec.decode(codec.encode(shapes_BCHW), (4, 4))
    psnr = 10 * torch.log10(4 / (decoded_BCHW - shapes_BCHW).square().mean())
    assert psnr > MIN_SHAPES_DB - MAX_SAMPLING_LOSS_DB


def test_embedded_one_brings_shapes_back(tiny, shapes_BCHW):
    mean_B = measure_psnr(tiny, shapes_BCHW)
    assert mean_B.mean() > MIN_SHAPES_DB
    assert measure_psnr(tiny, shapes_BCHW, sampled=True).mean() > mean_B.mean() - MAX_SAMPLING_LOSS_DB
    assert TINY.stat().st_size < MAX_BYTES


def test_embedded_one_keeps_background_colors(tiny):
    names = list(COLORS)
    scenes = [Scene(names[i - 1], "circle", "small", "in the center", name) for i, name in enumerate(names)]
    pixels_BCHW = torch.stack([to_pixels_CHW(render(scene, 64)) for scene in scenes])
    with torch.no_grad():
        decoded_BCHW = tiny.decode(tiny.encode(pixels_BCHW)[:, :16]).clamp(-1, 1)
    error_BC = ((decoded_BCHW - pixels_BCHW)[..., :12].mean(dim=(2, 3)) * 127.5).abs()
    assert error_BC.max() < MAX_COLOR_ERROR


def test_embedded_latents_have_the_spread_of_flux(tiny, shapes_BCHW):
    """Otherwise the shift and scale of FLUX.1 would not fit. It learned on such a mix, not on these pictures."""
    pixels_BCHW = torch.cat((shapes_BCHW, make_held_out_textures(seed=1, count=len(shapes_BCHW))))
    latents_BTC = LatentCodec(tiny, CodecConfig()).encode(pixels_BCHW)
    assert abs(latents_BTC.mean()) < MAX_SPREAD_ERROR
    assert abs(latents_BTC.std() - 1) < MAX_SPREAD_ERROR


def load(path):
    return load_autoencoder(path, CodecConfig(), dtype=torch.float32, device="cpu")


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"encoder\.autoencoder_path='.*ae\.safetensors' is not there.*download_assets"
    ):
        load(tmp_path / "ae.safetensors")


def test_refuses_a_folder(tmp_path):
    (tmp_path / "vae.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"is a folder, and must then hold config\.json"):
        load(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_never_opens_pickles(tmp_path, suffix):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    torch.save(Trap(), tmp_path / f"ae{suffix}")
    with pytest.raises(ValueError, match="can run code when opened"):
        load(tmp_path / f"ae{suffix}")


@pytest.mark.parametrize("kept", [0, 5, 1000, 100_000])
def test_refuses_a_truncated_file(tmp_path, kept):
    (tmp_path / "ae.safetensors").write_bytes(TINY.read_bytes()[:kept])
    with pytest.raises(ValueError, match="cut off"):
        load(tmp_path / "ae.safetensors")


def test_refuses_a_pickle_under_the_right_suffix(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match="not safetensors inside"):
        load(tmp_path / "ae.safetensors")


def test_refuses_another_channel_count(tmp_path):
    with pytest.raises(ValueError, match="has 16 latent channels, but the flavor needs 32"):
        load_autoencoder(TINY, CodecConfig(latent_channels=32), dtype=torch.float32, device="cpu")


def drop(weights, key):
    return {other: tensor for other, tensor in weights.items() if other != key}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: drop(w, "decoder.up.3.block.1.norm2.bias"), r"lacks decoder\.up\.3\.block\.1\.norm2\.bias"),
        (lambda w: drop(w, "encoder.conv_in.weight"), r"'encoder\.conv_in\.weight' is missing"),
        (lambda w: w | {"bn.running_mean": torch.zeros(128)}, r"has the foreign bn\.running_mean"),
        (lambda w: w | {"decoder.conv_out.bias": torch.zeros(4)}, r"another shape for decoder\.conv_out\.bias"),
        (lambda w: w | {"encoder.conv_in.weight": torch.zeros(())}, "no such dim"),
        (lambda w: w | {"encoder.conv_in.weight": torch.zeros(20, 3, 3, 3)}, "its levels have"),
        (lambda w: {f"model.{key}": tensor for key, tensor in w.items()}, "is missing"),
        (lambda w: {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}, "names of diffusers"),
        (lambda w: {"weight": torch.zeros(2)}, "is missing"),
    ],
)
def test_refuses_foreign_weights(tmp_path, change, message):
    save_file(change(load_file(TINY)), tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "ae.safetensors")


@pytest.mark.parametrize("spoil", [torch.randn_like, torch.zeros_like, lambda w: torch.full_like(w, torch.nan)])
def test_refuses_untrained_weights(tmp_path, spoil):
    torch.manual_seed(0)
    save_file({key: spoil(tensor) for key, tensor in load_file(TINY).items()}, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match="is not a trained autoencoder"):
        load(tmp_path / "ae.safetensors")


def test_refuses_fresh_weights(tmp_path):
    torch.manual_seed(0)
    save_file(Autoencoder(TINY_CONFIG).state_dict(), tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match="is not a trained autoencoder"):
        load(tmp_path / "ae.safetensors")


def test_gray_is_the_best_an_untrained_one_can_do(tiny):
    picture_BCHW = make_smooth_picture()
    gray = 10 * torch.log10(4 / picture_BCHW.square().mean()).item()
    assert gray + ROOM_DB < MIN_RECONSTRUCTION_DB < reconstruction_psnr(tiny, picture_BCHW) - ROOM_DB
