"""Color modes, orientation and crops."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux.data.transforms import convert_to_rgb, fit_and_crop

LEVEL = 1  # rounding of one step between color modes


def rgb(image: Image.Image) -> tuple[int, ...]:
    return convert_to_rgb(image).getpixel((0, 0))


@pytest.mark.parametrize(
    "image, wanted",
    [
        (Image.new("L", (2, 2), 100), (100, 100, 100)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGB", (2, 2), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("RGB", (2, 2), (10, 20, 30)).quantize(2), (10, 20, 30)),
        (Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 65535, dtype=np.int32)), (255, 255, 255)),
    ],
)
def test_color_modes(image, wanted):
    assert max(abs(a - b) for a, b in zip(rgb(image), wanted, strict=True)) <= LEVEL


def test_transparent_palette_shows_the_backdrop_not_the_hidden_color():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info["transparency"] = 0
    assert rgb(image) == (255, 255, 255)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    upright = convert_to_rgb(image)
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(64, 64), (200, 50), (50, 200), (17, 93), (1000, 30)])
def test_any_size_becomes_a_square_in_minus_one_to_one(size):
    pixels_CHW = fit_and_crop(Image.new("RGB", size, (255, 0, 127)), 48, torch.Generator().manual_seed(1))
    assert pixels_CHW.shape == (3, 48, 48) and pixels_CHW.dtype == torch.float32
    torch.testing.assert_close(pixels_CHW[:, 0, 0], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]))


def test_right_size_passes_untouched():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pixels_CHW = fit_and_crop(image, 32)
    assert np.array_equal(((pixels_CHW.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy(), np.asarray(image))


def test_crop_follows_the_generator_and_the_middle_is_the_default():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    lefts = {fit_and_crop(ramp, 64, torch.Generator().manual_seed(seed))[0, 0, 0].item() for seed in range(20)}
    assert len(lefts) > 10
    assert fit_and_crop(ramp, 64)[0, 0, 0].item() == pytest.approx(96 / 127.5 - 1)
