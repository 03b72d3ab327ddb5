"""Pixels in -1..1 to picture files."""

import math
from pathlib import Path

from PIL import Image
from torch import Tensor


def make_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """One RGB picture per sample; pixels outside -1..1 are clipped."""
    bytes_BHWC = ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in bytes_BHWC]


def save_grid(images: list[Image.Image], path: Path, gap: int = 2) -> None:
    """Writes the pictures as one PNG, row by row, as square as their number allows."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
