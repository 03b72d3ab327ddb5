"""Pictures of any size and color mode -> square pixels in -1..1."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

BACKDROP = (255, 255, 255)  # what shows through transparent places


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: EXIF rotation applied, transparency laid over white, 16-bit gray scaled instead of clipped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # NOTE: Pillow's own conversion clips everything above 255 to white.
        image = Image.fromarray(np.round(np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, BACKDROP)
        image = Image.alpha_composite(backdrop, image)
    return image.convert("RGB")


def fit_and_crop(image: Image.Image, img_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Resizes a square of the picture, as large as fits, to `img_size` (bicubic, antialiased).

    Args:
        image: RGB picture.
        img_size: side of the result in pixels.
        generator: places the square; None takes the middle.

    Returns:
        pixels_CHW, fp32 in -1..1.
    """
    if image.size != (img_size, img_size):
        side = min(image.size)
        x, y = (0.5, 0.5) if generator is None else torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        left, top = x * (image.width - side), y * (image.height - side)
        box = (left, top, left + side, top + side)
        image = image.resize((img_size, img_size), Image.Resampling.BICUBIC, box=box)
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels_HWC.permute(2, 0, 1).float() / 127.5 - 1
