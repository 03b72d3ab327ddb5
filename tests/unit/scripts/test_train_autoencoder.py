"""The script that trains the embedded autoencoder: repeatable, in FLUX.1's latent units, helpful."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flux.autoencoder import Autoencoder
from flux.spec import CodecConfig
from scripts import train_autoencoder as script

ROUNDING = 1e-4  # fp32, on latents of deviation 2.8


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(script, "FOLD_BATCHES", 2)
    monkeypatch.setattr(script, "EVALUATION_PICTURES", 2)


def test_same_seed_same_weights(quick):
    first, second, other = (script.train(2, 4, 1e-3, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_pictures_are_in_range_and_all_kinds_differ():
    rng = np.random.default_rng(0)
    for draw in (*script.FILLS, script.draw_leaves, script.draw_texture):
        pictures = [script.to_pixels_CHW(draw(rng)) for _ in range(20)]
        assert all(picture.shape == (3, script.SIDE, script.SIDE) for picture in pictures)
        assert max(picture.abs().max() for picture in pictures) <= 1 + 1e-6
        assert not torch.equal(pictures[0], pictures[1])


def test_batches_start_as_crops():
    batches = script.make_batches(0, 4, crops=1)
    assert next(batches).shape == (4, 3, script.CROP_SIDE, script.CROP_SIDE)
    assert next(batches).shape == (4, 3, script.SIDE, script.SIDE)


@torch.no_grad()
def test_folding_changes_units_and_nothing_else():
    torch.manual_seed(0)
    autoencoder, codec = Autoencoder(script.CONFIG), CodecConfig()
    pixels_BCHW = script.make_held_out_textures(seed=3, count=8)
    entered_BCHW = autoencoder.decoder.conv_in(autoencoder.encode(pixels_BCHW)[:, :16])
    script.fold_latent_units(autoencoder, pixels_BCHW, codec)

    mean_BCHW, logvar_BCHW = autoencoder.encode(pixels_BCHW).chunk(2, dim=1)
    std_C, center_C = torch.std_mean(mean_BCHW, dim=(0, 2, 3))
    torch.testing.assert_close(center_C, torch.full((16,), codec.shift), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(std_C, torch.full((16,), 1 / codec.scale), atol=ROUNDING, rtol=0)
    posterior_std = torch.exp(0.5 * logvar_BCHW) * codec.scale
    torch.testing.assert_close(posterior_std, torch.full_like(posterior_std, script.POSTERIOR_STD))

    # The zeros that pad the border mean another value now, so only the inside is the same.
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(
        autoencoder.decoder.conv_in(mean_BCHW)[inner], entered_BCHW[inner], atol=ROUNDING, rtol=0
    )


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_autoencoder", *map(str, arguments)])
    script.main()


def test_writes_a_file_and_reports(quick, tmp_path, monkeypatch, capsys):
    (tmp_path / "photographs").mkdir()
    script.Image.new("L", (70, 90), 128).save(tmp_path / "photographs" / "gray.png")
    out = tmp_path / "new folder" / "ae.safetensors"
    run(monkeypatch, "--steps", 1, "--batch-size", 2, "--out", out, "--photographs", tmp_path / "photographs")
    with torch.device("meta"):
        expected = Autoencoder(script.CONFIG).state_dict()
    assert load_file(out).keys() == expected.keys()
    printed = capsys.readouterr().out
    assert "827,779 parameters" in printed
    for name in ("shapes", "textures", "photographs at 64 px", "photographs at 256 px"):
        assert f"held-out {name}: PSNR" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--photographs", "no/such/folder"), "holds no .jpg"),
        (("--steps", "0"), "--steps=0 must be 1 or more"),
        (("--batch-size", "1"), "--batch-size=1 2 or more"),
    ],
)
def test_bad_arguments_are_refused_before_training(quick, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(script, "train", lambda *args: pytest.fail("trained"))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
