"""Position ids of image and text tokens. Explicit integers, so that one rotary table serves every family."""

import torch
from torch import Tensor

from flux.spec import PositionConfig


def image_ids(
    config: PositionConfig, rows: int, columns: int, reference: int = 0, device: torch.device | None = None
) -> Tensor:
    """ids_TA of an image's tokens in row-major order: (image, row, column), further axes 0; int64.

    Args:
        rows, columns: size of the token grid.
        reference: 0 for the image that is generated, k for the k-th reference image it is shown.
        device: where they are made; a GPU makes its own, since the host would wait for a copy of so many.
    """
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    if config.centered:
        row, column = row - (rows - rows // 2), column - (columns - columns // 2)
    ids_TA = torch.zeros(rows * columns, config.axes, dtype=torch.int64, device=device)
    ids_TA[:, 0].fill_(reference * config.reference_stride)  # an assigned number would be copied from the host
    ids_TA[:, 1] = row.repeat_interleave(columns)
    ids_TA[:, 2] = column.repeat(rows)
    return ids_TA


def text_ids(
    config: PositionConfig, length: int, rows: int, columns: int, device: torch.device | None = None
) -> Tensor:
    """ids_LA of the text tokens of an image with this token grid; int64.

    FLUX.1 has all zeros: the order of words is known through T5 alone. FLUX.2 counts on the last axis. Qwen-Image
    counts on all axes, from beyond the largest centered image coordinate.
    """
    ids_LA = torch.zeros(length, config.axes, dtype=torch.int64, device=device)
    count_L1 = torch.arange(length, device=device)[:, None]
    if config.text == "last_axis":
        ids_LA[:, -1:] = count_L1
    elif config.text == "after_image":
        ids_LA += count_L1 + max(rows // 2, columns // 2)
    return ids_LA
