"""RGB pictures of any size -> pixels in -1..1 of the size that is trained on."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def fit_and_crop(image: Image.Image, size: tuple[int, int], generator: torch.Generator | None = None) -> Tensor:
    """Resizes a part of the picture, of the shape of `size` and as large as fits, to it (bicubic, antialiased).

    Args:
        image: RGB picture.
        size: (width, height) of the result in pixels.
        generator: places the part; None takes the middle.

    Returns:
        pixels_CHW, fp32 in -1..1.
    """
    if image.size != size:
        width = min(image.width, image.height * size[0] / size[1])
        height = min(image.height, image.width * size[1] / size[0])
        x, y = (0.5, 0.5) if generator is None else torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        left, top = x * (image.width - width), y * (image.height - height)
        image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels_HWC.permute(2, 0, 1).float().div_(127.5).sub_(1)
