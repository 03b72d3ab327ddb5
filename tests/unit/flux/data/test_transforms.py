"""Crops of any shape, resized."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux.data.transforms import fit_and_crop


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_ramp(width: int, height: int) -> Image.Image:
    """Red is the place from the left, green from the top, both from 0 to 255."""
    y, x = np.mgrid[:height, :width]
    levels = np.stack([x / (width - 1), y / (height - 1), 0 * x], axis=2) * 255
    return Image.fromarray(levels.round().astype(np.uint8))


def cut(image: Image.Image, size: tuple[int, int], generator: torch.Generator | None = None) -> np.ndarray:
    """(left, top, right, bottom) of what is shown of a ramp, as shares of it; up to the half pixels at the edges."""
    levels_CHW = (fit_and_crop(image, size, generator).numpy() + 1) / 2
    return np.array([levels_CHW[0, 0, 0], levels_CHW[1, 0, 0], levels_CHW[0, -1, -1], levels_CHW[1, -1, -1]])


@pytest.mark.parametrize("source", [(64, 64), (200, 50), (50, 200), (17, 93), (1000, 30)])
@pytest.mark.parametrize("size", [(48, 48), (64, 32), (32, 80)])
def test_any_picture_becomes_the_size_in_minus_one_to_one(source, size):
    pixels_CHW = fit_and_crop(Image.new("RGB", source, (255, 0, 127)), size, seeded(1))
    assert pixels_CHW.shape == (3, size[1], size[0]) and pixels_CHW.dtype == torch.float32
    wanted = torch.tensor([1.0, -1.0, 127 / 127.5 - 1])[:, None, None].expand(3, size[1], size[0])
    torch.testing.assert_close(pixels_CHW, wanted)


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_right_size_passes_untouched_and_takes_no_draw(size):
    levels_HWC = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    generator = seeded(0)
    pixels_CHW = fit_and_crop(Image.fromarray(levels_HWC), size, generator)
    assert np.array_equal(((pixels_CHW.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy(), levels_HWC)
    assert torch.equal(generator.get_state(), seeded(0).get_state())


@pytest.mark.parametrize(
    "source, size, shown",
    [
        ((256, 128), (64, 64), (0.25, 0, 0.75, 1)),
        ((128, 256), (64, 64), (0, 0.25, 1, 0.75)),
        ((256, 128), (128, 64), (0, 0, 1, 1)),
        ((256, 256), (128, 64), (0, 0.25, 1, 0.75)),
        ((256, 128), (32, 96), (5 / 12, 0, 7 / 12, 1)),
        ((120, 90), (160, 160), (1 / 8, 0, 7 / 8, 1)),
    ],
)
def test_the_middle_is_shown_as_large_as_fits(source, size, shown):
    assert np.abs(cut(make_ramp(*source), size) - np.array(shown)).max() < 0.025


@pytest.mark.parametrize("source, size, free", [((256, 64), (64, 64), 0), ((64, 256), (64, 32), 1)])
def test_the_generator_places_the_part_along_the_free_side(source, size, free):
    ramp = make_ramp(*source)
    shown = np.stack([cut(ramp, size, seeded(seed)) for seed in range(40)])
    start, end, length = shown[:, free], shown[:, free + 2], 1 / 4 if free == 0 else 1 / 8
    assert np.abs(end - start - length).max() < 0.025
    assert start.min() < 0.1 and end.max() > 0.9 and len(np.unique(start)) > 30
    assert np.abs(shown[:, 1 - free]).max() < 0.025 and np.abs(shown[:, 3 - free] - 1).max() < 0.025


def test_two_draws_place_a_square_of_an_independent_computation():
    """x and y are drawn whatever the shape, so that a draw means the same for all pictures."""
    image = make_ramp(100, 60)
    x, _ = torch.rand(2, generator=seeded(3), dtype=torch.float64).tolist()
    left = x * (100 - 60)
    wanted = image.resize((32, 32), Image.Resampling.BICUBIC, box=(left, 0, left + 60, 60))
    pixels_CHW = fit_and_crop(image, (32, 32), seeded(3))
    assert torch.equal(pixels_CHW, torch.from_numpy(np.array(wanted)).permute(2, 0, 1).float() / 127.5 - 1)


def test_shrinking_does_not_alias():
    """One-pixel stripes become gray; taking single pixels would keep them black and white."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (128, 64))).convert("RGB")
    assert fit_and_crop(stripes, (32, 32)).abs().max() < 0.1
    assert fit_and_crop(stripes, (128, 128)).abs().min() == 1
